"""Count the requests per chunk of a run on an object store, with a local S3 server.

    python benchmarks/store_requests.py     # takes half a minute; writes a result

Converts a Zarr array of uint8 images to another type, both in the store, on a Dask cluster of two
workers, once with a few chunks and once with more. The difference between the two is due to the
additional chunks.
"""

from __future__ import annotations

import collections
import itertools
import json
import sys
from pathlib import Path

from arrays import batch
from distributed import Client, LocalCluster
from formats import INNER_CHUNK_IMAGES, SHARD_IMAGES, create_sharded

import fastvgg
from fastvgg.bench.timing import machine

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.stores import BUCKET, serve_s3

RESULT = Path(__file__).parent / "results" / "store_requests.json"
DTYPES = ("float16", "float32")
CHUNKS = (4, 12)  # of the source
WORKERS = 2


def request_kind(method, path):
    """Return the kind of a request in the store's price list."""
    return "LIST" if method == "GET" and path.strip("/") == BUCKET else method


def count_requests(s3, client, chunks, dtype):
    """Run a plan of `chunks` chunks; return its requests by kind, and the plan."""
    source, target = (f"s3://{BUCKET}/{chunks}-{name}.zarr" for name in (f"to-{dtype}", dtype))
    images = chunks * SHARD_IMAGES
    shard = batch(SHARD_IMAGES, "NHWC", "uint8")
    source_array = create_sharded(source, images, "uint8", SHARD_IMAGES, INNER_CHUNK_IMAGES)
    for start in range(0, images, SHARD_IMAGES):
        source_array[start : start + SHARD_IMAGES] = shard
    plan = fastvgg.plan(source, target, mode="caffe", dtype=dtype)
    requests_before = len(s3.requests)
    plan.run(client=client)
    requests = collections.Counter(itertools.starmap(request_kind, s3.requests[requests_before:]))
    requests["chunks"] = plan.chunks
    return requests, plan


def measure(s3, client, dtype):
    """Measure the requests per chunk."""
    few, _ = count_requests(s3, client, min(CHUNKS), dtype)
    many, plan = count_requests(s3, client, max(CHUNKS), dtype)
    additional = many - few
    chunks = additional.pop("chunks")
    return {
        "path": f"Zarr uint8 to Zarr {dtype}",
        "chunk_images": plan.chunk_images,
        "chunk_bytes": plan.chunk_images * plan.result.image_bytes,
        "requests": {name: round(count / chunks, 2) for name, count in sorted(additional.items())},
    }


def main():
    options = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": ":0"}
    with serve_s3() as s3, LocalCluster(**options) as cluster, Client(cluster) as client:
        rows = [measure(s3, client, dtype) for dtype in DTYPES]
    for row in rows:
        print(row)
    record = {"machine": machine(), "threads": WORKERS, "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
