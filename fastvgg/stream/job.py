"""Job: everything that determines the bytes of a result, as journals and manifests record it.

A record may be damaged or forged, with a valid checksum. `Job.from_dict` accepts it only if every
field is present, has the right type, and is consistent with the others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args

from fastvgg.datasets.base import Header, MissingChunks
from fastvgg.datasets.formats import SOURCES, TARGETS, Format
from fastvgg.datasets.image_writer import check_format
from fastvgg.errors import FastvggError, ResumeError, option
from fastvgg.imaging.decode import DecodeOptions
from fastvgg.stream.differences import (
    Difference,
    as_details,
    describe_differences,
    find_differences,
)
from fastvgg.transform import STORAGE_TYPES, Transform

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from fastvgg.datasets.image_writer import FileFormat

Schema: TypeAlias = "Mapping[str, type | tuple[type, ...]]"
"""The fields of a JSON object and their allowed types."""

JOB_SCHEMA: Final[Schema] = {"source": dict, "transform": dict, "result": dict}
HEADER_SCHEMA: Final[Schema] = {"kind": str, "shape": list, "dtype": str, "layout": str}
SOURCE_SCHEMA: Final[Schema] = {
    "path": str,
    "fingerprint": str,
    "follow_links": bool,
    **HEADER_SCHEMA,
}
IMAGE_SOURCE_SCHEMA: Final[Schema] = {
    "size": (list, NoneType),
    "interpolation": str,
    "keep_aspect_ratio": bool,
    "fast_jpeg": bool,
    "exif": bool,
    "scale_to_uint8": bool,
    "max_pixels": int,
}
CHUNKED_SOURCE_SCHEMA: Final[Schema] = {"missing_chunks": str}
CLASS_NUMBERS_SCHEMA: Final[Schema] = {"class_numbers": bool}
RESULT_SCHEMA: Final[Schema] = {"in_place": bool, **HEADER_SCHEMA}
TRANSFORM_SCHEMA: Final[Schema] = {
    "mode": dict,
    "direction": str,
    "layout": str,
    "out_layout": str,
    "dtype": (str, NoneType),
    "rounding": str,
}
MODE_SCHEMA: Final[Schema] = {
    "name": str,
    "divide": (float, NoneType),
    "mean": (list, NoneType),
    "std": (list, NoneType),
    "order": str,
}
MAX_COUNT: Final = 2**48  # upper bound of every count
# A manifest has 50 bytes for each. The limit keeps it, and the commits of a run, in memory.
MAX_CHUNKS: Final = 10**6


@dataclass(frozen=True)
class Job:
    """A source, a transform and a result. A run can resume another only if their jobs are equal."""

    source: str
    source_kind: str
    fingerprint: str
    """Fingerprint of the source at planning time."""
    header: Header
    """Header of the source."""
    decoding: DecodeOptions | None
    """How images are decoded; None for an array source."""
    transform: Transform
    target_format: str
    result: Header
    """Header of the result."""
    in_place: bool = False
    file_format: FileFormat = "png"
    """Format of the image files, for a result of image files."""
    dataset: str = ""
    """Name of the result within an HDF5 file; empty for other formats."""
    follow_links: bool = True
    """Whether links below the source are followed: it determines which rows there are."""
    missing_chunks: MissingChunks = "error"
    """What chunks that the source does not store are; "error" for formats without chunks."""
    class_numbers: bool = False
    """Whether the labels in the index come from .cls entries, and are numbers."""

    @property
    def formats(self) -> tuple[Format, Format]:
        """The formats of the source and of the result."""
        return SOURCES[self.source_kind], TARGETS[self.target_format]

    @property
    def is_decoded(self) -> bool:
        """Whether the source consists of encoded images."""
        return self.formats[0].has_image_files

    @property
    def is_encoded(self) -> bool:
        """Whether the result consists of encoded images."""
        return self.formats[1].has_image_files

    def to_dict(self) -> dict[str, Any]:
        """Return the job as JSON types."""
        job = {
            "source": {
                "path": self.source,
                "fingerprint": self.fingerprint,
                "follow_links": self.follow_links,
                "kind": self.source_kind,
                **vars(self.header),
                **({} if self.decoding is None else self.decoding.to_dict()),
                **({"missing_chunks": self.missing_chunks} if self.formats[0].has_chunks else {}),
                **({"class_numbers": True} if self.class_numbers else {}),
            },
            "transform": self.transform.to_dict(),
            "result": {
                "kind": self.target_format,
                **vars(self.result),
                "in_place": self.in_place,
                **({"format": self.file_format} if self.is_encoded else {}),
                **({"dataset": self.dataset} if self.dataset else {}),
            },
        }
        as_json: dict[str, Any] = json.loads(json.dumps(job))
        return as_json

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Job:
        """Return the job that `to_dict` wrote; raise ValueError if a field is inconsistent."""
        check_fields(fields, JOB_SCHEMA)
        source, result = fields["source"], fields["result"]
        source_format = SOURCES.get(str(source.get("kind")), Format())
        is_decoded = source_format.has_image_files
        schema = {**SOURCE_SCHEMA, **(IMAGE_SOURCE_SCHEMA if is_decoded else {})}
        schema |= CHUNKED_SOURCE_SCHEMA if source_format.has_chunks else {}
        schema |= CLASS_NUMBERS_SCHEMA if "class_numbers" in source else {}
        check_fields(source, schema)
        target_format = TARGETS.get(str(result.get("kind")), Format())
        check_fields(result, {**RESULT_SCHEMA, **dict.fromkeys(target_format.result_fields, str)})
        header = _parse_header(source)
        try:
            if is_decoded:
                check_sizes(source["size"] or [])
            if target_format.has_image_files:
                check_format(result["format"], *header.shape[1:3])
            if result.get("dataset") == "":
                raise ValueError("the dataset of an HDF5 file has no name")
            transform = parse_transform(fields["transform"])
            transform.check_input(header.shape, header.dtype)
            job = cls(
                source["path"],
                source["kind"],
                source["fingerprint"],
                header,
                DecodeOptions.from_dict(source) if is_decoded else None,
                transform,
                result["kind"],
                _parse_header(result),
                result["in_place"],
                result.get("format", "png"),
                result.get("dataset", ""),
                source["follow_links"],
                source.get("missing_chunks", "error"),
                source.get("class_numbers", False),
            )
        except FastvggError as error:
            raise ValueError(ascii(error.problem)) from None
        if job.missing_chunks not in get_args(MissingChunks):
            raise ValueError("missing_chunks is neither error nor fill")
        if job.source_kind not in SOURCES or job.target_format not in TARGETS:
            raise ValueError("the source or the result has an unknown format")
        if job.in_place and (job.source_kind != "npy" or job.target_format != "npy"):
            raise ValueError("only a .npy file can be converted in place")
        if transform.layout != header.layout:
            raise ValueError("the layouts of the transform and of the source differ")
        if result_header(header, transform) != job.result:
            raise ValueError("the result header does not match the transform of the source header")
        return job

    def check_same(self, wanted: Job, target: str, *, is_finished: bool = False) -> None:
        """Check that this earlier job is the one wanted now; the error names every difference.

        `is_finished` says that it made a target, of which failed images are to be retried.
        """
        differences = self.differences(wanted)
        if not differences:
            return
        if is_finished:
            remedy = (
                f"give the same settings to retry its failed images, or {option('restart')} "
                f"instead of {option('retry_failed')} to start over"
            )
        else:
            remedy = "rerun with the same settings and the same source to resume"
            if not self.in_place:
                remedy += f", or give {option('restart')} to start over"
        change = describe_differences(differences, "made" if is_finished else "started")
        raise ResumeError(f"{target} was {change}", remedy, **as_details(differences))

    def differences(self, wanted: Job) -> list[Difference]:
        """Return what differs between this earlier job and another; empty if they are equal."""
        return find_differences(self.to_dict(), wanted.to_dict())


def check_fields(fields: object, schema: Schema) -> None:
    """Check that a JSON object has exactly these fields and types, or raise ValueError.

    A bool is not an int.
    """
    if not isinstance(fields, dict) or fields.keys() != schema.keys():
        raise ValueError(f"not an object with the fields {', '.join(schema)}")
    for name, allowed in schema.items():
        if type(fields[name]) not in (allowed if isinstance(allowed, tuple) else (allowed,)):
            raise ValueError(f"{name} has type {type(fields[name]).__name__}")


def check_version(
    path: Path, found: object, known: int, remedy: str, error: type[FastvggError] = ResumeError
) -> None:
    """Raise `error` if the record in `path` has another format version than the one known here."""
    if type(found) is int and found != known:
        raise error(
            f"{path} has format version {str(found)[:20]}, but this fastvgg reads {known}", remedy
        )


def check_sizes(sizes: Iterable[object], *, minimum: int = 1, maximum: int = MAX_COUNT) -> None:
    """Check that all sizes are ints within bounds; raise ValueError otherwise."""
    if any(type(size) is not int or not minimum <= size <= maximum for size in sizes):
        raise ValueError(f"a size is not an integer from {minimum} to {maximum}")


def check_chunks(images: int, chunk_images: int) -> None:
    """Check that a result has at most `MAX_CHUNKS` chunks; raise ValueError otherwise."""
    chunks = -(-images // chunk_images)
    if chunks > MAX_CHUNKS:
        raise ValueError(f"{chunks} chunks; at most {MAX_CHUNKS} are supported")


def parse_transform(fields: dict[str, Any]) -> Transform:
    """Parse a transform from JSON types.

    Raises
    ------
    ValueError
        If a field is missing or has the wrong type.
    FastvggError
        If the types are right but a value is invalid.
    """
    check_fields(fields, TRANSFORM_SCHEMA)
    check_fields(fields["mode"], MODE_SCHEMA)
    numbers = (fields["mode"]["mean"] or []) + (fields["mode"]["std"] or [])
    if any(type(number) is not float for number in numbers):
        raise ValueError("mean and std must be lists of floats")
    if fields["dtype"] not in (None, *STORAGE_TYPES):
        raise ValueError("the transform's dtype is not a storage type")
    return Transform.from_dict(fields)


def result_header(header: Header, transform: Transform) -> Header:
    """Return the header of a transformed dataset."""
    return Header(
        transform.output_shape(header.shape),
        transform.output_type(header.dtype),
        transform.out_layout,
    )


def _parse_header(fields: dict[str, Any]) -> Header:
    check_sizes(fields["shape"])
    if len(fields["shape"]) != 4 or fields["dtype"] not in STORAGE_TYPES:
        raise ValueError("a header must have rank 4 and a storage dtype")
    return Header(tuple(fields["shape"]), fields["dtype"], fields["layout"])
