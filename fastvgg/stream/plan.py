"""Plan: the memory and chunk arithmetic of a run, from headers. Does no I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fastvgg.backend import check_backend, choose_for_size
from fastvgg.choices import check_flags
from fastvgg.errors import TargetError, UsageError, option
from fastvgg.escaping import escape_controls
from fastvgg.formatting import format_bytes, format_count, html_table
from fastvgg.storage.descriptors import open_standard_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distributed import Client

    from fastvgg.backend import Backend, ResolvedBackend
    from fastvgg.datasets.base import Header
    from fastvgg.datasets.images import ImageListing
    from fastvgg.storage.location import Location
    from fastvgg.stream.job import Job
    from fastvgg.stream.report import Progress, Report
    from fastvgg.transform import Transform

# Large enough to amortize a commit (two fsyncs, a few milliseconds), small enough that a killed run
# loses little.
CHUNK_BYTES: Final = 64 * 1024 * 1024
# For large arrays: each chunk is handed between threads, and its commit waits for the write in
# flight. 4 GiB of float32 to uint8 in memory: 0.58 s in chunks of 64 MiB, 0.49 s of 128, 0.43 s of
# 256. The pipeline is idle while it fills and drains, so a run needs MIN_LARGE_CHUNKS of them.
MAX_CHUNK_BYTES: Final = 256 * 1024 * 1024
MIN_LARGE_CHUNKS: Final = 32
# For decoded images, which arrive ten times slower than rows of an array: three chunks of 24 MiB.
# Smaller chunks spend more time on commits, larger ones on page faults and on the last chunk.
DECODED_CHUNK_BYTES: Final = 3 * 24 * 1024 * 1024
# Per thread: enough for an image of common size.
MIN_DECODE_BYTES: Final = 4 * 1024 * 1024
# Fixed overhead of a run: threads and commit references; 1.4 MiB measured.
RUN_BYTES: Final = 2 * 1024 * 1024


def choose_chunk_images(
    images: int,
    bytes_per_image: int,
    scratch_bytes: int,
    limit_bytes: int,
    max_bytes: int = CHUNK_BYTES,
    read_granularity: int = 1,
    write_granularity: int = 1,
) -> int:
    """Return the number of images per chunk that keeps a run within its memory limit.

    `bytes_per_image` is the memory per image of the chunks in flight, and `scratch_bytes` the
    additional memory. The source is read in whole units of `read_granularity` images, which may
    exceed the preferred `max_bytes`. The target prefers multiples of `write_granularity` images.

    Raises
    ------
    TargetError
        If not even one image, or one read unit, fits.

    Examples
    --------
    >>> choose_chunk_images(10**6, 752_640, scratch_bytes=0, limit_bytes=512 * 2**20)
    89
    >>> choose_chunk_images(10**6, 752_640, 0, limit_bytes=512 * 2**20, read_granularity=32)
    64
    """
    read_granularity = min(read_granularity, images)
    available_bytes, min_bytes = limit_bytes - scratch_bytes, read_granularity * bytes_per_image
    if available_bytes < min_bytes:
        what = "one image needs"
        if read_granularity > 1:
            what = f"{read_granularity} images, stored together, need"
        needed_bytes = scratch_bytes + min_bytes
        raise TargetError(
            f"{what} {format_bytes(needed_bytes)} of memory, but the limit is "
            f"{format_bytes(limit_bytes)}",
            f"give {option('memory', f'{-(-needed_bytes // 2**20)}MiB')} or more",
        )
    largest = max(1, min(max_bytes, available_bytes) // min_bytes) * read_granularity
    return min(images, largest - largest % math.lcm(read_granularity, write_granularity) or largest)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run that do not change its result."""

    memory_bytes: int
    """The memory limit."""
    threads: int
    backend: Backend
    strict: bool
    restart: bool
    retry_failed: bool
    """Whether to retry the failed images of a finished target."""
    fsync: bool
    """Whether commits survive a power failure, not only a crash of the process."""
    check_values: bool = True
    """Whether to reject floats whose values cannot be images before preprocessing them."""

    def __post_init__(self) -> None:
        check_backend(self.backend)
        check_flags(
            strict=self.strict,
            restart=self.restart,
            retry_failed=self.retry_failed,
            fsync=self.fsync,
            check_values=self.check_values,
        )


def check_threads_fit(options: RunOptions, fixed_bytes: int, thread_bytes: int) -> None:
    """Check that all threads fit into the memory limit, if a single one does.

    `fixed_bytes` is the memory that does not depend on the number of threads.

    Raises
    ------
    TargetError
        It says how many fit.
    """
    needed_bytes = fixed_bytes + options.threads * thread_bytes
    fitting = (options.memory_bytes - fixed_bytes) // max(1, thread_bytes)
    if 1 <= fitting < options.threads and needed_bytes > options.memory_bytes:
        raise TargetError(
            f"{options.threads} threads need {format_bytes(needed_bytes)} of memory, but the limit "
            f"is {format_bytes(options.memory_bytes)}",
            f"give {option('threads', fitting)}{' or fewer' if fitting > 1 else ''}, or "
            f"{option('memory', f'{-(-needed_bytes // 2**20)}MiB')} or more",
        )


def check_decoding_memory(options: RunOptions) -> None:
    """Check that images can be decoded at all, before their own size is known.

    Raises
    ------
    TargetError
        If the memory limit is too low.
    """
    check_threads_fit(options, RUN_BYTES, MIN_DECODE_BYTES)
    needed_bytes = RUN_BYTES + MIN_DECODE_BYTES
    if needed_bytes > options.memory_bytes:
        raise TargetError(
            f"decoding an image needs more than {format_bytes(needed_bytes)} of memory, but the "
            f"limit is {format_bytes(options.memory_bytes)}",
            f"give {option('memory', '64MiB')} or more",
        )


@dataclass(frozen=True, kw_only=True)
class Plan(RunOptions):
    """A planned conversion: its source, target and transform, and the resources it needs.

    Returned by `fastvgg.plan`; `run` executes it, or resumes an unfinished run.
    """

    source: Location
    target: Location
    job: Job
    """Everything that determines the result's bytes."""
    has_index: bool = True
    """Whether an index next to the source describes it."""
    read_bytes: int
    source_status: tuple[int, int] | None = None
    """Size and modification time of a source that is one file, to tell what has changed."""
    decoded_image_bytes: int = 0
    """Memory per image of the units that the source stores, if more than that of an image."""
    record_bytes: int = 0
    """Memory per image of the records of the chunks in flight."""
    listed_bytes: int = 0
    """Memory of the names of all images, or of the positions of what is read."""
    notes: tuple[str, ...]
    chunk_images: int = 1
    committed_chunks: int = 0
    """Chunks that an unfinished run has committed."""
    listing: ImageListing | None = field(default=None, compare=False, repr=False)
    """Listing of an image source; saves the run from scanning it again."""

    @property
    def header(self) -> Header:
        """Header of the source."""
        return self.job.header

    @property
    def result(self) -> Header:
        """Header of the target."""
        return self.job.result

    @property
    def transform(self) -> Transform:
        """The transform of the images."""
        return self.job.transform

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.header.images // self.chunk_images)

    def choose_backend(self) -> ResolvedBackend:
        """Return the backend: Numba if the work pays for its compilation, otherwise NumPy."""
        is_pack = self.transform.direction == "pack"
        nbytes = 0 if is_pack else self.header.nbytes + self.result.nbytes
        return choose_for_size(self.backend, nbytes, self.threads)

    @property
    def write_bytes(self) -> int:
        """Size of the target's pixels before compression, in bytes."""
        return self.result.nbytes

    @property
    def max_chunk_bytes(self) -> int:
        """Preferred maximum memory of a chunk."""
        _, target = self.job.formats
        if target.chunk_bytes is not None:
            return target.chunk_bytes
        if self.job.is_decoded:
            return DECODED_CHUNK_BYTES
        if self.job.in_place:
            return CHUNK_BYTES
        work_bytes = self.header.images * self.image_memory_bytes
        return min(max(CHUNK_BYTES, work_bytes // MIN_LARGE_CHUNKS), MAX_CHUNK_BYTES)

    @property
    def image_memory_bytes(self) -> int:
        """Memory per image of the chunks in flight: input, output, encoding buffers, records.

        Chunks that are computed row by row: two are computed while a third is written.
        """
        image_bytes, result_bytes = self.header.image_bytes, self.result.image_bytes
        decoded_bytes = max(image_bytes, self.decoded_image_bytes)
        source, target = self.job.formats
        encoded_bytes = self.record_bytes + target.write_copies * result_bytes
        if self.job.is_decoded:
            return 3 * result_bytes + encoded_bytes
        if self.job.is_encoded:
            return 2 * decoded_bytes + 3 * result_bytes + self.record_bytes
        read_bytes = image_bytes + source.read_copies * decoded_bytes
        return read_bytes + 2 * result_bytes + encoded_bytes

    @property
    def _overhead_bytes(self) -> int:
        """Memory of a run, its listing and the library of a format, at any chunk size."""
        return RUN_BYTES + self.listed_bytes + max(used.retained_bytes for used in self.job.formats)

    @property
    def thread_bytes(self) -> int:
        """Memory of each thread: a decoding one has a row buffer and decoder scratch space."""
        if self.job.is_decoded:
            return self.header.image_bytes + MIN_DECODE_BYTES
        return self.result.image_bytes if self.job.is_encoded else 0

    @property
    def min_scratch_bytes(self) -> int:
        """Minimum memory in addition to the chunks."""
        return self._overhead_bytes + self.threads * self.thread_bytes

    @property
    def decoding_bytes(self) -> int:
        """Memory left for decoding after chunks, rows and overhead."""
        if not self.job.is_decoded:
            return 0
        chunks_bytes = self.chunk_images * self.image_memory_bytes
        rows_bytes = self.threads * self.header.image_bytes
        return self.projected_bytes - chunks_bytes - rows_bytes - self._overhead_bytes

    @property
    def projected_bytes(self) -> int:
        """Peak memory of the run, excluding the idle process."""
        needed = self.min_scratch_bytes + self.chunk_images * self.image_memory_bytes
        return max(needed, self.memory_bytes) if self.job.is_decoded else needed

    def chunk_rows(self) -> Iterator[tuple[int, int]]:
        """Yield the row range (start, stop) of every chunk."""
        for start in range(0, self.header.images, self.chunk_images):
            yield start, min(start + self.chunk_images, self.header.images)

    def run(
        self, progress: Callable[[Progress], None] | None = None, *, client: Client | None = None
    ) -> Report:
        """Execute the plan; see `fastvgg.stream.run.run`.

        With a Dask client, run it on that cluster; see `fastvgg.executors.dask`. A closed standard
        stream is opened as the null device, so that no library's file gets its descriptor.
        """
        open_standard_streams()
        from fastvgg.executors.threads import ThreadExecutor
        from fastvgg.stream import in_place, run

        if client is not None:
            if not hasattr(client, "scheduler_info"):
                raise UsageError(
                    f"client is {client!r}, not a Dask client",
                    "give a distributed.Client, or omit it",
                )
            from fastvgg.executors.dask import DaskExecutor

            return run.run(self, DaskExecutor(client), progress)  # refuses plans in place
        if self.job.in_place:
            return in_place.run(self, progress)
        return run.run(self, ThreadExecutor(), progress)

    def _caption(self) -> str:
        direction, mode = self.transform.direction, self.transform.mode.name
        return f"{direction} ({mode}): {self.source} -> {self.target}"

    def _summary_rows(self) -> list[tuple[str, str]]:
        committed = f", {self.committed_chunks:,} done" if self.committed_chunks else ""
        limit = format_bytes(self.memory_bytes)
        twice = " twice, in place" if self.job.in_place else ""
        return [
            ("images", f"{self.header.images:,}"),
            ("from", f"{self.header.shape[1:]} {self.header.dtype} {self.header.layout}"),
            ("to", f"{self.result.shape[1:]} {self.result.dtype} {self.result.layout}"),
            ("chunks", f"{self.chunks:,} of {format_count(self.chunk_images, 'image')}{committed}"),
            ("reads", format_bytes(self.read_bytes)),
            ("writes", format_bytes(self.write_bytes) + twice),
            ("memory", f"{format_bytes(self.projected_bytes)} of {limit}"),
            ("threads", str(self.threads)),
            *(("note", note) for note in self.notes),
        ]

    def __str__(self) -> str:
        lines = (f"  {name:<9}{value}" for name, value in self._summary_rows())
        return "\n".join(map(escape_controls, [self._caption(), *lines]))

    def _repr_html_(self) -> str:
        return html_table(self._caption(), self._summary_rows())
