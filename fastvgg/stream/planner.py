"""Inspect a source and a target, reject invalid requests, and make the plan.

Reads headers but no pixels, and writes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, get_args

from fastvgg.choices import check_choice, check_flags
from fastvgg.datasets.base import MissingChunks
from fastvgg.datasets.formats import SOURCES, inner_chunk_images
from fastvgg.datasets.images import ImageSource, listed_memory_bytes, record_memory_bytes
from fastvgg.datasets.open import open_source, source_format, target_format
from fastvgg.errors import (
    SourceError,
    TargetError,
    UsageError,
    argument,
    command,
    option,
    option_name,
    os_errors_refused,
)
from fastvgg.formatting import parse_bytes
from fastvgg.imaging.decode import MAX_PIXELS, DecodeOptions
from fastvgg.parallel import check_threads
from fastvgg.storage.file_systems import check_in_place_supported
from fastvgg.storage.location import Location
from fastvgg.stream.destinations import make_destination
from fastvgg.stream.job import MAX_CHUNKS, Job
from fastvgg.stream.manifest import Provenance
from fastvgg.stream.plan import (
    Plan,
    RunOptions,
    check_decoding_memory,
    check_threads_fit,
    choose_chunk_images,
)
from fastvgg.stream.preflight import (
    check_directory,
    check_free_space,
    check_options,
    check_target,
    loss_notes,
    plan_result,
)
from fastvgg.stream.redo_log_layout import RedoLogHeader
from fastvgg.stream.redo_log_reader import (
    check_lengths,
    check_not_in_place,
    check_sidecars_in_place,
    committed_chunks,
    read_header_to_resume,
)
from fastvgg.stream.retry import check_nothing_failed, plan_retry
from fastvgg.stream.source import (
    check_exists,
    check_not_already_done,
    check_recorded,
    file_status,
)
from fastvgg.stream.target import inspect_unlocked_target, with_committed
from fastvgg.transform import Mode, Transform

if TYPE_CHECKING:
    import os

    from numpy.typing import DTypeLike

    from fastvgg.backend import Backend
    from fastvgg.datasets.base import Source
    from fastvgg.datasets.image_writer import FileFormat
    from fastvgg.transform import Direction, Layout, Rounding


@os_errors_refused()
def plan(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    mode: Mode | str | None = None,
    model: str | None = None,
    direction: Direction = "preprocess",
    size: tuple[int, int] | None = None,
    interpolation: str = "nearest",
    keep_aspect_ratio: bool = False,
    fast_jpeg: bool = False,
    exif: bool = False,
    scale_to_uint8: bool = False,
    max_pixels: int | None = None,
    follow_links: bool = True,
    missing_chunks: MissingChunks = "error",
    layout: Layout | None = None,
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    format: FileFormat = "png",  # noqa: A002  # as the command line calls it
    memory: str | int = "512MiB",
    threads: int | None = None,
    backend: Backend = "auto",
    strict: bool = False,
    restart: bool = False,
    retry_failed: bool = False,
    fsync: bool = True,
    check_values: bool = True,
) -> Plan:
    """Plan a conversion. Reads headers only and writes nothing.

    Parameters
    ----------
    source
        A directory of images, tar shards (one, or a range like ``{0000..0099}.tar``), a .npy file,
        a directory of part-*.npy, a Zarr array (a path, or a URL like ``s3://bucket/x.zarr``), or
        a dataset in an HDF5 file, ``FILE.h5::/NAME``.
    target
        A path or URL that ends in .npy or .zarr, ``FILE.h5::/NAME``, or, for restored images, a
        directory. The run writes to ``target.partial`` and renames it when the data is complete.
        An object store has no rename: there the array's metadata is written last, and the array
        cannot be opened before.
    in_place
        Convert a .npy file of floats in place, which needs a tenth of the disk space; `target` must
        be omitted. After a crash, rerun the same command before using the file.
    mode
        A `Mode` or its name. May be omitted to restore a dataset whose manifest records it.
    model
        A model of `keras.applications`, which selects its mode; see `Mode.for_model`.
    direction
        "preprocess", "restore", or "pack" (store resized uint8 images, to preprocess later).
    size, interpolation, keep_aspect_ratio
        Height and width to resize images to, and the method; bit-equal to Keras'
        ``load_img(target_size=..., interpolation=..., keep_aspect_ratio=...)``.
    fast_jpeg
        Decode large JPEGs at reduced size (libjpeg DCT scaling). Not bit-equal to Keras.
    exif
        Apply the EXIF orientation, which Keras ignores.
    scale_to_uint8
        Scale 16-bit and floating-point grayscale to 8 bits: 65535 becomes 255, and so does 1 in
        floats from 0 to 1. By default such images fail: Keras makes them white or black.
    max_pixels
        Fail larger images before decoding them. Default: 89,478,485.
    follow_links
        Follow symbolic links below a directory, to files and to folders; a link back to a folder
        that contains it is not followed. Otherwise links are skipped, and counted in the notes.
    missing_chunks
        What chunks that a Zarr or HDF5 array does not store are: "error", or "fill" for the fill
        value of the array. zarr-python does not store chunks that are full of that value.
    layout, out_layout, dtype, rounding
        As for `fastvgg.preprocess` and `fastvgg.restore`. What the manifest of the source records
        may be omitted.
    format
        Format of restored image files: "png", "webp" (lossless), or "jpeg" (lossy).
    memory
        Memory limit, excluding the idle process (about 45 MiB, 180 MiB once Numba is loaded): a
        number of bytes, or a string like "512MiB".
    threads
        Number of threads. Default: all available CPUs.
    backend
        "numba", "numpy" or "auto".
    strict
        Stop at the first failed image, also if an index lists it. By default, its row is zeros.
    restart
        Start over, replacing an unfinished run or a finished target.
    retry_failed
        Retry the images that could not be read in a finished target.
    fsync
        Sync every commit, so that a committed chunk survives a power failure. Without it, a
        committed chunk survives only a crash of the process.
    check_values
        Before preprocessing floats, check in a sample that they can be images: 0..255, and not all
        within 0..1, unless all are zero.

    Returns
    -------
    Plan
        Print it to see what the run will need; ``run()`` executes or resumes it.

    Raises
    ------
    UsageError, SourceError, TargetError, ResumeError, ModeError
        Before anything is written.
    """
    location = Location.parse(source)
    check_exists(location)
    check_flags(
        in_place=in_place,
        keep_aspect_ratio=keep_aspect_ratio,
        fast_jpeg=fast_jpeg,
        exif=exif,
        scale_to_uint8=scale_to_uint8,
        follow_links=follow_links,
    )
    options = RunOptions(
        memory_bytes=parse_bytes(memory),
        threads=check_threads(threads),
        backend=backend,
        strict=strict,
        restart=restart,
        retry_failed=retry_failed,
        fsync=fsync,
        check_values=check_values,
    )
    if in_place != (target is None):
        written, name = option("in_place"), argument("target")
        is_file = location.container.suffix == ".npy"
        raise UsageError(
            f"both a {name} and {written} are given" if in_place else f"no {name} is given",
            f"give either a {name} or {written}" if is_file else f"give a {name}",
        )
    mode = _resolve_mode(mode, model)
    destination = location if target is None else Location.parse(target)
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    decoding = DecodeOptions(
        size, interpolation, keep_aspect_ratio, fast_jpeg, exif, scale_to_uint8, max_pixels
    )
    check_choice("missing_chunks", missing_chunks, get_args(MissingChunks))
    recorded = Provenance.read(location, options.memory_bytes)
    redo_log = None
    if in_place:
        redo_log = read_header_to_resume(location.container, restart=restart)
    else:
        check_not_in_place(location.container)
    placeholder = "identity" if mode is None else mode
    requested = Transform(placeholder, direction, layout or "NHWC", out_layout, dtype, rounding)
    if redo_log is None:
        transform = _resolve_transform(location, recorded, requested, mode, layout, out_layout)
    else:
        unfinished = redo_log.job.transform
        transform = dataclasses.replace(
            requested,
            mode=unfinished.mode if mode is None else requested.mode,
            layout=layout or unfinished.layout,
            out_layout=out_layout or unfinished.out_layout,
        )
    if SOURCES[source_format(location)].has_image_files:
        check_decoding_memory(options)
    described = redo_log.job if redo_log is not None else recorded.manifest
    opened = open_source(
        location,
        layout=transform.layout,
        dtype_hint=None if described is None else described.header.dtype,
        decoding=decoding,
        decoding_bytes=options.memory_bytes,
        threads=options.threads,
        use_index=recorded.has_index,
        follow_links=follow_links,
        missing_chunks=missing_chunks,
    )
    with contextlib.closing(opened):
        check_recorded(opened, recorded.manifest, strict=strict)
        if described is not None and opened.records:
            opened.has_class_numbers = described.class_numbers
        if in_place:
            return _plan_in_place(opened, transform, redo_log, format, options)
        planned = _plan(opened, destination, transform, format, options)
    return dataclasses.replace(planned, has_index=recorded.has_index)


def _resolve_mode(mode: Mode | str | None, model: str | None) -> Mode | str | None:
    """Return the mode that is given, or that of the given model."""
    if model is None:
        return mode
    expected = Mode.for_model(model)
    if mode not in (None, expected, expected.name):
        given = mode.name if isinstance(mode, Mode) else mode
        raise UsageError(
            f"{option('mode', given)} conflicts with {option('model', model)}, whose mode is "
            f"{expected.name}",
            "give only one of them",
        )
    return expected


def _resolve_transform(
    source: Location,
    provenance: Provenance,
    requested: Transform,
    mode: Mode | str | None,
    layout: Layout | None,
    out_layout: Layout | None,
) -> Transform:
    """Complete the requested transform from the recorded one, after checking that they agree."""
    recorded = provenance.transform
    if recorded is not None:
        check_not_already_done(source, recorded, requested.direction)
    if requested.direction == "restore" and SOURCES[source_format(source)].has_image_files:
        raise SourceError(
            f"{source} contains images, but restore takes an array of network inputs",
            "give an array that preprocess wrote; to store images in an array, pack them",
        )
    is_known = recorded is not None and requested.direction == "restore"
    if mode is None and requested.direction != "pack" and not is_known:
        remedy = (
            f"give {option_name('mode')} or {option_name('model')}; the mode of each model: "
            f"{command('models')}"
        )
        if requested.direction == "restore":
            remedy = f"no manifest next to it records the mode: {remedy}"
        raise UsageError(f"{source}: the mode is not given", remedy)
    if recorded is None:
        return requested
    if mode is not None and requested.mode != recorded.mode and requested.direction == "restore":
        raise UsageError(
            f"{source} was preprocessed in mode {recorded.mode.name}, but mode "
            f"{requested.mode.name} was requested",
            f"omit {option_name('mode')}: the manifest records it",
        )
    if layout is not None and layout != recorded.out_layout:
        raise UsageError(
            f"{source} has layout {recorded.out_layout}, but {layout} was requested",
            f"omit {option_name('layout')}: the manifest records it",
        )
    return Transform(
        requested.mode if mode is not None else recorded.mode,
        requested.direction,
        recorded.out_layout,
        out_layout or (recorded.layout if requested.direction == "restore" else None),
        requested.dtype,
        requested.rounding,
    )


def _plan(
    source: Source,
    target: Location,
    transform: Transform,
    file_format: FileFormat,
    options: RunOptions,
) -> Plan:
    job = _make_job(source, target, transform, file_format)
    check_target(source, target, job)
    check_options(target, job, options)
    planned = _build_plan(source, target, job, options)
    found = inspect_unlocked_target(planned, make_destination(planned, records=source.records))
    if found.name == "complete" and found.manifest is not None and options.strict:
        check_nothing_failed(target, found.manifest)
    if found.name == "failed" and isinstance(source, ImageSource):
        return plan_retry(planned, source, found.manifest)
    if found.name == "fresh" and not job.is_encoded and not target.is_remote:
        has_smaller = transform.direction == "preprocess" and not job.result.dtype.endswith("16")
        smaller = (
            f"store 16 bits: {option('dtype', 'float16')}" if has_smaller else "another target"
        )
        check_free_space(target.container, job.result.nbytes, smaller)
    return found.plan


def _plan_in_place(
    source: Source,
    transform: Transform,
    redo_log: RedoLogHeader | None,
    file_format: FileFormat,
    options: RunOptions,
) -> Plan:
    path, header = source.path, source.header
    if source.kind != "npy":
        raise UsageError(
            f"{path} is not a .npy file, the only format that is converted in place",
            f"give a {argument('target')} instead of {option('in_place')}",
        )
    if header.dtype != "uint8":
        transform = dataclasses.replace(transform, dtype=transform.dtype or header.dtype)
    job = _make_job(source, source.location, transform, file_format)
    if job.result != header:
        raise UsageError(
            f"{path} has shape {header.shape} and dtype {header.dtype}, but the result would have "
            f"{job.result.shape} and {job.result.dtype}",
            "in place, neither dtype nor layout can change: give a "
            f"{argument('target')} instead of {option('in_place')}",
        )
    check_in_place_supported(path)
    check_directory(path)
    check_sidecars_in_place(path)
    if redo_log is None:
        planned = _build_plan(source, source.location, job, options)
        log_header = RedoLogHeader.new(job, planned.chunk_images, path.stat())
        check_free_space(path, log_header.journal_bytes, f"lower {option_name('memory')}")
        return planned
    check_lengths(redo_log, path)
    job = dataclasses.replace(job, fingerprint=redo_log.job.fingerprint)
    planned = _build_plan(source, source.location, job, options)
    redo_log.check_job(job, path)
    return with_committed(planned, redo_log.chunk_images, committed_chunks(redo_log, path))


def _make_job(
    source: Source, target: Location, transform: Transform, file_format: FileFormat
) -> Job:
    result = plan_result(source, transform)
    return Job(
        source=str(source.location),
        source_kind=source.kind,
        fingerprint=source.fingerprint(),
        header=source.header,
        decoding=DecodeOptions.from_dict(source.settings) if source.settings else None,
        transform=transform,
        target_format=target_format(target),
        result=result,
        in_place=source.location == target,
        file_format=file_format,
        dataset=target.inner,
        follow_links=source.follow_links,
        missing_chunks=source.missing_chunks,
        class_numbers=source.has_class_numbers,
    )


def _build_plan(source: Source, target: Location, job: Job, options: RunOptions) -> Plan:
    planned = Plan(
        source=source.location,
        target=target,
        job=job,
        read_bytes=source.stored_bytes,
        source_status=file_status(source.location),
        decoded_image_bytes=source.decoded_image_bytes,
        record_bytes=record_memory_bytes(source),
        listed_bytes=listed_memory_bytes(source),
        notes=tuple(source.notes + loss_notes(job)),
        listing=source.listing if isinstance(source, ImageSource) else None,
        **vars(options),
    )
    scratch_bytes = planned.min_scratch_bytes
    read_bytes = min(source.read_granularity, job.header.images) * planned.image_memory_bytes
    single = dataclasses.replace(planned, threads=1).min_scratch_bytes
    check_threads_fit(options, single - planned.thread_bytes + read_bytes, planned.thread_bytes)
    if job.is_decoded:  # half of the memory is to decode large images, if the rest is enough
        unused_bytes = options.memory_bytes - read_bytes
        scratch_bytes = max(scratch_bytes, min(options.memory_bytes // 2, unused_bytes))
    largest = choose_chunk_images(
        job.header.images,
        planned.image_memory_bytes,
        scratch_bytes,
        options.memory_bytes,
        planned.max_chunk_bytes,
        source.read_granularity,
        inner_chunk_images(job.result.image_bytes) if job.formats[1].has_inner_chunks else 1,
    )
    chunked = dataclasses.replace(planned, chunk_images=largest)
    if chunked.chunks > MAX_CHUNKS:
        more = options.memory_bytes * chunked.chunks // MAX_CHUNKS
        raise TargetError(
            f"{target} would have {chunked.chunks} chunks; at most {MAX_CHUNKS} are supported",
            f"give {option('memory', f'{-(-more // 2**20)}MiB')} or more",
        )
    return chunked
