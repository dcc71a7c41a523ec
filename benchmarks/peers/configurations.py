"""How a peer is called: in two styles, each in new and in reused memory."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

STYLES = ("batch", "images")
MEMORIES = ("new", "reused")


class Configuration(NamedTuple):
    """A peer, a style and a kind of memory."""

    peer: str
    style: str
    memory: str
    call: Callable[[], Any]
    prepare: Callable[[], object]


def run_image_by_image(implementation, task, pool, out):
    def run_share(first):
        for index in range(first, len(task.x), task.threads):
            implementation.image(task.x[index], out[index])

    for _ in pool.map(run_share, range(task.threads)):
        pass
    return implementation.view(out)


def configurations(name, implementation, task):
    """Yield the configurations that the API of a peer supports."""
    all_threads = functools.partial(implementation.set_threads, task.threads)
    one_thread = functools.partial(implementation.set_threads, 1)
    if implementation.batch is not None:
        yield Configuration(name, "batch", "new", implementation.batch, all_threads)
    if implementation.batch_into is not None:
        yield Configuration(name, "batch", "reused", implementation.batch_into, all_threads)
    if implementation.image is not None:
        pool = ThreadPoolExecutor(task.threads, initializer=one_thread)
        run = functools.partial(run_image_by_image, implementation, task, pool)
        yield Configuration(name, "images", "new", lambda: run(np.empty_like(task.out)), one_thread)
        yield Configuration(name, "images", "reused", lambda: run(task.out), one_thread)
