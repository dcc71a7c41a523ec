"""Validate the job (see `Plan.job`) that a journal or manifest records.

The file may be damaged or forged, with a valid checksum. A job is accepted only if every field is
present, has the right type, and is consistent with the others.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fastvgg.datasets.base import Header
from fastvgg.datasets.image_writer import check_format
from fastvgg.errors import FastvggError
from fastvgg.imaging.decode import DecodeOptions
from fastvgg.stream.plan import result_header
from fastvgg.transform import STORAGE_TYPES, Transform

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Schema", "check_fields", "check_job", "check_sizes", "transform_of_fields"]

Schema: TypeAlias = "Mapping[str, type | tuple[type, ...]]"
"""The fields of a JSON object and their allowed types."""

JOB: Final[Schema] = {"source": dict, "transform": dict, "result": dict}
HEADER: Final[Schema] = {"kind": str, "shape": list, "dtype": str, "layout": str}
SOURCE: Final[Schema] = {"path": str, "fingerprint": str, **HEADER}
IMAGE_SOURCE: Final[Schema] = {
    "size": (list, NoneType),
    "interpolation": str,
    "keep_aspect_ratio": bool,
    "fast_jpeg": bool,
    "exif": bool,
    "gray16": str,
    "max_pixels": int,
}
RESULT: Final[Schema] = {"in_place": bool, **HEADER}
RESULT_BY_FORMAT: Final[dict[str, Schema]] = {"images": {"format": str}, "hdf5": {"dataset": str}}
TRANSFORM: Final[Schema] = {
    "mode": dict,
    "direction": str,
    "layout": str,
    "out_layout": str,
    "dtype": (str, NoneType),
    "rounding": str,
}
MODE: Final[Schema] = {
    "name": str,
    "divide": (float, NoneType),
    "mean": (list, NoneType),
    "std": (list, NoneType),
    "order": str,
}
MAX_COUNT: Final = 2**48  # upper bound of every count


def check_fields(fields: object, schema: Schema) -> None:
    """Check that a JSON object has exactly these fields and types; a bool is not an int.

    Raises
    ------
    ValueError
        Naming the wrong field.
    """
    if not isinstance(fields, dict) or fields.keys() != schema.keys():
        raise ValueError(f"not an object with the fields {', '.join(schema)}")
    for name, allowed in schema.items():
        if type(fields[name]) not in (allowed if isinstance(allowed, tuple) else (allowed,)):
            raise ValueError(f"{name} has type {type(fields[name]).__name__}")


def check_sizes(sizes: Iterable[object], *, minimum: int = 1, maximum: int = MAX_COUNT) -> None:
    """Check that all sizes are ints within bounds.

    Raises
    ------
    ValueError
        If one is not.
    """
    if any(type(size) is not int or not minimum <= size <= maximum for size in sizes):
        raise ValueError(f"a size is not an integer from {minimum} to {maximum}")


def check_job(job: dict[str, Any]) -> None:
    """Check that a job is valid and consistent.

    Raises
    ------
    ValueError
        Naming what is wrong.
    """
    check_fields(job, JOB)
    source, result = job["source"], job["result"]
    is_image_source = source.get("kind") in ("images", "tar")
    check_fields(source, {**SOURCE, **IMAGE_SOURCE} if is_image_source else SOURCE)
    is_image_target = result.get("kind") == "images"
    check_fields(result, {**RESULT, **RESULT_BY_FORMAT.get(str(result.get("kind")), {})})
    header = _parse_header(source)
    try:
        if is_image_source:
            check_sizes(source["size"] or [])
            DecodeOptions.from_dict(source)
        if is_image_target:
            check_format(result["format"], *header.shape[1:3])
        transform = transform_of_fields(job["transform"])
        transform.check_input(header.shape, header.dtype)
    except FastvggError as error:
        raise ValueError(ascii(error.problem)) from None
    if transform.layout != header.layout:
        raise ValueError("the layouts of the transform and of the source differ")
    if result_header(header, transform) != _parse_header(result):
        raise ValueError("the result header does not match the transform of the source header")


def transform_of_fields(fields: dict[str, Any]) -> Transform:
    """Parse a transform from JSON types.

    Raises
    ------
    ValueError
        If a field is missing or has the wrong type.
    FastvggError
        If the types are right but a value is invalid.
    """
    check_fields(fields, TRANSFORM)
    check_fields(fields["mode"], MODE)
    numbers = (fields["mode"]["mean"] or []) + (fields["mode"]["std"] or [])
    if any(type(number) is not float for number in numbers):
        raise ValueError("mean and std must be lists of floats")
    if fields["dtype"] not in (None, *STORAGE_TYPES):
        raise ValueError("the transform's dtype is not a storage type")
    return Transform.from_dict(fields)


def _parse_header(fields: dict[str, Any]) -> Header:
    check_sizes(fields["shape"])
    if len(fields["shape"]) != 4 or fields["dtype"] not in STORAGE_TYPES:
        raise ValueError("a header must have rank 4 and a storage dtype")
    return Header(tuple(fields["shape"]), fields["dtype"], fields["layout"])
