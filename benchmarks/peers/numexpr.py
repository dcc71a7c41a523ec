"""numexpr."""

from __future__ import annotations

import numpy as np

from peers.task import Implementation, means, torch_constants


def evaluate_by_channel(task, expression, casting, constants):
    """Evaluate each channel separately, which is faster than broadcasting the constants."""
    import numexpr

    def evaluate(out):
        for channel in range(3):
            y, x = (channel, 2 - channel) if task.mode.is_bgr else (channel, channel)
            source, target = (y, x) if task.restores else (x, y)
            values = {name: column[y] for name, column in constants.items()}
            numexpr.evaluate(
                expression,
                {"a": task.x[..., source], **values},
                out=out[..., target],
                casting=casting,
            )
        return out

    return Implementation(
        batch=lambda: evaluate(np.empty_like(task.out)),
        batch_into=lambda: evaluate(task.out),
        set_threads=numexpr.set_num_threads,
    )


def numexpr_preprocess(task):
    if task.mode.is_bgr:
        constants = {"mean": means(task.mode)}
        return evaluate_by_channel(task, "a - mean", "same_kind", constants)
    divide, mean, std = torch_constants(task.mode)
    constants = {"divide": np.repeat(divide, 3), "mean": mean, "std": std}
    return evaluate_by_channel(task, "(a / divide - mean) / std", "same_kind", constants)


def numexpr_restore(task):
    value = "round(a + mean)"
    saturated = f"where({value} < 0, 0, where({value} > 255, 255, {value}))"
    return evaluate_by_channel(task, saturated, "unsafe", {"mean": means(task.mode)})
