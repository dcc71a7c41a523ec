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
STORED_AS = ("float32", "float16", "bfloat16")
VALUES = np.arange(256, dtype=np.uint8)
# No pixel is gray.
X = np.stack((VALUES, VALUES + np.uint8(85), VALUES + np.uint8(170)), axis=-1)
X = X.reshape(1, 16, 16, 3)
CAFFE_MEAN = np.array(Mode.CAFFE.mean)
TORCH_MEAN, TORCH_STD = np.array(Mode.TORCH.mean), np.array(Mode.TORCH.std)


def single(constant):
    return np.asarray(constant, np.float32)


def truncated(x):
    return np.clip(x, 0, 255).astype(np.uint8)


def inverse_normalize(y):
    """Compute Normalize(-mean / std, 1 / std), an often recommended inverse."""
    return (y - single(-TORCH_MEAN / TORCH_STD)) / single(1 / TORCH_STD)


# The mode, a description, and a function of y in float32.
INVERSES = (
    ("caffe", "add the means, flip, clip, `astype('uint8')`",
     lambda y: truncated((y + single(CAFFE_MEAN))[..., ::-1])),
    ("caffe", "the same, the means a plain NumPy array: float64",
     lambda y: truncated((y + CAFFE_MEAN)[..., ::-1])),
    ("caffe", "the same, rounded, without the flip",
     lambda y: truncated(np.rint(y + single(CAFFE_MEAN)))),
    ("tf", "`((y + 1) * 127.5).astype('uint8')`",
     lambda y: truncated((y + single(1)) * single(127.5))),
    ("torch", "`((y * std + mean) * 255).astype('uint8')`",
     lambda y: truncated((y * single(TORCH_STD) + single(TORCH_MEAN)) * single(255))),
    ("torch", "`Normalize(-mean / std, 1 / std)`, then `to_pil_image`",
     lambda y: truncated(inverse_normalize(y) * single(255))),
)  # fmt: skip


def stored(mode, dtype):
    """Return Keras' float32 result, rounded once to the storage type."""
    from keras.applications.imagenet_utils import preprocess_input

    return preprocess_input(X, mode=mode).astype(storage_dtype(dtype))


def wrong(inverse, mode):
    """Return the number of wrong values among the 768, by storage type."""
    return {dtype: int(np.count_nonzero(inverse(stored(mode, dtype)) != X)) for dtype in STORED_AS}


def main():
    os.environ["KERAS_BACKEND"] = "numpy"
    rows = [
        {
            "mode": mode,
            "inverse": name,
            "wrong": wrong(lambda y, i=inverse: i(y.astype(np.float32)), mode),
        }
        for mode, name, inverse in INVERSES
    ]
    rows += [
        {
            "mode": mode,
            "inverse": "`fastvgg.restore`",
            "wrong": wrong(lambda y, m=mode: fastvgg.restore(y, m), mode),
        }
        for mode in ("caffe", "tf", "torch")
    ]
    for row in rows:
        print(f"{row['mode']:6s} {row['inverse']:60s}", row["wrong"])
    record = {"machine": machine(), "values": X.size, "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
