"""The destinations of runs: a file or directory on disk, and an array in a store."""

from __future__ import annotations

import os
import re
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Final, cast

import xxhash

from fastvgg.datasets.files import read_sidecar
from fastvgg.datasets.formats import TARGETS
from fastvgg.datasets.index import index_path
from fastvgg.errors import (
    FastvggError,
    StoppedError,
    TargetError,
    remedy_for,
)
from fastvgg.storage import objects
from fastvgg.storage.local import SCRATCH_FILE, Storage
from fastvgg.storage.location import sidecar_path, temporary_path
from fastvgg.storage.objects import ObjectStorage
from fastvgg.storage.shared import SharedStorage
from fastvgg.stream.destination import MOVE_AWAY, Destination
from fastvgg.stream.journal import check_is_journal, journal_path
from fastvgg.stream.journal_writer import FileJournal, StoreJournal
from fastvgg.stream.manifest import manifest_path
from fastvgg.stream.ownership import (
    Written,
    find_change,
    find_foreign,
    identity_of,
)
from fastvgg.stream.source import open_job_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fastvgg.datasets.base import ImageRecord
    from fastvgg.stream.job import Job
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.journal_writer import Journal
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

ARRAY: Final = "zarr.json"  # the object that makes a prefix of a store an array
ARRAY_NAME_PATTERN: Final = re.compile(r"zarr\.json|c(\.\d+){4}")


def make_destination(
    plan: Plan,
    storage: Storage | ObjectStorage | None = None,
    records: Sequence[ImageRecord] = (),
) -> Destination:
    """Return the destination of a plan.

    `storage` performs its durable I/O. `records` are those that its source knows, which name the
    image files of a restored dataset.
    """
    if plan.target.is_remote:
        return StoreDestination(plan, cast("ObjectStorage", storage or ObjectStorage()))
    disk = cast("Storage", storage or Storage(fsync=plan.fsync))
    return DiskDestination(plan, disk, records)


class DiskDestination(Destination):
    """A file or directory on disk, written under a temporary name until it is complete."""

    def __init__(self, plan: Plan, storage: Storage, records: Sequence[ImageRecord]) -> None:
        super().__init__(plan)
        self.is_file = TARGETS[plan.job.target_format].target == "file"
        self.storage: Storage = storage
        self.partial = sidecar_path(self.path, ".partial")
        written = index_path(self.path), manifest_path(self.path)
        self.temporaries = tuple(map(temporary_path, written))
        self._plan = plan
        self._records = records

    def shared_storage(self) -> Storage:
        directory = self.path.parent if self.is_file else self.partial
        return SharedStorage(directory, fsync=self.storage.fsync)

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
        try:
            return identity_of(self.path)
        except OSError as error:
            where = error.filename or self.path
            problem = f"{where} cannot be read: {error.strerror or error}"
            raise TargetError(problem, remedy_for(error)) from error

    def _find_change(
        self, manifest: Manifest | None, state: JournalState | None, *, read: bool
    ) -> str | None:
        if self.path.is_symlink() or self.path.is_dir() == self.is_file:
            return "fastvgg writes no such thing there"
        if manifest is None and state is not None:
            if state.replaces == self.identity():
                return None  # proven when that run began
            if self._is_published_by(state):
                return self._find_change_of(Written.by_journal(state), read=read)
        # A killed run may have set aside only the manifest of what it replaces.
        manifest = manifest or self._read_manifest(self.replaced)
        if manifest is None:
            return "no manifest describes it"
        return self._find_change_of(Written.by_manifest(manifest), read=read)

    def _find_change_of(self, written: Written, *, read: bool) -> str | None:
        if written.job.target_format != self._plan.job.target_format:
            return f"its manifest describes {written.job.target_format}"
        return super()._find_change_of(written, read=read)

    def find_change_since(self, identity: str) -> str | None:
        if super().find_change_since(identity) is None:
            return None
        return self._find_change(self.read_manifest(), None, read=True)  # perhaps a copy

    def check_partial(self, state: JournalState | None) -> None:
        if not self.exists(self.partial):
            return
        job, chunk_images = self._plan.job, self._plan.chunk_images
        if state is not None:
            job, chunk_images = state.job, state.chunk_images
        written = Written(job, chunk_images, (), self._records_of(job))
        foreign = find_foreign(self.partial, self.path, written)
        if foreign is not None:
            raise TargetError(foreign, "move it away, and rerun the same command")

    def _records_of(self, job: Job) -> Sequence[ImageRecord]:
        """Return the records that name the image files of a job."""
        if not job.is_encoded:
            return ()
        if job.source == self._plan.job.source:
            return self._records
        with (
            suppress(FastvggError),  # without its source, the names of another run are unknown
            closing(open_job_source(job, use_index=True)) as source,
        ):
            return source.records
        return ()

    def discard_unfinished(self) -> None:
        super().discard_unfinished()
        for path in (self.partial, *self.temporaries):
            if self.exists(path):
                self.storage.remove(path)

    def _check_set_aside(self, manifest: Manifest | None, state: JournalState | None) -> None:
        if not self.exists(self.replaced) or self._is_scratch(self.replaced):
            return
        if state is not None and state.replaces is not None:
            with suppress(OSError):
                if identity_of(self.replaced) == state.replaces:
                    return
        change = "no manifest describes it"
        if manifest is not None:
            found = find_change(self.replaced, Written.by_manifest(manifest), read=True)
            if found is None:
                return
            change = found
        raise TargetError(
            f"{self.replaced} is not what the unfinished run set aside: {change}", MOVE_AWAY
        )

    def _is_scratch(self, path: Path) -> bool:
        """Return whether a killed run left a directory there that `check_movable` made."""
        if path.is_symlink() or not path.is_dir():
            return False
        return all(
            each.name == SCRATCH_FILE and each.is_file() and each.stat().st_size == 0
            for each in path.iterdir()
        )

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

    def __init__(self, plan: Plan, storage: ObjectStorage) -> None:
        super().__init__(plan)
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

    def _find_change(
        self, manifest: Manifest | None, state: JournalState | None, *, read: bool
    ) -> str | None:
        """Return a change of an array; of an unfinished one, only a name that no array has.

        A run that was killed may have removed part of the array that it replaces.
        """
        if state is not None or check_is_journal(journal_path(self.path)):
            return self._find_foreign()
        if manifest is None:
            return "no manifest or journal describes it"
        return self._find_change_of(Written.by_manifest(manifest), read=read)

    def _find_foreign(self) -> str | None:
        for name in objects.list_objects(self.path):
            if not ARRAY_NAME_PATTERN.fullmatch(name):
                return f"{self.path} contains {name}, which fastvgg did not write"
        return None

    def check_partial(self, state: JournalState | None) -> None:
        foreign = self._find_foreign() if state is not None else None
        if foreign is not None:
            raise TargetError(foreign, "move it away, and rerun the same command")

    def set_aside(self) -> None:
        """Remove what describes the array that was there; creating the target removed the array.

        The manifest proves that the index is fastvgg's, so the index is removed first.
        """
        for path, _ in reversed(self.set_aside_names[:-1]):
            self.storage.remove(path)

    def remove_set_aside(self) -> None:
        """Do nothing: nothing has a temporary name."""
