"""The command line of the campaigns: takes a seed, and prints one line of counts.

    python -m tests.campaigns.crash_states --seed 1

A campaign is a function of a seed and a size that returns counts and raises at the first error. The
suite runs the same functions with smaller sizes: tests/campaigns/test_campaigns.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from fastvgg.bench.timing import machine
from tests.helpers.checkout import CHECKOUT

RESULTS = CHECKOUT / "benchmarks" / "results"


def main(campaign, description, *, size):
    """Run a campaign from the command line, and print its counts."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=size, help="amount of work; see the module")
    parser.add_argument(
        "--record", action="store_true", help="replace the published record of this campaign"
    )
    arguments = parser.parse_args()
    name = Path(sys.argv[0]).stem
    start_seconds = time.monotonic()
    counts = campaign(arguments.seed, arguments.size)
    seconds = round(time.monotonic() - start_seconds, 1)
    print(f"{name}: {format_counts(counts)}, {seconds} s")
    if not arguments.record:
        return
    record = {"machine": machine(), "seed": arguments.seed, "size": arguments.size}
    record |= {"counts": counts, "seconds": seconds}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


def format_counts(counts):
    """Format the counts on one line."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())
