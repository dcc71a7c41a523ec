"""Samples of exhaustive tests: some cases run by default, the others are slow tests."""

from __future__ import annotations

import itertools

import pytest


def parts(count):
    """Parametrize a test by `part`; every part but the first is a slow test.

    Part p contains the cases whose number modulo `count` is p, so that each case is in one part.
    """
    others = (pytest.param(part, marks=pytest.mark.slow) for part in range(1, count))
    return pytest.mark.parametrize("part", [0, *others], ids=f"part {{}} of {count}".format)


def sampled(names, *values, one_in):
    """Parametrize a test by the product of values; all but one in `one_in` cases are slow.

    The default cases cover every value, and every pair of values of different names for which
    another name has at least `one_in` values.
    """
    numbered = itertools.product(*(enumerate(each) for each in values))
    cases = [
        pytest.param(
            *(value for _, value in case),
            marks=[pytest.mark.slow] if sum(number for number, _ in case) % one_in else [],
        )
        for case in numbered
    ]
    return pytest.mark.parametrize(names, cases, ids=_name_of)


def _name_of(value):
    is_pair = isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    return "-".join(value) if is_pair else str(value)
