"""Inspect a source and a target, reject invalid requests, and make the plan.

Reads headers but no pixels, and writes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from fastvgg import oracle
from fastvgg.backend import check_backend
from fastvgg.datasets.base import inner_chunk_images
from fastvgg.datasets.image_writer import is_lossy
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.open import open_source, target_format
from fastvgg.errors import SourceError, UsageError
from fastvgg.imaging.decode import MAX_PIXELS, DecodeOptions
from fastvgg.parallel import check_threads
from fastvgg.storage.local import check_in_place_supported
from fastvgg.storage.location import Location
from fastvgg.stream.job import DECODED
from fastvgg.stream.journal import journal_path, read_journal
from fastvgg.stream.manifest import Provenance, manifest_path
from fastvgg.stream.plan import (
    Plan,
    RunOptions,
    chunk_bytes,
    chunk_images,
    image_work_bytes,
    min_scratch_bytes,
    parse_bytes,
)
from fastvgg.stream.preflight import (
    check_choices,
    check_directory,
    check_free_space,
    check_target,
    plan_result,
)
from fastvgg.stream.redo_log import (
    check_restart,
    check_same_file,
    committed_chunks,
    read_redo_log_header,
    unfinished_error,
)
from fastvgg.stream.redo_log_layout import RedoLogHeader
from fastvgg.stream.retry import plan_retry
from fastvgg.stream.target import inspect_target, with_committed
from fastvgg.stream.values import check_not_already_done
from fastvgg.transform import Mode, Transform

if TYPE_CHECKING:
    import os

    from numpy.typing import DTypeLike

    from fastvgg.backend import Backend
    from fastvgg.datasets.base import Header, Source
    from fastvgg.datasets.image_writer import FileFormat
    from fastvgg.imaging.decode import Gray16
    from fastvgg.stream.manifest import Manifest
    from fastvgg.transform import Direction, Layout, Rounding


def plan(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    mode: Mode | str | None = None,
    direction: Direction = "preprocess",
    size: tuple[int, int] | None = None,
    interpolation: str = "nearest",
    keep_aspect_ratio: bool = False,
    fast_jpeg: bool = False,
    exif: bool = False,
    gray16: Gray16 = "error",
    max_pixels: int | None = None,
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
    direction
        "preprocess", "restore", or "pack" (store resized uint8 images, to preprocess later).
    size, interpolation, keep_aspect_ratio
        Height and width to resize images to, and the method; bit-equal to Keras'
        ``load_img(target_size=..., interpolation=..., keep_aspect_ratio=...)``.
    fast_jpeg
        Decode large JPEGs at reduced size (libjpeg DCT scaling). Not bit-equal to Keras.
    exif
        Apply the EXIF orientation, which Keras ignores.
    gray16
        How to treat 16-bit grayscale images, which Keras clips to white: "error" counts each as a
        failed image, "scale" maps them to 8 bits.
    max_pixels
        Fail larger images before decoding them. Default: 89,478,485.
    layout, out_layout, dtype, rounding
        As for `fastvgg.preprocess` and `fastvgg.restore`. What the manifest of the source records
        may be omitted.
    format
        Format of restored image files: "png", "webp" (lossless), or "jpeg" (lossy).
    memory
        Memory limit, excluding the idle process: a number of bytes, or a string like "512MiB".
    threads
        Number of threads. Default: all available CPUs.
    backend
        "numba", "numpy" or "auto".
    strict
        Stop at the first image that cannot be read. By default, its row is zeros.
    restart
        Start over, replacing an unfinished run or a finished target.
    retry_failed
        Retry the images that could not be read in a finished target.
    fsync
        Sync every commit, so that a committed chunk survives a power failure. Without it, a
        committed chunk survives only a crash of the process.

    Returns
    -------
    Plan
        Print it to see what the run will need; ``run()`` executes or resumes it.

    Raises
    ------
    UsageError, SourceError, TargetError, ResumeError, ModeError, DtypeError
        Before anything is written.
    """
    if in_place != (target is None):
        raise UsageError(
            "both a target and --in-place are given" if in_place else "no target is given",
            "give either a target or --in-place",
        )
    source_location = Location.parse(source)
    destination = source_location if target is None else Location.parse(target)
    decoding = DecodeOptions(
        size,
        interpolation,
        keep_aspect_ratio,
        fast_jpeg,
        exif,
        gray16,
        MAX_PIXELS if max_pixels is None else max_pixels,
    )
    threads = check_threads(threads)
    check_backend(backend)
    recorded = Provenance.read(source_location)
    manifest = recorded.manifest
    options = RunOptions(
        memory_bytes=parse_bytes(memory),
        threads=threads,
        backend=backend,
        strict=strict,
        restart=restart,
        retry_failed=retry_failed,
        fsync=fsync,
        file_format=format,
        has_index=recorded.has_index,
    )
    redo_log = read_redo_log_header(source_location.container)
    if redo_log is not None and restart and in_place:
        check_restart(redo_log, source_location.container)
        redo_log = None
    if redo_log is not None and not in_place:
        raise unfinished_error(redo_log, source_location.container)
    if redo_log is None:
        placeholder = "identity" if mode is None else mode
        requested = Transform(placeholder, direction, layout or "NHWC", out_layout, dtype, rounding)
        transform = _resolve_transform(
            source_location, recorded.transform, requested, mode, layout, out_layout
        )
        dtype_hint = None if manifest is None else manifest.header.dtype
    else:
        unfinished = redo_log.job.transform
        layouts = layout or unfinished.layout, out_layout or unfinished.out_layout
        transform = Transform(mode or unfinished.mode, direction, *layouts, dtype, rounding)
        dtype_hint = redo_log.job.header.dtype
    opened = open_source(
        source_location,
        layout=transform.layout,
        dtype_hint=dtype_hint,
        decoding=decoding,
        decoding_bytes=options["memory_bytes"],
        threads=threads,
        use_index=recorded.has_index,
    )
    with contextlib.closing(opened):
        if manifest is not None:
            _check_manifest(manifest, opened)
        if in_place:
            return _plan_in_place(opened, transform, redo_log, options)
        return _plan(opened, destination, transform, options)


def _check_manifest(manifest: Manifest, source: Source) -> None:
    """Check that a manifest matches its dataset; image files have no header to compare."""
    if source.kind not in DECODED and source.header != manifest.header:
        raise SourceError(
            f"{source.location} has shape {source.header.shape} and dtype {source.header.dtype}, "
            f"but its manifest records {manifest.header.shape} and {manifest.header.dtype}",
            f"restore the matching file, or remove {manifest_path(source.path)}",
        )


def _resolve_transform(
    source: Location,
    recorded: Transform | None,
    requested: Transform,
    mode: Mode | str | None,
    layout: Layout | None,
    out_layout: Layout | None,
) -> Transform:
    """Complete the requested transform from the recorded one, after checking that they agree."""
    if recorded is None:
        if mode is None and requested.direction != "pack":
            remedy = "give --mode or --model; 'fastvgg models' lists the mode of each model"
            if requested.direction == "restore":
                remedy = f"no manifest next to it records the mode: {remedy}"
            raise UsageError(f"{source}: the mode is not given", remedy)
        return requested
    check_not_already_done(source, recorded, requested.direction)
    if mode is not None and requested.mode != recorded.mode and requested.direction == "restore":
        raise UsageError(
            f"{source} was preprocessed in mode {recorded.mode.name}, but mode "
            f"{requested.mode.name} was requested",
            "omit --mode: it is recorded in the manifest",
        )
    if layout is not None and layout != recorded.out_layout:
        raise UsageError(
            f"{source} has layout {recorded.out_layout}, but {layout} was requested",
            "omit --layout: it is recorded in the manifest",
        )
    if requested.direction == "preprocess" and mode is None:
        raise UsageError(
            f"{source}: the mode is not given",
            "give --mode or --model; 'fastvgg models' lists the mode of each model",
        )
    return Transform(
        requested.mode if mode is not None else recorded.mode,
        requested.direction,
        recorded.out_layout,
        out_layout or (recorded.layout if requested.direction == "restore" else None),
        requested.dtype,
        requested.rounding,
    )


def _plan(source: Source, target: Location, transform: Transform, options: RunOptions) -> Plan:
    result = plan_result(source, transform)
    check_target(source, target, result)
    check_choices(source, target, transform, result, options)
    planned = _build_plan(source, target, transform, result, source.fingerprint(), options)
    journal_state = None if planned.restart else read_journal(journal_path(target.container))
    state, manifest = inspect_target(planned, journal_state)
    if state == "resumable" and journal_state is not None:
        return with_committed(planned, journal_state.chunk_images, len(journal_state.commits))
    if state == "failed" and isinstance(source, ImageSource):
        return plan_retry(planned, source, manifest)
    if state == "fresh" and planned.target_format != "images" and not target.is_remote:
        check_free_space(target.container, result.nbytes, "store 16 bits: --dtype float16")
    return planned


def _plan_in_place(
    source: Source, transform: Transform, redo_log: RedoLogHeader | None, options: RunOptions
) -> Plan:
    path, header = source.path, source.header
    if source.kind != "npy":
        raise UsageError(
            f"{path} is not a .npy file: --in-place converts only .npy files", "give a DST"
        )
    if header.dtype != "uint8":
        transform = dataclasses.replace(transform, dtype=transform.dtype or header.dtype)
    result = plan_result(source, transform)
    if result != header:
        raise UsageError(
            f"{path} has shape {header.shape} and dtype {header.dtype}, but the result would have "
            f"{result.shape} and {result.dtype}",
            "--in-place cannot change dtype or layout: give a DST instead",
        )
    check_in_place_supported(path)
    check_directory(path)
    if redo_log is None:
        planned = _build_plan(
            source, source.location, transform, result, source.fingerprint(), options
        )
        log_header = RedoLogHeader.new(planned.job(), planned.chunk_images, path.stat())
        check_free_space(path, log_header.file_layout.journal_bytes, "lower --memory")
        return planned
    check_same_file(redo_log, path)
    fingerprint = redo_log.job.fingerprint
    planned = _build_plan(source, source.location, transform, result, fingerprint, options)
    redo_log.job.check_same(planned.job(), str(planned.target))
    return with_committed(planned, redo_log.chunk_images, committed_chunks(redo_log, path))


def _build_plan(
    source: Source,
    target: Location,
    transform: Transform,
    result: Header,
    fingerprint: str,
    options: RunOptions,
) -> Plan:
    header = source.header
    formats = source.kind, target_format(target)
    bytes_per_image = image_work_bytes(*formats, header.image_bytes, result.image_bytes)
    scratch_bytes = min_scratch_bytes(
        *formats, options["threads"], header.image_bytes, result.image_bytes
    )
    max_bytes = chunk_bytes(
        *formats, header.images * bytes_per_image, in_place=target == source.location
    )
    if source.kind in DECODED:
        scratch_bytes = max(scratch_bytes, options["memory_bytes"] // 2)  # to decode large images
    return Plan(
        source=source.location,
        target=target,
        source_kind=source.kind,
        target_format=formats[1],
        header=header,
        result=result,
        transform=transform,
        decoding=DecodeOptions.from_dict(source.settings) if source.settings else None,
        fingerprint=fingerprint,
        read_bytes=source.stored_bytes,
        chunk_images=chunk_images(
            header.images,
            bytes_per_image,
            scratch_bytes,
            options["memory_bytes"],
            max_bytes,
            source.read_granularity,
            inner_chunk_images(result.image_bytes) if formats[1] == "zarr" else 1,
        ),
        notes=tuple(source.notes + _losses(transform, result, formats[1], options["file_format"])),
        committed_chunks=0,
        listing=source.listing if isinstance(source, ImageSource) else None,
        **options,
    )


def _losses(
    transform: Transform, result: Header, target_format: str, file_format: FileFormat
) -> list[str]:
    """Return notes on what the result cannot restore exactly."""
    if target_format == "images" and is_lossy(file_format):
        return [
            f"{file_format} is lossy: the files are not the exact images; use png or webp for that"
        ]
    if transform.direction != "preprocess":
        return []
    lost = oracle.unrestorable(transform.mode, result.dtype)
    return [f"{lost} of 768 values cannot be restored from {result.dtype}"] if lost else []
