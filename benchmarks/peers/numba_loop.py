"""A straightforward parallel loop in Numba."""

from __future__ import annotations

import numpy as np

from peers.task import Implementation, means


def numba_preprocess(task):
    import numba

    flips, mean = task.mode.is_bgr, tuple(means(task.mode))
    divides = task.mode.divide is not None
    divide = np.float32(task.mode.divide or 1)
    std = tuple(np.array(task.mode.std or (1, 1, 1), np.float32))

    @numba.njit(parallel=True)
    def loop(x, out):
        images, rows, columns, channels = x.shape
        for image in numba.prange(images):
            for row in range(rows):
                for column in range(columns):
                    for channel in range(channels):
                        value = np.float32(x[image, row, column, 2 - channel if flips else channel])
                        if divides:
                            value = (value / divide - mean[channel]) / std[channel]
                        else:
                            value = value - mean[channel]
                        out[image, row, column, channel] = value
        return out

    return Implementation(
        batch=lambda: loop(task.x, np.empty_like(task.out)),
        batch_into=lambda: loop(task.x, task.out),
        set_threads=numba.set_num_threads,
    )


def numba_restore(task):
    import numba

    mean = tuple(means(task.mode))

    @numba.njit(parallel=True)
    def loop(y, out):
        images, rows, columns, channels = y.shape
        for image in numba.prange(images):
            for row in range(rows):
                for column in range(columns):
                    for channel in range(channels):
                        value = np.rint(y[image, row, column, channel] + mean[channel])
                        out[image, row, column, 2 - channel] = min(max(value, 0), 255)
        return out

    return Implementation(
        batch=lambda: loop(task.x, np.empty_like(task.out)),
        batch_into=lambda: loop(task.x, task.out),
        set_threads=numba.set_num_threads,
    )
