"""Arrays of other libraries: the same bits as NumPy arrays, without a copy; and rejections.

PyTorch is not a test dependency, as its default build takes gigabytes; its tests need it.
"""

from __future__ import annotations

import io
import json
import pickle

import dask.array
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import fastvgg
from fastvgg import interop, oracle
from fastvgg.errors import ArrayError, DtypeError, OutputError, ShapeError
from fastvgg.transform import Transform
from tests.helpers.batches import FLOATS, OnlyArray, dtype_of, every_value, run_script

pytestmark = pytest.mark.pixels

ODD = (2, 5, 27, 3)


class OnlyInterface:
    """An array that only offers the array interface."""

    def __init__(self, array):
        self._held = array
        self.__array_interface__ = array.__array_interface__


class OnlyDlpack:
    """An array that only offers DLPack."""

    def __init__(self, array, device=None):
        self._array = array
        self._device = device

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._device or self._array.__dlpack_device__()


def assert_identical(actual, expected):
    assert type(actual) is np.ndarray
    assert actual.dtype == expected.dtype
    assert actual.strides == expected.strides
    assert actual.tobytes() == expected.tobytes()


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")


# Shared memory


@pytest.mark.parametrize("wrap", [OnlyInterface, OnlyDlpack, OnlyArray])
def test_exported_arrays_are_viewed_without_a_copy(wrap):
    x = np.array(every_value())
    seen = interop.as_numpy(wrap(x))
    assert type(seen) is np.ndarray
    assert seen.ctypes.data == x.ctypes.data
    assert (seen.shape, seen.dtype, seen.strides) == (x.shape, x.dtype, x.strides)


def test_numpy_array_is_returned_unchanged():
    x = every_value()
    assert interop.as_numpy(x) is x


def test_transposed_memory_keeps_its_strides():
    x = np.array(every_value()).transpose(0, 2, 1, 3)[::-1]
    assert interop.as_numpy(OnlyDlpack(x)).strides == x.strides


@pytest.mark.parametrize("wrap", [OnlyInterface, OnlyDlpack, OnlyArray])
@pytest.mark.parametrize("mode", ["caffe", "tf", "torch"])
def test_foreign_arrays_match_numpy_results(wrap, mode):
    x = np.array(every_value())
    before = x.copy()
    y = fastvgg.preprocess(wrap(x), mode, out_layout="NCHW")
    assert_identical(y, oracle.apply(fastvgg.Transform(mode, out_layout="NCHW"), x))
    assert_identical(fastvgg.restore(wrap(y), mode, layout="NCHW", out_layout="NHWC"), before)
    assert_identical(x, before)


@pytest.mark.parametrize("name", FLOATS[:-1])
def test_jax_arrays_match_numpy_results(name):
    x = jnp.asarray(every_value())
    y = fastvgg.preprocess(x, "caffe", dtype=name)
    expected = oracle.apply(fastvgg.Transform("caffe", dtype=name), np.asarray(x))
    assert_identical(y, expected)
    in_jax = jnp.asarray(y)
    assert in_jax.dtype == dtype_of(name)
    assert_identical(fastvgg.restore(in_jax, "caffe"), every_value())


def test_a_jax_array_is_not_copied():
    x = jnp.asarray(every_value())
    seen = interop.as_numpy(x)
    assert seen.ctypes.data == x.unsafe_buffer_pointer()


def test_jax_array_as_out_is_rejected():
    y = jnp.asarray(fastvgg.preprocess(every_value(), "tf"))
    with pytest.raises(OutputError, match="give a plain NumPy array or a PyTorch tensor"):
        fastvgg.restore(y, "tf", out=y)


def test_pillow_image_is_accepted():
    pixels = every_value(rank=3)
    assert_identical(
        fastvgg.preprocess(Image.fromarray(pixels), "torch"),
        oracle.apply(fastvgg.Transform("torch"), pixels),
    )


COLOR_MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
)
NUMBER_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@pytest.mark.parametrize("mode", [*COLOR_MODES, *NUMBER_MODES])
def test_pillow_image_of_another_mode_is_rejected_alone_and_in_a_list(mode):
    image = Image.new(mode, (7, 5))
    for x in (image, [image, image], [Image.new("RGB", (7, 5)), image]):
        with pytest.raises(
            DtypeError, match=f"Pillow image of mode {mode}, expected RGB"
        ) as caught:
            fastvgg.preprocess(x, "caffe")
    if mode in NUMBER_MODES:
        assert "scale its numbers to 0..255" in caught.value.remedy
    else:
        converted = eval(caught.value.remedy.removeprefix("give "), {"image": image})  # noqa: S307
        fastvgg.preprocess(converted, "caffe")


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "bmp"])
def test_truncated_pillow_image_is_rejected_alone_and_in_a_list(kind):
    """Pillow opens an image by its header, and decodes it only when it is used."""
    buffer, noise = io.BytesIO(), np.random.default_rng(1).integers(0, 256, (80, 90, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    whole = buffer.getvalue()
    for wrap in (lambda image: image, lambda image: [image]):
        with Image.open(io.BytesIO(whole[: len(whole) // 2])) as image:
            with pytest.raises(ArrayError, match=r"cannot be decoded: \w") as caught:
                fastvgg.preprocess(wrap(image), "caffe")
            assert "intact" in caught.value.remedy


def test_closed_pillow_image_is_rejected_with_the_reason(tmp_path):
    Image.new("RGB", (5, 7)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ArrayError, match="cannot be decoded: AssertionError"):
        fastvgg.preprocess(image, "caffe")


def test_every_pillow_mode_is_known():
    assert {"RGB", *COLOR_MODES, *NUMBER_MODES} >= {*Image.MODES}


def test_transforms_accept_foreign_arrays():
    transform = fastvgg.Transform("caffe", out_layout="NCHW")
    x = np.array(every_value())
    expected = oracle.apply(transform, x)
    assert_identical(transform(OnlyDlpack(x)), expected)
    out = np.empty_like(expected)
    assert transform(OnlyDlpack(x), out=out) is out
    assert_identical(out, expected)
    assert_identical(pickle.loads(pickle.dumps(transform))(OnlyInterface(x)), expected)  # noqa: S301


# Lists


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_images_is_a_batch(kind):
    batch = every_value()
    images = kind([OnlyDlpack(np.array(batch[0])), Image.fromarray(batch[1])])
    assert_identical(
        fastvgg.preprocess(images, "caffe"), oracle.apply(fastvgg.Transform("caffe"), batch)
    )


@pytest.mark.parametrize(
    ("images", "error", "shown"),
    [
        ([], ShapeError, "an empty list has no images"),
        (
            [np.zeros((2, 5, 7, 3))],
            ShapeError,
            r"item 0 of the list has shape \(2, 5, 7, 3\), of rank 4",
        ),
        ([np.zeros((5, 7))] * 3, ShapeError, r"item 0 of the list has shape \(5, 7\), of rank 2"),
        (
            [np.zeros((5, 7, 3)), np.zeros((5, 8, 3))],
            ShapeError,
            r"item 0 of the list has shape \(5, 7, 3\), but item 1 has \(5, 8, 3\)",
        ),
        (
            [np.zeros((5, 7, 3), np.uint8), np.zeros((5, 7, 3), np.float32)],
            DtypeError,
            "item 0 of the list has dtype uint8, but item 1 has float32",
        ),
        ([[[1.0, 2.0, 3.0]]], DtypeError, "got a list of list, which is not an array"),
        ((1.0, 2.0, 3.0), DtypeError, "got a tuple of float, which is not an array"),
        ([None], DtypeError, "got NoneType, which is not an array"),
    ],
)
def test_a_list_that_is_not_a_batch_is_rejected(images, error, shown):
    with pytest.raises(error, match=shown):
        fastvgg.preprocess(images, "caffe")


# Rejections


@pytest.mark.parametrize("kind", [2, 8, 10])
def test_an_array_on_a_gpu_is_rejected(kind):
    x = OnlyDlpack(np.array(every_value()), device=(kind, 1))
    with pytest.raises(
        DtypeError, match=rf"on device 1 of DLPack device type {kind}.*\n.*copy it to the CPU"
    ):
        fastvgg.preprocess(x, "caffe")


@pytest.mark.parametrize("kind", [1, 3, 11, 13])
def test_cpu_accessible_dlpack_devices_are_accepted(kind):
    x = np.array(every_value())
    x_elsewhere = OnlyArray(x)
    x_elsewhere.__dlpack_device__ = lambda: (kind, 0)
    assert_identical(interop.as_numpy(x_elsewhere), x)


@pytest.mark.parametrize(
    ("module", "move"),
    [
        ("cupy._core.core", "cupy.asnumpy(x)"),
        ("jaxlib._jax", "jax.device_get(x)"),
        ("tensorflow.python.framework.ops", "x.cpu()"),
    ],
)
def test_gpu_remedy_names_the_copy_call_of_the_framework(module, move):
    kind = type("Tensor", (OnlyDlpack,), {"__module__": module})
    with pytest.raises(DtypeError) as raised:
        fastvgg.restore(kind(np.zeros((5, 7, 3), np.float32), device=(2, 0)), "caffe")
    assert raised.value.remedy == f"copy it to the CPU: {move}"


def test_tensor_with_a_gpu_device_string_is_rejected():
    x = OnlyArray(every_value())
    x.device = "/job:localhost/replica:0/task:0/device:GPU:0"
    with pytest.raises(DtypeError, match="device:GPU:0, but fastvgg runs on the CPU"):
        fastvgg.preprocess(x, "caffe")
    x.device = "/job:localhost/replica:0/task:0/device:CPU:0"
    fastvgg.preprocess(x, "caffe")


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError, BufferError])
def test_failed_export_is_rejected_with_the_library_message(error):
    with pytest.raises(DtypeError, match="OnlyArray, which cannot export its memory: a symbol"):
        fastvgg.preprocess(OnlyArray(None, error("a symbol")), "caffe")


@pytest.mark.parametrize("x", [None, 7, "x.png", b"\x00" * 105, {"x": 1}, object()])
def test_a_value_that_is_not_an_array_is_rejected(x):
    with pytest.raises(DtypeError, match=f"got {type(x).__name__}, which is not an array"):
        fastvgg.preprocess(x, "caffe")


def test_masked_array_is_rejected_alone_and_in_a_list():
    masked = np.ma.masked_array(every_value(rank=3), mask=False)
    has_mask = OnlyInterface(every_value(rank=3))
    has_mask.__array_interface__["mask"] = np.zeros(every_value(rank=3).shape, bool)
    wrapped = [masked, OnlyArray(masked), has_mask, dask.array.from_array(masked)]
    for x in (*wrapped, [masked], (masked,), *([x] for x in wrapped)):
        for transform in (Transform("caffe"), Transform("caffe", "restore")):
            with pytest.raises(DtypeError, match="masked"):
                transform(x, check_values=False)


def test_array_of_objects_is_rejected_with_a_remedy_that_works():
    x = np.empty(2, object)
    x[:] = [*every_value()]
    with pytest.raises(DtypeError, match="an array of objects") as caught:
        fastvgg.preprocess(x, "caffe")
    assert "numpy.stack(list(x))" in caught.value.remedy
    fastvgg.preprocess(np.stack(list(x)), "caffe")


def test_structured_array_is_rejected_with_a_remedy_that_works():
    x = np.zeros((2, 5, 7), [("r", "u1"), ("g", "u1"), ("b", "u1")])
    with pytest.raises(DtypeError, match="with the fields r, g, b") as caught:
        fastvgg.preprocess(x, "caffe")
    x = eval(caught.value.remedy.removeprefix("give "), {"x": x, "numpy": np})  # noqa: S307
    assert fastvgg.preprocess(x, "caffe").shape == (2, 5, 7, 3)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 4, 5, 7, 3), "NHWC"),
        ((2, 4, 6, 3, 5, 7), "NCHW"),
        ((2, 5, 7, 4), "NHWC"),
        ((2, 4, 5, 7), "NCHW"),
        ((2, 5, 7, 1), "NHWC"),
        ((1, 5, 7), "NCHW"),
    ],
)
def test_remedy_for_another_shape_works_as_it_is_spelled(shape, layout):
    x = np.zeros(shape, np.uint8)
    with pytest.raises(ShapeError) as caught:
        fastvgg.preprocess(x, "caffe", layout=layout)
    remedy = caught.value.remedy.rpartition(": ")[2]
    fastvgg.preprocess(eval(remedy, {"x": x, "numpy": np}), "caffe", layout=layout)  # noqa: S307


def test_no_framework_is_imported():
    script = (
        "import json, sys; import numpy as np, fastvgg; x = np.zeros((5, 7, 3), np.uint8)\n"
        "fastvgg.restore(fastvgg.preprocess([x], 'caffe', dtype='bfloat16'), 'caffe')\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    loaded = {name.partition(".")[0] for name in json.loads(run_script(script))}
    assert "fastvgg" in loaded
    assert not loaded & {"torch", "jax", "tensorflow", "cupy", "keras", "h5py", "zarr", "PIL"}


# PyTorch


@pytest.mark.parametrize("name", FLOATS)
def test_tensor_input_returns_a_tensor(torch, name):
    x = torch.from_numpy(np.array(every_value()))
    y = fastvgg.preprocess(x, "torch", dtype=name, out_layout="NCHW")
    assert type(y) is torch.Tensor
    assert y.dtype == getattr(torch, name)
    assert y.is_contiguous()
    expected = oracle.apply(
        fastvgg.Transform("torch", dtype=name, out_layout="NCHW"), every_value()
    )
    assert y.shape == expected.shape
    assert y.view(torch.uint8).numpy().tobytes() == expected.tobytes()
    back = fastvgg.restore(y, "torch", layout="NCHW", out_layout="NHWC")
    assert back.dtype == torch.uint8
    assert_identical(back.numpy(), np.array(every_value()))


@pytest.mark.parametrize("name", FLOATS)
def test_tensor_is_viewed_writable_without_a_copy(torch, name):
    x = torch.zeros(ODD, dtype=getattr(torch, name)).permute(0, 2, 1, 3)
    seen = interop.as_numpy(x)
    assert seen.ctypes.data == x.data_ptr()
    assert seen.dtype == dtype_of(name)
    assert seen.shape == tuple(x.shape)
    seen[...] = 7
    assert (x == 7).all()


def test_tensor_is_processed_in_place(torch):
    images = np.array(every_value()).astype(np.float32)
    y = torch.from_numpy(images.copy())
    assert fastvgg.preprocess(y, "caffe", out=y) is y
    assert_identical(y.numpy(), oracle.apply(fastvgg.Transform("caffe"), images))
    assert fastvgg.restore(y, "caffe", out=y) is y
    assert_identical(y.numpy(), images)


def test_tensor_and_array_out_can_be_mixed(torch):
    x = every_value()
    expected = oracle.apply(fastvgg.Transform("tf"), x)
    tensor, array = torch.empty(ODD), np.empty(ODD, np.float32)
    assert fastvgg.preprocess(x, "tf", out=tensor) is tensor
    assert fastvgg.preprocess(torch.from_numpy(np.array(x)), "tf", out=array) is array
    assert_identical(tensor.numpy(), expected)
    assert_identical(array, expected)


def test_list_of_tensors_returns_a_tensor(torch):
    images = [torch.from_numpy(np.array(image)) for image in every_value()]
    y = fastvgg.preprocess(images, "caffe")
    assert type(y) is torch.Tensor
    assert_identical(y.numpy(), oracle.apply(fastvgg.Transform("caffe"), every_value()))


def test_empty_tensor_returns_an_empty_tensor(torch):
    y = fastvgg.preprocess(torch.empty((0, 5, 7, 3), dtype=torch.uint8), "caffe")
    assert (tuple(y.shape), y.dtype) == ((0, 5, 7, 3), torch.float32)


def test_tensor_that_requires_grad_is_rejected_and_not_modified(torch):
    y = torch.zeros(ODD, requires_grad=True)
    with pytest.raises(DtypeError, match=r"give x.detach\(\)"):
        fastvgg.restore(y, "caffe")
    with pytest.raises(OutputError, match=r"give x.detach\(\)"):
        fastvgg.preprocess(every_value(), "caffe", out=y)
    assert not y.detach().any()


def test_tensor_on_another_device_is_rejected_with_a_remedy(torch):
    y = torch.zeros(ODD, device="meta")
    with pytest.raises(DtypeError, match=r"on meta, but fastvgg runs on the CPU\n.*x.cpu\(\)"):
        fastvgg.restore(y, "caffe")


def test_a_sparse_tensor_is_rejected(torch):
    with pytest.raises(DtypeError, match="cannot export its memory"):
        fastvgg.restore(torch.zeros(ODD).to_sparse(), "caffe")


def test_int64_tensor_is_rejected(torch):
    with pytest.raises(DtypeError, match="int64"):
        fastvgg.preprocess(torch.zeros(ODD, dtype=torch.int64), "caffe")


def test_bfloat16_tensors_convert_to_ml_dtypes(torch):
    x = torch.ones(ODD, dtype=torch.bfloat16)
    assert interop.as_numpy(x).dtype == ml_dtypes.bfloat16
    assert interop.as_torch(interop.as_numpy(x)).dtype == torch.bfloat16
