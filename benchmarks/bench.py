"""What `fastvgg bench` measures, kept for the table and the picture of it.

python benchmarks/bench.py            # a minute; writes results/bench.json
python benchmarks/bench.py --quick    # ten seconds; writes nothing
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastvgg.bench import FULL, QUICK, measure
from fastvgg.cli.answers import print_measured

RESULT = Path(__file__).parent / "results" / "bench.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    record = measure(QUICK if arguments.quick else FULL, tell=print_measured())
    if not arguments.quick:
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
