"""Calls that are timed in turn, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Comparison", "compare", "time_interleaved"]


class Comparison(NamedTuple):
    """How fast something is beside its limit."""

    share: float
    """The median of (seconds of the limit / seconds of ours) over the rounds."""
    spread: tuple[float, float]
    """The middle half of them."""
    seconds: float
    """The median of ours."""


def time_interleaved(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the seconds of every call in every round; the first of each is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
    return seconds


def compare(ours: Sequence[float], limit: Sequence[float]) -> Comparison:
    """Hold the seconds of rounds against those of a limit in the same rounds.

    Examples
    --------
    >>> compare([2.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    Comparison(share=0.5, spread=(0.25, 0.5), seconds=2.0)
    """
    shares = [theirs / own for own, theirs in zip(ours, limit, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return Comparison(round(middle, 3), (round(low, 3), round(high, 3)), statistics.median(ours))
