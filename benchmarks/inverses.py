"""Count how many of all values common hand-written inverses get wrong.

    python benchmarks/inverses.py    # takes seconds; writes results/inverses.json

An image has 256 values in each of three channels, 768 in all. Each is preprocessed by Keras,
stored, and inverted with NumPy; it is wrong if the result is not the original byte.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

import fastvgg
from fastvgg import Mode
from fastvgg.bench.timing import machine
from fastvgg.transform import storage_dtype

RESULT = Path(__file__).parent / "results" / "inverses.json"
STORAGE_DTYPES = ("float32", "float16", "bfloat16")
VALUES = np.arange(256, dtype=np.uint8)
# No pixel is gray.
X = np.stack((VALUES, VALUES + np.uint8(85), VALUES + np.uint8(170)), axis=-1)
X = X.reshape(1, 16, 16, 3)
CAFFE_MEAN = np.array(Mode.CAFFE.mean)
TORCH_MEAN, TORCH_STD = np.array(Mode.TORCH.mean), np.array(Mode.TORCH.std)


def as_float32(constant):
    return np.asarray(constant, np.float32)


def truncate(x):
    return np.clip(x, 0, 255).astype(np.uint8)


def inverse_normalize(y):
    """Compute Normalize(-mean / std, 1 / std), an often recommended inverse."""
    return (y - as_float32(-TORCH_MEAN / TORCH_STD)) / as_float32(1 / TORCH_STD)


# The mode, a description, and a function of y in float32.
INVERSES = (
    ("caffe", "add the means, flip, clip, `astype('uint8')`",
     lambda y: truncate((y + as_float32(CAFFE_MEAN))[..., ::-1])),
    ("caffe", "the same, the means a plain NumPy array: float64",
     lambda y: truncate((y + CAFFE_MEAN)[..., ::-1])),
    ("caffe", "the same, rounded, without the flip",
     lambda y: truncate(np.rint(y + as_float32(CAFFE_MEAN)))),
    ("tf", "`((y + 1) * 127.5).astype('uint8')`",
     lambda y: truncate((y + as_float32(1)) * as_float32(127.5))),
    ("torch", "`((y * std + mean) * 255).astype('uint8')`",
     lambda y: truncate((y * as_float32(TORCH_STD) + as_float32(TORCH_MEAN)) * as_float32(255))),
    ("torch", "`Normalize(-mean / std, 1 / std)`, then `to_pil_image`",
     lambda y: truncate(inverse_normalize(y) * as_float32(255))),
)  # fmt: skip


def preprocess_and_store(mode, dtype):
    """Return Keras' float32 result, rounded once to the storage type."""
    from keras.applications.imagenet_utils import preprocess_input

    return preprocess_input(X, mode=mode).astype(storage_dtype(dtype))


def count_wrong(inverse, mode):
    """Return the number of wrong values among the 768, by storage type."""
    return {
        dtype: int(np.count_nonzero(inverse(preprocess_and_store(mode, dtype)) != X))
        for dtype in STORAGE_DTYPES
    }


def main():
    os.environ["KERAS_BACKEND"] = "numpy"
    rows = [
        {
            "mode": mode,
            "inverse": name,
            "wrong": count_wrong(lambda y, i=inverse: i(y.astype(np.float32)), mode),
        }
        for mode, name, inverse in INVERSES
    ]
    rows += [
        {
            "mode": mode,
            "inverse": "`fastvgg.restore`",
            "wrong": count_wrong(lambda y, m=mode: fastvgg.restore(y, m), mode),
        }
        for mode in ("caffe", "tf", "torch")
    ]
    for row in rows:
        print(f"{row['mode']:6s} {row['inverse']:60s}", row["wrong"])
    record = {"machine": machine(), "values": X.size, "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
