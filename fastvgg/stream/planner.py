"""Look at a source and a target, refuse what cannot go well, and make the plan.

Headers are read, pixels are not, and nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from typing import TYPE_CHECKING, Final, TypedDict

from fastvgg import oracle
from fastvgg.backend import check_backend
from fastvgg.datasets.base import inner_chunk_images
from fastvgg.datasets.image_writer import check_format, is_lossy
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.open import check_target, open_source, target_format
from fastvgg.errors import ArrayError, SourceError, TargetError, UsageError
from fastvgg.imaging.decode import MAX_PIXELS, DecodeOptions
from fastvgg.imaging.resize import gather_function
from fastvgg.parallel import check_threads
from fastvgg.storage.location import (
    container_of,
    inner_name,
    is_remote,
    parse_location,
    sidecar_path,
)
from fastvgg.stream.journal import check_same_job, journal_path, read_journal
from fastvgg.stream.manifest import (
    describes_other_dataset,
    manifest_path,
    read_manifest,
    read_transform,
)
from fastvgg.stream.plan import (
    DECODED,
    Plan,
    bytes_worked_on,
    chunk_bytes,
    chunk_images,
    format_bytes,
    min_scratch_bytes,
    parse_bytes,
    result_header,
)
from fastvgg.stream.redo_log import (
    RedoLogHeader,
    check_in_place_supported,
    check_restart,
    check_same_file,
    committed_chunks,
    read_redo_log_header,
    unfinished_error,
)
from fastvgg.stream.retry import plan_retry
from fastvgg.stream.state import inspect_target, with_committed
from fastvgg.stream.values import check_not_already_done
from fastvgg.transform import Mode, Transform

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import DTypeLike

    from fastvgg.backend import Backend
    from fastvgg.datasets.base import Header, Source
    from fastvgg.datasets.image_writer import FileFormat
    from fastvgg.imaging.decode import Gray16
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.manifest import Manifest
    from fastvgg.transform import Direction, Layout, Rounding

__all__ = ["SIDECARS", "changed", "plan", "plan_result", "read_state_of", "reopen_source"]

# What a run writes beside a target, as ends of its name.
SIDECARS: Final = (
    ".partial",
    ".index.csv",
    ".fastvgg.json",
    ".fastvgg-journal",
    ".fastvgg-replaced",
)
IMAGES: Final = ("uint8", "NHWC")  # what image files can hold


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
    """Plan the way of one dataset into another; headers are read, nothing is written.

    Parameters
    ----------
    source
        A directory of images, tar shards (one, or a range like ``{0000..0099}.tar``), a .npy file,
        a directory of part-*.npy, a Zarr array, also by a URL like ``s3://bucket/x.zarr``, or a
        dataset in an HDF5 file, ``FILE.h5::/NAME``.
    target
        A name that ends in .npy or .zarr, also of a URL, or ``FILE.h5::/NAME``, or for restored
        images a directory. While unfinished the data is in ``target.partial``; the name appears
        when it is complete. In a store, where nothing can be renamed, the array can be opened from
        then on.
    in_place
        Without a target: make a .npy file of floats its own result, in a tenth of the disk space.
        What a crash leaves is finished by the same command, and is not to be used before.
    mode
        A `Mode` or the name of one. To restore what fastvgg wrote, it may be left away.
    direction
        "preprocess", "restore", or "pack": images as they are, to be preprocessed later.
    size, interpolation, keep_aspect_ratio
        Height and width to resize images to, and how: exactly Keras'
        ``load_img(target_size=..., interpolation=..., keep_aspect_ratio=...)``.
    fast_jpeg
        Decode large JPEGs at a part of their size; the pixels are others than Keras'.
    exif
        Turn images as their EXIF orientation says, which Keras does not.
    gray16
        What to do with 16-bit grayscale images, which Keras clips to white: "error" makes each a
        failed image, "scale" maps them to 8 bits.
    max_pixels
        Refuse larger images before they are decoded; 89,478,485 if not given.
    layout, out_layout, dtype, rounding
        As for `fastvgg.preprocess` and `fastvgg.restore`. What the manifest of the source says
        need not be said again.
    format
        Of restored image files: "png", "webp" (without loss), or "jpeg", which is not exact.
    memory
        The limit above the idle process, in bytes or like "512MiB".
    threads
        All usable cores if not given.
    backend
        "numba", "numpy" or "auto".
    strict
        Stop at the first image that cannot be read, where otherwise its row is zeros.
    restart
        Begin again where an unfinished run, or a finished target, is in the way.
    retry_failed
        Take a finished target up again, for the images that could not be read then.
    fsync
        Wait for the disk, so that a committed chunk survives a power cut. Without it a committed
        chunk survives only the death of the process.

    Returns
    -------
    Plan
        Print it to see what it will need; ``run()`` carries it out, or resumes it.

    Raises
    ------
    UsageError, SourceError, TargetError, ResumeError, ModeError, DtypeError
        Before anything is written.
    """
    if in_place != (target is None):
        raise UsageError(
            "a target is given, and in place is asked for" if in_place else "no target is given",
            "give a target, or --in-place without one",
        )
    source_path = parse_location(source)
    target_path = source_path if target is None else parse_location(target)
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
    options = _Options(
        memory_bytes=parse_bytes(memory),
        threads=threads,
        backend=backend,
        strict=strict,
        restart=restart,
        retry_failed=retry_failed,
        fsync=fsync,
        file_format=format,
    )
    manifest = read_manifest(source_path)
    ring = read_redo_log_header(source_path)
    if ring is not None and restart and in_place:
        check_restart(ring, source_path)
        ring = None
    if ring is not None and not in_place:
        raise unfinished_error(ring, source_path)
    if ring is None:
        placeholder = "identity" if mode is None else mode
        asked = Transform(placeholder, direction, layout or "NHWC", out_layout, dtype, rounding)
        done = read_transform(source_path)
        transform = _resolve_transform(source_path, done, asked, mode, layout, out_layout)
        dtype_hint = None if manifest is None else manifest.header.dtype
    else:
        begun = Transform.from_dict(ring.job["transform"])
        layouts = layout or begun.layout, out_layout or begun.out_layout
        transform = Transform(mode or begun.mode, direction, *layouts, dtype, rounding)
        dtype_hint = ring.job["source"]["dtype"]
    opened = open_source(
        source_path,
        layout=transform.layout,
        dtype_hint=dtype_hint,
        decoding=decoding,
        decoding_bytes=options["memory_bytes"],
        threads=threads,
        use_index=not describes_other_dataset(source_path),
    )
    with contextlib.closing(opened):
        if manifest is not None:
            _check_manifest(manifest, opened)
        if in_place:
            return _plan_in_place(opened, transform, ring, options)
        return _plan(opened, target_path, transform, options)


class _Options(TypedDict):
    """What is asked of a run beside its result."""

    memory_bytes: int
    threads: int
    backend: Backend
    strict: bool
    restart: bool
    retry_failed: bool
    fsync: bool
    file_format: FileFormat


def _check_manifest(manifest: Manifest, source: Source) -> None:
    """Refuse a manifest that is left from other data; image files tell less of it."""
    if source.kind not in DECODED and source.header != manifest.header:
        raise SourceError(
            f"{source.path} holds {source.header.shape} of {source.header.dtype}, and its manifest "
            f"is of {manifest.header.shape} of {manifest.header.dtype}",
            f"put back what belongs together, or remove {manifest_path(source.path)}",
        )


def _resolve_transform(
    path: Path,
    done: Transform | None,
    asked: Transform,
    mode: Mode | str | None,
    layout: Layout | None,
    out_layout: Layout | None,
) -> Transform:
    """Return what is asked for, completed by and checked against what was done to the source."""
    if done is None:
        if mode is None and asked.direction != "pack":
            remedy = "give --mode or --model; 'fastvgg models' lists which model wants which"
            if asked.direction == "restore":
                remedy = f"there is no manifest beside it that says the mode: {remedy}"
            raise UsageError(f"{path}: the mode is not given", remedy)
        return asked
    check_not_already_done(path, done, asked.direction)
    if mode is not None and asked.mode != done.mode and asked.direction == "restore":
        raise UsageError(
            f"{path} was preprocessed in mode {done.mode.name}, and mode {asked.mode.name} is "
            "asked for",
            "leave --mode away: the manifest knows it",
        )
    if layout is not None and layout != done.out_layout:
        raise UsageError(
            f"{path} has layout {done.out_layout}, and {layout} is asked for",
            "leave --layout away: the manifest knows it",
        )
    if asked.direction == "preprocess" and mode is None:
        raise UsageError(
            f"{path}: the mode is not given",
            "give --mode or --model; 'fastvgg models' lists which mode each model wants",
        )
    return Transform(
        asked.mode if mode is not None else done.mode,
        asked.direction,
        done.out_layout,
        out_layout or (done.layout if asked.direction == "restore" else None),
        asked.dtype,
        asked.rounding,
    )


def _plan(source: Source, target_path: Path, transform: Transform, options: _Options) -> Plan:
    result = plan_result(source, transform)
    _check_target(source, target_path, result)
    _check_choices(source, target_path, transform, result, options)
    made = _planned(source, target_path, transform, result, source.fingerprint(), options)
    journal_state = read_state_of(made)
    state = inspect_target(made, journal_state)
    if state == "resumable" and journal_state is not None:
        return with_committed(made, journal_state.chunk_images, len(journal_state.commits))
    if state == "failed" and isinstance(source, ImageSource):
        return plan_retry(made, source)
    if state == "fresh" and made.target_format != "images" and not is_remote(target_path):
        _check_room(container_of(target_path), result.nbytes, "store halves: --dtype float16")
    return made


def _plan_in_place(
    source: Source, transform: Transform, ring: RedoLogHeader | None, options: _Options
) -> Plan:
    path, held = source.path, source.header
    if source.kind != "npy":
        raise UsageError(
            f"{path} is not a .npy file: what is not one cannot be done in place", "give a DST"
        )
    if held.dtype != "uint8":
        transform = dataclasses.replace(transform, dtype=transform.dtype or held.dtype)
    result = plan_result(source, transform)
    if result != held:
        raise UsageError(
            f"{path} holds {held.shape} of {held.dtype}, and would hold {result.shape} of "
            f"{result.dtype}",
            "in place type and layout stay as they are: give a DST instead",
        )
    check_in_place_supported(path)
    _check_directory(path)
    if ring is None:
        made = _planned(source, path, transform, result, source.fingerprint(), options)
        header = RedoLogHeader.new(made.job(), made.chunk_images, path.stat())
        _check_room(path, header.file_layout.journal_bytes, "give less --memory")
        return made
    check_same_file(ring, path)
    fingerprint = ring.job["source"]["fingerprint"]
    made = _planned(source, path, transform, result, fingerprint, options)
    check_same_job(ring.job, made.job(), made.target)
    return with_committed(made, ring.chunk_images, committed_chunks(ring, path))


def plan_result(source: Source, transform: Transform) -> Header:
    """Return the header of what a transform makes of a source; refuse one that it does not fit."""
    header = source.header
    try:
        transform.check_input(header.shape, header.dtype)
    except ArrayError as error:
        raise SourceError(f"{source.path}: {error.problem}", error.remedy) from None
    return result_header(header, transform)


def _planned(
    source: Source,
    target_path: Path,
    transform: Transform,
    result: Header,
    fingerprint: str,
    options: _Options,
) -> Plan:
    header = source.header
    kinds = source.kind, target_format(target_path)
    worked_on = bytes_worked_on(*kinds, header.image_bytes, result.image_bytes)
    scratch_bytes = min_scratch_bytes(
        *kinds, options["threads"], header.image_bytes, result.image_bytes
    )
    max_bytes = chunk_bytes(*kinds, header.images * worked_on, in_place=target_path == source.path)
    if source.kind in DECODED:
        scratch_bytes = max(scratch_bytes, options["memory_bytes"] // 2)  # for large images
    return Plan(
        source=str(source.path),
        target=str(target_path),
        dataset=inner_name(target_path),
        source_kind=source.kind,
        target_format=kinds[1],
        header=header,
        result=result,
        transform=transform,
        settings=source.settings,
        fingerprint=fingerprint,
        read_bytes=source.stored_bytes,
        chunk_images=chunk_images(
            header.images,
            worked_on,
            scratch_bytes,
            options["memory_bytes"],
            max_bytes,
            source.read_granularity,
            inner_chunk_images(result.image_bytes) if kinds[1] == "zarr" else 1,
        ),
        notes=tuple(source.notes + _losses(transform, result, kinds[1], options["file_format"])),
        committed_chunks=0,
        listing=source.listing if isinstance(source, ImageSource) else None,
        **options,
    )


def _check_target(source: Source, target: Path, result: Header) -> None:
    """Refuse a target whose place cannot be right."""
    if is_remote(target):
        _check_store(source, target)
        return
    file = container_of(target)
    check_target(target)
    _check_directory(file)
    if target_format(target) == "images" and (result.dtype, result.layout) != IMAGES:
        raise TargetError(
            f"{target}: image files hold {' '.join(IMAGES)}, and the result is {result.dtype} "
            f"{result.layout}",
            "give a name that ends in .npy; only restore, in its own layout, writes image files",
        )
    read = container_of(source.path).resolve()
    if read == file.resolve():
        raise TargetError(f"{file} is the source itself", "give the result another name")
    for ending in ("", *SIDECARS):
        written = sidecar_path(file, ending).resolve()
        if written == read or read in written.parents or written in read.parents:
            raise TargetError(
                f"{file}{ending}, which the run writes, and the source {source.path} lie one in "
                "the other",
                "give the result a place of its own, beside the source",
            )


def _check_store(source: Source, target: Path) -> None:
    """Refuse a name in a store that cannot be right."""
    if target_format(target) != "zarr":
        raise TargetError(
            f"{target}: to a store, Zarr arrays alone are written", "give a name that ends in .zarr"
        )
    check_target(target)
    read, written = f"{source.path}/", f"{target}/"
    if is_remote(source.path) and (read.startswith(written) or written.startswith(read)):
        raise TargetError(
            f"{target} and the source {source.path} lie one in the other",
            "give the result a place of its own, beside the source",
        )


def _check_choices(
    source: Source, target: Path, transform: Transform, result: Header, options: _Options
) -> None:
    """Refuse what is asked for and cannot be done with such a source and target."""
    kind = target_format(target)
    if transform.direction == "pack" and source.kind not in DECODED:
        raise UsageError(
            f"{source.path} is an array already: image files are packed",
            "preprocess it, or give a directory of images",
        )
    if kind == "zarr" and result.dtype == "bfloat16":
        raise TargetError(
            f"{target}: Zarr has no type bfloat16",
            "store float16 or float32, or give a name that ends in .npy, or FILE.h5::/NAME",
        )
    if kind == "images":
        check_format(options["file_format"], *result.shape[1:3])
    elif options["file_format"] != "png":
        raise UsageError(
            f"{target} is no directory, and a format of image files is given",
            "leave --format away, or give a directory",
        )
    if options["retry_failed"] and (options["restart"] or source.kind not in DECODED):
        raise UsageError(
            "--retry-failed takes a finished result of images up again",
            "give it without --restart, with the source and the result of the run that had "
            "failures",
        )


def _check_directory(target: Path) -> None:
    """Refuse a name beside which nothing can be written."""
    directory = target.parent
    if not directory.is_dir():
        raise TargetError(f"{directory} is not a directory", f"make it: mkdir -p {directory}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise TargetError(
            f"{directory} cannot be written to", "check its permissions, or choose another place"
        )
    if len(os.fsencode(target.name + max(SIDECARS, key=len))) > os.pathconf(
        directory, "PC_NAME_MAX"
    ):
        raise TargetError(
            f"{target}: the name is too long for this disk, with what is written beside it",
            "choose a shorter name",
        )


def _check_room(target: Path, needed_bytes: int, less: str) -> None:
    free_bytes = shutil.disk_usage(target.parent).free
    if needed_bytes > free_bytes:
        raise TargetError(
            f"{target} needs {format_bytes(needed_bytes)} ({needed_bytes} bytes), and the disk "
            f"has {format_bytes(free_bytes)} ({free_bytes} bytes) free",
            f"free space, choose another disk, or {less}",
        )


def _losses(
    transform: Transform, result: Header, target_format: str, file_format: FileFormat
) -> list[str]:
    """Say so where what is written cannot give back every byte."""
    if target_format == "images" and is_lossy(file_format):
        return [f"{file_format} is lossy: the files are not the exact images; png and webp are"]
    if transform.direction != "preprocess":
        return []
    lost = oracle.unrestorable(transform.mode, result.dtype)
    return [f"{lost} of 768 values cannot be restored from {result.dtype}"] if lost else []


def read_state_of(plan: Plan) -> JournalState | None:
    """Return what the journal of a plan's target says; nothing, if the plan is to begin again."""
    return None if plan.restart else read_journal(journal_path(parse_location(plan.target)))


def reopen_source(plan: Plan) -> Source:
    """Open the source of a plan again, and see that it is still the one that was planned.

    Raises
    ------
    SourceError
        If it has changed since.
    """
    path = parse_location(plan.source)
    source = open_source(
        path,
        layout=plan.header.layout,
        dtype_hint=plan.header.dtype,
        decoding=DecodeOptions.from_dict(plan.settings) if plan.settings else None,
        decoding_bytes=plan.decoding_bytes,
        threads=plan.threads,
        gather=gather_function(plan.choose_backend()),
        listing=plan.listing,
        use_index=not describes_other_dataset(path),
    )
    if changed(plan, source):
        source.close()
        raise changed_since(source.path)
    return source


def changed_since(path: Path) -> SourceError:
    """Return the error that says so of a source."""
    return SourceError(
        f"{path} has changed since the run was planned",
        "give the same command again, or plan the run again",
    )


def changed(plan: Plan, source: Source) -> bool:
    """Whether a source is no longer the one that was planned."""
    return source.header != plan.header or source.fingerprint() != plan.fingerprint
