"""Write keras.npz: what Keras itself makes of all 256 values in each of three channels.

    python tests/golden/make.py

Run it by hand, once; the tests only read the file. README.md beside it says what is in there.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

os.environ["KERAS_BACKEND"] = "numpy"

import keras
from keras.applications.imagenet_utils import preprocess_input


def every_value():
    """Shape (2, 8, 16, 3): each channel has all 256 values, in an order of its own."""
    pixels = np.arange(256)
    channels = [pixels, (pixels * 77 + 13) % 256, (pixels * 201 + 100) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8).reshape(2, 8, 16, 3)


def main():
    x = every_value()
    arrays = {
        "x": x,
        "keras_version": np.array(keras.__version__),
        "numpy_version": np.array(np.__version__),
    }
    for mode in ("caffe", "tf", "torch"):
        for dtype in ("float32", "float64"):
            y = preprocess_input(x.astype(dtype), data_format="channels_last", mode=mode)
            arrays[f"{mode}_{dtype}"] = np.ascontiguousarray(y)
    np.savez_compressed(Path(__file__).with_name("keras.npz"), **arrays)


if __name__ == "__main__":
    main()
