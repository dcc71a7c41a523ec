"""A directory of part-*.npy files: one array in parts, which are concatenated in name order."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import threading
from typing import TYPE_CHECKING, Any, Final

import xxhash

from fastvgg.datasets.base import Chunk, Header, changed_during_run_error, read_copy
from fastvgg.datasets.images import is_image_name
from fastvgg.datasets.npy import NpySource
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ImageRecord
    from fastvgg.transform import Layout

__all__ = ["PartitionedNpySource", "part_names"]

MAX_OPEN_PARTS: Final = 64  # a process may commonly have 1,024 open files


def part_names(directory: Path) -> list[str]:
    """Return the names of the parts in a directory, sorted bytewise; empty if there are none.

    Raises
    ------
    SourceError
        If the directory cannot be listed, or also contains images.
    """
    try:
        names = os.listdir(os.fsencode(directory))  # noqa: PTH208  # sorted as bytes, as images are
    except OSError as error:
        raise SourceError(
            f"{directory} cannot be listed: {error.strerror}", "check its permissions"
        ) from None
    parts = sorted(name for name in names if name.startswith(b"part-") and name.endswith(b".npy"))
    image = next((name for name in names if is_image_name(name)), None) if parts else None
    if image is not None:
        raise SourceError(
            f"{directory} contains both parts of an array, e.g. {os.fsdecode(parts[0])!r}, and "
            f"images, e.g. {os.fsdecode(image)!r}",
            "move the images or the parts to a separate directory",
        )
    return [os.fsdecode(name) for name in parts]


class PartitionedNpySource:
    """An array that is partitioned by rows into several .npy files.

    Parameters
    ----------
    path
        The directory.
    names
        The file names of the parts, in row order.
    layout
        The layout of the array.
    dtype_hint
        "bfloat16" if a manifest declares that the two-byte elements are bfloat16.

    Raises
    ------
    SourceError
        If `NpySource` rejects a part, or its image shape or dtype differs from that of the first.
    """

    kind = "parts"
    read_granularity = 1

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        *,
        layout: Layout = "NHWC",
        dtype_hint: str | None = None,
    ) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.notes = [f"{len(names)} parts"]
        self.records: Sequence[ImageRecord] = ()
        self._names = names
        self._layout = layout
        self._dtype_hint = dtype_hint
        self._open: dict[int, NpySource] = {}
        self._readers: dict[int, int] = {}
        self._lock = threading.Lock()
        headers = list(self._read_headers())
        images = sum(header.images for header in headers)
        first = headers[0]
        self.header = Header((images, *first.shape[1:]), first.dtype, layout)
        self._starts = [0, *itertools.accumulate(header.images for header in headers)]

    def _read_headers(self) -> Iterator[Header]:
        """Yield the header of every part, and set `stored_bytes` to the sum of their sizes."""
        first = None
        self.stored_bytes = 0
        for name in self._names:
            with contextlib.closing(self._open_part(name)) as part:
                header = part.header
                self.stored_bytes += part.stored_bytes
            first = first or header
            if (header.shape[1:], header.dtype) != (first.shape[1:], first.dtype):
                raise SourceError(
                    f"{self.path / name} contains images of {header.shape[1:]} {header.dtype}, but "
                    f"{self._names[0]} of {first.shape[1:]} {first.dtype}",
                    "all parts must have the same image shape and dtype; move others elsewhere",
                )
            yield header

    def fingerprint(self) -> str:
        """Return a hash of the current names and fingerprints of all parts."""
        digest = xxhash.xxh3_128()
        for name in part_names(self.path):
            with contextlib.closing(self._open_part(name)) as part:
                digest.update(f"{part.fingerprint()} {name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Chunk:
        """Return images as a view of a mapped window; a copy if they span several parts.

        Raises
        ------
        StoppedError
            If a part has changed, or cannot be read.
        """
        number = self._part_of(start)
        if stop <= self._starts[number + 1]:
            with self._borrow(number) as part:
                first = self._starts[number]
                return part.read(start - first, stop - first)
        return read_copy(self, start, stop)

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out` with images, starting at row `start`; thread-safe.

        Raises
        ------
        StoppedError
            If a part has changed, or cannot be read.
        """
        number, row, stop = self._part_of(start), start, start + len(out)
        while row < stop:
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            with self._borrow(number) as part:
                part.read_into(row - first, out[row - start : end - start])
            row, number = end, number + 1

    def close(self) -> None:
        """Close the open parts."""
        while self._open:
            self._open.popitem()[1].close()

    def _part_of(self, row: int) -> int:
        """Return the number of the part that contains a row."""
        return bisect.bisect_right(self._starts, row) - 1

    @contextlib.contextmanager
    def _borrow(self, number: int) -> Iterator[NpySource]:
        """Open a part if necessary, and keep it open during the `with` block."""
        with self._lock:
            if number not in self._open:
                self._evict()
                self._open[number] = self._reopen(number)
            self._readers[number] = self._readers.get(number, 0) + 1
        try:
            yield self._open[number]
        finally:
            with self._lock:
                self._readers[number] -= 1

    def _evict(self) -> None:
        """Close the oldest part that no thread is reading, if too many are open."""
        if len(self._open) >= MAX_OPEN_PARTS:
            idle = next((number for number in self._open if not self._readers[number]), None)
            if idle is not None:
                self._open.pop(idle).close()

    def _reopen(self, number: int) -> NpySource:
        """Open a part, after checking that its header is unchanged."""
        name, images = self._names[number], self._starts[number + 1] - self._starts[number]
        path = str(self.path / name)
        try:
            part = self._open_part(name)
        except SourceError as error:
            raise changed_during_run_error(path) from error
        if part.header != Header((images, *self.header.shape[1:]), self.header.dtype, self._layout):
            part.close()
            raise changed_during_run_error(path)
        return part

    def _open_part(self, name: str) -> NpySource:
        return NpySource(self.path / name, layout=self._layout, dtype_hint=self._dtype_hint)
