"""Samples of what is exhaustive: a part of the cases by default, and all others as slow tests."""

from __future__ import annotations

import pytest


def parts(count):
    """Parametrize a test by `part`; every part but the first is a slow test.

    The cases of a part are those whose number leaves that remainder when divided by `count`, so
    that the parts together are all cases, and none is run twice.
    """
    others = (pytest.param(part, marks=pytest.mark.slow) for part in range(1, count))
    return pytest.mark.parametrize("part", [0, *others], ids=f"part {{}} of {count}".format)
