"""How a contender is called: two styles, each in new memory and in memory used before."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

STYLES = ("batch", "images")
MEMORIES = ("new", "reused")


class Way(NamedTuple):
    """One contender, one style, one kind of memory."""

    contender: str
    style: str
    memory: str
    call: Callable[[], Any]
    prepare: Callable[[], object]


def image_by_image(peer, task, pool, out):
    def share(first):
        for index in range(first, len(task.x), task.threads):
            peer.image(task.x[index], out[index])

    for _ in pool.map(share, range(task.threads)):
        pass
    return peer.seen(out)


def ways(name, peer, task):
    """List the calls of a peer, of those that its API offers."""
    many = functools.partial(peer.set_threads, task.threads)
    one = functools.partial(peer.set_threads, 1)
    if peer.whole is not None:
        yield Way(name, "batch", "new", peer.whole, many)
    if peer.whole_into is not None:
        yield Way(name, "batch", "reused", peer.whole_into, many)
    if peer.image is not None:
        pool = ThreadPoolExecutor(task.threads, initializer=one)
        run = functools.partial(image_by_image, peer, task, pool)
        yield Way(name, "images", "new", lambda: run(np.empty_like(task.out)), one)
        yield Way(name, "images", "reused", lambda: run(task.out), one)
