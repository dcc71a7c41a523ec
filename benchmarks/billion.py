"""Estimate the cost of a plan for a billion images from measured results.

    python benchmarks/billion.py     # takes a second; writes a result

Requires the results of benchmarks/cluster.py and benchmarks/store_requests.py. Assumes any number
of c5.4xlarge machines with 16 processors, at the on-demand price and the sustained bandwidth of
us-east-1, and S3 in the same region, where only requests and storage are charged:

- https://docs.aws.amazon.com/autoscaling/ec2/userguide/weights-spot-price-per-unit-hour-example.html
- https://docs.aws.amazon.com/ec2/latest/instancetypes/co.html
- https://aws.amazon.com/s3/pricing/
- https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
"""

from __future__ import annotations

import json
from pathlib import Path

from streams import image_bytes

from fastvgg.executors.dask import MAX_CHUNKS_PER_TASK

RESULTS = Path(__file__).parent / "results"
IMAGES = 10**9
PROCESSORS, DOLLARS_PER_HOUR, BYTES_PER_SECOND = 16, 0.68, 5e9 / 8
DOLLARS_PER_REQUEST = {"PUT": 5e-6, "POST": 5e-6, "LIST": 5e-6, "GET": 4e-7, "HEAD": 4e-7}
DOLLARS_PER_GIGABYTE_MONTH = 0.023
PUTS_PER_SECOND = 3500  # per key prefix
MAX_COORDINATOR_MIB = 1024


def read_record(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def estimate(cluster, request_counts):
    """Return the estimate for a billion images as one plan."""
    (few, many) = sorted(cluster["chunks"], key=lambda row: row["chunks"])
    chunks = -(-IMAGES // request_counts["chunk_images"])
    mib_per_chunk = (many["coordinator_mib"] - few["coordinator_mib"]) / (
        many["chunks"] - few["chunks"]
    )
    idle_mib = many["coordinator_mib"] - mib_per_chunk * many["chunks"]
    requests = {
        kind: round(count * chunks) for kind, count in request_counts["requests"].items() if count
    }
    read_bytes = IMAGES * image_bytes("uint8")
    written_bytes = chunks * request_counts["chunk_bytes"]
    # The throughput of two workers on one disk is a lower bound on that of their processors.
    images_per_second = min(
        BYTES_PER_SECOND / ((read_bytes + written_bytes) / IMAGES),
        PROCESSORS * cluster["rows"][0]["gigabytes_per_second"] * 1e9 / 2 / image_bytes("uint8"),
    )
    hours = IMAGES / images_per_second / 3600
    millions = IMAGES / 1e6
    dollars = sum(DOLLARS_PER_REQUEST[kind] * count for kind, count in requests.items())
    return {
        "path": request_counts["path"],
        "images": IMAGES,
        "chunks": chunks,
        "terabytes_read": round(read_bytes / 1e12),
        "terabytes_written": round(written_bytes / 1e12),
        "requests": requests,
        "machine_hours": round(hours),
        "tasks": -(-chunks // MAX_CHUNKS_PER_TASK),
        "machines_that_a_scheduler_feeds": int(
            1e3 / many["ms"] * request_counts["chunk_images"] / images_per_second
        ),
        "machines_that_a_prefix_takes": int(
            PUTS_PER_SECOND * request_counts["chunk_images"] / images_per_second
        ),
        "hours_of_the_scheduler": round(chunks * many["ms"] / 3.6e6, 1),
        "coordinator_mib": round(idle_mib + mib_per_chunk * chunks),
        "chunks_that_fit_into_1_gib": round((MAX_COORDINATOR_MIB - idle_mib) / mib_per_chunk),
        "dollars_a_million_of_machines": round(hours * DOLLARS_PER_HOUR / millions, 2),
        "dollars_a_million_of_requests": round(dollars / millions, 2),
        "dollars_a_million_of_a_month": round(
            written_bytes / 1e9 * DOLLARS_PER_GIGABYTE_MONTH / millions, 2
        ),
    }


def main():
    cluster, requests = read_record("cluster"), read_record("store_requests")
    rows = [estimate(cluster, request_counts) for request_counts in requests["rows"]]
    for row in rows:
        print(row)
    record = {"machine": cluster["machine"], "threads": cluster["threads"], "rows": rows}
    (RESULTS / "billion.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
