"""Verify a finished dataset: its checksums, its index, and images recomputed with the oracle."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastvgg.choices import check_flags
from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.errors import SourceError, VerificationError, command
from fastvgg.formatting import format_count, parse_bytes
from fastvgg.parallel import check_threads
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from fastvgg.storage.objects import ObjectStorage
from fastvgg.stream import repair as repairs
from fastvgg.stream.finished import CheckCounter, FinishedDataset
from fastvgg.stream.recompute import Recomputation

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from fastvgg.errors import DamagedChunk
    from fastvgg.stream.report import Progress

MAX_DAMAGED_SHOWN: Final = 10


@dataclass(frozen=True)
class Verification:
    """The result of a successful verification."""

    path: str
    images: int
    failed: int
    """Images that could not be read when the dataset was made; their rows are zeros."""
    chunks: int
    """Chunks whose checksums match: all of them."""
    repaired_chunks: int
    """Chunks that were damaged, and were recomputed."""
    recomputed_images: int
    """Images whose bytes equal those recomputed from the source."""
    note: str
    """Why the source was not compared; empty if it was."""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        failed = f"{self.failed:,} of them zeros, because decoding failed, " if self.failed else ""
        repaired = format_count(self.repaired_chunks, "chunk")
        return (
            f"{self.path}: {f'repaired {repaired}, ' if self.repaired_chunks else ''}"
            f"{format_count(self.images, 'image')} in {format_count(self.chunks, 'chunk')} matched "
            f"the checksums, {failed}{format_count(self.recomputed_images, 'image')} matched the "
            f"NumPy reference{note}"
        )


def verify(
    path: str | os.PathLike[str],
    *,
    full: bool = False,
    threads: int | None = None,
    memory: str | int = "512MiB",
    repair: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Verify a dataset that fastvgg wrote.

    Parameters
    ----------
    path
        The dataset; its manifest must be next to it.
    full
        Recompute every image from the source instead of a sample of 16.
    threads
        Number of threads. Default: all available CPUs.
    memory
        Memory limit, excluding the idle process: bytes, or a string like "512MiB".
    repair
        Recompute damaged chunks from the source, and overwrite them in the dataset if the
        recomputed bytes have the checksums that the manifest records. Nothing else is written. A
        crash leaves the dataset no worse; the same call repairs the rest.
    progress
        Called while images are checked: each counts once for its checksum, once if it is compared
        with its source, and once if its chunk is repaired.

    Raises
    ------
    VerificationError
        If anything differs: stored bytes from their checksums or from the recomputed bytes, the
        length or the header from what was written, the index from the manifest. `damaged` lists
        every damaged chunk, also those that cannot be read.
    SourceError
        If there is no finished dataset, or its manifest or index is damaged.
    """
    check_flags(full=full, repair=repair)
    location = Location.parse(path)
    storage = ObjectStorage() if location.is_remote else Storage()
    limits = check_threads(threads), parse_bytes(memory)
    return verify_with(storage, location, *limits, full=full, repair=repair, progress=progress)


def verify_with(
    storage: Storage | ObjectStorage,
    location: Location,
    threads: int,
    memory_bytes: int,
    *,
    full: bool,
    repair: bool,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Verify a dataset as `verify` does; `storage` performs the durable I/O of a repair."""
    limits = threads, memory_bytes
    with contextlib.ExitStack() as opened:
        dataset = FinishedDataset.open(location, storage, *limits)
        if repair:
            opened.enter_context(repairs.locked(location, storage))
            dataset = FinishedDataset.open(location, storage, *limits)  # under the lock
        try:
            differences = dataset.stored.inspect_published()
        except OSError as error:
            raise SourceError(f"{location} cannot be read: {error}", "restore a copy") from None
        recomputation = opened.enter_context(contextlib.closing(Recomputation(dataset, full=full)))
        return _verify(dataset, differences, recomputation, repair, progress)


def _verify(
    dataset: FinishedDataset,
    differences: list[str],
    recomputation: Recomputation,
    repair: bool,
    progress: Callable[[Progress], None] | None,
) -> Verification:
    manifest = dataset.manifest
    counter = CheckCounter(progress, manifest.header.images + recomputation.images)
    damaged = dataset.damaged_chunks(range(dataset.chunks), counter.count)
    repaired = repairs.Repaired(0, damaged, differences)
    if repair and (damaged or differences):
        repaired = repairs.repair(dataset, damaged, differences, counter)
    recomputed = recomputation.run({chunk.chunk for chunk in repaired.damaged}, counter.count)
    found = sorted([*repaired.damaged, *recomputation.differing_chunks()])
    differences = [*repaired.differences, *dataset.index_differences]
    if found or differences:
        raise _error(dataset, found, differences, repaired, has_repaired=repair)
    return Verification(
        path=str(dataset.location),
        images=manifest.header.images,
        failed=manifest.counts["failed"],
        chunks=dataset.chunks,
        repaired_chunks=repaired.chunks,
        recomputed_images=recomputed,
        note=recomputation.note,
    )


def _error(
    dataset: FinishedDataset,
    damaged: list[DamagedChunk],
    differences: list[str],
    repaired: repairs.Repaired,
    *,
    has_repaired: bool,
) -> VerificationError:
    problems = [*differences]
    if damaged:
        shown = "; ".join(map(str, damaged[:MAX_DAMAGED_SHOWN]))
        more = len(damaged) - MAX_DAMAGED_SHOWN
        chunks = len({chunk.chunk for chunk in damaged})
        problems.append(
            f"{chunks:,} of {format_count(dataset.chunks, 'chunk')} damaged: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )
    if repaired.chunks:
        problems.append(f"repaired {format_count(repaired.chunks, 'chunk')}")
    if repaired.refusal:
        problems.append(f"it cannot be repaired: {repaired.refusal}")
    problem = f"{dataset.location}: {'; '.join(problems)}"
    remedy = _remedy(dataset, repaired, has_repaired=has_repaired)
    return VerificationError(problem, remedy, damaged=damaged, differences=differences)


def _remedy(dataset: FinishedDataset, repaired: repairs.Repaired, *, has_repaired: bool) -> str:
    job, path, stored = dataset.manifest.job, dataset.location.container, dataset.stored
    is_intact = not repaired.damaged and len(repaired.differences) == 1
    if isinstance(stored, ContiguousTarget) and stored.is_extended and is_intact:
        copy = f"head -c {stored.stored_bytes} {shlex.quote(str(path))} > COPY"
        return f"take a copy without what follows: {copy}"
    is_damaged = bool(repaired.damaged or repaired.differences)
    is_other = 1 < dataset.chunks == len(repaired.damaged)  # not one chunk is what was written
    if not is_damaged or is_other or has_repaired or job.in_place:
        return "restore a copy of the dataset, or recreate it under another name"
    how = command("verify", dataset.location, repair=True)
    return (
        f"recompute from {job.source} all that differs from its checksum; this overwrites it, also "
        f"what was changed on purpose: {how}"
    )
