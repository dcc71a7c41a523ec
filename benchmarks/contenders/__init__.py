"""The table of contenders: the implementation of each task in each library, imported lazily.

Each library has one file; notes state the restrictions of its API.
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
        "in reused memory it works in place on the bytes converted to float32",
    ),
    *(
        Contender(
            f"Keras on {library}",
            "keras",
            keras_tensor_preprocess,
            None,
            "on float tensors, in a separate process together with fastvgg: the backend is fixed "
            "at import",
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
        "modifies its argument, so it gets a copy; its floats are neither rounded nor clipped "
        "before the cast to uint8",
    ),
    Contender(
        "Numba, plain prange loop",
        "numba",
        numba_preprocess,
        numba_restore,
        "whole batch only: its default threading layer supports one caller at a time",
    ),
    Contender(
        "numexpr",
        "numexpr",
        numexpr_preprocess,
        numexpr_restore,
        "computes in float64, rounds at the end; whole batch only: it supports one caller at a "
        "time",
    ),
    Contender(
        "Dask array",
        "dask.array",
        dask_preprocess,
        dask_restore,
        "NumPy's arithmetic on chunks of 16 images, whole batch only",
    ),
    Contender("OpenCV blobFromImages, NCHW", "cv2", opencv_blob("NCHW"), None),
    Contender("OpenCV blobFromImages, NHWC", "cv2", opencv_blob("NHWC"), None),
    Contender(
        "OpenCV arithmetic",
        "cv2",
        opencv_preprocess,
        opencv_restore,
        "image by image only: its functions take one image",
    ),
    Contender("Albumentations Normalize", "albumentations", albumentations_preprocess, None),
    Contender(
        "torchvision v2",
        "torchvision",
        torchvision_preprocess,
        None,
        "no output argument",
    ),
    Contender(
        "PyTorch",
        "torch",
        torch_preprocess,
        torch_restore,
        "the operations of torchvision's v2 without the package, in place in the result",
    ),
    Contender(
        "torch.compile",
        "torch",
        torch_compile_preprocess,
        torch_compile_restore,
        "whole batch only: it is compiled for one shape and number of threads",
    ),
    Contender(
        "JAX jit",
        "jax",
        jax_preprocess,
        jax_restore,
        "whole batch only, already on its device; no output argument, but a result that is donated "
        "to the next call has its memory reused",
    ),
    Contender(
        "DALI",
        "nvidia.dali",
        dali_preprocess,
        dali_restore,
        "whole batch only, results in its own buffers: no new memory; the flip is a separate "
        "operator",
    ),
    Contender(
        "DALI, without the flip",
        "nvidia.dali",
        dali_preprocess_without_flip,
        None,
        "less work than the task requires; its flipped result is compared with Keras'",
    ),
)


def importable(backend="numpy"):
    """Return the contenders of a process, the versions, and the import errors of the others.

    Every process has fastvgg and the contenders of its Keras backend.
    """
    present, versions, missing = [], {}, {}
    for contender in CONTENDERS:
        if contender.backend != backend and contender.name != "fastvgg":
            continue
        modules = dict.fromkeys((contender.module, contender.backend))
        try:
            imported = {name: importlib.import_module(name) for name in modules}
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, PyTorch mismatch
            missing[contender.name] = str(error)
        else:
            present.append(contender)
            versions |= {name: version_of(module) for name, module in imported.items()}
    return present, versions, missing


def version_of(module):
    """Return the version of the package of a module."""
    package = module.__name__.partition(".")[0]
    return getattr(module, "__version__", None) or importlib.import_module(package).__version__
