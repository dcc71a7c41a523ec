"""A row of a result, a path and its share of the limit, and the number of its rounds."""

from __future__ import annotations

import argparse

MIN_ROUNDS = 2  # quartiles need two values


def number_of_rounds(text):
    """Parse the number of rounds, as the type of an argument."""
    if not text.isdecimal() or int(text) < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {MIN_ROUNDS}")
    return int(text)


def print_row(path, target_value, share, spread, **figures):
    """Print and return a row of the result."""
    row = {"path": path, "wanted": target_value, "share": share, "spread": spread, **figures}
    print(f"{path:36s} {share:6.3f} of the limit ({spread[0]}..{spread[1]})", figures, flush=True)
    return row
