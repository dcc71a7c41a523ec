"""How a contender is called: two styles, each in new and in reused memory."""

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
    """One contender, one style, one kind of memory."""

    contender: str
    style: str
    memory: str
    call: Callable[[], Any]
    prepare: Callable[[], object]


def image_by_image(peer, task, pool, out):
    def run_share(first):
        for index in range(first, len(task.x), task.threads):
            peer.image(task.x[index], out[index])

    for _ in pool.map(run_share, range(task.threads)):
        pass
    return peer.view(out)


def configurations(name, peer, task):
    """Yield the configurations that the API of a peer supports."""
    all_threads = functools.partial(peer.set_threads, task.threads)
    one_thread = functools.partial(peer.set_threads, 1)
    if peer.batch is not None:
        yield Configuration(name, "batch", "new", peer.batch, all_threads)
    if peer.batch_into is not None:
        yield Configuration(name, "batch", "reused", peer.batch_into, all_threads)
    if peer.image is not None:
        pool = ThreadPoolExecutor(task.threads, initializer=one_thread)
        run = functools.partial(image_by_image, peer, task, pool)
        yield Configuration(name, "images", "new", lambda: run(np.empty_like(task.out)), one_thread)
        yield Configuration(name, "images", "reused", lambda: run(task.out), one_thread)
