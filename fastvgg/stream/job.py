"""What journals and manifests say of a run: its job, as `Plan.job` gives it, when it is read back.

Any of it may have been damaged, or written by someone else, with a checksum that is right. It is
believed when every part is there, is of its type, and fits the others.
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
"""The fields of an object, and of which type, or which types, each may be."""

JOB: Final[Schema] = {"source": dict, "transform": dict, "result": dict}
HEADER: Final[Schema] = {"kind": str, "shape": list, "dtype": str, "layout": str}
SOURCE: Final[Schema] = {"path": str, "fingerprint": str, **HEADER}
OF_IMAGES: Final[Schema] = {
    "size": (list, NoneType),
    "interpolation": str,
    "keep_aspect_ratio": bool,
    "fast_jpeg": bool,
    "exif": bool,
    "gray16": str,
    "max_pixels": int,
}
RESULT: Final[Schema] = {"in_place": bool, **HEADER}
OF_RESULTS: Final[dict[str, Schema]] = {"images": {"format": str}, "hdf5": {"dataset": str}}
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
MAX_COUNT: Final = 2**48  # of anything that is counted


def check_fields(fields: object, schema: Schema) -> None:
    """Refuse what is not an object of exactly these fields, each of its type: a bool is no number.

    Raises
    ------
    ValueError
        Saying which is wrong.
    """
    if not isinstance(fields, dict) or fields.keys() != schema.keys():
        raise ValueError(f"no object of {', '.join(schema)}")
    for name, kind in schema.items():
        if type(fields[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise ValueError(f"{name} is of type {type(fields[name]).__name__}")


def check_sizes(sizes: Iterable[object], *, least: int = 1, most: int = MAX_COUNT) -> None:
    """Refuse what counts nothing that there can be.

    Raises
    ------
    ValueError
        If there is such a one.
    """
    if any(type(size) is not int or not least <= size <= most for size in sizes):
        raise ValueError(f"a size is not a whole number from {least} to {most}")


def check_job(job: dict[str, Any]) -> None:
    """Refuse a job that no run has.

    Raises
    ------
    ValueError
        Saying what is wrong with it.
    """
    check_fields(job, JOB)
    source, result = job["source"], job["result"]
    of_images = source.get("kind") in ("images", "tar")
    check_fields(source, {**SOURCE, **OF_IMAGES} if of_images else SOURCE)
    of_files = result.get("kind") == "images"
    check_fields(result, {**RESULT, **OF_RESULTS.get(str(result.get("kind")), {})})
    header = _parse_header(source)
    try:
        if of_images:
            check_sizes(source["size"] or [])
            DecodeOptions.from_dict(source)
        if of_files:
            check_format(result["format"], *header.shape[1:3])
        transform = transform_of_fields(job["transform"])
        transform.check_input(header.shape, header.dtype)
    except FastvggError as error:
        raise ValueError(ascii(error.problem)) from None
    if transform.layout != header.layout:
        raise ValueError("the transform reads another layout than the source has")
    if result_header(header, transform) != _parse_header(result):
        raise ValueError("the result is not what the transform makes of the source")


def transform_of_fields(fields: dict[str, Any]) -> Transform:
    """Return the transform of JSON types.

    Raises
    ------
    ValueError
        Saying what is wrong with them.
    FastvggError
        If they are of the right types, and no transform has such values.
    """
    check_fields(fields, TRANSFORM)
    check_fields(fields["mode"], MODE)
    numbers = (fields["mode"]["mean"] or []) + (fields["mode"]["std"] or [])
    if any(type(number) is not float for number in numbers):
        raise ValueError("mean and std are not of numbers")
    if fields["dtype"] not in (None, *STORAGE_TYPES):
        raise ValueError("the transform's dtype is not a storage type")
    return Transform.from_dict(fields)


def _parse_header(fields: dict[str, Any]) -> Header:
    check_sizes(fields["shape"])
    if len(fields["shape"]) != 4 or fields["dtype"] not in STORAGE_TYPES:
        raise ValueError("a header is not of rank 4 and a storage type")
    return Header(tuple(fields["shape"]), fields["dtype"], fields["layout"])
