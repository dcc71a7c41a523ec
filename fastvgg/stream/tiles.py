"""Read rows of an array and transform them tile by tile, in the cache of each thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastvgg import engine
from fastvgg.parallel import ThreadSlot
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.backend import ResolvedBackend
    from fastvgg.datasets.base import ArraySource
    from fastvgg.transform import Transform

# In the cache of a core. A tile of 256 KiB takes 1.3 times as long, because of its two calls.
TILE_BYTES: Final = 2**20
# NumPy asks the system for huge pages for arrays of 4 MiB or more.
HUGE_PAGE_ARRAY_BYTES: Final = 2**22


class TileTransform:
    """The transform of an array's rows, each read into memory of the calling thread.

    A tile that is read into the cache and transformed there costs no more than one that is
    transformed from a memory-mapped file. A mapping is no alternative: if the file is truncated
    while it is read, the first access to a missing page kills the process (SIGBUS).

    Parameters
    ----------
    transform
        The transform.
    source
        A source whose rows can be read in any order at no extra cost.
    threads
        The maximum number of threads that call it.
    max_images
        The maximum number of images in a tile.
    backend
        The backend of the transform.
    """

    def __init__(
        self,
        transform: Transform,
        source: ArraySource,
        *,
        threads: int,
        max_images: int,
        backend: ResolvedBackend,
    ) -> None:
        self._transform = transform
        self._source = source
        self._backend = backend
        self.images = min(max_images, max(1, TILE_BYTES // source.header.image_bytes))
        """Number of images in a tile."""
        shape = (threads * self.images, *source.header.shape[1:])
        nbytes = threads * self.images * source.header.image_bytes
        memory = np.empty(max(nbytes, HUGE_PAGE_ARRAY_BYTES), np.uint8)
        self._tiles = memory[:nbytes].view(storage_dtype(source.header.dtype)).reshape(shape)
        self._thread_slot = ThreadSlot(threads)

    def bind(self, out: NDArray[Any]) -> Callable[[int, int, int], None]:
        """Return a function that transforms `count` rows, from `row` on, into `out[out_row:]`."""
        transform = engine.bind_rows(self._transform, self._tiles, out, backend=self._backend)

        def apply(row: int, out_row: int, count: int) -> None:
            first = self._thread_slot() * self.images
            for start in range(0, count, self.images):
                images = min(self.images, count - start)
                self._source.read_into(row + start, self._tiles[first : first + images])
                transform(first, out_row + start, images)

        return apply
