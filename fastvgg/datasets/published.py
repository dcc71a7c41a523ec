"""The interface of a published dataset: what verification reads, and what a repair overwrites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

MIN_SPAN_BYTES: Final = 64 * 1024


class PublishedDataset(ABC):
    """A finished dataset of fastvgg, under its final name."""

    def inspect_published(self) -> list[str]:
        """Return what is wrong with its header and its length.

        Afterwards `stored_spans` reads its rows regardless. Raises OSError, or SourceError, if
        there is nothing to read.
        """
        return []

    @property
    def min_span_bytes(self) -> int:
        """Bytes of the smallest span that is stored as a unit."""
        return MIN_SPAN_BYTES

    @abstractmethod
    def stored_spans(self, start: int, stop: int, max_bytes: int) -> Iterator[bytes | memoryview]:
        """Yield the payload of rows in spans; thread-safe.

        A span has at most `max_bytes` and `min_span_bytes`, whichever is more, and is valid until
        the next one is requested.

        Raises
        ------
        FastvggError, OSError
            If a row cannot be read.
        """

    @abstractmethod
    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Read, and decode if necessary, rows."""

    def repair_header(self) -> list[str]:
        """Restore the header and the length; return what `inspect_published` then finds.

        Nothing is removed or overwritten that may be someone else's.
        """
        return self.inspect_published()

    @abstractmethod
    def repair(self, start: int, stored: Sequence[bytes | memoryview]) -> None:
        """Overwrite damaged rows durably with their payload.

        A crash leaves every byte as it was, or as it should be.
        """
