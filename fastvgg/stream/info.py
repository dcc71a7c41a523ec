"""What a path is: its header, its manifest, and how far an unfinished run is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastvgg.datasets.open import open_source
from fastvgg.storage.location import parse_location
from fastvgg.stream.journal import journal_path, read_journal
from fastvgg.stream.manifest import describes_other_dataset, read_manifest, read_transform
from fastvgg.stream.redo_log import committed_chunks, read_redo_log_header

if TYPE_CHECKING:
    import os

    from fastvgg.transform import Transform

__all__ = ["info"]


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what is known of a dataset, or of the unfinished run that is writing it.

    Parameters
    ----------
    path
        A source, a finished target, or the name that a target will get.

    Returns
    -------
    dict
        JSON types, in the order to show them: path, state ("finished", "unfinished",
        "unfinished in place", or "source" for what fastvgg did not write), and what there is of
        shape, type, layout, mode, counts.

    Raises
    ------
    SourceError
        If there is nothing that fastvgg knows.
    """
    dataset = parse_location(path)
    ring = read_redo_log_header(dataset)
    if ring is not None:
        return {
            "path": str(dataset),
            "state": "unfinished in place",
            "committed_chunks": committed_chunks(ring, dataset),
            "chunks": ring.file_layout.chunks,
            **_of_job(ring.job),
            "next": f"finish it, which nothing else may use before: {ring.command(dataset)}",
        }
    journal_state = read_journal(journal_path(dataset))
    if journal_state is not None:
        return {
            "path": str(dataset),
            "state": "unfinished",
            "committed_chunks": len(journal_state.commits),
            "chunks": journal_state.chunks,
            **_of_job(journal_state.job),
            "next": "run the same command again to go on, or with --restart to begin again",
        }
    manifest = read_manifest(dataset)
    if manifest is not None:
        return {
            "path": str(dataset),
            "state": "finished",
            **_of_job(manifest.job),
            **manifest.counts,
            "chunks": len(manifest.checksums),
            "created": manifest.created,
            "packages": manifest.packages,
        }
    source = open_source(dataset, use_index=not describes_other_dataset(dataset))
    try:
        header = source.header
        return {
            "path": str(dataset),
            "state": "source",
            "kind": source.kind,
            "shape": list(header.shape),
            "dtype": header.dtype,
            "bytes": source.stored_bytes,
            **_of_transform(read_transform(dataset)),
            "notes": source.notes,
        }
    finally:
        source.close()


def _of_transform(done: Transform | None) -> dict[str, Any]:
    """Return what an array that has no manifest says of itself."""
    if done is None:
        return {}
    return {"layout": done.out_layout, "direction": done.direction, "mode": done.mode.name}


def _of_job(job: dict[str, Any]) -> dict[str, Any]:
    source, transform, result = job["source"], job["transform"], job["result"]
    return {
        "kind": result["kind"],
        **({"dataset": result["dataset"]} if "dataset" in result else {}),
        "shape": result["shape"],
        "dtype": result["dtype"],
        "layout": result["layout"],
        "direction": transform["direction"],
        "mode": transform["mode"]["name"],
        "source": source["path"],
        "size": source.get("size"),
        "interpolation": source.get("interpolation"),
    }
