"""Check a request before anything is written: its target, its options, and the space it needs."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

from fastvgg import oracle
from fastvgg.datasets.image_writer import check_format, is_lossy
from fastvgg.datasets.open import check_target_name
from fastvgg.errors import (
    ArrayError,
    SourceError,
    TargetError,
    UsageError,
    argument,
    creation_remedy,
    option,
    option_name,
)
from fastvgg.formatting import format_bytes
from fastvgg.storage.file_systems import is_mount_point
from fastvgg.storage.location import sidecar_path
from fastvgg.stream.job import result_header

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.datasets.base import Header, Source
    from fastvgg.storage.location import Location
    from fastvgg.stream.job import Job
    from fastvgg.stream.plan import RunOptions
    from fastvgg.transform import Transform

# Suffixes of the files that a run writes next to its target.
SIDECARS: Final = (
    ".partial",
    ".index.csv",
    ".fastvgg.json",
    ".fastvgg-journal",
    *(".fastvgg-replaced", ".fastvgg-replaced.index.csv", ".fastvgg-replaced.fastvgg.json"),
    *(".index.csv.tmp", ".fastvgg.json.tmp", ".fastvgg-journal.tmp"),
)
IMAGE_TYPE: Final = ("uint8", "NHWC")  # the dtype and layout that image files can store


def check_target(source: Source, target: Location, job: Job) -> None:
    """Check the name, directory and format of a target."""
    if target.is_remote:
        _check_store(source, target, job)
        return
    file, result = target.container, job.result
    check_target_name(target)
    check_directory(file)
    if job.is_encoded and job.transform.direction != "restore":
        raise TargetError(
            f"{target} is the name of a directory of image files, which only restore writes",
            "give the name of an array: .npy, .zarr, or .h5::/NAME",
        )
    if job.is_encoded and (result.dtype, result.layout) != IMAGE_TYPE:
        raise TargetError(
            f"{target}: image files store {' '.join(IMAGE_TYPE)}, but the result is {result.dtype} "
            f"{result.layout}",
            f"give the name of an array, such as .npy, or {option('out_layout', 'NHWC')}",
        )
    if is_mount_point(file):
        raise TargetError(
            f"{file} is a mount point, to which nothing can be renamed",
            f"give a name inside of it: {file / 'NAME'}" if file.is_dir() else "give another name",
        )
    if source.location.is_remote:
        return  # a store and a disk do not overlap
    read = _real_path(source.path)
    if read == _real_path(file):
        raise TargetError(f"{file} is the source itself", "choose another name for the result")
    for ending in ("", *SIDECARS):
        written = _real_path(sidecar_path(file, ending))
        for place in (read, *source.linked_paths):
            if written == place or place in written.parents or written in place.parents:
                linked = "" if place == read else f"{place}, to which a link leads in "
                raise TargetError(
                    f"{file}{ending}, which the run writes, overlaps {linked}the source "
                    f"{source.location}: one contains the other",
                    "choose a target outside the source",
                )


def _real_path(path: Path) -> Path:
    """Resolve links; unlike `Path.resolve`, also where they form a loop."""
    return type(path)(os.path.realpath(path))


def _check_store(source: Source, target: Location, job: Job) -> None:
    if job.target_format != "zarr":
        raise TargetError(
            f"{target}: only Zarr arrays can be written to an object store",
            "give a name that ends in .zarr",
        )
    check_target_name(target)
    read, written = f"{source.location}/", f"{target}/"
    if source.location.is_remote and (read.startswith(written) or written.startswith(read)):
        raise TargetError(
            f"{target} overlaps the source {source.location}: one contains the other",
            "choose a target outside the source",
        )


def check_options(target: Location, job: Job, options: RunOptions) -> None:
    """Check that the options fit the source and target."""
    if job.transform.direction == "pack" and not job.is_decoded:
        raise UsageError(
            f"{job.source} is already an array, but pack takes image files",
            "preprocess it, or give a directory of images",
        )
    if job.target_format == "zarr" and job.result.dtype == "bfloat16":
        raise TargetError(
            f"{target}: Zarr has no bfloat16 dtype",
            "store float16 or float32, or give a name that ends in .npy, or FILE.h5::/NAME",
        )
    if job.is_encoded:
        check_format(job.file_format, *job.result.shape[1:3])
    elif job.file_format != "png":
        raise UsageError(
            f"{target} is not a directory, but {option('format', job.file_format)} applies to "
            "image files",
            f"omit {option_name('format')}, or give a directory",
        )
    if options.retry_failed and options.restart:
        raise UsageError(
            f"{option('retry_failed')} conflicts with {option('restart')}", "omit one of them"
        )
    if options.retry_failed and not job.is_decoded:
        raise UsageError(
            f"{job.source} is an array, but {option('retry_failed')} decodes image files",
            f"omit {option('retry_failed')}, or give the {argument('source')} and "
            f"{argument('target')} of the run that had failures",
        )


def check_directory(target: Path) -> None:
    """Check that the directory of a target is writable and can store its sidecar names."""
    directory = target.parent
    if not directory.is_dir():
        raise TargetError(f"{directory} is not a directory", creation_remedy(directory))
    if not os.access(directory, os.W_OK | os.X_OK):
        raise TargetError(
            f"{directory} is not writable", "check its permissions, or choose another directory"
        )
    if len(os.fsencode(target.name + max(SIDECARS, key=len))) > os.pathconf(
        directory, "PC_NAME_MAX"
    ):
        raise TargetError(
            f"{target}: the name plus the suffix of a sidecar file is too long for this file "
            "system",
            "choose a shorter name",
        )


def check_free_space(target: Path, needed_bytes: int, alternative: str) -> None:
    """Check that the disk of a target has enough free space."""
    free_bytes = shutil.disk_usage(target.parent).free
    if needed_bytes > free_bytes:
        raise TargetError(
            f"{target} needs {format_bytes(needed_bytes)} ({needed_bytes} bytes), but the disk "
            f"has {format_bytes(free_bytes)} ({free_bytes} bytes) free",
            f"free space, choose another disk, or {alternative}",
        )


def plan_result(source: Source, transform: Transform) -> Header:
    """Return the header of a transform's result; raise if it cannot be applied to the source."""
    header = source.header
    try:
        transform.check_input(header.shape, header.dtype)
    except ArrayError as error:
        raise SourceError(f"{source.location}: {error.problem}", error.remedy) from None
    return result_header(header, transform)


def loss_notes(job: Job) -> list[str]:
    """Return notes about values that cannot be restored exactly from the result."""
    if job.is_encoded and is_lossy(job.file_format):
        exact = "the files are not the exact images; use png or webp for that"
        return [f"{job.file_format} is lossy: {exact}"]
    if job.transform.direction != "preprocess":
        return []
    lost = oracle.unrestorable(job.transform.mode, job.result.dtype)
    return [f"{lost} of 768 values cannot be restored from {job.result.dtype}"] if lost else []
