"""Samples of what is exhaustive: a part of the cases by default, and all others as slow tests."""

from __future__ import annotations

import itertools

import pytest


def parts(count):
    """Parametrize a test by `part`; every part but the first is a slow test.

    The cases of a part are those whose number leaves that remainder when divided by `count`, so
    that the parts together are all cases, and none is run twice.
    """
    others = (pytest.param(part, marks=pytest.mark.slow) for part in range(1, count))
    return pytest.mark.parametrize("part", [0, *others], ids=f"part {{}} of {count}".format)


def sampled(names, *values, one_in):
    """Parametrize a test by the product of values, of which all but one in `one_in` are slow.

    By default every value is used, and every two values of different names together wherever one
    name has at least `one_in` values besides.
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
