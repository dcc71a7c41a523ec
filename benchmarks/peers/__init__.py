"""The table of peers: the implementation of each task in each library, imported lazily.

Each library has one file; notes state the restrictions of its API.
"""

from __future__ import annotations

import importlib

from peers.dali import dali_preprocess, dali_preprocess_without_flip, dali_restore
from peers.dask_array import dask_preprocess, dask_restore
from peers.fastvgg import fastvgg_preprocess, fastvgg_restore
from peers.jax import jax_preprocess, jax_restore
from peers.keras import keras_preprocess, keras_tensor_preprocess
from peers.numba_loop import numba_preprocess, numba_restore
from peers.numexpr import numexpr_preprocess, numexpr_restore
from peers.opencv import (
    albumentations_preprocess,
    opencv_blob,
    opencv_preprocess,
    opencv_restore,
)
from peers.plain_numpy import (
    deprocess_img,
    numpy_restore,
    restore_original_image_from_array,
)
from peers.pytorch import (
    torch_compile_preprocess,
    torch_compile_restore,
    torch_preprocess,
    torch_restore,
    torchvision_preprocess,
)
from peers.task import Peer

KERAS_BACKENDS = {"PyTorch": "torch", "JAX": "jax", "TensorFlow": "tensorflow"}

PEERS = (
    Peer("fastvgg", "fastvgg", fastvgg_preprocess, fastvgg_restore),
    Peer(
        "Keras",
        "keras",
        keras_preprocess,
        None,
        "in caffe mode its result is a view with a negative stride, one copy short of contiguous; "
        "in reused memory it works in place on the bytes converted to float32",
    ),
    *(
        Peer(
            f"Keras on {library}",
            "keras",
            keras_tensor_preprocess,
            None,
            "on float tensors, in a separate process together with fastvgg: the backend is fixed "
            "at import",
            backend,
        )
        for library, backend in KERAS_BACKENDS.items()
    ),
    Peer("NumPy", "numpy", None, numpy_restore),
    Peer(
        "deprocess_img (StackOverflow)",
        "numpy",
        None,
        deprocess_img,
        "truncates instead of rounding",
    ),
    Peer(
        "restore_original_image_from_array (StackOverflow)",
        "numpy",
        None,
        restore_original_image_from_array,
        "modifies its argument, so it gets a copy; its floats are neither rounded nor clipped "
        "before the cast to uint8",
    ),
    Peer(
        "Numba, plain prange loop",
        "numba",
        numba_preprocess,
        numba_restore,
        "whole batch only: its default threading layer supports one caller at a time",
    ),
    Peer(
        "numexpr",
        "numexpr",
        numexpr_preprocess,
        numexpr_restore,
        "computes in float64, rounds at the end; whole batch only: it supports one caller at a "
        "time",
    ),
    Peer(
        "Dask array",
        "dask.array",
        dask_preprocess,
        dask_restore,
        "NumPy's arithmetic on chunks of 16 images, whole batch only",
    ),
    Peer("OpenCV blobFromImages, NCHW", "cv2", opencv_blob("NCHW"), None),
    Peer("OpenCV blobFromImages, NHWC", "cv2", opencv_blob("NHWC"), None),
    Peer(
        "OpenCV arithmetic",
        "cv2",
        opencv_preprocess,
        opencv_restore,
        "image by image only: its functions take one image",
    ),
    Peer("Albumentations Normalize", "albumentations", albumentations_preprocess, None),
    Peer(
        "torchvision v2",
        "torchvision",
        torchvision_preprocess,
        None,
        "no output argument",
    ),
    Peer(
        "PyTorch",
        "torch",
        torch_preprocess,
        torch_restore,
        "the operations of torchvision's v2 without the package, in place in the result",
    ),
    Peer(
        "torch.compile",
        "torch",
        torch_compile_preprocess,
        torch_compile_restore,
        "whole batch only: it is compiled for one shape and number of threads",
    ),
    Peer(
        "JAX jit",
        "jax",
        jax_preprocess,
        jax_restore,
        "whole batch only, already on its device; no output argument, but a result that is donated "
        "to the next call has its memory reused",
    ),
    Peer(
        "DALI",
        "nvidia.dali",
        dali_preprocess,
        dali_restore,
        "whole batch only, results in its own buffers: no new memory; the flip is a separate "
        "operator",
    ),
    Peer(
        "DALI, without the flip",
        "nvidia.dali",
        dali_preprocess_without_flip,
        None,
        "less work than the task requires; its flipped result is compared with Keras'",
    ),
)


def import_peers(backend="numpy"):
    """Import the peers of a process; return them, the versions, and the import errors by peer.

    Every process has fastvgg and the peers of its Keras backend.
    """
    present, versions, missing = [], {}, {}
    for peer in PEERS:
        if peer.backend != backend and peer.name != "fastvgg":
            continue
        modules = dict.fromkeys((peer.module, peer.backend))
        try:
            imported = {name: importlib.import_module(name) for name in modules}
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, PyTorch mismatch
            missing[peer.name] = str(error)
        else:
            present.append(peer)
            versions |= {name: version_of(module) for name, module in imported.items()}
    return present, versions, missing


def version_of(module):
    """Return the version of the package of a module."""
    package = module.__name__.partition(".")[0]
    return getattr(module, "__version__", None) or importlib.import_module(package).__version__
