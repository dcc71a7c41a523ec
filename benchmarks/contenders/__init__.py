"""The table of contenders: what each library does for a task. Their imports wait until they enter.

A library is one file; what its API forces is said in a note.
"""

from __future__ import annotations

import importlib

from contenders.dali import dali_preprocess, dali_preprocess_without_flip, dali_restore
from contenders.dask_array import dask_preprocess, dask_restore
from contenders.jax import jax_preprocess, jax_restore
from contenders.keras import keras_preprocess, keras_tensor_preprocess
from contenders.numba_loop import numba_preprocess, numba_restore
from contenders.numexpr import numexpr_preprocess, numexpr_restore
from contenders.opencv import (
    albumentations_preprocess,
    opencv_blob,
    opencv_preprocess,
    opencv_restore,
)
from contenders.own import fastvgg_preprocess, fastvgg_restore
from contenders.plain_numpy import (
    deprocess_img,
    numpy_restore,
    restore_original_image_from_array,
)
from contenders.pytorch import (
    torch_compile_preprocess,
    torch_compile_restore,
    torch_preprocess,
    torch_restore,
    torchvision_preprocess,
)
from contenders.task import Contender

KERAS_TENSORS = {"PyTorch": "torch", "JAX": "jax", "TensorFlow": "tensorflow"}

CONTENDERS = (
    Contender("fastvgg", "fastvgg", fastvgg_preprocess, fastvgg_restore),
    Contender(
        "Keras",
        "keras",
        keras_preprocess,
        None,
        "in caffe mode its result is a view with a negative stride, one copy short of contiguous; "
        "in used memory it works in place on the bytes converted to float32",
    ),
    *(
        Contender(
            f"Keras on {library}",
            "keras",
            keras_tensor_preprocess,
            None,
            "on tensors of floats, in a process of its own with fastvgg beside it: the backend is "
            "read once",
            backend,
        )
        for library, backend in KERAS_TENSORS.items()
    ),
    Contender("NumPy", "numpy", None, numpy_restore),
    Contender(
        "deprocess_img (StackOverflow)",
        "numpy",
        None,
        deprocess_img,
        "truncates instead of rounding",
    ),
    Contender(
        "restore_original_image_from_array (StackOverflow)",
        "numpy",
        None,
        restore_original_image_from_array,
        "writes into its argument, so it is given a copy; leaves floats that are neither rounded "
        "nor clipped, which are cast to uint8",
    ),
    Contender(
        "Numba, plain prange loop",
        "numba",
        numba_preprocess,
        numba_restore,
        "called on the whole batch alone: its default threading layer takes one caller at a time",
    ),
    Contender(
        "numexpr",
        "numexpr",
        numexpr_preprocess,
        numexpr_restore,
        "computes in float64, rounds at the end; called on the whole batch alone: it takes one "
        "caller at a time",
    ),
    Contender(
        "Dask array",
        "dask.array",
        dask_preprocess,
        dask_restore,
        "NumPy's arithmetic on chunks of some images, called on the whole batch alone",
    ),
    Contender("OpenCV blobFromImages, NCHW", "cv2", opencv_blob("NCHW"), None),
    Contender("OpenCV blobFromImages, NHWC", "cv2", opencv_blob("NHWC"), None),
    Contender(
        "OpenCV arithmetic",
        "cv2",
        opencv_preprocess,
        opencv_restore,
        "its functions take one image, so it is called image by image alone",
    ),
    Contender("Albumentations Normalize", "albumentations", albumentations_preprocess, None),
    Contender(
        "torchvision v2",
        "torchvision",
        torchvision_preprocess,
        None,
        "it cannot be told where to write",
    ),
    Contender(
        "PyTorch",
        "torch",
        torch_preprocess,
        torch_restore,
        "the operations of torchvision's v2 without the package, in the memory of the result",
    ),
    Contender(
        "torch.compile",
        "torch",
        torch_compile_preprocess,
        torch_compile_restore,
        "called on the whole batch alone: it is compiled for one shape and number of threads",
    ),
    Contender(
        "JAX jit",
        "jax",
        jax_preprocess,
        jax_restore,
        "called on the whole batch alone, which lies on its device before; it cannot be told where "
        "to write, but reuses the memory of a result that is donated to the next call",
    ),
    Contender(
        "DALI",
        "nvidia.dali",
        dali_preprocess,
        dali_restore,
        "batches alone, its results in buffers of its own: no new memory; the flip is an operator "
        "of its own",
    ),
    Contender(
        "DALI, without the flip",
        "nvidia.dali",
        dali_preprocess_without_flip,
        None,
        "less work than the task asks for; its bits are compared with Keras' flipped back",
    ),
)


def importable(backend="numpy"):
    """Return the contenders of a process: those there are, versions, and why others are not.

    fastvgg is in every process, and beside it what belongs to the backend that Keras has there.
    """
    present, versions, missing = [], {}, {}
    for contender in CONTENDERS:
        if contender.backend != backend and contender.name != "fastvgg":
            continue
        modules = dict.fromkeys((contender.module, contender.backend))
        try:
            found = {name: importlib.import_module(name) for name in modules}
        except (ImportError, RuntimeError) as error:  # torchvision, beside another PyTorch
            missing[contender.name] = str(error)
        else:
            present.append(contender)
            versions |= {name: version_of(module) for name, module in found.items()}
    return present, versions, missing


def version_of(module):
    """Return the version of the package that a module is of."""
    package = module.__name__.partition(".")[0]
    return getattr(module, "__version__", None) or importlib.import_module(package).__version__
