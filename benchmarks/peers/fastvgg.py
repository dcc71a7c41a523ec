"""fastvgg."""

from __future__ import annotations

import fastvgg
from peers.task import Implementation


def fastvgg_preprocess(task):
    mode, x, out, threads = task.mode, task.x, task.out, task.threads
    return Implementation(
        batch=lambda: fastvgg.preprocess(x, mode, threads=threads),
        batch_into=lambda: fastvgg.preprocess(x, mode, out=out, threads=threads),
        image=lambda image, row: fastvgg.preprocess(image, mode, out=row, threads=1),
    )


def fastvgg_restore(task):
    mode, x, out, threads = task.mode, task.x, task.out, task.threads
    return Implementation(
        batch=lambda: fastvgg.restore(x, mode, threads=threads),
        batch_into=lambda: fastvgg.restore(x, mode, out=out, threads=threads),
        image=lambda image, row: fastvgg.restore(image, mode, out=row, threads=1),
    )
