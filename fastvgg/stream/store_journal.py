"""A run into a store: the journal is objects, and nothing can be renamed, locked or synced.

An object is there whole, or not, and durable once it is there. A shard is put first, and then the
line of the journal that says so. What makes the array one that others can open is put when all of
them are there, and the manifest after that. Two runs of one job at a time write the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastvgg.errors import StoppedError, TargetError
from fastvgg.stream.journal import (
    HEADER_NAME,
    Commit,
    CommitRef,
    StoreJournalState,
    encode_line,
    journal_path,
    line_name,
    read_journal,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fastvgg.storage.objects import StoreStorage
    from fastvgg.stream.journal import JournalState

__all__ = ["StoreJournal"]


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
        self.state: JournalState | None = None if restart else read_journal(self.path)

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
        journal_state = StoreJournalState(
            self.path, job, chunk_images, replaces, retries=done is not None
        )
        try:
            self.remove()
            self._storage.put(self.path / HEADER_NAME, encode_line(journal_state.header_fields()))
        except StoppedError as error:
            raise TargetError(
                f"{error.problem}: nothing was written",
                "check the connection, and the permission to write and to remove there",
            ) from error
        self.state = journal_state
        for commit in done or ():
            self.commit(commit)

    def commit(self, *commits: Commit) -> None:
        """Record that the bytes of some chunks are durable."""
        for commit in commits:
            self._storage.put(self.path / line_name(commit.chunk), encode_line(commit.to_dict()))
            if self.state is not None:
                self.state.commits[commit.chunk] = CommitRef.of(commit, 0)

    def remove(self) -> None:
        """Remove the journal, of which nothing is left without its first line."""
        self._storage.remove(self.path / HEADER_NAME)
        self._storage.remove(self.path)

    def close(self) -> None:
        """Remove what an earlier run left of a journal that says nothing."""
        if self.state is None:
            self._storage.remove(self.path)
