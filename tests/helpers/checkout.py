"""The checkout, and processes that import from it."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def importing_checkout(**environment):
    """Return this process's environment, where Python imports fastvgg and tests from the checkout.

    What is given replaces variables, or is added to them.
    """
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(CHECKOUT), *([inherited] if inherited else [])])
    return os.environ | {"PYTHONPATH": path} | environment
