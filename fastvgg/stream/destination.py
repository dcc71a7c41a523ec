"""Where a run writes its target, on disk or in a store, and what it may replace there."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

import xxhash

from fastvgg.datasets.files import read_sidecar
from fastvgg.datasets.formats import TARGETS
from fastvgg.datasets.index import index_path
from fastvgg.errors import ResumeError, StoppedError, TargetError
from fastvgg.storage import objects
from fastvgg.storage.local import Storage
from fastvgg.storage.location import sidecar_path, temporary_path
from fastvgg.storage.objects import ObjectStorage
from fastvgg.storage.shared import SharedStorage
from fastvgg.stream.journal import check_is_journal, journal_path, read_journal
from fastvgg.stream.journal_writer import FileJournal, StoreJournal
from fastvgg.stream.manifest import manifest_path, read_manifest
from fastvgg.stream.ownership import Written, find_change, find_changed_index, find_foreign_name

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.storage.location import Location
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.journal_writer import Journal
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

REPLACED: Final = ".fastvgg-replaced"
ARRAY: Final = "zarr.json"  # the object that makes a prefix of a store an array
ARRAY_NAME_PATTERN: Final = re.compile(r"zarr\.json|c(\.\d+){4}")
MOVE_AWAY: Final = "move it away, or choose another name"


def make_destination(plan: Plan, storage: Storage | ObjectStorage | None = None) -> Destination:
    """Return the destination of a plan; `storage` performs its durable I/O."""
    kind = plan.job.target_format
    if plan.target.is_remote:
        return StoreDestination(plan.target, cast("ObjectStorage", storage or ObjectStorage()))
    disk = cast("Storage", storage or Storage(fsync=plan.fsync))
    return DiskDestination(plan.target, kind, disk)


class Destination(ABC):
    """Where a target is written: a file or directory, or a name in a store."""

    storage: Storage | ObjectStorage
    """Performs durable I/O here."""
    partial: Path
    """Path of the data of an unfinished run."""

    def __init__(self, location: Location) -> None:
        self.path = path = location.container
        self.dataset = location.inner
        replaced = sidecar_path(path, REPLACED)
        self.set_aside_names = (
            (manifest_path(path), manifest_path(replaced)),
            (index_path(path), index_path(replaced)),
            (path, replaced),
        )
        """What a run replaces, and its temporary names until the run is finished."""
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

    def run_names(self) -> tuple[Path, ...]:
        """Return those names that exist only before, during or after a run; none of a store."""
        return ()

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
    def _find_change(self, manifest: Manifest | None, *, read: bool) -> str | None:
        """Return why no manifest or journal proves that fastvgg wrote it; None if one does."""

    def check_replaceable(self, *, read: bool = False) -> str | None:
        """Return the identity of what a restart may replace; None if the name is free.

        With `read`, every byte is compared with its checksum.

        Raises
        ------
        TargetError
            If no manifest or journal proves that fastvgg wrote it and its sidecars, or if it was
            changed since.
        """
        manifest = read_manifest(self.path)
        self.check_sidecars(manifest)
        found = self._replaced_type()
        if found is None:
            return None
        change = self._find_change(manifest, read=read)
        if change is not None:
            raise TargetError(
                f"{self.path} is {found} that fastvgg did not write, or that was changed since: "
                f"{change}",
                MOVE_AWAY,
            )
        return self.identity()

    def _find_change_of(self, written: Written, *, read: bool) -> str | None:
        if written.job.dataset != self.dataset:
            return f"it contains another dataset, {written.job.dataset}"
        return find_change(self.path, written, read=read)

    def check_sidecars(self, manifest: Manifest | None) -> None:
        """Check that the sidecars that a run replaces or removes were written by fastvgg.

        A journal proves it; of an index, also the manifest's checksum.
        """
        index = index_path(self.path)
        if check_is_journal(journal_path(self.path)):
            return
        for path in (*self.temporaries, *(name for _, name in self.set_aside_names), index):
            is_proven = path == index and manifest is not None
            if not is_proven and self.exists(path):
                raise TargetError(
                    f"{path} exists, but no journal or manifest shows that fastvgg wrote it",
                    MOVE_AWAY,
                )
        change = None if manifest is None else find_changed_index(self.path, manifest)
        if change is not None:
            raise TargetError(f"{change} since fastvgg wrote it", MOVE_AWAY)

    def sync_existing(self) -> None:  # noqa: B027  # an object is durable once it is put
        """Make durable what a killed run has written."""

    def check_movable(self) -> None:  # noqa: B027  # objects are not moved
        """Check that what the run replaces can be renamed; raise TargetError otherwise."""

    @abstractmethod
    def set_aside(self) -> None:
        """Give what the run replaces its temporary names, before the result gets its name.

        A manifest must never be beside data that it does not describe. A file is replaced by the
        rename that publishes the result; a directory that is not empty cannot be.
        """

    def put_back(self) -> None:  # noqa: B027  # a store has no rename
        """Undo `set_aside`, if the result did not get its name."""

    @abstractmethod
    def remove_set_aside(self) -> None:
        """Durably remove what the run replaced."""

    def reopen_published(self) -> None:  # noqa: B027  # objects have no partial name
        """Rename a published target back to the partial name, to resume writing it."""


class DiskDestination(Destination):
    """A file or directory on disk, written under a temporary name until it is complete."""

    def __init__(self, location: Location, kind: str, storage: Storage) -> None:
        super().__init__(location)
        self.kind = kind
        self.is_file = TARGETS[kind].target == "file"
        self.storage: Storage = storage
        self.partial = sidecar_path(self.path, ".partial")
        written = index_path(self.path), manifest_path(self.path)
        self.temporaries = (self.partial, *map(temporary_path, written))

    def shared_storage(self) -> Storage:
        directory = self.path.parent if self.is_file else self.partial
        return SharedStorage(directory, fsync=self.storage.fsync)

    def check_sidecars(self, manifest: Manifest | None) -> None:
        super().check_sidecars(manifest)
        if not self.partial.is_dir() or self.partial.is_symlink():
            return
        try:
            state = read_journal(journal_path(self.path))
        except ResumeError:  # a damaged journal does not tell which names are ours
            return
        if state is None:
            return
        written = Written.by_unfinished(state)
        change = find_foreign_name(self.path, written, below=self.partial)
        if change is not None:
            raise TargetError(change, MOVE_AWAY)

    def open_journal(self, *, restart: bool) -> Journal:
        check_is_journal(journal_path(self.path))
        try:
            return FileJournal(self.path, self.storage, restart=restart)
        except StoppedError as error:
            raise error.as_refusal() from error

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def run_names(self) -> tuple[Path, ...]:
        names = journal_path(self.path), self.partial, manifest_path(self.path)
        return tuple(filter(os.path.lexists, names))

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

    def _find_change(self, manifest: Manifest | None, *, read: bool) -> str | None:
        if self.path.is_symlink() or self.path.is_dir() == self.is_file:
            return "fastvgg writes no such thing there"
        if manifest is not None:
            written = Written.by_manifest(manifest)
        else:
            try:
                state = read_journal(journal_path(self.path))
            except ResumeError as error:
                return error.problem
            if state is not None and state.replaces == self.identity():
                return None  # proven when that run began
            if state is None or not (state.complete and self.is_published()):
                return "no manifest describes it"
            written = Written.by_journal(state)
        if written.job.target_format != self.kind:
            return f"its manifest describes {written.job.target_format}"
        return self._find_change_of(written, read=read)

    def _replaced_type(self) -> str | None:
        if not self.is_occupied():
            return None
        return "a directory" if self.path.is_dir() else "a file"

    def sync_existing(self) -> None:
        self.storage.syncfs(self.path.parent)

    def check_movable(self) -> None:
        _, scratch = self.set_aside_names[-1]
        for path, _ in self.set_aside_names:
            if not os.path.lexists(path):
                continue
            try:
                self.storage.check_movable(path, scratch)
            except StoppedError as error:
                with suppress(StoppedError):
                    self.storage.remove(scratch)
                raise TargetError(
                    f"{path} cannot be replaced: {error.problem}; nothing was written",
                    "choose another name, or have its owner move it away",
                ) from error

    def set_aside(self) -> None:
        is_moved = False
        for path, aside in self.set_aside_names:
            is_replaced_by_rename = path == self.path and (self.is_file or not self.is_occupied())
            if os.path.lexists(path) and not is_replaced_by_rename:
                self.storage.remove(aside)
                self.storage.rename(path, aside)
                is_moved = True
        if is_moved:
            self.storage.sync_directory(self.path.parent)

    def put_back(self) -> None:
        if self.is_published():
            return
        for path, aside in reversed(self.set_aside_names):
            if os.path.lexists(aside) and not os.path.lexists(path):
                self.storage.rename(aside, path)
        self.storage.sync_directory(self.path.parent)

    def remove_set_aside(self) -> None:
        names = [aside for _, aside in self.set_aside_names if os.path.lexists(aside)]
        for name in names:
            self.storage.remove(name)
        if names:
            self.storage.sync_directory(self.path.parent)

    def reopen_published(self) -> None:
        if self.is_published():
            self.storage.rename(self.path, self.partial)
            self.storage.sync_directory(self.path.parent)


class StoreDestination(Destination):
    """Objects of a store, written under their final names.

    Readers can open the array once its metadata exists, which is written last.
    """

    def __init__(self, location: Location, storage: ObjectStorage) -> None:
        super().__init__(location)
        self.storage: ObjectStorage = storage
        self.partial = self.path

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

    def _find_change(self, manifest: Manifest | None, *, read: bool) -> str | None:
        """Return a change of an array; of an unfinished one, only a name that is not its own.

        A run that was killed may have removed part of the array that it replaces.
        """
        written = [] if manifest is None else [Written.by_manifest(manifest)]
        try:
            state = read_journal(journal_path(self.path))
        except ResumeError:  # only its names tell what is part of an array
            names = objects.list_objects(self.path)
            return next((name for name in names if not ARRAY_NAME_PATTERN.fullmatch(name)), None)
        if state is not None:
            written.append(Written(state.job, state.chunk_images, ()))
            return find_foreign_name(self.path, written)
        if manifest is None:
            return "no manifest or journal describes it"
        return self._find_change_of(written[0], read=read)

    def set_aside(self) -> None:
        """Remove what describes the array that was there; creating the target removed the array."""
        for path, _ in self.set_aside_names[:-1]:
            self.storage.remove(path)

    def remove_set_aside(self) -> None:
        """Do nothing: nothing has a temporary name."""
