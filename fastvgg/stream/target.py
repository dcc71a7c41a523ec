"""Where a target goes, and what has its name already: on a disk, or in a store."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import xxhash

from fastvgg.datasets.base import read_sidecar
from fastvgg.datasets.contiguous import ContiguousTarget
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
from fastvgg.stream.store_journal import StoreJournal

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

__all__ = ["Destination", "StoreDestination", "destination_of", "open_journal"]

ARRAY: Final = "zarr.json"  # what makes objects of a store an array
FILES: Final = ("npy", "hdf5")  # what a target is that is no directory


def destination_of(plan: Plan) -> Destination:
    """Return where a plan's target goes."""
    path = container_of(parse_location(plan.target))
    return (StoreDestination if is_remote(path) else Destination)(path, plan.target_format)


def open_journal(path: Path, storage: Storage, *, restart: bool) -> Journal | StoreJournal:
    """Open the journal of a target, of the kind that goes with what writes the target."""
    if isinstance(storage, StoreStorage):
        return StoreJournal(path, storage, restart=restart)
    return Journal(path, storage, restart=restart)


class Destination:
    """A file or a directory on a disk, under another name until it is complete.

    Parameters
    ----------
    path
        Of the file, or the directory.
    kind
        Of the target.
    """

    is_remote = False

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind

    @property
    def partial(self) -> Path:
        """What has the bytes of an unfinished run."""
        return sidecar_path(self.path, ".partial")

    @property
    def replaced(self) -> Path:
        """Where a directory waits that is being replaced."""
        return sidecar_path(self.path, ".fastvgg-replaced")

    def storage(self, *, fsync: bool) -> Storage:
        """Return what carries out the calls that make data last there."""
        return Storage(fsync=fsync)

    def shared_storage(self, *, fsync: bool) -> Storage:
        """Return what carries out the calls of one that others began, and write as well."""
        within = self.path.parent if self.kind in FILES else self.partial
        return SharedStorage(within, fsync=fsync)

    def exists(self, path: Path) -> bool:
        """Whether something there has a name.

        Raises
        ------
        TargetError
            If it is in a store that does not answer.
        """
        return os.path.lexists(path)

    def is_occupied(self) -> bool:
        """Whether something has the target's name that is more than an empty directory."""
        if self.kind not in FILES and self.path.is_dir() and not self.path.is_symlink():
            return any(self.path.iterdir())
        return os.path.lexists(self.path)

    def is_published(self) -> bool:
        """Whether a run that began gave its data the name."""
        return not os.path.lexists(self.partial) and os.path.lexists(self.path)

    def predates_run(self, journal_state: JournalState) -> bool:  # noqa: ARG002  # a store needs it
        """Whether what has the name cannot be what the unfinished run made."""
        return os.path.lexists(self.partial)

    def identity(self) -> str:
        """Return what tells the thing that has the name from any other that might come."""
        status = self.path.lstat()  # a new directory may get the inode of one that was removed
        return f"device {status.st_dev}, inode {status.st_ino}, changed {status.st_mtime_ns}"

    def replaceable(self) -> str | None:
        """Return the identity of what a restart may replace; None where there is nothing.

        Raises
        ------
        TargetError
            If it is a directory, or an HDF5 file, that fastvgg did not write, or not alone: it may
            hold anything.
        """
        if not self.is_occupied():
            return None
        is_directory = self.path.is_dir()
        if is_directory or self.kind == "hdf5":
            was_written = is_directory != (self.kind in FILES) and self._is_ours()
            if not was_written:
                raise _foreign(self.path, is_directory=is_directory)
        return self.identity()

    def _is_ours(self) -> bool:
        """Whether it has a manifest, or the journal of a run that was cut off knows it."""
        manifest = read_manifest(self.path)
        if manifest is not None:
            return self.path.is_dir() or _is_as_written(self.path, manifest)
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
        """Move away a directory that has the name: one cannot be renamed over another."""
        if self.kind not in FILES and os.path.lexists(self.path):
            storage.remove(self.replaced)
            storage.rename(self.path, self.replaced)
            storage.sync_directory(self.path.parent)

    def reopen_published(self, storage: Storage) -> None:
        """Make what has the name the bytes of an unfinished run."""
        if self.is_published():
            storage.rename(self.path, self.partial)
            storage.sync_directory(self.path.parent)


class StoreDestination(Destination):
    """Objects of a store, which are the target's from the first on.

    Others can open the array from when its metadata is put, as the last of its objects.
    """

    is_remote = True

    @property
    def partial(self) -> Path:
        """What has the bytes of an unfinished run."""
        return self.path

    def storage(self, *, fsync: bool) -> StoreStorage:
        """Return what carries out the calls that make data last there."""
        return StoreStorage(fsync=fsync)

    def shared_storage(self, *, fsync: bool) -> StoreStorage:
        """Return what carries out the calls of any."""
        return self.storage(fsync=fsync)

    def exists(self, path: Path) -> bool:
        """Whether there is an object of a name, or one below it; see `Destination.exists`."""
        try:
            return objects.exists(path)
        except OSError as error:
            raise TargetError(
                f"{path} cannot be reached: {error.strerror or error}",
                "check the URL, the connection, and the permission to read there",
            ) from None

    def is_occupied(self) -> bool:
        """Whether there is an array."""
        return self.exists(self.path / ARRAY)

    def is_published(self) -> bool:
        """Whether there is an array."""
        return self.is_occupied()

    def predates_run(self, journal_state: JournalState) -> bool:
        """Whether there was an array when the unfinished run began, as far as its journal tells."""
        return not (journal_state.complete or journal_state.retries)

    def identity(self) -> str:
        """Return what tells the array from any other that might come."""
        return f"metadata {xxhash.xxh3_128_hexdigest(read_sidecar(self.path / ARRAY) or b'')}"

    def replaceable(self) -> str | None:
        """Return the identity of what a restart may replace; see `Destination.replaceable`."""
        if not self.exists(self.path):
            return None
        if not self._is_ours():
            raise _foreign(self.path, is_directory=True)
        return self.identity()

    def _is_ours(self) -> bool:
        """Whether there is a manifest or a journal, whose first line is there before the target."""
        if read_manifest(self.path) is not None:
            return True
        try:
            return read_journal(journal_path(self.path)) is not None
        except ResumeError:
            return True

    def move_aside(self, storage: Storage) -> None:
        """Do nothing: what was there went when the run began."""

    def reopen_published(self, storage: Storage) -> None:
        """Do nothing: objects have no other name."""


def _foreign(path: Path, *, is_directory: bool) -> TargetError:
    """Return the error that refuses to replace what fastvgg did not write."""
    return TargetError(
        f"{path} is {'a directory' if is_directory else 'an HDF5 file'} that fastvgg did not "
        f"write{'' if is_directory else ', or that was changed since'}",
        "choose another name, or remove it yourself",
    )


def _is_as_written(path: Path, manifest: Manifest) -> bool:
    """Whether an HDF5 file has the length that it was written with: what is added takes more."""
    if not manifest.dataset or not path.is_file():
        return False
    together = manifest.chunk_images
    location = with_inner(path, manifest.dataset)
    written = open_target(location, manifest.header, Storage(), chunk_images=together)
    return isinstance(written, ContiguousTarget) and path.stat().st_size == written.stored_bytes
