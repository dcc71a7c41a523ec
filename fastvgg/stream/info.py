"""Describe a path: its header, its manifest, and the progress of an unfinished run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastvgg.datasets.index import read_index
from fastvgg.errors import FastvggError, SourceError, command, option
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from fastvgg.storage.objects import ObjectStorage
from fastvgg.stream.describe import count_labels, describe_error, describe_source
from fastvgg.stream.finished import FinishedDataset, exists, problem_of
from fastvgg.stream.journal import journal_path, read_journal
from fastvgg.stream.manifest import Provenance, manifest_path
from fastvgg.stream.redo_log_reader import committed_chunks, read_redo_log_header

if TYPE_CHECKING:
    import os

    from fastvgg.stream.job import Job
    from fastvgg.transform import Transform

MEMORY_BYTES: Final = 512 * 2**20  # the default of the commands that read data


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a dataset, the unfinished run that writes it, or any file or directory.

    Parameters
    ----------
    path
        A source, a finished target, or the final name of an unfinished target.

    Returns
    -------
    dict
        JSON types, in the order to show them: path, state ("finished", "unfinished",
        "unfinished in place", "changed" if its header, length or index contradicts the
        manifest, "source" for what fastvgg did not write, or "not a dataset" with
        the reason), and, where known, shape, type, layout, mode and counts. Of images: formats,
        labels, sizes in a sample of 200 headers, and what is skipped.

    Raises
    ------
    SourceError
        If nothing has that name.
    """
    location = Location.parse(path)
    return {"path": str(location), **_describe(location)}


def _describe(location: Location) -> dict[str, Any]:
    redo_log = read_redo_log_header(location.container)
    if redo_log is not None:
        return {
            "state": "unfinished in place",
            "committed_chunks": committed_chunks(redo_log, location.container),
            "chunks": redo_log.chunks,
            **_job_fields(redo_log.job),
            "next": f"finish it before using the file: {redo_log.command(location.container)}",
        }
    journal_state = read_journal(journal_path(location.container))
    if journal_state is not None:
        return {
            "state": "unfinished",
            "committed_chunks": len(journal_state.commits),
            "chunks": journal_state.chunks,
            **_job_fields(journal_state.job),
            "next": "rerun the command that writes it: it resumes, or starts over with "
            f"{option('restart')}",
        }
    try:
        recorded = Provenance.read(location)
    except SourceError as error:  # a damaged record, or a group of arrays
        return describe_error(location, error)
    manifest = recorded.manifest
    if manifest is not None:
        if not exists(location):
            raise _no_data_error(location)
        differences = _find_differences(location)
        return {
            "state": "changed" if differences else "finished",
            "differences": differences,
            **_job_fields(manifest.job),
            **manifest.counts,
            **count_labels(read_index(location.container, manifest.header.images)),
            "chunks": len(manifest.checksums),
            "created": manifest.created,
            "packages": manifest.packages,
            "next": f"find all differences: {command('verify', location)}" if differences else None,
        }
    described = describe_source(location, use_index=recorded.has_index)
    transform = {} if recorded.transform is None else _transform_fields(recorded.transform)
    return {**described, **transform}


def _no_data_error(location: Location) -> SourceError:
    path = manifest_path(location.container)
    return SourceError(
        f"{location.container} does not exist any more, but its manifest does: {path}",
        "restore the dataset, or move the manifest to where the dataset is now",
    )


def _find_differences(location: Location) -> list[str]:
    """Return how a finished dataset differs from its manifest, without reading its data."""
    storage = ObjectStorage() if location.is_remote else Storage()
    try:
        dataset = FinishedDataset.open(location, storage, threads=1, memory_bytes=MEMORY_BYTES)
        return [*dataset.stored.inspect_published(), *dataset.index_differences]
    except (FastvggError, OSError) as error:
        return [problem_of(error)]


def _transform_fields(transform: Transform) -> dict[str, Any]:
    return {
        "layout": transform.out_layout,
        "direction": transform.direction,
        "mode": transform.mode.name,
    }


def _job_fields(job: Job) -> dict[str, Any]:
    return {
        "kind": job.target_format,
        **({"dataset": job.dataset} if job.dataset else {}),
        "shape": list(job.result.shape),
        "dtype": job.result.dtype,
        **_transform_fields(job.transform),
        "source": job.source,
        "size": job.decoding.size if job.decoding else None,
        "interpolation": job.decoding.interpolation if job.decoding else None,
    }
