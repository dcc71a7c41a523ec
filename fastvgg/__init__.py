"""Bit-exact, reversible ImageNet preprocessing, from arrays in memory to terabyte datasets.

Public names, and the modules `fastvgg.keras`, `fastvgg.torch` and `fastvgg.dask`, are imported on
first use: importing fastvgg imports neither NumPy nor Numba nor any optional dependency.

>>> import numpy as np
>>> import fastvgg
>>> x = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
>>> bool((fastvgg.restore(fastvgg.preprocess(x, "caffe"), "caffe") == x).all())
True
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from fastvgg.fork_lock import fork_lock

if TYPE_CHECKING:
    from fastvgg import dask as dask
    from fastvgg import keras as keras
    from fastvgg import torch as torch
    from fastvgg.engine import preprocess as preprocess
    from fastvgg.engine import restore as restore
    from fastvgg.errors import FastvggError as FastvggError
    from fastvgg.loader import batches as batches
    from fastvgg.stream.info import info as info
    from fastvgg.stream.planner import plan as plan
    from fastvgg.stream.verify import verify as verify
    from fastvgg.transform import Mode as Mode
    from fastvgg.transform import Transform as Transform

__version__ = "0.1.0"

_LAZY = {
    "FastvggError": "fastvgg.errors",
    "Mode": "fastvgg.transform",
    "Transform": "fastvgg.transform",
    "batches": "fastvgg.loader",
    "info": "fastvgg.stream.info",
    "plan": "fastvgg.stream.planner",
    "preprocess": "fastvgg.engine",
    "restore": "fastvgg.engine",
    "verify": "fastvgg.stream.verify",
}

__all__ = [
    "FastvggError",
    "Mode",
    "Transform",
    "__version__",
    "batches",
    "info",
    "plan",
    "preprocess",
    "restore",
    "verify",
]


# What these import when they are used. It is imported with them, under the lock.
_LATE = {"Transform": "fastvgg.engine", "plan": "fastvgg.executors.threads"}

# The package that each of these modules needs.
_MODULES = {"dask": "dask", "keras": "numpy", "torch": "torch"}

if not TYPE_CHECKING:  # otherwise type checkers accept any name

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            with fork_lock:
                return importlib.import_module(f"fastvgg.{name}")
        if name not in _LAZY:  # without the lock: `from fastvgg import engine` asks for it first
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with fork_lock:
            if name in _LATE:
                importlib.import_module(_LATE[name])
            value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    modules = [name for name, package in _MODULES.items() if importlib.util.find_spec(package)]
    return sorted([*__all__, *modules])
