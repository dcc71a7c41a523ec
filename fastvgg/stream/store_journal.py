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
    CommitRef,
    JournalState,
    journal_path,
    line_name,
    read_journal,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fastvgg.storage.objects import StoreStorage
    from fastvgg.stream.job import Job


class StoreJournal:
    """The journal of a target in a store, one object per line.

    Parameters
    ----------
    target
        The dataset to be written.
    storage
        Performs the calls.
    restart
        Start over, ignoring the contents of the journal.
    """

    def __init__(self, target: Path, storage: StoreStorage, *, restart: bool) -> None:
        self.path = journal_path(target)
        self._storage = storage
        self.state: JournalState | None = None if restart else read_journal(self.path)

    def begin(
        self,
        job: Job,
        chunk_images: int,
        *,
        replaces: str | None = None,
        committed: Iterable[Commit] | None = None,
    ) -> None:
        """Start the journal of a new run, replacing its previous contents; see `Journal.begin`.

        Raises
        ------
        TargetError
            If nothing can be written there.
        """
        journal_state = JournalState(
            self.path, job, chunk_images, replaces, retries=committed is not None
        )
        try:
            self.remove()
            self._storage.put(self.path / HEADER_NAME, journal_state.header_line())
        except StoppedError as error:
            raise TargetError(
                f"{error.problem}: nothing was written",
                "check the connection, and the permission to write and delete there",
            ) from error
        self.state = journal_state
        for commit in committed or ():
            self.commit(commit)

    def commit(self, *commits: Commit) -> None:
        """Record chunks whose bytes are durable."""
        for commit in commits:
            self._storage.put(self.path / line_name(commit.chunk), commit.to_line())
            if self.state is not None:
                self.state.commits[commit.chunk] = CommitRef.of(commit, 0)

    def remove(self) -> None:
        """Remove the journal, its header first: without it the journal is void."""
        self._storage.remove(self.path / HEADER_NAME)
        self._storage.remove(self.path)

    def close(self) -> None:
        """Remove the remains of a journal that has no header."""
        if self.state is None and objects.exists(self.path):
            self._storage.remove(self.path)
