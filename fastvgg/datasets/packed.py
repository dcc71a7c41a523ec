"""Millions of short byte strings, such as file names, in contiguous memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["PackedNames", "first_repeated", "name_hashes"]


class PackedNames(Sequence[bytes]):
    """A sequence of byte strings with an overhead of 8 bytes each.

    The overhead of a Python list of bytes objects is 50 to 60 bytes higher.

    Examples
    --------
    >>> names = PackedNames([b"cat/a.jpg", b"dog/b.jpg"])
    >>> names.append(b"")
    >>> len(names), names[1], names[-1], names[:2]
    (3, b'dog/b.jpg', b'', [b'cat/a.jpg', b'dog/b.jpg'])
    """

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        self._text = bytearray()
        self._ends = array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: bytes) -> None:
        """Append a name."""
        self._text += name
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        row = range(len(self))[index]
        return bytes(self._text[self._ends[row] : self._ends[row + 1]])


def first_repeated(names: Iterable[bytes]) -> tuple[int, int] | None:
    """Return the positions of the first repeated name, its second and its first; or None.

    Names are compared by their 64-bit hashes. For a million distinct names, the probability of a
    collision is 1 in 37 million.

    >>> first_repeated([b"a", b"b", b"c", b"b"])
    (3, 1)
    """
    hashes = name_hashes(names)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if not len(same):
        return None
    pair = same[np.argmin(order[same + 1])]
    return int(order[pair + 1]), int(order[pair])


def name_hashes(names: Iterable[bytes]) -> NDArray[np.uint64]:
    """Return the 64-bit hash of every name."""
    return np.fromiter((xxhash.xxh3_64_intdigest(name) for name in names), np.uint64)
