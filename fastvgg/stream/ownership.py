"""Prove that a dataset is as fastvgg wrote it, so that a run may replace or remove it.

A name, a length or a manifest beside it is no proof: a manifest may have been copied, and an array
edited. The manifest, or the journal of a run that published its data, has the checksum of every
chunk, and determines all other bytes and all names. The data of an unfinished run has no such
proof, but its journal determines its names, and the header of a file.
"""

from __future__ import annotations

import itertools
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.files import open_regular, open_sidecar, read_sidecar
from fastvgg.datasets.index import INDEX_HEADER, format_records, hash_names, read_index
from fastvgg.datasets.open import open_target
from fastvgg.errors import FastvggError
from fastvgg.storage import objects
from fastvgg.storage.location import Location, is_remote, sidecar_path
from fastvgg.stream.manifest import checksum

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fastvgg.datasets.base import ImageRecord, Target
    from fastvgg.stream.job import Job
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.manifest import Manifest

READ_BYTES: Final = 2**20
REPLACED: Final = ".fastvgg-replaced"
"""Suffix of the temporary name of what a run replaces."""


@dataclass(frozen=True)
class Written:
    """What a manifest or a journal records of a dataset that fastvgg wrote."""

    job: Job
    chunk_images: int
    checksums: Sequence[str]
    """Of every chunk."""
    records: Sequence[ImageRecord] | None = None
    """Those of the rows; None to read the index, which may have its temporary name."""

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

    def target(self, path: Path) -> Target:
        """Return the target as which the dataset at a path was written."""
        location, job, records = Location(path, self.job.dataset), self.job, self.records
        if records is None:
            containers = (path, sidecar_path(path, REPLACED)) if job.is_encoded else ()
            indexes = (read_index(container, job.result.images) for container in containers)
            records = next(filter(None, indexes), ())
        return open_target(
            location,
            job.result,
            chunk_images=self.chunk_images,
            transform=job.transform,
            records=records,
            file_format=job.file_format,
        )


def identity_of(path: Path) -> str:
    """Return a string that identifies a file, or a directory with all files in it.

    It changes when a file is edited, added or removed, but not when a directory is renamed. On a
    disk that is mounted again, or restored, unchanged files may have another one.
    """
    status = path.lstat()
    found = f"device {status.st_dev}, inode {status.st_ino}, changed {status.st_mtime_ns}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{found} {status.st_ctime_ns}, {status.st_size} bytes"
    entries = 0  # their sum: a directory has no order
    for name, entry in _entries_below(path):
        inner = entry.stat(follow_symlinks=False)
        seen = inner.st_ino, inner.st_mode, inner.st_size, inner.st_mtime_ns, inner.st_ctime_ns
        entries += xxhash.xxh3_128_intdigest(os.fsencode(f"{seen} {name}"))
    return f"{found}, entries {entries % 2**128:032x}"


def find_change(path: Path, written: Written, *, read: bool) -> str | None:
    """Return how a dataset differs from what was written, or None if it does not.

    Reads every byte, or, without `read`, only names, lengths and headers.
    """
    with _described_errors(path) as errors:
        target = written.target(path)
        if isinstance(target, ContiguousTarget):
            change = _find_changed_file(path, target)
        else:
            change = _find_changed_names(path, target)
        return change or (_find_changed_chunk(target, written) if read else None)
    return errors[0]


def find_foreign(partial: Path, path: Path, written: Written) -> str | None:
    """Return what an unfinished run did not write in a partial; None if there is no such thing.

    `path` is the name that its dataset is given. The bytes of files are not read: a power failure
    may leave any.
    """
    with _described_errors(partial) as errors:
        target = written.target(path)
        is_file = isinstance(target, ContiguousTarget)
        if partial.is_symlink() or partial.is_dir() == is_file:
            return f"{partial} exists, but fastvgg writes no such thing there"
        if not isinstance(target, ContiguousTarget):
            return _find_foreign_name(partial, target)
        with open_regular(partial) as file:
            start = np.frombuffer(file.read(len(target.preamble)), np.uint8)
            size = os.fstat(file.fileno()).st_size
        expected = np.frombuffer(target.preamble, np.uint8)[: len(start)]
        if size > target.stored_bytes or not ((start == expected) | (start == 0)).all():
            return (
                f"{partial} is not the data of the unfinished run: it has another header, or more "
                f"than {target.stored_bytes} bytes"
            )
        return None
    return errors[0]


@contextmanager
def _described_errors(path: Path) -> Iterator[list[str]]:
    """Collect what is wrong with a dataset that cannot be read."""
    problems: list[str] = []
    try:
        yield problems
    except FastvggError as error:
        problems.append(error.problem)
    except OSError as error:
        problems.append(f"{error.filename or path} cannot be read: {error.strerror or error}")


def _find_changed_file(path: Path, target: ContiguousTarget) -> str | None:
    size = path.stat().st_size
    if size != target.stored_bytes:
        return f"{path} has {size} bytes instead of {target.stored_bytes}"
    with open_regular(path) as file:
        if file.read(len(target.preamble)) != target.preamble:
            return f"the header of {path} differs"
    return None


def _find_changed_names(path: Path, target: Target) -> str | None:
    """Return a file below a directory that was added or is missing, or metadata that differs."""
    foreign = _find_foreign_name(path, target)
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


def _find_foreign_name(path: Path, target: Target) -> str | None:
    """Return a file below a directory, or in a store, that no run wrote; None if there is none."""
    names = (name for name in target.file_names() if name is not None)
    expected = np.sort(hash_names(map(os.fsencode, names)))
    spellings: dict[str, str] = {}
    for name in _names_below(path):
        (key,) = hash_names([os.fsencode(name)])
        at = int(np.searchsorted(expected, key))
        if at < len(expected) and expected[at] == key:
            continue
        if not spellings:  # a disk that ignores case may list another spelling
            spellings = {name.casefold(): name for name in target.file_names() if name is not None}
        spelling = spellings.get(name.casefold())
        if spelling is None or is_remote(path) or not _is_same_file(path / name, path / spelling):
            return f"{path} contains {name}, which fastvgg did not write"
    return None


def _is_same_file(path: Path, other: Path) -> bool:
    return os.path.lexists(other) and os.path.samestat(path.lstat(), other.lstat())


def _names_below(path: Path) -> Iterator[str]:
    """Yield the relative names of everything below a path that is not a directory."""
    if is_remote(path):
        yield from objects.list_objects(path)
        return
    for name, entry in _entries_below(path):
        if not entry.is_dir(follow_symlinks=False):
            yield name


def _entries_below(path: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield everything below a directory, with its relative name."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{name}/")
                yield name, entry


def _find_changed_chunk(target: Target, written: Written) -> str | None:
    images = written.job.result.images
    for chunk, expected in enumerate(written.checksums):
        start = chunk * written.chunk_images
        stop = min(images, start + written.chunk_images)
        if checksum(target.stored_spans(start, stop, READ_BYTES)) != expected:
            return f"images {start} to {stop - 1} of {target.path} differ"
    return None


def index_content(state: JournalState) -> Iterator[bytes]:
    """Yield the index of a run that committed every chunk; nothing if images have no records."""
    if not state.commit(0).records:
        return
    yield INDEX_HEADER.encode()
    for chunk in range(state.chunks):
        lines = format_records(state.commit(chunk).records, chunk * state.chunk_images)
        yield lines.encode("utf-8", "surrogateescape")


def find_changed_index(index: Path, expected: str) -> str | None:
    """Return how an index differs from that of a checksum, which is empty if there is none."""
    digest = xxhash.xxh3_64()
    with open_sidecar(index) as file:
        while file is not None and (block := file.read(READ_BYTES)):
            digest.update(block)
    if expected and digest.hexdigest() == expected:
        return None
    return (
        f"{index} was changed since fastvgg wrote it"
        if expected
        else f"{index} exists, but no journal or manifest shows that fastvgg wrote it"
    )
