"""Prove that a dataset is as fastvgg wrote it, so that a restart may replace it.

A name, a length or a manifest beside it is no proof: a manifest may have been copied, and an array
edited. The manifest, or the journal of a run that published its data, has the checksum of every
chunk, and determines all other bytes and all names.
"""

from __future__ import annotations

import itertools
import os
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.files import open_regular, open_sidecar, read_sidecar
from fastvgg.datasets.index import hash_names, index_path, read_index
from fastvgg.datasets.open import open_target
from fastvgg.errors import FastvggError
from fastvgg.storage import objects
from fastvgg.storage.location import Location, is_remote
from fastvgg.stream.manifest import checksum
from fastvgg.stream.source import open_job_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from fastvgg.datasets.base import ImageRecord, Target
    from fastvgg.stream.job import Job
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.manifest import Manifest

READ_BYTES: Final = 2**20


@dataclass(frozen=True)
class Written:
    """What a manifest or a journal records of a dataset that fastvgg wrote."""

    job: Job
    chunk_images: int
    checksums: Sequence[str]
    """Of every chunk."""
    records: Sequence[ImageRecord] | None = None
    """Those of the rows; None to read the index."""

    @classmethod
    def by_manifest(cls, manifest: Manifest) -> Written:
        """Return what a manifest records."""
        return cls(manifest.job, manifest.chunk_images, manifest.checksums)

    @classmethod
    def by_journal(cls, state: JournalState) -> Written:
        """Return what the journal of a run that committed every chunk records."""
        chunks = range(state.chunks)
        sums = [state.commits[chunk].checksum for chunk in chunks]
        records = [*itertools.chain(*(state.commit(chunk).records for chunk in chunks))]
        return cls(state.job, state.chunk_images, sums, records if state.job.is_encoded else ())

    @classmethod
    def by_unfinished(cls, state: JournalState) -> list[Written]:
        """Return what an unfinished run may have written, without checksums.

        Image files have the names that the index of its source gives them, if there is one.
        """
        written = [cls(state.job, state.chunk_images, (), ())]
        if state.job.is_encoded:
            with (
                suppress(FastvggError),
                closing(open_job_source(state.job, use_index=True)) as source,
            ):
                written.append(cls(state.job, state.chunk_images, (), source.records))
        return written

    def target(self, path: Path) -> Target:
        """Return the target as which the dataset at a path was written."""
        location, job, records = Location(path, self.job.dataset), self.job, self.records
        if records is None:
            records = read_index(path, job.result.images) if job.is_encoded else ()
        return open_target(
            location,
            job.result,
            chunk_images=self.chunk_images,
            transform=job.transform,
            records=records,
            file_format=job.file_format,
        )


def find_change(path: Path, written: Written, *, read: bool) -> str | None:
    """Return how a dataset differs from what was written, or None if it does not.

    Reads every byte, or, without `read`, only names, lengths and headers.
    """
    try:
        target = written.target(path)
        if isinstance(target, ContiguousTarget):
            change = _find_changed_file(path, target)
        else:
            change = _find_changed_names(path, target)
        return change or (_find_changed_chunk(target, written) if read else None)
    except FastvggError as error:
        return error.problem
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"


def _find_changed_file(path: Path, target: ContiguousTarget) -> str | None:
    size = path.stat().st_size
    if size != target.stored_bytes:
        return f"{path} has {size} bytes instead of {target.stored_bytes}"
    with open_regular(path) as file:
        if file.read(len(target.preamble)) != target.preamble:
            return f"the header of {path} differs"
    return None


def _find_changed_names(path: Path, target: Target) -> str | None:
    """Return a file below a directory, or in a store, that was added or is missing."""
    foreign = _find_foreign_name(path, [target])
    if foreign is not None:
        return foreign
    expected = sum(name is not None for name in target.file_names())
    found = sum(1 for _ in _names_below(path))
    if found != expected:
        return f"{path} contains {found} files instead of {expected}"
    for name, content in target.metadata().items():
        if read_sidecar(path / name) != content:
            return f"{path / name} differs"
    return None


def find_foreign_name(
    path: Path, written: Iterable[Written], *, below: Path | None = None
) -> str | None:
    """Return a file that no run wrote to a target; None if there is none.

    It is searched for in `below`, the partial of the target, or in the target.
    """
    return _find_foreign_name(below or path, [each.target(path) for each in written])


def _find_foreign_name(path: Path, targets: Iterable[Target]) -> str | None:
    names = (name for target in targets for name in target.file_names() if name is not None)
    expected = np.sort(hash_names(map(os.fsencode, names)))
    for name in _names_below(path):
        (key,) = hash_names([os.fsencode(name)])
        at = int(np.searchsorted(expected, key))
        if at == len(expected) or expected[at] != key:
            return f"{path} contains {name}, which fastvgg did not write"
    return None


def _names_below(path: Path) -> Iterator[str]:
    """Yield the relative names of everything below a path that is not a directory."""
    if is_remote(path):
        yield from objects.list_objects(path)
        return
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                else:
                    yield name


def _find_changed_chunk(target: Target, written: Written) -> str | None:
    images = written.job.result.images
    for chunk, expected in enumerate(written.checksums):
        start = chunk * written.chunk_images
        stop = min(images, start + written.chunk_images)
        if checksum(target.stored_spans(start, stop, READ_BYTES)) != expected:
            return f"images {start} to {stop - 1} of {target.path} differ"
    return None


def find_changed_index(path: Path, manifest: Manifest) -> str | None:
    """Return how the index of a dataset differs from what was written, or None."""
    index = index_path(path)
    digest = xxhash.xxh3_64()
    with open_sidecar(index) as file:
        if file is None:
            return None
        while block := file.read(READ_BYTES):
            digest.update(block)
    return None if digest.hexdigest() == manifest.index_checksum else f"{index} was changed"
