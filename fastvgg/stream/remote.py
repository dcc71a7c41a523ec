"""A run into a store: the journal is objects, and nothing can be renamed, locked or synced.

An object is there whole, or not, and durable once it is there. A shard is put first, and then the
line of the journal that says so. What makes the array one that others can open is put when all of
them are there, and the manifest after that. Two runs of one job at a time write the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastvgg.datasets import remote
from fastvgg.errors import StoppedError, TargetError
from fastvgg.stream.journal import (
    FIRST_NAME,
    Commit,
    Mark,
    StoreLedger,
    journal_path,
    line_name,
    read_ledger,
    seal,
)
from fastvgg.stream.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fastvgg.stream.journal import Ledger

__all__ = ["StoreJournal", "StoreStorage"]


class StoreStorage(Storage):
    """The calls that change a store.

    Every method raises `StoppedError` where the store refuses.
    """

    def put(self, path: Path, data: bytes | bytearray) -> None:
        """Write an object, at once."""
        try:
            remote.put(path, data)
        except OSError as error:
            raise StoppedError.from_os_error(error, "put", str(path), 0) from error

    def remove(self, path: Path) -> None:
        """Remove an object and all below it; missing is fine."""
        try:
            remote.remove(path)
        except OSError as error:
            raise StoppedError.from_os_error(error, "remove", str(path), 0) from error

    def write_whole(self, path: Path, pieces: Iterable[bytes]) -> None:
        """Write an object of pieces."""
        self.put(path, b"".join(pieces))

    def sync_directory(self, path: Path) -> None:
        """Do nothing: what is put is durable."""

    def sync_disk(self, directory: Path) -> None:
        """Do nothing: what is put is durable."""


class StoreJournal:
    """The journal of one target, an object for each line.

    Parameters
    ----------
    target
        The dataset that is being written.
    storage
        What carries out the calls.
    restart
        Begin again, whatever the journal says.
    """

    def __init__(self, target: Path, storage: StoreStorage, *, restart: bool) -> None:
        self.path = journal_path(target)
        self._storage = storage
        self.ledger: Ledger | None = None if restart else read_ledger(self.path)

    def begin(
        self,
        job: dict[str, Any],
        chunk_images: int,
        *,
        replaces: str | None = None,
        done: Iterable[Commit] | None = None,
    ) -> None:
        """Write the first line, in place of whatever was there; see `Journal.begin`.

        Raises
        ------
        TargetError
            If nothing can be written there.
        """
        ledger = StoreLedger(self.path, job, chunk_images, replaces, retries=done is not None)
        try:
            self.remove()
            self._storage.put(self.path / FIRST_NAME, seal(ledger.said()))
        except StoppedError as error:
            raise TargetError(
                f"{error.problem}: nothing was written",
                "check the connection, and the permission to write and to remove there",
            ) from error
        self.ledger = ledger
        for commit in done or ():
            self.commit(commit)

    def commit(self, *commits: Commit) -> None:
        """Record that the bytes of some chunks are durable."""
        for commit in commits:
            self._storage.put(self.path / line_name(commit.chunk), seal(commit.to_dict()))
            if self.ledger is not None:
                self.ledger.commits[commit.chunk] = Mark.of(commit, 0)

    def remove(self) -> None:
        """Remove the journal, of which nothing is left without its first line."""
        self._storage.remove(self.path / FIRST_NAME)
        self._storage.remove(self.path)

    def close(self) -> None:
        """Remove what an earlier run left of a journal that says nothing."""
        if self.ledger is None:
            self._storage.remove(self.path)
