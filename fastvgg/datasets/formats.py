"""The table of formats: what a run needs to know of each, besides its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

# Chunks of 4 MiB encode at two thirds of the speed of 8 MiB; larger ones gain almost nothing.
INNER_CHUNK_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True)
class Format:
    """The properties of a format on which the checks and the memory of a run depend."""

    target: Literal["file", "directory"] | None = None  # what it is on disk; None: only a source
    has_image_files: bool = False  # encoded images, which are decoded or encoded one by one
    has_chunks: bool = False  # stored one by one, so that some may be missing
    has_inner_chunks: bool = False  # a chunk should be a multiple of `inner_chunk_images`
    result_fields: tuple[str, ...] = ()  # fields of a `Job`, recorded for such results only
    chunk_bytes: int | None = None  # preferred memory of a chunk of a target
    read_copies: int = 0  # extra copies of a stored chunk that a library holds while reading it
    write_copies: int = 0  # the same while writing it
    retained_bytes: int = 0  # memory that the threads of a library retain


SOURCES: Final = {
    "npy": Format("file"),
    "parts": Format(),
    "hdf5": Format("file", has_chunks=True, result_fields=("dataset",), read_copies=1),
    "zarr": Format(
        "directory",
        has_chunks=True,
        has_inner_chunks=True,
        chunk_bytes=144 * 2**20,  # shards of about 20 MiB, plus their encoding buffers
        read_copies=2,
        write_copies=3,  # one shard is being encoded, one is queued, one is being written
        retained_bytes=32 * 2**20,
    ),
    "images": Format(
        "directory",
        has_image_files=True,
        result_fields=("format",),
        chunk_bytes=256 * 2**20,  # each commit calls syncfs, which takes 20 ms for 40 new files
    ),
    "tar": Format(has_image_files=True),
}
TARGETS: Final = {kind: entry for kind, entry in SOURCES.items() if entry.target is not None}


def inner_chunk_images(image_bytes: int) -> int:
    """Return how many images an inner chunk (the unit of random access) should hold.

    >>> inner_chunk_images(602_112)
    13
    """
    return max(1, INNER_CHUNK_BYTES // image_bytes)
