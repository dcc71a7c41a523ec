"""Arrays of others, in the memory that they have: a NumPy view of what is on the CPU.

Whatever offers the array interface, or DLPack, is an array: PyTorch, JAX and TensorFlow tensors,
Pillow's images. No framework is imported: a PyTorch tensor can only be one where PyTorch is.

The array interface: https://numpy.org/doc/stable/reference/arrays.interface.html
DLPack: https://dmlc.github.io/dlpack/latest/python_spec.html
"""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from fastvgg.errors import DtypeError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["address_of", "as_numpy", "as_torch", "is_torch"]

# DLPack's numbers of the devices whose memory the CPU reads: its own, pinned and managed memory.
READ_BY_THE_CPU: Final = frozenset({1, 3, 11, 13})
TO_HOST: Final = {"cupy": "cupy.asnumpy(x)", "jaxlib": "jax.device_get(x)", "tensorflow": "x.cpu()"}
# What arrays raise that cannot show their memory: of symbols, sparse ones, those with a gradient.
EXPORT_ERRORS: Final = (BufferError, RuntimeError, TypeError, ValueError)


class _ArrayStruct(ctypes.Structure):
    """What `__array_struct__` points to, `PyArrayInterface`, as far as its data."""

    _fields_ = (
        *(("two", ctypes.c_int), ("nd", ctypes.c_int), ("typekind", ctypes.c_char)),
        *(("itemsize", ctypes.c_int), ("flags", ctypes.c_int)),
        *(("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("data", ctypes.c_void_p)),
    )


_DATA_OFFSET: Final = _ArrayStruct.data.offset
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first element, whatever a subclass says of it.

    >>> x = np.zeros(3)
    >>> address_of(x[1:]) - address_of(x) == x.itemsize
    True
    """
    # 0.9 us, where `array.ctypes.data` and `array.__array_interface__` take 2.
    capsule = np.asarray(array).__array_struct__  # owns what its pointer points to
    data = ctypes.c_void_p.from_address(_pointer_of(capsule, None) + _DATA_OFFSET)
    return data.value or 0


def as_numpy(x: Any) -> NDArray[Any]:  # noqa: ANN401  # that is the question
    """Return an array of any kind as a NumPy array, which shares its memory where that can be.

    Parameters
    ----------
    x
        A NumPy array, which is returned as it is; what offers `__array_interface__`, `__array__` or
        DLPack; or a list or tuple of images, arrays of one shape and type, which are copied.

    Returns
    -------
    ndarray
        Writable only if `x` is a NumPy array or a PyTorch tensor.

    Raises
    ------
    DtypeError
        If `x` is nothing of that, is masked, is on a GPU, or does not show its memory.
    ShapeError
        If images of a list have different sizes.

    Examples
    --------
    >>> from PIL import Image
    >>> as_numpy([Image.new("RGB", (5, 7)), Image.new("RGB", (5, 7))]).shape
    (2, 7, 5, 3)
    """
    if type(x) is np.ndarray:  # the usual case, and fast
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError("a masked array has no bytes for its masked values", "use x.filled(...)")
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, list | tuple):
        return _stack(x)
    if is_torch(x):
        return _from_torch(x)
    _check_on_host(x)
    try:
        if hasattr(x, "__array_interface__") or hasattr(x, "__array__"):
            return np.asarray(x)
        if hasattr(x, "__dlpack__"):
            return np.from_dlpack(x)
    except EXPORT_ERRORS as error:
        raise _export_error(x, error, "make a NumPy array of it") from error
    raise DtypeError(
        f"got {type(x).__name__}, which is no array",
        "give an array, a tensor or a Pillow image; fastvgg.plan reads files",
    )


def is_torch(x: object) -> bool:
    """Whether something is a PyTorch tensor."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(x, tensor)


def as_torch(array: NDArray[Any]) -> Any:  # noqa: ANN401  # PyTorch's types are not at hand
    """Return a writable NumPy array as a PyTorch tensor, which shares its memory."""
    torch = sys.modules["torch"]
    if array.dtype == ml_dtypes.bfloat16:  # which PyTorch does not take from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _from_torch(x: Any) -> NDArray[Any]:  # noqa: ANN401
    if x.device.type != "cpu":
        raise _device_error(x, f"on {x.device}", "x.cpu()")
    if x.requires_grad:
        raise DtypeError("a tensor that requires a gradient would lose it", "give x.detach()")
    torch = sys.modules["torch"]
    try:
        if x.dtype == torch.bfloat16:
            halves: NDArray[Any] = x.view(torch.int16).numpy()
            return halves.view(ml_dtypes.bfloat16)
        array: NDArray[Any] = x.numpy()
    except EXPORT_ERRORS as error:
        raise _export_error(x, error, "give a dense one: x.to_dense(), x.resolve_conj()") from error
    return array


def _stack(images: list[Any] | tuple[Any, ...]) -> NDArray[Any]:
    """Return images of one size as a batch."""
    if not images:
        raise ShapeError("an empty list has no images", "give images")
    kinds = {type(image) for image in images} & {list, tuple, int, float}
    if kinds:
        raise DtypeError(
            f"got a {type(images).__name__} of {kinds.pop().__name__}, which is no array",
            "convert it: np.asarray(x)",
        )
    arrays = [as_numpy(image) for image in images]
    first = arrays[0]
    for at, array in enumerate(arrays):
        if array.ndim != 3:
            raise ShapeError(
                f"of a list, number {at} has shape {array.shape}, of rank {array.ndim}",
                "a list holds images, of rank 3: for batches use numpy.concatenate",
            )
        if array.shape != first.shape:
            raise ShapeError(
                f"of a list, number 0 has shape {first.shape} and number {at} {array.shape}",
                "give images of one size",
            )
        if array.dtype != first.dtype:
            raise DtypeError(
                f"of a list, number 0 has type {first.dtype} and number {at} {array.dtype}",
                "give images of one type",
            )
    return np.stack(arrays)


def _check_on_host(x: Any) -> None:  # noqa: ANN401
    """Refuse an array in memory that the CPU does not read."""
    move = TO_HOST.get(type(x).__module__.partition(".")[0], "what its framework has for that")
    if hasattr(x, "__dlpack_device__"):
        kind, number = x.__dlpack_device__()
        if int(kind) not in READ_BY_THE_CPU:
            raise _device_error(x, f"on device {number} of DLPack's kind {int(kind)}", move)
    device = getattr(x, "device", "")
    if isinstance(device, str) and "GPU" in device:  # TensorFlow copies it without a word
        raise _device_error(x, f"on {device}", move)


def _device_error(x: object, where: str, move: str) -> DtypeError:
    return DtypeError(
        f"got {type(x).__name__} {where}, and fastvgg works on the CPU", f"move it there: {move}"
    )


def _export_error(x: object, error: BaseException, remedy: str) -> DtypeError:
    said = " ".join(str(error).split())[:200]
    return DtypeError(f"got {type(x).__name__}, which does not show its memory: {said}", remedy)
