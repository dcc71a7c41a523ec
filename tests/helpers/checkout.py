"""The path of the checkout, and an environment for processes that import from it."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def checkout_environment(**environment):
    """Return a copy of the environment in which Python imports fastvgg and tests from the checkout.

    Keyword arguments add or override variables.
    """
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(CHECKOUT), *([inherited] if inherited else [])])
    return os.environ | {"PYTHONPATH": path} | environment
