"""Run `fastvgg bench` and save the record for its table and plot.

python benchmarks/bench.py            # takes minutes; writes results/bench-<instruction set>.json
python benchmarks/bench.py --quick    # 15 seconds; writes nothing
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastvgg.bench import FULL, QUICK, measure
from fastvgg.cli.output import print_benchmark

RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    record = measure(QUICK if arguments.quick else FULL, on_figure=print_benchmark())
    if not arguments.quick:
        name = f"bench-{record['instruction_set'].lower()}.json"
        (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
