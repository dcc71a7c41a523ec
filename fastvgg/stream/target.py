"""The target of a run, on disk or in a store, and whether a run may resume or replace it."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import xxhash

from fastvgg.datasets.base import read_sidecar
from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.index import index_path
from fastvgg.datasets.open import open_target
from fastvgg.errors import ResumeError, TargetError
from fastvgg.storage import objects
from fastvgg.storage.local import SharedStorage, Storage
from fastvgg.storage.location import (
    container_of,
    is_remote,
    parse_location,
    sidecar_path,
    with_inner,
)
from fastvgg.storage.objects import StoreStorage
from fastvgg.stream.journal import Journal, journal_path, read_journal
from fastvgg.stream.manifest import read_manifest
from fastvgg.stream.plan import format_bytes
from fastvgg.stream.store_journal import StoreJournal

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

__all__ = [
    "Destination",
    "State",
    "StoreDestination",
    "check_not_occupied",
    "destination_of",
    "inspect_target",
    "open_journal",
    "with_committed",
]

ARRAY: Final = "zarr.json"  # the object that makes a prefix of a store an array
MOVE_AWAY: Final = "move it away, or choose another name"
FILES: Final = ("npy", "hdf5")  # formats whose target is a file, not a directory
State: TypeAlias = Literal["fresh", "resumable", "complete", "failed"]


class TargetState(NamedTuple):
    """What was found at the name of a target."""

    name: State
    """Absent, unfinished or finished; "failed" if the failed images of a finished target are to
    be retried."""
    manifest: Manifest | None
    """The manifest of the finished target, or of the target of which a run retries the failures."""


def destination_of(plan: Plan) -> Destination:
    """Return the destination of a plan."""
    path = container_of(parse_location(plan.target))
    return (StoreDestination if is_remote(path) else Destination)(path, plan.target_format)


def open_journal(path: Path, storage: Storage, *, restart: bool) -> Journal | StoreJournal:
    """Open the journal of a target: a file, or objects for a store."""
    if isinstance(storage, StoreStorage):
        return StoreJournal(path, storage, restart=restart)
    return Journal(path, storage, restart=restart)


class Destination:
    """A file or directory on disk, written under a temporary name until it is complete.

    Parameters
    ----------
    path
        Of the file or directory.
    kind
        Format of the target.
    """

    is_remote = False

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind

    @property
    def partial(self) -> Path:
        """Path of the data of an unfinished run."""
        return sidecar_path(self.path, ".partial")

    @property
    def replaced(self) -> Path:
        """Temporary name of a directory that is being replaced."""
        return sidecar_path(self.path, ".fastvgg-replaced")

    def storage(self, *, fsync: bool) -> Storage:
        """Return the storage that performs durable I/O here."""
        return Storage(fsync=fsync)

    def shared_storage(self, *, fsync: bool) -> Storage:
        """Return the storage for a worker, which writes to a target that another process made."""
        directory = self.path.parent if self.kind in FILES else self.partial
        return SharedStorage(directory, fsync=fsync)

    def exists(self, path: Path) -> bool:
        """Return whether `path` exists.

        Raises
        ------
        TargetError
            If it is in a store that does not respond.
        """
        return os.path.lexists(path)

    def is_occupied(self) -> bool:
        """Return whether the target's name is taken by anything but an empty directory."""
        if self.kind not in FILES and self.path.is_dir() and not self.path.is_symlink():
            return any(self.path.iterdir())
        return os.path.lexists(self.path)

    def is_published(self) -> bool:
        """Return whether a started run has published its data."""
        return not os.path.lexists(self.partial) and os.path.lexists(self.path)

    def predates_run(self, journal_state: JournalState) -> bool:  # noqa: ARG002  # a store needs it
        """Return whether what has the name cannot be the output of the unfinished run."""
        return os.path.lexists(self.partial)

    def identity(self) -> str:
        """Return a string that identifies what has the target's name."""
        status = self.path.lstat()  # inodes of removed directories are reused
        return f"device {status.st_dev}, inode {status.st_ino}, changed {status.st_mtime_ns}"

    def replaceable(self) -> str | None:
        """Return the identity of what a restart may replace; None if the name is free.

        Raises
        ------
        TargetError
            If no manifest or journal proves that fastvgg wrote it and its sidecars, or if it was
            changed since.
        """
        self.check_sidecars()
        if not self.is_occupied():
            return None
        if not self._is_ours():
            raise _foreign_error(self.path, is_directory=self.path.is_dir())
        return self.identity()

    def check_sidecars(self) -> None:
        """Check that the sidecars that a run replaces or removes were written by fastvgg.

        Raises
        ------
        TargetError
            If there is one, but no journal and, for an index, no manifest.
        """
        index = index_path(self.path)
        has_manifest = read_manifest(self.path) is not None
        if self.exists(journal_path(self.path)):
            return
        for path in (self.partial, self.replaced, index):
            is_proven = path == self.path or (path == index and has_manifest)
            if not is_proven and self.exists(path):
                raise TargetError(
                    f"{path} exists, but no journal or manifest shows that fastvgg wrote it",
                    MOVE_AWAY,
                )

    def _is_ours(self) -> bool:
        """Return whether a manifest, or the journal of an interrupted run, proves it ours."""
        if self.path.is_symlink() or self.path.is_dir() == (self.kind in FILES):
            return False
        manifest = read_manifest(self.path)
        if manifest is not None:
            return self.path.is_dir() or _is_as_written(self.path, self.kind, manifest)
        try:
            journal_state = read_journal(journal_path(self.path))
        except ResumeError:
            return False
        if journal_state is None:
            return False
        return (
            journal_state.complete and self.is_published()
        ) or journal_state.replaces == self.identity()

    def move_aside(self, storage: Storage) -> None:
        """Move an existing directory aside: rename cannot replace a non-empty directory."""
        if self.kind not in FILES and os.path.lexists(self.path):
            storage.remove(self.replaced)
            storage.rename(self.path, self.replaced)
            storage.sync_directory(self.path.parent)

    def reopen_published(self, storage: Storage) -> None:
        """Rename a published target back to the partial name, to resume writing it."""
        if self.is_published():
            storage.rename(self.path, self.partial)
            storage.sync_directory(self.path.parent)


class StoreDestination(Destination):
    """Objects of a store, written under their final names.

    Readers can open the array once its metadata exists, which is written last.
    """

    is_remote = True

    @property
    def partial(self) -> Path:
        """Path of the data of an unfinished run: the final one."""
        return self.path

    def storage(self, *, fsync: bool) -> StoreStorage:
        """Return the storage that performs durable I/O here."""
        return StoreStorage(fsync=fsync)

    def shared_storage(self, *, fsync: bool) -> StoreStorage:
        """Return the storage for a worker."""
        return self.storage(fsync=fsync)

    def exists(self, path: Path) -> bool:
        """Return whether an object exists at or below `path`; see `Destination.exists`."""
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

    def is_published(self) -> bool:
        """Return whether there is an array."""
        return self.is_occupied()

    def predates_run(self, journal_state: JournalState) -> bool:
        """Return whether the array existed before the unfinished run, judging by its journal."""
        return not (journal_state.complete or journal_state.retries)

    def identity(self) -> str:
        """Return a string that identifies the array: the checksum of its metadata."""
        return f"metadata {xxhash.xxh3_128_hexdigest(read_sidecar(self.path / ARRAY) or b'')}"

    def replaceable(self) -> str | None:
        """Return the identity of what a restart may replace; see `Destination.replaceable`."""
        self.check_sidecars()
        if not self.exists(self.path):
            return None
        if not self._is_ours():
            raise _foreign_error(self.path, is_directory=True)
        return self.identity()

    def _is_ours(self) -> bool:
        """Return whether there is a manifest, or a journal, whose header precedes the target."""
        if read_manifest(self.path) is not None:
            return True
        try:
            return read_journal(journal_path(self.path)) is not None
        except ResumeError:
            return True

    def move_aside(self, storage: Storage) -> None:
        """Do nothing: creating the target removed what was there."""

    def reopen_published(self, storage: Storage) -> None:
        """Do nothing: objects have no partial name."""


def _foreign_error(path: Path, *, is_directory: bool) -> TargetError:
    """Return the error for a restart that would replace what fastvgg did not write."""
    return TargetError(
        f"{path} is {'a directory' if is_directory else 'a file'} that fastvgg did not "
        f"write{'' if is_directory else ', or that was changed since'}",
        MOVE_AWAY,
    )


def _is_as_written(path: Path, kind: str, manifest: Manifest) -> bool:
    """Return whether a file has the format and length that its manifest records.

    Data added to an HDF5 file would extend it, and another .npy file usually has another length.
    """
    if manifest.job.target_format != kind:
        return False
    location, chunk_images = with_inner(path, manifest.job.dataset), manifest.chunk_images
    written = open_target(location, manifest.header, Storage(), chunk_images=chunk_images)
    return isinstance(written, ContiguousTarget) and path.stat().st_size == written.stored_bytes


def inspect_target(plan: Plan, journal_state: JournalState | None) -> TargetState:
    """Return the state of a plan's target.

    Raises
    ------
    ResumeError
        If the unfinished run has other settings.
    TargetError
        If the target's name is taken by something that this run did not write.
    """
    destination = destination_of(plan)
    if plan.restart:
        destination.replaceable()
        return TargetState("fresh", None)
    if journal_state is not None:
        journal_state.job.check_same(plan.job(), plan.target)
        if destination.predates_run(journal_state):
            check_not_occupied(plan, journal_state.replaces)
        retried = read_manifest(destination.path) if journal_state.retries else None
        return TargetState("resumable", retried)
    manifest = read_manifest(destination.path)
    if manifest is not None and destination.is_occupied():
        is_same = manifest.job == plan.job()
        if plan.retry_failed and (not is_same or manifest.counts["failed"] > 0):
            return TargetState("failed", manifest)
        if is_same:
            return TargetState("complete", manifest)
    check_not_occupied(plan, None)
    if destination.exists(destination.partial):
        raise TargetError(
            f"{destination.partial} exists, but no journal shows that an unfinished run wrote it",
            _remedy(destination),
        )
    destination.check_sidecars()
    return TargetState("fresh", None)


def check_not_occupied(plan: Plan, replaces: str | None) -> None:
    """Check that the target's name is free, or taken only by what the run replaces.

    Raises
    ------
    TargetError
        If something else has the name.
    """
    destination = destination_of(plan)
    if not destination.is_occupied() or destination.identity() == replaces:
        return
    is_foreign = read_manifest(destination.path) is None
    maker = "not written by fastvgg" if is_foreign else "made with other settings or another source"
    raise TargetError(f"{destination.path} exists, and was {maker}", _remedy(destination))


def _remedy(destination: Destination) -> str:
    """Return how to free the names of a run: --restart only if it would not be refused."""
    try:
        destination.replaceable()
    except TargetError as error:
        return error.remedy
    return "choose another name, or give --restart to replace it"


def with_committed(plan: Plan, chunk_images: int, committed_chunks: int) -> Plan:
    """Return the plan with the chunk size and progress of the unfinished run.

    Raises
    ------
    TargetError
        If chunks of that size exceed the present memory limit.
    """
    resumed = dataclasses.replace(
        plan, chunk_images=chunk_images, committed_chunks=committed_chunks
    )
    if resumed.projected_bytes > resumed.memory_bytes:
        raise TargetError(
            f"{plan.target} was started with chunks that need "
            f"{format_bytes(resumed.projected_bytes)}, but the memory limit is "
            f"{format_bytes(plan.memory_bytes)}",
            f"give --memory {-(-resumed.projected_bytes // 2**20)}MiB"
            + ("" if plan.in_place else ", or --restart"),
        )
    return resumed
