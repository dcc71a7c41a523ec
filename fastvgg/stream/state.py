"""What there is of a target already, and whether a run may go on with it or take its name."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import xxhash

from fastvgg.datasets import open_target, remote
from fastvgg.datasets.base import read_beside
from fastvgg.datasets.locations import beside_path, file_of, is_remote, located, path_within
from fastvgg.datasets.reserved import ReservedArray
from fastvgg.errors import ResumeError, TargetError
from fastvgg.stream.journal import journal_path, read_ledger, refuse_other_job
from fastvgg.stream.manifest import read_manifest
from fastvgg.stream.plan import readable_bytes
from fastvgg.stream.storage import Storage

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.stream.journal import Ledger
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

__all__ = [
    "FILES",
    "State",
    "exists",
    "find_state",
    "is_published",
    "refuse_occupied",
    "replaceable",
    "replaced_path",
    "resumed",
    "target_path",
]

ARRAY: Final = "zarr.json"  # what makes objects of a store an array
FILES: Final = ("npy", "hdf5")  # what a target is that is no directory

State: TypeAlias = Literal["fresh", "resumable", "complete", "failed"]


def target_path(plan: Plan) -> Path:
    """Return the file or directory that a plan writes."""
    return file_of(located(plan.target))


def find_state(plan: Plan, ledger: Ledger | None) -> State:
    """Return what there is of a plan's target: nothing, an unfinished run, or all of it.

    "failed" is all of it, to be taken up again for what failed.

    Raises
    ------
    ResumeError
        If the unfinished run is another job.
    TargetError
        If something that is not this run's has the target's name.
    """
    target = target_path(plan)
    if plan.restart:
        replaceable(plan)
        return "fresh"
    if ledger is not None:
        refuse_other_job(ledger.job, plan.job(), plan.target)
        if _is_unpublished(target, ledger):
            refuse_occupied(plan, ledger.replaces)
        return "resumable"
    manifest = read_manifest(target)
    if _occupied(plan) and manifest is not None:
        has_failures = manifest.job != plan.job() or manifest.counts["failed"] > 0
        if plan.retry_failed and has_failures:
            return "failed"
        if manifest.job == plan.job():
            return "complete"
    refuse_occupied(plan, None)
    partial = target if is_remote(target) else beside_path(target, ".partial")
    if exists(partial):
        raise TargetError(
            f"{partial} is in the way, and no journal says that it is an unfinished run",
            "move it away, or give --restart to replace it",
        )
    return "fresh"


def replaceable(plan: Plan) -> str | None:
    """Return what identifies the thing that a restart may replace; None where there is nothing.

    Raises
    ------
    TargetError
        If it is a directory, or an HDF5 file, that fastvgg did not write, or not alone: it may hold
        anything.
    """
    target = target_path(plan)
    if not (_occupied(plan) or (is_remote(target) and exists(target))):
        return None
    is_directory = is_remote(target) or target.is_dir()
    holds_much = is_directory or plan.target_kind == "hdf5"
    is_ours = is_directory != (plan.target_kind in FILES) and _written_by_fastvgg(target)
    if holds_much and not is_ours:
        raise TargetError(
            f"{target} is {'a directory' if is_directory else 'an HDF5 file'} that fastvgg did not "
            f"write{'' if is_directory else ', or that was changed since'}",
            "choose another name, or remove it yourself",
        )
    return _identity(target)


def refuse_occupied(plan: Plan, replaces: str | None) -> None:
    """Refuse a target whose name something has, unless it is what the run replaces.

    Raises
    ------
    TargetError
        Saying what has the name.
    """
    target = target_path(plan)
    if not _occupied(plan) or _identity(target) == replaces:
        return
    what = "was not made by fastvgg" if read_manifest(target) is None else "is of another job"
    raise TargetError(
        f"{target} exists, and {what}", "choose another name, or give --restart to replace it"
    )


def is_published(target: Path) -> bool:
    """Whether a run that began under a target's name gave it that name."""
    if is_remote(target):
        return exists(target / ARRAY)
    return not exists(beside_path(target, ".partial")) and exists(target)


def _is_unpublished(target: Path, ledger: Ledger) -> bool:
    """Whether what has a target's name cannot be what the unfinished run made."""
    if is_remote(target):
        return not (ledger.complete or ledger.retries)
    return os.path.lexists(beside_path(target, ".partial"))


def replaced_path(target: Path) -> Path:
    """Return where a directory waits that is being replaced."""
    return beside_path(target, ".fastvgg-replaced")


def _occupied(plan: Plan) -> bool:
    target = target_path(plan)
    if is_remote(target):
        return exists(target / ARRAY)
    if plan.target_kind not in FILES and target.is_dir() and not target.is_symlink():
        return any(target.iterdir())
    return os.path.lexists(target)


def exists(path: Path) -> bool:
    """Whether something has a name.

    Raises
    ------
    TargetError
        If it is in a store that does not answer.
    """
    if not is_remote(path):
        return os.path.lexists(path)
    try:
        return remote.exists(path)
    except OSError as error:
        raise TargetError(
            f"{path} cannot be reached: {error.strerror or error}",
            "check the URL, the connection, and the permission to read there",
        ) from None


def _identity(path: Path) -> str:
    if is_remote(path):
        return f"metadata {xxhash.xxh3_128_hexdigest(read_beside(path / ARRAY) or b'')}"
    status = path.lstat()  # an inode alone may come back: a new directory gets that of one removed
    return f"device {status.st_dev}, inode {status.st_ino}, changed {status.st_mtime_ns}"


def _written_by_fastvgg(path: Path) -> bool:
    """Whether something has a manifest, or the journal of a run that was cut off knows it."""
    manifest = read_manifest(path)
    if manifest is not None:
        return is_remote(path) or path.is_dir() or _is_as_written(path, manifest)
    try:
        ledger = read_ledger(journal_path(path))
    except ResumeError:
        return is_remote(path)
    if ledger is None:
        return False
    if is_remote(path):  # whose name is the run's from the journal's first line on
        return True
    partial = beside_path(path, ".partial")
    published = ledger.complete and not os.path.lexists(partial)
    return published or ledger.replaces == _identity(path)


def _is_as_written(path: Path, manifest: Manifest) -> bool:
    """Whether an HDF5 file has the length that it was written with: what is added takes more."""
    if not manifest.dataset or not path.is_file():
        return False
    together = manifest.chunk_images
    location = path_within(path, manifest.dataset)
    written = open_target(location, manifest.header, Storage(), chunk_images=together)
    return isinstance(written, ReservedArray) and path.stat().st_size == written.stored_bytes


def resumed(plan: Plan, chunk_images: int, committed_chunks: int) -> Plan:
    """Return the plan with the chunks that an unfinished run began with.

    Raises
    ------
    TargetError
        If those chunks do not fit into the memory limit of now.
    """
    fitted = dataclasses.replace(plan, chunk_images=chunk_images, committed_chunks=committed_chunks)
    if fitted.projected_bytes > fitted.memory_bytes:
        raise TargetError(
            f"{plan.target} was begun in chunks that need "
            f"{readable_bytes(fitted.projected_bytes)}, and the memory limit is "
            f"{readable_bytes(plan.memory_bytes)}",
            f"give --memory {-(-fitted.projected_bytes // 2**20)}MiB"
            + ("" if plan.in_place else ", or --restart"),
        )
    return fitted
