"""NumPy, and the two functions that are copied from StackOverflow."""

from __future__ import annotations

import numpy as np

from contenders.task import Peer, means


def numpy_restore(task):
    mean = means(task.mode)

    def rounded(y):
        x = y.copy()
        for channel in range(3):  # faster than to add all three, broadcast
            x[..., channel] += mean[channel]
        np.rint(x, out=x)
        return np.clip(x, 0, 255, out=x)[..., ::-1]

    def image(y, row):
        row[...] = rounded(y)

    return Peer(whole=lambda: rounded(task.x).astype(np.uint8), image=image)


def deprocess_img(task):
    """Do what the function of that name in style transfer tutorials does."""

    def deprocess(y):
        x = y.copy()
        add_means(x, task.mode)
        return np.clip(x[..., ::-1], 0, 255).astype("uint8")

    return by_copies(task, deprocess)


def restore_original_image_from_array(task):
    """Do what the function of that name does, on a copy, and cast its floats to images.

    It adds the means to its argument, and neither rounds nor clips.
    """

    def restore(y):
        x = y.copy()
        add_means(x, task.mode)
        return x[..., ::-1].astype("uint8")

    return by_copies(task, restore)


def add_means(x, mode):
    for channel, mean in enumerate(mode.mean):
        x[..., channel] += mean


def by_copies(task, formula):
    """Return what a formula can do that gives new memory."""

    def image(y, row):
        row[...] = formula(y)

    return Peer(whole=lambda: formula(task.x), image=image)
