"""Write the journal of a run, on disk or in an object store.

On disk the journal is also the lock: only the process that holds it may write the target.

An object store has no rename, lock or sync. A put is atomic and durable. A shard is put first, then
its journal line. The array's metadata, without which readers cannot open it, is put after all
shards, and the manifest after that. Two concurrent runs of one job write the same bytes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from fastvgg.errors import FastvggError, StoppedError, TargetError, command
from fastvgg.storage import objects
from fastvgg.storage.location import temporary_path
from fastvgg.stream.journal import (
    HEADER_NAME,
    CommitRef,
    JournalState,
    check_is_journal,
    journal_path,
    line_name,
    read_journal,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fastvgg.storage.local import OpenFile, Storage
    from fastvgg.storage.objects import ObjectStorage
    from fastvgg.stream.job import Job
    from fastvgg.stream.journal import Commit


class Journal(ABC):
    """The open journal of a target: a `FileJournal`, or the `StoreJournal` of an object store."""

    state: JournalState | None
    """None before `begin` if there was no valid header, or if a restart ignores it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self,
        job: Job,
        chunk_images: int,
        *,
        replaces: str | None = None,
        committed: Iterable[Commit] | None = None,
    ) -> None:
        """Durably start the journal of a new run, replacing its previous contents.

        `replaces` identifies the existing file or directory that publishing may replace. A retry of
        a finished target has `committed`: the chunks that need no retry.

        Raises
        ------
        TargetError
            If that fails; the previous contents are kept.
        """
        self.state = JournalState(
            self.path, job, chunk_images, replaces, retries=committed is not None
        )
        try:
            self._start(self.state.header_line())
            for commit in committed or ():
                self.state.commits[commit.chunk] = self._append_commit(commit)
            self._sync(is_new=True)
        except StoppedError as error:
            self.state = None
            self._abandon()
            raise error.as_refusal() from error

    def commit(self, *commits: Commit) -> None:
        """Durably record chunks whose bytes are durable."""
        refs = {commit.chunk: self._append_commit(commit) for commit in commits}
        self._sync()
        self.commits.update(refs)

    @property
    def commits(self) -> dict[int, CommitRef]:
        """The commits of the run by chunk; empty before `begin`."""
        return {} if self.state is None else self.state.commits

    def _append_commit(self, commit: Commit) -> CommitRef:
        return CommitRef.of(commit, self._append(line_name(commit.chunk), commit.to_line()))

    @abstractmethod
    def _start(self, header: bytes) -> None:
        """Replace the contents by a header line."""

    def _abandon(self) -> None:  # noqa: B027  # a store has no temporary names
        """Remove what was written of a journal that could not be begun."""

    @abstractmethod
    def _append(self, name: str, line: bytes) -> int:
        """Write a line, which has a name in a store, and return its offset, which is 0 there."""

    @abstractmethod
    def _sync(self, *, is_new: bool = False) -> None:
        """Make the lines durable, and the name of a new journal."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the journal of a finished run."""

    def close(self) -> None:
        """Close the journal; remove it if it has no header.

        A run that is refused keeps the journal of an earlier one, even a damaged one.
        """
        if self.state is None and self._is_void():
            self.remove()

    def _is_void(self) -> bool:
        return not check_is_journal(self.path)


class FileJournal(Journal):
    """The open, locked journal of a target on disk; a restart ignores its contents."""

    def __init__(self, target: Path, storage: Storage, *, restart: bool) -> None:
        super().__init__(journal_path(target))
        self._storage = storage
        self._temporary = temporary_path(self.path)
        self._replaced: OpenFile | None = None
        is_new = not os.path.lexists(self.path)
        self._file: OpenFile = storage.open(self.path, create=True)
        try:
            if not storage.lock(self._file):
                raise TargetError(
                    f"{target} is being written by another process",
                    f"wait for it to finish; its progress: {command('info', target)}",
                )
            self.state = None if restart else read_journal(self.path)
        except FastvggError as error:
            storage.close(self._file)
            if is_new and isinstance(error, StoppedError):  # no lock can be taken there
                storage.remove(self.path)
            raise
        self._end = self.state.valid_bytes if self.state else 0

    def _start(self, header: bytes) -> None:
        """Begin the new journal under a temporary name.

        It replaces the old one when it is durable, so that a crash leaves a whole header, or none.
        Both are locked until then. The name of the old one proves that what has the temporary name
        is ours, whatever a power failure leaves there.
        """
        self._storage.sync_directory(self.path.parent)
        self._replaced, self._file = self._file, self._storage.create(self._temporary)
        self._storage.lock(self._file)
        self._end = 0
        self._append(HEADER_NAME, header)

    def _abandon(self) -> None:
        """Remove the new journal, unless it has replaced another, which proves a partial ours."""
        with suppress(StoppedError):
            self._storage.remove(self._temporary)
            if self._replaced is not None and self._storage.size(self._replaced) == 0:
                self._storage.remove(self.path)

    def _append(self, name: str, line: bytes) -> int:  # noqa: ARG002  # a store needs it
        """Write a line after the last valid one."""
        offset = self._end
        self._storage.truncate(self._file, offset)
        self._storage.write(self._file, line, offset)
        self._end += len(line)
        return offset

    def _sync(self, *, is_new: bool = False) -> None:
        self._storage.sync(self._file)
        if is_new:
            self._storage.rename(self._temporary, self.path)
            self._file = self._file._replace(path=self.path)
            self._storage.sync_directory(self.path.parent)

    def remove(self) -> None:
        """Remove the journal, and keep the lock until it is closed."""
        if os.path.lexists(self._temporary):  # left by a crash; only the journal proves it ours
            self._storage.remove(self._temporary)
            self._storage.sync_directory(self.path.parent)
        self._storage.remove(self.path)
        self._storage.sync_directory(self.path.parent)

    def close(self) -> None:
        """Close the journal as any other, and release the lock."""
        with ExitStack() as closing:  # the lock, whatever fails
            for file in (self._file, self._replaced):
                if file is not None:
                    closing.callback(self._storage.close, file)
            super().close()


class StoreJournal(Journal):
    """The journal of a target in a store; a restart ignores its contents."""

    def __init__(self, target: Path, storage: ObjectStorage, *, restart: bool) -> None:
        super().__init__(journal_path(target))
        self._storage = storage
        self.state = None if restart else read_journal(self.path)

    def _start(self, header: bytes) -> None:
        """Write the header; raise TargetError if nothing can be written there."""
        try:
            self.remove()
            self._append(HEADER_NAME, header)
        except StoppedError as error:
            raise TargetError(
                f"{error.problem}: nothing was written",
                "check the connection, and the permission to write and delete there",
            ) from error

    def _append(self, name: str, line: bytes) -> int:
        self._storage.put(self.path / name, line)
        return 0

    def _sync(self, *, is_new: bool = False) -> None:
        """Do nothing: an object is durable once it is put."""

    def _is_void(self) -> bool:
        return objects.exists(self.path) and super()._is_void()

    def remove(self) -> None:
        """Remove the journal, its header first: without it the journal is void."""
        self._storage.remove(self.path / HEADER_NAME)
        self._storage.remove(self.path)
