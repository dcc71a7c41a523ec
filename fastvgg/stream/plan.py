"""What will be done: pure arithmetic on headers. Nothing here opens, reads or writes a file."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fastvgg.backend import choose_for
from fastvgg.errors import TargetError, UsageError
from fastvgg.formatting import html_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client

    from fastvgg.backend import Backend, ResolvedBackend
    from fastvgg.datasets.base import Header
    from fastvgg.datasets.image_writer import FileFormat
    from fastvgg.datasets.images import ImageListing
    from fastvgg.stream.report import Progress, Report
    from fastvgg.transform import Transform

__all__ = [
    "CHUNK_BYTES",
    "DECODED",
    "Plan",
    "bytes_worked_on",
    "chunk_bytes",
    "chunk_images",
    "format_bytes",
    "min_scratch_bytes",
    "parse_bytes",
    "result_header",
]

# Large enough that a commit (two fsyncs, some milliseconds) is small beside it, small enough that
# little is lost when a run is killed.
CHUNK_BYTES: Final = 64 * 1024 * 1024
# Of arrays that are larger than a few chunks: a chunk's commit waits for the write beside it, and
# each is handed from thread to thread. 4 GiB of float32 to uint8 in memory: 0.58 s in chunks of
# 64 MiB, 0.49 s of 128, 0.43 s of 256. But while the first is computed nothing is written, and
# while the last is written nothing is computed, so that there are to be many.
MAX_CHUNK_BYTES: Final = 256 * 1024 * 1024
MANY_CHUNKS: Final = 32
# Of decoded images, which come ten times slower than an array's: three chunks of 24 MiB. Smaller
# ones spend more of the time on commits, larger ones on new memory and on waiting for the last.
DECODED_CHUNK_BYTES: Final = 3 * 24 * 1024 * 1024
# Of image files: each commit syncs the whole disk, and takes 20 ms for 40 new files. Of shards:
# some 20 MiB each, with what encoding them takes.
CHUNKS_BYTES: Final = {"images": 256 * 1024 * 1024, "zarr": 144 * 1024 * 1024}
# For each thread: no less than an image of common size takes.
MIN_DECODE_BYTES: Final = 4 * 1024 * 1024
DECODED: Final = ("images", "tar")
# How often a library holds a chunk beside it to read it, as it is stored.
READ: Final = {"hdf5": 1, "zarr": 2}
# And to write it: one shard is encoded, one waits, and one is on its way to the disk.
ENCODED: Final = {"zarr": 3}
# What its threads keep of the memory that they had.
KEPT_BYTES: Final = {"zarr": 32 * 1024 * 1024}
# What a run takes for itself: threads, the journal's marks; 1.4 MiB were seen.
RUN_BYTES: Final = 2 * 1024 * 1024
UNITS: Final = {"": 1, "B": 1, "K": 2**10, "KIB": 2**10, "M": 2**20, "MIB": 2**20}
UNITS.update({"G": 2**30, "GIB": 2**30, "T": 2**40, "TIB": 2**40})
UNITS.update({"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12})


def parse_bytes(text: str | int) -> int:
    """Return the bytes that a text like 512MiB means.

    >>> parse_bytes("512MiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
    (536870912, 1500000000, 4096)
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UsageError(f"{text!r} is not an amount of memory", "write it like 512MiB or 2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """Return a count of bytes for people.

    >>> format_bytes(999), format_bytes(602112), format_bytes(3 * 2**30)
    ('999 B', '588.0 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def result_header(header: Header, transform: Transform) -> Header:
    """Return the header of what a transform makes of a dataset."""
    return type(header)(
        transform.output_shape(header.shape),
        transform.output_name(header.dtype),
        transform.out_layout,
    )


def bytes_worked_on(
    source_kind: str, target_format: str, image_bytes: int, result_bytes: int
) -> int:
    """Return what an image takes while its chunk is worked on, as read and as the result.

    Chunks that are computed row by row are two at a time, and a third is being written.
    """
    encoded_bytes = ENCODED.get(target_format, 0) * result_bytes
    if source_kind in DECODED:
        return 3 * result_bytes + encoded_bytes
    if target_format == "images":
        return 2 * image_bytes + 3 * result_bytes
    read_bytes = (1 + READ.get(source_kind, 0)) * image_bytes
    return read_bytes + 2 * result_bytes + encoded_bytes


def min_scratch_bytes(
    source_kind: str, target_format: str, threads: int, image_bytes: int, result_bytes: int
) -> int:
    """Return what threads that compute row by row take at least beside the chunks.

    To decode, each needs memory for its row, and something to decode in.
    """
    kept = kept_bytes(source_kind, target_format)
    if source_kind in DECODED:
        return kept + threads * (image_bytes + MIN_DECODE_BYTES)
    return kept + (threads * result_bytes if target_format == "images" else 0)


def kept_bytes(source_kind: str, target_format: str) -> int:
    """Return what a run, and the library of a format, keep however large the chunks are."""
    return RUN_BYTES + max(KEPT_BYTES.get(kind, 0) for kind in (source_kind, target_format))


def chunk_bytes(
    source_kind: str, target_format: str, worked_on_bytes: int, *, in_place: bool = False
) -> int:
    """Return what a chunk takes at most while it is worked on, of images that take so much in all.

    >>> [chunk_bytes("npy", "npy", gib * 2**30) // 2**20 for gib in (1, 4, 100)]
    [64, 128, 256]
    """
    if target_format in CHUNKS_BYTES:
        return CHUNKS_BYTES[target_format]
    if source_kind in DECODED:
        return DECODED_CHUNK_BYTES
    if in_place:
        return CHUNK_BYTES
    return min(max(CHUNK_BYTES, worked_on_bytes // MANY_CHUNKS), MAX_CHUNK_BYTES)


def chunk_images(
    images: int,
    bytes_per_image: int,
    scratch_bytes: int,
    limit_bytes: int,
    max_bytes: int = CHUNK_BYTES,
    together: int = 1,
    rounded: int = 1,
) -> int:
    """Return how many images make a chunk, so that the run stays below a memory limit.

    Parameters
    ----------
    images
        How many there are in all.
    bytes_per_image
        What an image takes while it is worked on.
    scratch_bytes
        What reading needs beside that.
    limit_bytes
        The memory limit.
    max_bytes
        What a chunk's images take at most while they are worked on; more where it must be.
    together
        How many images the source stores as one piece, which is read once and whole.
    rounded
        How many the target would best store as one piece.

    Raises
    ------
    TargetError
        If not even one image, or one such piece, fits.

    Examples
    --------
    >>> chunk_images(10**6, 752_640, scratch_bytes=0, limit_bytes=512 * 2**20)
    89
    >>> chunk_images(10**6, 752_640, scratch_bytes=0, limit_bytes=512 * 2**20, together=32)
    64
    """
    together = min(together, images)
    room_bytes, min_bytes = limit_bytes - scratch_bytes, together * bytes_per_image
    if room_bytes < min_bytes:
        what = "one image needs" if together == 1 else f"{together} images, stored together, need"
        needed = format_bytes(scratch_bytes + min_bytes)
        raise TargetError(
            f"{what} {needed} of memory, and the limit is {format_bytes(limit_bytes)}",
            f"give --memory {-(-(scratch_bytes + min_bytes) // 2**20)}MiB or more",
        )
    most = max(1, min(max_bytes, room_bytes) // min_bytes) * together
    return min(images, most - most % math.lcm(together, rounded) or most)


@dataclass(frozen=True)
class Plan:
    """One dataset into another: what will be read, computed and written, and what it will need.

    Made by `fastvgg.plan`; `run` carries it out, and resumes what an earlier run left unfinished.
    """

    source: str
    target: str
    dataset: str
    """What the target is called within its file; empty where it is a file itself."""
    source_kind: str
    target_format: str
    header: Header
    """Of the source."""
    result: Header
    """Of the target."""
    transform: Transform
    settings: dict[str, Any]
    """What else decides the pixels: how images are resized."""
    fingerprint: str
    """Of the source, when the plan was made."""
    read_bytes: int
    chunk_images: int
    memory_bytes: int
    """The limit."""
    threads: int
    backend: Backend
    strict: bool
    restart: bool
    fsync: bool
    """What a commit survives."""
    notes: tuple[str, ...]
    committed_chunks: int
    """What an unfinished run has done already."""
    file_format: FileFormat
    """Of image files that are written."""
    retry_failed: bool
    """Whether a finished target is taken up again, for what failed in it."""
    listing: ImageListing | None = field(default=None, compare=False, repr=False)
    """Which images there are, not to be looked for again."""

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.header.images // self.chunk_images)

    def choose_backend(self) -> ResolvedBackend:
        """Return the backend of a run: Numba where there is enough to do, otherwise NumPy."""
        packs = self.transform.direction == "pack"
        nbytes = 0 if packs else self.header.nbytes + self.result.nbytes
        return choose_for(self.backend, nbytes, self.threads)

    @property
    def in_place(self) -> bool:
        """Whether the source becomes the result."""
        return self.source == self.target

    @property
    def write_bytes(self) -> int:
        """How many bytes the target's pixels take, before any compression."""
        return self.result.nbytes

    @property
    def image_memory_bytes(self) -> int:
        """How much memory an image takes while its chunk is worked on."""
        return bytes_worked_on(self.source_kind, self.target_format, *self._image_bytes)

    @property
    def min_scratch_bytes(self) -> int:
        """How much memory is needed at least beside the chunks."""
        kinds = self.source_kind, self.target_format
        return min_scratch_bytes(*kinds, self.threads, *self._image_bytes)

    @property
    def decoding_bytes(self) -> int:
        """How much memory decoding may take: all that chunks and rows leave."""
        if self.source_kind not in DECODED:
            return 0
        chunks_bytes = self.chunk_images * self.image_memory_bytes
        rows_bytes = self.threads * self.header.image_bytes
        kept = kept_bytes(self.source_kind, self.target_format)
        return self.projected_bytes - chunks_bytes - rows_bytes - kept

    @property
    def projected_bytes(self) -> int:
        """How much memory the run takes at most, above the idle process."""
        least = self.min_scratch_bytes + self.chunk_images * self.image_memory_bytes
        return max(least, self.memory_bytes) if self.source_kind in DECODED else least

    @property
    def _image_bytes(self) -> tuple[int, int]:
        return self.header.image_bytes, self.result.image_bytes

    def chunk_rows(self) -> Iterator[tuple[int, int]]:
        """Return the first row of every chunk, and the row after its last."""
        for start in range(0, self.header.images, self.chunk_images):
            yield start, min(start + self.chunk_images, self.header.images)

    def job(self) -> dict[str, Any]:
        """Return all that decides the result's bytes, as JSON types: two equal jobs are one."""
        job = {
            "source": {
                "path": self.source,
                "kind": self.source_kind,
                "fingerprint": self.fingerprint,
                "shape": list(self.header.shape),
                "dtype": self.header.dtype,
                "layout": self.header.layout,
                **self.settings,
            },
            "transform": self.transform.to_dict(),
            "result": {
                "kind": self.target_format,
                "shape": list(self.result.shape),
                "dtype": self.result.dtype,
                "layout": self.result.layout,
                "in_place": self.in_place,
                **({"format": self.file_format} if self.target_format == "images" else {}),
                **({"dataset": self.dataset} if self.dataset else {}),
            },
        }
        as_read_back: dict[str, Any] = json.loads(json.dumps(job))
        return as_read_back

    def run(
        self, progress: Callable[[Progress], None] | None = None, *, client: Client | None = None
    ) -> Report:
        """Carry the plan out; see `fastvgg.stream.run.run`.

        With a client of Dask on its cluster; see `fastvgg.cluster.run`.
        """
        if client is not None:
            from fastvgg import cluster

            return cluster.run(self, client, progress)
        from fastvgg.stream import run

        return run.run(self, progress)

    def _caption(self) -> str:
        verb, mode = self.transform.direction, self.transform.mode.name
        return f"{verb} ({mode}): {self.source} -> {self.target}"

    def _summary_rows(self) -> list[tuple[str, str]]:
        """Return what people are told of it, by name."""
        done = f", {self.committed_chunks:,} done" if self.committed_chunks else ""
        limit = format_bytes(self.memory_bytes)
        twice = " twice, in place" if self.in_place else ""
        return [
            ("images", f"{self.header.images:,}"),
            ("from", f"{self.header.shape[1:]} {self.header.dtype} {self.header.layout}"),
            ("to", f"{self.result.shape[1:]} {self.result.dtype} {self.result.layout}"),
            ("chunks", f"{self.chunks:,} of {self.chunk_images:,} images{done}"),
            ("reads", format_bytes(self.read_bytes)),
            ("writes", format_bytes(self.write_bytes) + twice),
            ("memory", f"{format_bytes(self.projected_bytes)} of {limit}"),
            ("threads", str(self.threads)),
            *(("note", note) for note in self.notes),
        ]

    def __str__(self) -> str:
        facts = (f"  {name:<9}{value}" for name, value in self._summary_rows())
        return "\n".join([self._caption(), *facts])

    def _repr_html_(self) -> str:
        return html_table(self._caption(), self._summary_rows())
