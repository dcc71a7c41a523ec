"""Where a run writes its target, and what it may replace or remove there: the interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from fastvgg.datasets.index import index_path
from fastvgg.errors import ResumeError, SourceError, TargetError
from fastvgg.storage.location import is_remote, sidecar_path
from fastvgg.stream.journal import check_is_journal, journal_path, read_journal
from fastvgg.stream.manifest import checksum, manifest_path, read_manifest
from fastvgg.stream.ownership import (
    REPLACED,
    Written,
    find_change,
    find_changed_index,
    index_content,
)

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.storage.local import Storage
    from fastvgg.storage.objects import ObjectStorage
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.journal_writer import Journal
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

MOVE_AWAY: Final = "move it away, or choose another name"


class Destination(ABC):
    """Where a target is written: a file or directory, or a name in a store."""

    storage: Storage | ObjectStorage
    """Performs durable I/O here."""
    partial: Path
    """Path of the data of an unfinished run."""

    def __init__(self, plan: Plan) -> None:
        self.path = path = plan.target.container
        self.dataset = plan.target.inner
        self._memory_bytes = plan.memory_bytes
        self.replaced = replaced = sidecar_path(path, REPLACED)
        self.set_aside_names = (
            (manifest_path(path), manifest_path(replaced)),
            (index_path(path), index_path(replaced)),
            (path, replaced),
        )
        """What a run replaces, and its temporary names until the run is finished."""
        self.temporaries: tuple[Path, ...] = ()
        """Temporary names of the manifest and the index, which are written after the data."""

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
    def _find_change(
        self, manifest: Manifest | None, state: JournalState | None, *, read: bool
    ) -> str | None:
        """Return why no manifest or journal proves that fastvgg wrote it; None if one does."""

    def find_change_since(self, identity: str) -> str | None:
        """Return how the target has changed since it had an identity; None if it has not."""
        return None if self.identity() == identity else "it was changed since that run began"

    def check_replaceable(self, *, read: bool = False) -> str | None:
        """Return the identity of what a restart may replace; None if the name is free.

        With `read`, every byte is compared with its checksum.

        Raises
        ------
        TargetError
            If no manifest or journal proves that fastvgg wrote it, its sidecars and the partial, or
            if it was changed since.
        """
        state = self._read_journal()
        manifest = self.check_sidecars(state)
        self.check_partial(state)
        found = self._replaced_type()
        if found is None:
            return None
        identity = self.identity()  # before it is read
        change = self._find_change(manifest, state, read=read)
        if change is not None:
            raise TargetError(
                f"{self.path} is {found} that fastvgg did not write, or that was changed since: "
                f"{change}",
                MOVE_AWAY,
            )
        return identity

    def _find_change_of(self, written: Written, *, read: bool) -> str | None:
        if written.job.dataset != self.dataset:
            return f"it contains another dataset, {written.job.dataset}"
        return find_change(self.path, written, read=read)

    def check_partial(self, state: JournalState | None) -> None:  # noqa: B027
        """Check that the partial contains only what the unfinished run wrote.

        Without a readable journal, it must be a partial of this run. Raises TargetError.
        """

    def discard_unfinished(self) -> None:
        """Remove what only the journal of an unfinished run, which a restart replaces, proves."""
        if self._is_published_by(self._read_journal()) and not self.exists(
            manifest_path(self.path)
        ):
            self.storage.remove(index_path(self.path))

    def _read_journal(self) -> JournalState | None:
        """Read the journal; return None if it is damaged, or of another version."""
        try:
            return read_journal(journal_path(self.path))
        except ResumeError:
            return None

    def _is_published_by(self, state: JournalState | None) -> bool:
        """Return whether the run of a journal published its data, and writes only sidecars."""
        return state is not None and state.complete and self.is_published()

    def read_manifest(self) -> Manifest | None:
        """Read the manifest with the target's name; raise TargetError if it is something else."""
        return self._read_manifest(self.path)

    def _read_manifest(self, container: Path) -> Manifest | None:
        try:
            return read_manifest(container, self._memory_bytes)
        except SourceError as error:
            raise TargetError(error.problem, MOVE_AWAY) from error

    def check_sidecars(self, state: JournalState | None) -> Manifest | None:
        """Check that the sidecars that a run replaces or removes were written by fastvgg.

        A manifest proves itself and its index; a journal, whose state is None if it cannot be
        read, the names that exist only during a run. Returns the manifest.

        Raises
        ------
        TargetError
            If anything else has the name of a sidecar.
        """
        manifest = self.read_manifest()
        name = manifest_path(self.path)
        if self.exists(name) and (manifest is None or _is_link(name)):
            raise _unproven_error(name)
        is_journal = state is not None or check_is_journal(journal_path(self.path))
        is_published = self._is_published_by(state)
        asides = [aside for _, aside in self.set_aside_names]
        temporary = () if is_journal else (self.partial, *asides)
        if not is_published:
            temporary += self.temporaries
        for path in temporary:
            if path != self.path and self.exists(path):
                raise _unproven_error(path)
        aside = self._read_manifest(self.replaced) if is_journal else None
        described = manifest or (None if is_published else aside)
        if described is not None:
            expected = described.index_checksum
        elif state is not None and is_published:
            expected = checksum(index_content(state))
        else:
            expected = ""
        self._check_index(self.path, expected)
        # Once the new manifest is written, what was set aside is being removed.
        if is_journal and not (is_published and manifest is not None):
            described = aside or manifest
            self._check_index(self.replaced, described.index_checksum if described else "")
            self._check_set_aside(described, state)
        return manifest

    def _check_index(self, container: Path, expected: str) -> None:
        index = index_path(container)
        if not self.exists(index):
            return
        try:
            change = find_changed_index(index, expected)
        except SourceError as error:
            raise TargetError(error.problem, MOVE_AWAY) from error
        if change is not None or _is_link(index):
            raise TargetError(change or f"{index} is a link", MOVE_AWAY)

    def _check_set_aside(  # noqa: B027  # a store has no temporary names
        self, manifest: Manifest | None, state: JournalState | None
    ) -> None:
        """Check that what was set aside is the dataset of a manifest, or that of a journal."""

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


def _is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


def _unproven_error(path: Path) -> TargetError:
    return TargetError(
        f"{path} exists, but no journal or manifest shows that fastvgg wrote it", MOVE_AWAY
    )
