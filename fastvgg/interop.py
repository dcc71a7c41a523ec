"""Zero-copy NumPy views of the arrays of other libraries, in CPU memory.

Accepts everything with the array interface or DLPack: PyTorch, JAX and TensorFlow tensors, and
Pillow images. Imports no framework: an object can only be a PyTorch tensor if PyTorch is already
imported.

The array interface: https://numpy.org/doc/stable/reference/arrays.interface.html
DLPack: https://dmlc.github.io/dlpack/latest/python_spec.html
"""

from __future__ import annotations

import ctypes
import struct
import sys
import zlib
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from fastvgg.errors import ArrayError, DtypeError, ShapeError
from fastvgg.transform import storage_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The DLPack device types that the CPU can read: CPU, pinned host and managed memory.
HOST_DEVICE_TYPES: Final = frozenset({1, 3, 11, 13})
TO_HOST: Final = {"cupy": "cupy.asnumpy(x)", "jaxlib": "jax.device_get(x)", "tensorflow": "x.cpu()"}
# Raised by arrays that cannot export their memory: symbolic, sparse, or requiring a gradient.
EXPORT_ERRORS: Final = (BufferError, RuntimeError, TypeError, ValueError)
# What Pillow raises for damaged images: its plugins parse with struct and indexing. Warnings are
# raised if the caller's filters turn them into errors.
PILLOW_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    RuntimeError,  # of AVIF
    struct.error,
    zlib.error,
    Warning,
)


# `data` follows two, nd, typekind, itemsize, flags, shape and strides in a `PyArrayInterface`.
_DATA_OFFSET: Final = struct.calcsize("iiciiPP")
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def address_of(array: NDArray[Any]) -> int:
    """Return the address of the first element of an array, also of a subclass.

    >>> x = np.zeros(3)
    >>> address_of(x[1:]) - address_of(x) == x.itemsize
    True
    """
    # 0.9 us; `array.ctypes.data` and `array.__array_interface__` take 2 us.
    capsule = np.asarray(array).__array_struct__  # owns the struct
    data = ctypes.c_void_p.from_address(_get_pointer(capsule, None) + _DATA_OFFSET)
    return data.value or 0


def as_numpy(x: Any) -> NDArray[Any]:  # noqa: ANN401
    """Return an array of any library as a NumPy array, without a copy where possible.

    `x` is a NumPy array, which is returned unchanged; an object with `__array_interface__`,
    `__array__` or DLPack; or a list or tuple of images of the same shape and dtype, which are
    copied into one batch. The result is writable only if `x` is a NumPy array or a PyTorch tensor.

    Raises
    ------
    DtypeError
        If `x` is not an array, is masked, is on a GPU, or cannot export its memory.
    ArrayError
        If `x` is a Pillow image that cannot be decoded.
    ShapeError
        If the images of a list have different shapes.

    >>> from PIL import Image
    >>> as_numpy([Image.new("RGB", (5, 7)), Image.new("RGB", (5, 7))]).shape
    (2, 7, 5, 3)
    """
    if type(x) is np.ndarray:  # fast path
        return x
    if isinstance(x, np.ndarray):
        check_unmasked(x)
        return x
    if isinstance(x, list | tuple):
        return _stack(x)
    if is_torch(x):
        return _from_torch(x)
    if _is_pillow(x):
        return _from_pillow(x)
    _check_on_host(x)
    try:
        if hasattr(x, "__array_interface__") or hasattr(x, "__array__"):
            return without_mask(x)
        if hasattr(x, "__dlpack__"):
            return np.from_dlpack(x)
    except DtypeError:
        raise
    except EXPORT_ERRORS as error:
        raise _export_error(x, error, "convert it to a NumPy array first") from error
    raise DtypeError(
        f"got {type(x).__name__}, which is not an array",
        "give an array, a tensor or a Pillow image; to read files use fastvgg.plan",
    )


def check_array_dtype(dtype: np.dtype[Any]) -> str:
    """Return the storage type of an array; raise DtypeError with a remedy for the array.

    >>> check_array_dtype(np.dtype(">f4"))
    'float32'
    """
    if dtype.hasobject and dtype.names is None:
        raise DtypeError(
            "got an array of objects", "give numpy.stack(list(x)), of images of the same shape"
        )
    if dtype.names is not None:
        raise DtypeError(
            f"got a structured array, with the fields {', '.join(dtype.names)}",
            "give numpy.stack([x[name] for name in x.dtype.names], axis=-1)",
        )
    return storage_type(dtype)


def without_mask(x: Any) -> NDArray[Any]:  # noqa: ANN401
    """Convert `x` with NumPy, after checking that no mask is lost: its own, or one of its items.

    Raises
    ------
    DtypeError
        If there is one.
    """
    for part in x if isinstance(x, list | tuple) else [x]:
        check_unmasked(part)
    array = np.asanyarray(x)
    check_unmasked(array)
    return np.asarray(array)


def check_unmasked(x: Any) -> None:  # noqa: ANN401
    """Check that an array is not masked, because a mask would be lost.

    Dask drops that of its arrays when they are converted, and NumPy that of the array interface.
    """
    interface = getattr(x, "__array_interface__", None)
    has_mask = isinstance(interface, dict) and interface.get("mask") is not None
    is_dask = isinstance(getattr(x, "_meta", None), np.ma.MaskedArray)
    if has_mask or is_dask or isinstance(x, np.ma.MaskedArray):
        filled = "dask.array.ma.filled(x, 0)" if is_dask else "x.filled(0)"
        raise DtypeError("masked arrays are not supported", f"replace masked values: {filled}")


def _is_pillow(x: object) -> bool:
    """Return whether `x` is a Pillow image, without importing Pillow."""
    image = getattr(sys.modules.get("PIL.Image"), "Image", None)
    return image is not None and isinstance(x, image)


def _from_pillow(x: Any) -> NDArray[Any]:  # noqa: ANN401
    """Decode a Pillow image, which must be RGB: others with three bands have no RGB values.

    Nothing is converted, because Keras' `img_to_array` does not either.
    """
    if x.mode == "RGB":
        try:
            return np.asarray(x)
        except (*PILLOW_ERRORS, AssertionError) as error:  # the latter of a closed image
            raise ArrayError(
                f"the Pillow image cannot be decoded: {_reason(error)}",
                "open an intact image, or omit it",
            ) from error
    remedy = "give image.convert('RGB')"
    if x.mode.startswith(("I", "F")):
        remedy = "scale its numbers to 0..255, then convert it to RGB: convert('RGB') clips them"
    elif x.mode == "La":
        remedy = "give image.convert('LA').convert('RGB')"
    raise DtypeError(f"got a Pillow image of mode {x.mode}, expected RGB", remedy)


def is_torch(x: object) -> bool:
    """Return whether `x` is a PyTorch tensor, without importing PyTorch."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(x, tensor)


def as_torch(array: NDArray[Any]) -> Any:  # noqa: ANN401  # PyTorch is optional
    """Return a PyTorch tensor that shares the memory of a writable NumPy array."""
    torch = sys.modules["torch"]
    if array.dtype == ml_dtypes.bfloat16:  # PyTorch does not accept this dtype from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _from_torch(x: Any) -> NDArray[Any]:  # noqa: ANN401
    if x.device.type != "cpu":
        raise _device_error(x, str(x.device), "x.cpu()")
    if x.requires_grad:
        raise DtypeError(
            "the tensor requires a gradient, and fastvgg does not compute gradients",
            "give x.detach()",
        )
    torch = sys.modules["torch"]
    try:
        if x.dtype == torch.bfloat16:
            bits: NDArray[Any] = x.view(torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array: NDArray[Any] = x.numpy()
    except EXPORT_ERRORS as error:
        raise _export_error(
            x, error, "give a dense tensor: x.to_dense(), x.resolve_conj()"
        ) from error
    return array


def _stack(images: list[Any] | tuple[Any, ...]) -> NDArray[Any]:
    if not images:
        raise ShapeError("an empty list has no images", "give at least one image")
    types = {type(image) for image in images} & {list, tuple, int, float}
    if types:
        raise DtypeError(
            f"got a {type(images).__name__} of {types.pop().__name__}, which is not an array",
            "convert it: np.asarray(x)",
        )
    arrays = [as_numpy(image) for image in images]
    first = arrays[0]
    for index, array in enumerate(arrays):
        if array.ndim != 3:
            raise ShapeError(
                f"item {index} of the list has shape {array.shape}, of rank {array.ndim}",
                "give a list of images, of rank 3; to join batches use numpy.concatenate",
            )
        for error, name in ((ShapeError, "shape"), (DtypeError, "dtype")):
            expected, found = getattr(first, name), getattr(array, name)
            if found != expected:
                raise error(
                    f"item 0 of the list has {name} {expected}, but item {index} has {found}",
                    f"give images of the same {name}",
                )
    return np.stack(arrays)


def _check_on_host(x: Any) -> None:  # noqa: ANN401
    to_host = TO_HOST.get(type(x).__module__.partition(".")[0], "with its own framework")
    if hasattr(x, "__dlpack_device__"):
        device_type, number = x.__dlpack_device__()
        if int(device_type) not in HOST_DEVICE_TYPES:
            device = f"device {number} of DLPack device type {int(device_type)}"
            raise _device_error(x, device, to_host)
    device = getattr(x, "device", "")
    if isinstance(device, str) and "GPU" in device:  # TensorFlow would copy it silently
        raise _device_error(x, device, to_host)


def _device_error(x: object, device: str, to_host: str) -> DtypeError:
    return DtypeError(
        f"got {type(x).__name__} on {device}, but fastvgg runs on the CPU",
        f"copy it to the CPU: {to_host}",
    )


def _export_error(x: object, error: BaseException, remedy: str) -> DtypeError:
    problem = f"got {type(x).__name__}, which cannot export its memory: {_reason(error)}"
    return DtypeError(problem, remedy)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
