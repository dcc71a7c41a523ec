"""The manifest of a finished dataset, `DST.fastvgg.json`, written last.

It lets a dataset be restored without naming the mode, verified years later, and distinguished from
one that was never preprocessed.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import xxhash

from fastvgg.datasets.files import read_sidecar
from fastvgg.datasets.open import embedded_transform
from fastvgg.errors import SourceError, option
from fastvgg.formatting import format_bytes, package_versions
from fastvgg.storage.location import sidecar_path
from fastvgg.stream.job import (
    Job,
    check_chunks,
    check_fields,
    check_sizes,
    check_version,
    parse_transform,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fastvgg.datasets.base import Header
    from fastvgg.storage.location import Location
    from fastvgg.stream.job import Schema
    from fastvgg.transform import Transform

FORMAT_VERSION: Final = 3
VERSION_FIELD: Final = "fastvgg-manifest"
SPAN_BYTES: Final = 4 * 2**20
"""Bytes of a dataset that are read, and added to a checksum, at a time."""
MANIFEST_SCHEMA: Final[Schema] = {
    VERSION_FIELD: int,
    "job": dict,
    "chunk_images": int,
    "checksums": list,
    "source_checksums": list,
    "index_checksum": str,
    "counts": dict,
    "created": str,
    "packages": dict,
}
# Two checksums for each of `MAX_CHUNKS` chunks, and the job.
MAX_BYTES: Final = 64 * 1024 * 1024
# As JSON is parsed: the bytes, the text, and a string for each of its values.
TEXT_COPIES: Final = 2
VALUE_BYTES: Final = 80
MAX_BRACKETS: Final = 20_000  # a manifest has fewer than 100; the path of a source may have others
COUNTS_SCHEMA: Final[Schema] = {"images": int, "failed": int}


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished dataset."""

    job: Job
    chunk_images: int
    checksums: list[str]
    """xxh3-64 of every chunk's bytes."""
    source_checksums: list[str]
    """xxh3-64 of the identities of each chunk's readable images; empty for an array source."""
    index_checksum: str
    """xxh3-64 of the index; empty if there is none."""
    counts: dict[str, int]
    created: str
    packages: dict[str, str]

    @classmethod
    def new(
        cls,
        job: Job,
        chunk_images: int,
        checksums: list[str],
        counts: dict[str, int],
        source_checksums: list[str] | None = None,
        index_checksum: str = "",
    ) -> Manifest:
        """Return a manifest with the current time and package versions."""
        created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        sources = source_checksums or [""] * len(checksums)
        return cls(
            job,
            chunk_images,
            checksums,
            sources,
            index_checksum,
            counts,
            created,
            package_versions(),
        )

    @property
    def header(self) -> Header:
        """Header of the dataset."""
        return self.job.result

    @property
    def class_numbers(self) -> bool:
        """Whether the labels in the index come from .cls entries, and are numbers."""
        return self.job.class_numbers

    def to_json(self) -> bytes:
        """Encode the manifest as JSON."""
        fields = {VERSION_FIELD: FORMAT_VERSION, **vars(self), "job": self.job.to_dict()}
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Manifest:
        """Return the manifest; raise ValueError if a field is invalid or inconsistent."""
        check_fields(fields, MANIFEST_SCHEMA)
        check_fields(fields["counts"], COUNTS_SCHEMA)
        recorded = {name: fields[name] for name in MANIFEST_SCHEMA if name != VERSION_FIELD}
        manifest = cls(**{**recorded, "job": Job.from_dict(fields["job"])})
        images, counts = manifest.header.images, manifest.counts
        check_sizes([manifest.chunk_images])
        check_chunks(images, manifest.chunk_images)
        check_sizes([counts["images"]], minimum=images, maximum=images)
        check_sizes([counts["failed"]], minimum=0, maximum=images)
        sums = manifest.checksums, manifest.source_checksums
        if any(len(values) != -(-images // manifest.chunk_images) for values in sums):
            raise ValueError(f"{len(manifest.checksums)} checksums for {images} images")
        texts = [*manifest.checksums, *manifest.source_checksums, *manifest.packages.values()]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a checksum or a version is not a string")
        return manifest


def manifest_path(container: Path) -> Path:
    """Return the path of the manifest of the dataset in a container."""
    return sidecar_path(container, ".fastvgg.json")


def read_manifest(container: Path, memory_bytes: int | None = None) -> Manifest | None:
    """Read the manifest of the dataset in a container; return None if it has none.

    Raises
    ------
    SourceError
        If the manifest is damaged, has an unknown format version, or takes more memory than
        `memory_bytes`.
    """
    path = manifest_path(container)
    data = read_sidecar(path, MAX_BYTES + 1)
    if data is None:
        return None
    needed_bytes = TEXT_COPIES * len(data) + VALUE_BYTES * data.count(b",")
    if memory_bytes is not None and needed_bytes > memory_bytes:
        raise SourceError(
            f"{path} takes {format_bytes(needed_bytes)} of memory, but the limit is "
            f"{format_bytes(memory_bytes)}",
            f"give {option('memory', f'{-(-needed_bytes // 2**20)}MiB')} or more",
        )
    try:
        _check_is_small(data)
        fields = json.loads(data)
        found = fields.get(VERSION_FIELD) if isinstance(fields, dict) else None
        remedy = "use the version of fastvgg that wrote it"
        check_version(path, found, FORMAT_VERSION, remedy, SourceError)
        return Manifest.from_dict(fields)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not a manifest: {type(error).__name__}: {str(error)[:200]}",
            "restore it from a copy. Without one: to read the dataset, move the manifest away, and "
            "give its mode and its layout; to recreate the dataset, move both away",
        ) from None


def _check_is_small(data: bytes) -> None:
    """Raise ValueError if JSON has more bytes, or more containers, than a manifest can have."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise ValueError("it has too many objects and lists")


def _read_transform(location: Location) -> Transform | None:
    """Return the transform recorded in an array's own attributes; None if there is none."""
    recorded = embedded_transform(location)
    if recorded is None:
        return None
    try:
        return parse_transform(recorded)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{location}: the attribute 'fastvgg' is not a valid transform: {str(error)[:200]}",
            "restore the attribute; or copy the array without it, and give its mode and its layout",
        ) from None


@dataclass(frozen=True)
class Provenance:
    """What the manifest of a dataset, or its own attributes, record about it.

    In an HDF5 file, the manifest and the index describe only the dataset that fastvgg wrote.
    """

    manifest: Manifest | None
    transform: Transform | None
    """The transform that made it; None if unknown."""
    has_index: bool
    """Whether an index next to the container describes this dataset."""

    @classmethod
    def read(cls, location: Location, memory_bytes: int | None = None) -> Provenance:
        """Read what is recorded about a dataset; raise SourceError as `read_manifest` does."""
        manifest, inner = read_manifest(location.container, memory_bytes), location.inner
        if manifest is not None and (not inner or manifest.job.dataset in ("", inner)):
            return cls(manifest, manifest.job.transform, has_index=True)
        return cls(None, _read_transform(location), has_index=manifest is None)


def checksum(stored: Iterable[bytes | memoryview]) -> str:
    """Return the xxh3-64 of a payload."""
    digest = xxhash.xxh3_64()
    for data in stored:
        digest.update(data)
    return digest.hexdigest()
