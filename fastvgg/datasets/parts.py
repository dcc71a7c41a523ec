"""A directory of part-*.npy: one array that others wrote in parts, whose rows are in name order."""

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

OPEN_AT_A_TIME: Final = 64  # of the 1,024 files that a process may commonly have open


def part_names(directory: Path) -> list[str]:
    """Return the names of a directory's parts, sorted by their bytes; none if it has none.

    Raises
    ------
    SourceError
        If it cannot be listed, or has images as well.
    """
    try:
        names = os.listdir(os.fsencode(directory))  # noqa: PTH208  # bytes, as of the images
    except OSError as error:
        raise SourceError(
            f"{directory} cannot be listed: {error.strerror}", "check its permissions"
        ) from None
    parts = sorted(name for name in names if name.startswith(b"part-") and name.endswith(b".npy"))
    image = next((name for name in names if is_image_name(name)), None) if parts else None
    if image is not None:
        raise SourceError(
            f"{directory} holds parts of an array, as {os.fsdecode(parts[0])!r}, and images, as "
            f"{os.fsdecode(image)!r}",
            "put the one or the other into a directory of its own",
        )
    return [os.fsdecode(name) for name in parts]


class PartitionedNpySource:
    """The parts of a .npy array as one source.

    Parameters
    ----------
    path
        The directory.
    names
        Its parts, in the order of their rows.
    layout
        Which axis holds the channels.
    dtype_hint
        "bfloat16" where a manifest says that the two-byte elements are that.

    Raises
    ------
    SourceError
        If a part is no `NpySource`, or holds images of another shape or type than the first.
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
        self._stored_as = dtype_hint
        self._open: dict[int, NpySource] = {}
        self._readers: dict[int, int] = {}
        self._lock = threading.Lock()
        headers = list(self._headers())
        images = sum(header.images for header in headers)
        first = headers[0]
        self.header = Header((images, *first.shape[1:]), first.dtype, layout)
        self._starts = [0, *itertools.accumulate(header.images for header in headers)]

    def _headers(self) -> Iterator[Header]:
        """Return the header of every part, and add up their bytes."""
        first = None
        self.stored_bytes = 0
        for name in self._names:
            with contextlib.closing(self._open_checked(name)) as part:
                header = part.header
                self.stored_bytes += part.stored_bytes
            first = first or header
            if (header.shape[1:], header.dtype) != (first.shape[1:], first.dtype):
                raise SourceError(
                    f"{self.path / name} holds images of {header.shape[1:]} {header.dtype}, and "
                    f"{self._names[0]} of {first.shape[1:]} {first.dtype}",
                    "the parts of an array are alike: move others elsewhere",
                )
            yield header

    def fingerprint(self) -> str:
        """Return a hash of the names and of every part's fingerprint, as they are now."""
        digest = xxhash.xxh3_128()
        for name in part_names(self.path):
            with contextlib.closing(self._open_checked(name)) as part:
                digest.update(f"{part.fingerprint()} {name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Chunk:
        """Return images of one part as a view of a mapped window, and of several as a copy.

        Raises
        ------
        StoppedError
            If a part is no longer what it was, or cannot be read.
        """
        number = self._number(start)
        if stop <= self._starts[number + 1]:
            with self._borrowed(number) as part:
                first = self._starts[number]
                return part.read(start - first, stop - first)
        return read_copy(self, start, stop)

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Read as many images as `out` has, from row `start` on; many threads may.

        Raises
        ------
        StoppedError
            If a part is no longer what it was, or cannot be read.
        """
        number, row, stop = self._number(start), start, start + len(out)
        while row < stop:
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            with self._borrowed(number) as part:
                part.read_into(row - first, out[row - start : end - start])
            row, number = end, number + 1

    def close(self) -> None:
        """Close the parts that are open."""
        while self._open:
            self._open.popitem()[1].close()

    def _number(self, row: int) -> int:
        """Return which part a row is in."""
        return bisect.bisect_right(self._starts, row) - 1

    @contextlib.contextmanager
    def _borrowed(self, number: int) -> Iterator[NpySource]:
        """Return a part that stays open meanwhile."""
        with self._lock:
            if number not in self._open:
                self._close_one()
                self._open[number] = self._checked(number)
            self._readers[number] = self._readers.get(number, 0) + 1
        try:
            yield self._open[number]
        finally:
            with self._lock:
                self._readers[number] -= 1

    def _close_one(self) -> None:
        """Close the part that was opened first, of those that nobody reads, if many are open."""
        if len(self._open) >= OPEN_AT_A_TIME:
            idle = next((number for number in self._open if not self._readers[number]), None)
            if idle is not None:
                self._open.pop(idle).close()

    def _checked(self, number: int) -> NpySource:
        """Open a part; refuse one that is not what it was."""
        name, images = self._names[number], self._starts[number + 1] - self._starts[number]
        path = str(self.path / name)
        try:
            part = self._open_checked(name)
        except SourceError as error:
            raise changed_during_run_error(path) from error
        if part.header != Header((images, *self.header.shape[1:]), self.header.dtype, self._layout):
            part.close()
            raise changed_during_run_error(path)
        return part

    def _open_checked(self, name: str) -> NpySource:
        return NpySource(self.path / name, layout=self._layout, dtype_hint=self._stored_as)
