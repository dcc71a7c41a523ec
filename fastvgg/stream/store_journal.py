"""The journal of a run into an object store, which has no rename, lock or sync.

A put is atomic and durable. A shard is put first, then its journal line. The array's metadata,
without which readers cannot open it, is put after all shards, and the manifest after that. Two
concurrent runs of one job write the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvgg.errors import StoppedError, TargetError
from fastvgg.storage import objects
from fastvgg.stream.journal import (
    HEADER_NAME,
    Commit,
    Journal,
    journal_path,
    line_name,
    read_journal,
)

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.storage.objects import StoreStorage


class StoreJournal(Journal):
    """The journal of a target in a store, one object per line; a restart ignores its contents."""

    def __init__(self, target: Path, storage: StoreStorage, *, restart: bool) -> None:
        super().__init__(journal_path(target))
        self._storage = storage
        self.state = None if restart else read_journal(self.path)

    def _start(self, header: bytes) -> None:
        """Write the header; raise TargetError if nothing can be written there."""
        try:
            self.remove()
            self._storage.put(self.path / HEADER_NAME, header)
        except StoppedError as error:
            raise TargetError(
                f"{error.problem}: nothing was written",
                "check the connection, and the permission to write and delete there",
            ) from error

    def _append(self, commit: Commit) -> int:
        self._storage.put(self.path / line_name(commit.chunk), commit.to_line())
        return 0

    def _sync(self, *, is_new: bool = False) -> None:
        """Do nothing: an object is durable once it is put."""

    def _is_void(self) -> bool:
        return objects.exists(self.path) and super()._is_void()

    def remove(self) -> None:
        """Remove the journal, its header first: without it the journal is void."""
        self._storage.remove(self.path / HEADER_NAME)
        self._storage.remove(self.path)
