"""Count the requests of a run to an object store per chunk, with a local S3 server.

    python benchmarks/store_requests.py     # half a minute; writes a result

A Zarr array of uint8 images becomes one of another type on a Dask cluster of two workers, both in
the store, once with a few chunks and once with more: what the second asks for beyond the first is
that of the chunks between.
"""

from __future__ import annotations

import collections
import itertools
import json
import sys
from pathlib import Path

from arrays import batch
from distributed import Client, LocalCluster
from formats import INNER_CHUNK_IMAGES, SHARD_IMAGES, sharded

import fastvgg
from fastvgg.bench.timing import machine

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.stores import BUCKET, serve_s3

RESULT = Path(__file__).parent / "results" / "store_requests.json"
DTYPES = ("float16", "float32")
CHUNKS = (4, 12)  # of the source
WORKERS = 2


def kind_of(method, path):
    """Return the kind of a request in the price list of a store."""
    return "LIST" if method == "GET" and path.strip("/") == BUCKET else method


def requests_of(s3, client, chunks, dtype):
    """Return how many requests of each method a run of so many chunks makes, and its plan."""
    source, target = (f"s3://{BUCKET}/{chunks}-{name}.zarr" for name in (f"to-{dtype}", dtype))
    images = chunks * SHARD_IMAGES
    together = batch(SHARD_IMAGES, "NHWC", "uint8")
    packed = sharded(source, images, "uint8", SHARD_IMAGES, INNER_CHUNK_IMAGES)
    for start in range(0, images, SHARD_IMAGES):
        packed[start : start + SHARD_IMAGES] = together
    plan = fastvgg.plan(source, target, mode="caffe", dtype=dtype)
    requests_before = len(s3.requests)
    plan.run(client=client)
    made = collections.Counter(itertools.starmap(kind_of, s3.requests[requests_before:]))
    made["chunks"] = plan.chunks
    return made, plan


def measured(s3, client, dtype):
    """Measure the requests per chunk."""
    few, _ = requests_of(s3, client, min(CHUNKS), dtype)
    many, plan = requests_of(s3, client, max(CHUNKS), dtype)
    between = many - few
    chunks = between.pop("chunks")
    return {
        "path": f"Zarr uint8 to Zarr {dtype}",
        "chunk_images": plan.chunk_images,
        "chunk_bytes": plan.chunk_images * plan.result.image_bytes,
        "requests": {name: round(count / chunks, 2) for name, count in sorted(between.items())},
    }


def main():
    options = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": ":0"}
    with serve_s3() as s3, LocalCluster(**options) as cluster, Client(cluster) as client:
        rows = [measured(s3, client, dtype) for dtype in DTYPES]
    for row in rows:
        print(row)
    record = {"machine": machine(), "threads": WORKERS, "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
