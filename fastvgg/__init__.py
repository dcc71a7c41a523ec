"""Bit-exact, reversible ImageNet preprocessing, from arrays in memory to terabyte datasets.

Public names are imported on first use: importing fastvgg imports neither NumPy nor Numba nor any
optional dependency.

>>> import numpy as np
>>> import fastvgg
>>> x = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
>>> bool((fastvgg.restore(fastvgg.preprocess(x, "caffe"), "caffe") == x).all())
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


if not TYPE_CHECKING:  # otherwise type checkers accept any name

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
