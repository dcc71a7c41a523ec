"""The target of a run: where it is written, on disk or in a store, and what is there.

From that follows whether a run may create, resume or replace it.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, cast

import xxhash

from fastvgg.datasets.base import read_sidecar
from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.formats import TARGETS
from fastvgg.datasets.index import index_path
from fastvgg.datasets.open import open_target
from fastvgg.errors import ResumeError, TargetError, option
from fastvgg.formatting import format_bytes
from fastvgg.storage import objects
from fastvgg.storage.local import SharedStorage, Storage
from fastvgg.storage.location import Location, sidecar_path, temporary_path
from fastvgg.storage.objects import ObjectStorage
from fastvgg.stream.journal import check_is_journal, journal_path, read_journal
from fastvgg.stream.journal_writer import FileJournal, StoreJournal
from fastvgg.stream.manifest import manifest_path, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.stream.job import Job
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.journal_writer import Journal
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

ARRAY: Final = "zarr.json"  # the object that makes a prefix of a store an array
MOVE_AWAY: Final = "move it away, or choose another name"


class TargetState(NamedTuple):
    """The dataset or unfinished run that was found at the name of a target."""

    name: Literal["fresh", "resumable", "complete", "failed"]
    """Absent, unfinished or finished; "failed" if the failed images of a finished target are to
    be retried."""
    plan: Plan
    """The plan, with the chunk size and progress of a run that it resumes."""
    manifest: Manifest | None = None
    """The manifest of the finished target, or of the target whose failures a run retries."""
    replaces: str | None = None
    """Identity of what a restart replaces."""


def make_destination(plan: Plan, storage: Storage | ObjectStorage | None = None) -> Destination:
    """Return the destination of a plan; `storage` performs its durable I/O."""
    path, kind = plan.target.container, plan.job.target_format
    if plan.target.is_remote:
        return StoreDestination(path, cast("ObjectStorage", storage or ObjectStorage()))
    return DiskDestination(path, kind, cast("Storage", storage or Storage(fsync=plan.fsync)))


class Destination(ABC):
    """Where a target is written: a file or directory, or a name in a store."""

    storage: Storage | ObjectStorage
    """Performs durable I/O here."""
    partial: Path
    """Path of the data of an unfinished run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replaced = sidecar_path(path, ".fastvgg-replaced")
        """Temporary name of a directory that is being replaced."""
        self.temporaries: tuple[Path, ...] = ()
        """Other temporary names next to the target."""

    def shared_storage(self) -> Storage | ObjectStorage:
        """Return the storage for a worker, which writes to a target that another process made."""
        return self.storage

    @abstractmethod
    def open_journal(self, *, restart: bool) -> Journal:
        """Open the journal, and take its lock where there is one.

        Raises TargetError if something else has its name, or another process holds the lock.
        """

    @abstractmethod
    def exists(self, path: Path) -> bool:
        """Return whether `path` exists; raise TargetError if its store does not respond."""

    @abstractmethod
    def is_occupied(self) -> bool:
        """Return whether the target's name is taken by anything but an empty directory."""

    @abstractmethod
    def _replaced_type(self) -> str | None:
        """Return whether a restart would replace "a file" or "a directory"; None if neither."""

    def is_published(self) -> bool:
        """Return whether a started run has published its data."""
        return self.is_occupied()

    def predates_run(self, journal_state: JournalState) -> bool:
        """Return whether the existing target cannot be the output of the unfinished run.

        A run publishes its target after it committed every chunk; a retry reopens a finished one.
        """
        return not (journal_state.complete or journal_state.retries)

    @abstractmethod
    def identity(self) -> str:
        """Return a string that identifies what has the target's name."""

    @abstractmethod
    def _is_ours(self, manifest: Manifest | None) -> bool:
        """Return whether a manifest, or the journal of an interrupted run, proves it ours."""

    def check_replaceable(self) -> str | None:
        """Return the identity of what a restart may replace; None if the name is free.

        Raises
        ------
        TargetError
            If no manifest or journal proves that fastvgg wrote it and its sidecars, or if it was
            changed since.
        """
        manifest = read_manifest(self.path)
        self.check_sidecars(manifest)
        found = self._replaced_type()
        if found is not None and not self._is_ours(manifest):
            problem = f"{self.path} is {found} that fastvgg did not write"
            changed = ", or that was changed since" if found == "a file" else ""
            raise TargetError(problem + changed, MOVE_AWAY)
        return None if found is None else self.identity()

    def check_sidecars(self, manifest: Manifest | None) -> None:
        """Check that the sidecars that a run replaces or removes were written by fastvgg.

        A journal proves it; of an index, also the manifest.
        """
        index = index_path(self.path)
        if check_is_journal(journal_path(self.path)):
            return
        for path in (*self.temporaries, self.replaced, index):
            is_proven = path == index and manifest is not None
            if not is_proven and self.exists(path):
                raise TargetError(
                    f"{path} exists, but no journal or manifest shows that fastvgg wrote it",
                    MOVE_AWAY,
                )

    def sync_existing(self) -> None:  # noqa: B027  # an object is durable once it is put
        """Make durable what a killed run has written."""

    def move_aside(self) -> None:  # noqa: B027  # creating a target in a store removed it
        """Move an existing directory aside: rename cannot replace a non-empty directory."""

    def reopen_published(self) -> None:  # noqa: B027  # objects have no partial name
        """Rename a published target back to the partial name, to resume writing it."""


class DiskDestination(Destination):
    """A file or directory on disk, written under a temporary name until it is complete."""

    def __init__(self, path: Path, kind: str, storage: Storage) -> None:
        super().__init__(path)
        self.kind = kind
        self.is_file = TARGETS[kind].target == "file"
        self.storage: Storage = storage
        self.partial = sidecar_path(path, ".partial")
        written = index_path(path), manifest_path(path)
        self.temporaries = (self.partial, *map(temporary_path, written))

    def shared_storage(self) -> Storage:
        directory = self.path.parent if self.is_file else self.partial
        return SharedStorage(directory, fsync=self.storage.fsync)

    def open_journal(self, *, restart: bool) -> Journal:
        check_is_journal(journal_path(self.path))
        return FileJournal(self.path, self.storage, restart=restart)

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def is_occupied(self) -> bool:
        if not self.is_file and self.path.is_dir() and not self.path.is_symlink():
            return any(self.path.iterdir())
        return os.path.lexists(self.path)

    def is_published(self) -> bool:
        return not os.path.lexists(self.partial) and os.path.lexists(self.path)

    def predates_run(self, journal_state: JournalState) -> bool:
        return os.path.lexists(self.partial) or super().predates_run(journal_state)

    def identity(self) -> str:
        status = self.path.lstat()  # inodes of removed directories are reused
        return f"device {status.st_dev}, inode {status.st_ino}, changed {status.st_mtime_ns}"

    def _is_ours(self, manifest: Manifest | None) -> bool:
        if self.path.is_symlink() or self.path.is_dir() == self.is_file:
            return False
        if manifest is not None:
            return self._is_as_written(manifest)
        try:
            state = read_journal(journal_path(self.path))
        except ResumeError:
            return False
        if state is None:
            return False
        if state.replaces == self.identity():
            return True
        return state.complete and self.is_published() and self._is_as_written(state)

    def _replaced_type(self) -> str | None:
        if not self.is_occupied():
            return None
        return "a directory" if self.path.is_dir() else "a file"

    def _is_as_written(self, record: Manifest | JournalState) -> bool:
        """Return whether a file has the recorded format and length; a directory is not compared.

        Data added to an HDF5 file would extend it, and another .npy file usually has another
        length.
        """
        if self.path.is_dir():
            return True
        job, location = record.job, Location(self.path, record.job.dataset)
        if job.target_format != self.kind:
            return False
        written = open_target(location, job.result, chunk_images=record.chunk_images)
        if not isinstance(written, ContiguousTarget):
            return False
        return self.path.stat().st_size == written.stored_bytes

    def sync_existing(self) -> None:
        self.storage.syncfs(self.path.parent)

    def move_aside(self) -> None:
        if not self.is_file and os.path.lexists(self.path):
            self.storage.remove(self.replaced)
            self.storage.rename(self.path, self.replaced)
            self.storage.sync_directory(self.path.parent)

    def reopen_published(self) -> None:
        if self.is_published():
            self.storage.rename(self.path, self.partial)
            self.storage.sync_directory(self.path.parent)


class StoreDestination(Destination):
    """Objects of a store, written under their final names.

    Readers can open the array once its metadata exists, which is written last.
    """

    def __init__(self, path: Path, storage: ObjectStorage) -> None:
        super().__init__(path)
        self.storage: ObjectStorage = storage
        self.partial = path

    def open_journal(self, *, restart: bool) -> Journal:
        return StoreJournal(self.path, self.storage, restart=restart)

    def exists(self, path: Path) -> bool:
        """Return whether an object exists at or below `path`."""
        try:
            return objects.exists(path)
        except OSError as error:
            raise TargetError(
                f"{path} cannot be reached: {error.strerror or error}",
                "check the URL, the connection, and the permission to read there",
            ) from None

    def is_occupied(self) -> bool:
        """Return whether there is an array."""
        return self.exists(self.path / ARRAY)

    def _replaced_type(self) -> str | None:
        return "a directory" if self.exists(self.path) else None  # also without an array's metadata

    def identity(self) -> str:
        """Return a string that identifies the array: the checksum of its metadata."""
        return f"metadata {xxhash.xxh3_128_hexdigest(read_sidecar(self.path / ARRAY) or b'')}"

    def _is_ours(self, manifest: Manifest | None) -> bool:
        """Return whether there is a manifest, or a journal, whose header precedes the target."""
        if manifest is not None:
            return True
        try:
            return read_journal(journal_path(self.path)) is not None
        except ResumeError:
            return True


def inspect_target(
    plan: Plan, destination: Destination, journal_state: JournalState | None
) -> TargetState:
    """Return the state of a plan's target, which is at `destination`.

    Raises
    ------
    ResumeError
        If the unfinished run has other settings.
    TargetError
        If the target's name is taken by something that this run did not write, or a run that it
        resumes needs more memory.
    """
    if plan.restart:
        return TargetState("fresh", plan, replaces=destination.check_replaceable())
    if journal_state is not None:
        journal_state.job.check_same(plan.job, str(plan.target))
        if destination.predates_run(journal_state):
            check_not_occupied(destination, plan.job, journal_state.replaces)
        retried = read_manifest(destination.path) if journal_state.retries else None
        resumed = with_committed(plan, journal_state.chunk_images, len(journal_state.commits))
        return TargetState("resumable", resumed, retried)
    manifest = read_manifest(destination.path)
    if manifest is not None and destination.is_occupied():
        is_same = manifest.job == plan.job
        if plan.retry_failed and (not is_same or manifest.counts["failed"] > 0):
            destination.check_sidecars(manifest)
            return TargetState("failed", plan, manifest)
        if is_same:
            return TargetState("complete", plan, manifest)
    check_not_occupied(destination, plan.job, None)
    if destination.exists(destination.partial):
        raise TargetError(
            f"{destination.partial} exists, but no journal shows that an unfinished run wrote it",
            _remedy(destination),
        )
    destination.check_sidecars(manifest)
    return TargetState("fresh", plan)


def check_not_occupied(destination: Destination, job: Job, replaces: str | None) -> None:
    """Check that the target's name is free, or taken only by what the run replaces."""
    if not destination.is_occupied() or destination.identity() == replaces:
        return
    manifest, maker = read_manifest(destination.path), "not written by fastvgg"
    if manifest is not None:
        differences = "; ".join(manifest.job.differences(job))
        maker = f"made with other settings: {differences}" if differences else "made by another run"
    raise TargetError(f"{destination.path} exists, and was {maker}", _remedy(destination))


def _remedy(destination: Destination) -> str:
    """Return how to free the names of a run: to restart only if that would not be refused."""
    try:
        destination.check_replaceable()
    except TargetError as error:
        return error.remedy
    return f"choose another name, or give {option('restart')} to replace it"


def with_committed(plan: Plan, chunk_images: int, committed_chunks: int) -> Plan:
    """Return the plan with the chunk size and progress of an unfinished run; check that it fits."""
    resumed = dataclasses.replace(
        plan, chunk_images=chunk_images, committed_chunks=committed_chunks
    )
    if resumed.projected_bytes > resumed.memory_bytes:
        raise TargetError(
            f"{plan.target} was started with chunks that need "
            f"{format_bytes(resumed.projected_bytes)}, but the memory limit is "
            f"{format_bytes(plan.memory_bytes)}",
            f"give {option('memory', f'{-(-resumed.projected_bytes // 2**20)}MiB')}"
            + ("" if plan.job.in_place else f", or {option('restart')}"),
        )
    return resumed
