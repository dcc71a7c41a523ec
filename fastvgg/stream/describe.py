"""Describe what fastvgg did not write: images, arrays, and files that are neither.

Nothing here needs an option: images may have any sizes, arrays any layout. The time is bounded:
images are listed, and only a sample of their headers is read.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from fastvgg.datasets.formats import SOURCES
from fastvgg.datasets.open import IMAGE_SOURCES, hdf5_datasets, open_source, source_format
from fastvgg.errors import SourceError, StoppedError
from fastvgg.imaging.decode import DecodeOptions, Decoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastvgg.datasets.base import ImageRecord, MissingChunks
    from fastvgg.datasets.images import ImageListing
    from fastvgg.storage.location import Location

SAMPLED_HEADERS: Final = 200
MAX_SHOWN: Final = 10
MAX_SAMPLE_BYTES: Final = 32 * 2**20  # of one image: a larger one is not sampled
DECODING_BYTES: Final = 64 * 2**20


def describe_source(location: Location, *, use_index: bool) -> dict[str, Any]:
    """Return what a path contains, as JSON types in the order to show them.

    Raises
    ------
    SourceError
        If it does not exist, or cannot be listed.
    """
    try:
        kind = source_format(location)
        if kind in IMAGE_SOURCES:
            return _describe_images(kind, IMAGE_SOURCES[kind].listing_class(location.container))
        if kind == "hdf5" and not location.inner:
            return _describe_hdf5(location)
        return _describe_array(location, use_index=use_index)
    except SourceError as error:
        return describe_error(location, error)


def describe_error(location: Location, error: SourceError) -> dict[str, Any]:
    """Describe what exists but is not a dataset; raise the error if nothing exists."""
    if not location.is_remote and not os.path.exists(location.container):  # noqa: PTH110
        raise error
    fields = {"state": "not a dataset", **_size(location)}
    if "shape" in error.details:
        with contextlib.suppress(SourceError):
            fields["kind"] = source_format(location)
        fields.update({name: error.details[name] for name in ("shape", "dtype")})
    return {**fields, "reason": error.problem, "next": error.remedy}


def _size(location: Location) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        if location.container.is_file():
            return {"bytes": location.container.stat().st_size}
    return {}


def _describe_array(location: Location, *, use_index: bool) -> dict[str, Any]:
    # Missing chunks are a note here, not an error.
    missing: MissingChunks = "fill" if SOURCES[source_format(location)].has_chunks else "error"
    opened = open_source(location, use_index=use_index, missing_chunks=missing)
    with contextlib.closing(opened) as source:
        return {
            "state": "source",
            "kind": source.kind,
            "shape": list(source.header.shape),
            "dtype": source.header.dtype,
            "bytes": source.stored_bytes,
            "notes": source.notes,
        }


def _describe_hdf5(location: Location) -> dict[str, Any]:
    """List the datasets of an HDF5 file."""
    datasets, more = hdf5_datasets(location)
    images = next((found["name"] for found in datasets if found["images"]), "/NAME")
    return {
        "state": "source",
        "kind": "hdf5",
        **_size(location),
        "datasets": datasets,
        "more_datasets": more or None,
        "next": f"give one of the datasets: {location.container}::{images}",
    }


def _describe_images(kind: str, listing: ImageListing) -> dict[str, Any]:
    rows = range(len(listing))
    suffixes = Counter(os.path.splitext(listing.name(row))[1].lower() for row in rows)  # noqa: PTH122
    labels = Counter(listing.label(row) for row in rows)
    return {
        "state": "source",
        "kind": kind,
        "images": len(listing),
        "bytes": listing.stored_bytes,
        "formats": {os.fsdecode(suffix): count for suffix, count in suffixes.most_common()},
        **label_fields(labels),
        **(_sampled_sizes(listing) if len(listing) else {}),
        "linked_folders": len(listing.linked_paths) or None,
        "notes": listing.notes,
    }


def label_fields(labels: Counter[Any]) -> dict[str, Any]:
    """Return the number of labels, and the most frequent ones with their numbers of images."""
    if not any(labels):
        return {"labels": 0}
    first = heapq.nsmallest(MAX_SHOWN, labels.items(), key=lambda item: (-item[1], item[0]))
    shown = {os.fsdecode(label) or "(none)": count for label, count in first}
    return {"labels": sum(map(bool, labels)), "images_by_label": shown}


def count_labels(records: Sequence[ImageRecord]) -> dict[str, Any]:
    """Return the labels of an index, as `label_fields` does; nothing if there is no index."""
    return label_fields(Counter(record.label for record in records)) if records else {}


def _sampled_sizes(listing: ImageListing) -> dict[str, Any]:
    """Read the headers of images at equal distances; return their heights and widths."""
    decoder = Decoder(DecodeOptions(), memory_bytes=DECODING_BYTES)
    images = len(listing)
    count = min(SAMPLED_HEADERS, images)
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable: list[str] = []
    for row in (number * images // count for number in range(count)):
        try:
            found = decoder.size(listing.read(row, MAX_SAMPLE_BYTES))
        except (OSError, StoppedError) as error:
            found = str(error)
        if isinstance(found, str):
            unreadable.append(os.fsdecode(listing.name(row)))
        else:
            sizes[found] += 1
    fields: dict[str, Any] = {"sampled_headers": count}
    if sizes:
        fields["sizes"] = {
            "distinct": len(sizes),
            "most common": _text(sizes.most_common(1)[0][0]),
            "smallest": _text(min(sizes, key=math.prod)),
            "largest": _text(max(sizes, key=math.prod)),
        }
    if unreadable:
        fields["unreadable"] = len(unreadable)
        fields["unreadable_first"] = unreadable[0]
    return fields


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
