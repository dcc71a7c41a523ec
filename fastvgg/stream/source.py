"""The source of a run: it exists, is reopened as it was planned, and was not processed before."""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
from typing import TYPE_CHECKING, Final

import numpy as np

from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.index import index_path
from fastvgg.datasets.open import open_source, source_format
from fastvgg.errors import (
    FastvggError,
    SourceError,
    StoppedError,
    command,
    option,
    os_errors_refused,
)
from fastvgg.imaging.modes import NOT_SCALED
from fastvgg.imaging.resize import gather_function
from fastvgg.parallel import ThreadSlot, parallel_for
from fastvgg.storage.location import Location
from fastvgg.stream.journal import journal_path, read_journal
from fastvgg.stream.manifest import Provenance, manifest_path
from fastvgg.values import scaling_remedy

if TYPE_CHECKING:
    from fastvgg.datasets.base import Source
    from fastvgg.stream.job import Job
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan
    from fastvgg.transform import Direction, Transform

CHECKED_IMAGES: Final = 16
ROWS_PER_TASK: Final = 16
MAX_REASONS_SHOWN: Final = 3


def check_exists(source: Location) -> None:
    """Check that a source exists and is a dataset that no unfinished run is writing."""
    try:
        kind = source_format(source)
    except SourceError:
        if (
            source.is_remote
            or read_journal(journal_path(source.container), header_only=True) is None
        ):
            raise
        raise unfinished_error(source) from None
    if kind == "hdf5" and source.inner:  # the file exists, but perhaps not the dataset
        open_source(source, use_index=False, missing_chunks="fill").close()


def unfinished_error(location: Location) -> SourceError:
    """Return the error for a dataset that an interrupted run has not finished."""
    return SourceError(
        f"{location} is unfinished: the run that writes it was interrupted",
        f"rerun the command that writes it; its progress: {command('info', location)}",
    )


def open_job_source(
    job: Job, decoding_bytes: int = 0, threads: int = 1, *, use_index: bool = False
) -> Source:
    """Open the source of a job as its run did; raise SourceError if that is impossible."""
    return open_source(
        Location.parse(job.source),
        layout=job.header.layout,
        dtype_hint=job.header.dtype,
        decoding=job.decoding,
        decoding_bytes=decoding_bytes,
        threads=threads,
        use_index=use_index,
        follow_links=job.follow_links,
        missing_chunks=job.missing_chunks,
    )


@os_errors_refused()
def reopen_source(plan: Plan) -> Source:
    """Reopen the source of a plan; raise SourceError if it has changed since."""
    with contextlib.ExitStack() as opened:
        source = open_source(
            plan.source,
            layout=plan.header.layout,
            dtype_hint=plan.header.dtype,
            decoding=plan.job.decoding,
            decoding_bytes=plan.decoding_bytes,
            threads=plan.threads,
            gather=gather_function(plan.choose_backend()),
            listing=plan.listing,
            use_index=plan.has_index,
            follow_links=plan.job.follow_links,
            missing_chunks=plan.job.missing_chunks,
        )
        opened.callback(source.close)
        if is_changed(plan, source):
            raise changed_error(plan)
        opened.pop_all()
    return source


def changed_error(plan: Plan) -> SourceError:
    """Return the error for a source that changed after planning."""
    return SourceError(
        f"{plan.source} has changed since the run was planned{describe_change(plan)}",
        "rerun the same command, or call fastvgg.plan again",
    )


def describe_change(plan: Plan) -> str:
    """Return what has changed in a source since planning, to be appended to a message."""
    with contextlib.suppress(FastvggError, OSError):  # it may be gone
        if plan.listing is not None:
            follow_links = plan.job.follow_links
            later = type(plan.listing)(plan.source.container, follow_links=follow_links)
            return f": {plan.listing.describe_change(later)}"
        now = file_status(plan.source)
        if now is not None and plan.source_status is not None:
            (size_then, time_then), (size, time_ns) = plan.source_status, now
            if size != size_then:
                return f": it had {size_then} bytes and has {size}"
            if time_ns != time_then:
                modified = dt.datetime.fromtimestamp(time_ns // 10**9, dt.UTC)
                return f": it was modified at {modified:%Y-%m-%d %H:%M:%S} UTC"
            return ": its content differs"
    return ""


def file_status(source: Location) -> tuple[int, int] | None:
    """Return the size and the modification time, in ns, of a source that is one file."""
    if source.is_remote or not source.container.is_file():
        return None
    status = source.container.stat()
    return status.st_size, status.st_mtime_ns


def is_changed(plan: Plan, source: Source) -> bool:
    """Return whether a source differs from the planned one."""
    return source.header != plan.header or source.fingerprint() != plan.job.fingerprint


def check_recorded(source: Source, manifest: Manifest | None, *, strict: bool) -> None:
    """Check the index of an array, and its header, which its manifest must match.

    Raises
    ------
    SourceError
        If the header does not match, or every image failed when the array was made; or, if strict,
        if any did.
    """
    if source.records and all(record.failed for record in source.records):
        raise SourceError(
            f"every row of {source.location} is empty: no image could be read when it was made; of "
            f"the first, {source.records[0].path}: {source.records[0].reason}",
            f"rerun the command that made it with {option('retry_failed')}",
        )
    for row, record in enumerate(source.records if strict else ()):
        if record.failed:
            raise SourceError(
                f"row {row} of {source.location} is empty: {record.path} failed when it was made",
                f"rerun without {option('strict')}, or rerun the command that made it with "
                f"{option('retry_failed')}",
            )
    if manifest is None or isinstance(source, ImageSource):
        return
    if source.header != manifest.header:
        raise SourceError(
            f"{source.location} has shape {source.header.shape} and dtype {source.header.dtype}, "
            f"but its manifest records {manifest.header.shape} and {manifest.header.dtype}",
            f"restore the matching file, or move {manifest_path(source.path)} away",
        )
    failed = manifest.counts["failed"]
    if failed and not source.records:
        problem = f"images that failed when {source.location} was made: {failed}"
        if strict:
            raise SourceError(
                f"{problem}; {index_path(source.path)}, which says which, is missing",
                f"restore the index, or rerun without {option('strict')}",
            )
        source.notes.append(f"{problem}; without an index, their zeros count as pixels")


def check_not_already_done(source: Location, recorded: Transform, direction: Direction) -> None:
    """Check that a dataset was not already preprocessed, or restored, by its manifest."""
    if recorded.direction != direction:
        return
    if direction == "preprocess":
        raise SourceError(
            f"{source} is already preprocessed, in mode {recorded.mode.name}: preprocessing it "
            "twice would destroy it",
            "preprocess the original images, or restore this dataset first",
        )
    raise SourceError(
        f"{source} is already restored: it contains images, not network inputs",
        "give the dataset that it was restored from",
    )


def check_sampled_values(source: Source, transform: Transform, *, is_enabled: bool) -> None:
    """Check a sample of a floating-point source before it is transformed.

    Images have values 0..255, and those of 0..1 would be black; only an all-black image has nothing
    but zeros. Network inputs are negative except in bright images, and contain fractions; in tf
    mode an all-white image is all ones. Unless `is_enabled`, any values are preprocessed.

    Raises
    ------
    SourceError
        If scaled images or network inputs would be preprocessed, or images restored.
    """
    if source.header.dtype == "uint8":
        return  # the dtype rules out network inputs
    recorded = Provenance.read(source.location).transform
    if recorded is not None:  # another process may have just written the manifest
        check_not_already_done(source.location, recorded, transform.direction)
        return
    is_preprocessed = transform.direction == "preprocess"
    if is_preprocessed and not is_enabled:
        return
    images, samples = source.header.images, min(CHECKED_IMAGES, source.header.images)
    rows = sorted({image * images // samples for image in range(samples)})
    values = [source.read(row, row + 1).batch.astype(np.float64) for row in rows]
    low = float(np.min([image.min() for image in values]))  # propagates NaN, unlike min()
    high = float(np.max([image.max() for image in values]))
    is_image = low >= 0 and high <= 255  # false for NaN
    found = (
        f"{source.location}: {len(rows)} sampled images have values from {low:.6g} to {high:.6g}"
    )
    is_unit = low >= -1 and high <= 1 and (low, high) != (0, 0)
    if is_preprocessed and (is_unit or not is_image):
        scaling = f"; to scale these, {scaling_remedy(low)}"
        raise SourceError(
            f"{found}: these are not images (0 to 255), and may be already preprocessed",
            "preprocess the original images"
            + (scaling if is_unit else ", or restore this dataset first")
            + f"; if these values are meant, give {option('check_values', False)}",
        )
    is_integral = all(np.array_equal(image, np.trunc(image)) for image in values)
    if not is_preprocessed and is_image and is_integral and high > 1:
        raise SourceError(
            f"{found}, all of them whole numbers: these are images that were never preprocessed",
            "there is nothing to restore; to store them as uint8, convert their dtype",
        )


def check_decodable(plan: Plan, source: Source) -> None:
    """Check that at least one image decodes, before anything is written or replaced.

    Normally the first one does. A dataset of zeros would look finished, as where a disk is not
    mounted or the links of a cache lead nowhere.

    Raises
    ------
    SourceError
        If every image fails, or an image has changed since planning.
    """
    if not isinstance(source, ImageSource):
        return
    images, is_found, thread_slot = plan.header.images, threading.Event(), ThreadSlot(plan.threads)
    rows = np.empty((plan.threads, *plan.header.shape[1:]), np.uint8)
    reasons: dict[int, str] = {}

    def decode(task: range) -> None:
        for row in task:
            if is_found.is_set():
                return
            record = source.decode(row, rows[thread_slot()])
            if not record.failed:
                is_found.set()
            elif row < MAX_REASONS_SHOWN:
                reasons[row] = f"{record.path}: {record.reason}"

    step = ROWS_PER_TASK
    try:
        decode(range(1))
        if not is_found.is_set():
            tasks = [range(start, min(start + step, images)) for start in range(1, images, step)]
            parallel_for(tasks, decode, plan.threads)
    except StoppedError:
        raise changed_error(plan) from None
    if not is_found.is_set():
        raise _none_decodable_error(plan, [reasons[row] for row in sorted(reasons)])


def _none_decodable_error(plan: Plan, reasons: list[str]) -> SourceError:
    shown = "; ".join(reasons)
    more = "; ..." if plan.header.images > len(reasons) else ""
    remedy = "check that the files are images, and that their disk is mounted"
    if any(NOT_SCALED in reason for reason in reasons):
        remedy = f"give {option('scale_to_uint8')} to scale images of more than 8 bits"
    return SourceError(
        f"no image in {plan.source} can be decoded: {shown}{more}",
        f"{remedy}; nothing was changed",
    )
