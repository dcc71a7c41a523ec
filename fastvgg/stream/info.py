"""What a path is: its header, its manifest, and how far an unfinished run is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastvgg import datasets
from fastvgg.datasets.locations import located
from fastvgg.stream.journal import journal_path, read_ledger
from fastvgg.stream.manifest import describes_another, read_manifest, transform_of
from fastvgg.stream.ring import committed_chunks, read_ring_header

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
    dataset = located(path)
    ring = read_ring_header(dataset)
    if ring is not None:
        return {
            "path": str(dataset),
            "state": "unfinished in place",
            "committed_chunks": committed_chunks(ring, dataset),
            "chunks": ring.places.chunks,
            **_of_job(ring.job),
            "next": f"finish it, which nothing else may use before: {ring.command(dataset)}",
        }
    ledger = read_ledger(journal_path(dataset))
    if ledger is not None:
        return {
            "path": str(dataset),
            "state": "unfinished",
            "committed_chunks": len(ledger.commits),
            "chunks": ledger.chunks,
            **_of_job(ledger.job),
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
    source = datasets.open_source(dataset, indexed=not describes_another(dataset))
    try:
        header = source.header
        return {
            "path": str(dataset),
            "state": "source",
            "kind": source.kind,
            "shape": list(header.shape),
            "dtype": header.dtype,
            "bytes": source.stored_bytes,
            **_of_transform(transform_of(dataset)),
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
