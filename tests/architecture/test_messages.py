"""Messages name options as the caller writes them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fastvgg

PACKAGE = Path(fastvgg.__file__).parent
MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in ("cli", "errors.py")  # which write them
)
OPTION = re.compile(r"(?:^|[\s'\"(`])--[a-z]")
OTHER_PROGRAMS = {"make a copy without holes: cp --sparse=never"}


def texts_of(module):
    """Yield the string literals of a module that are no docstrings, with their lines."""
    tree = ast.parse((PACKAGE / module).read_text("utf-8"))
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in prose:
            yield node.lineno, node.value


@pytest.mark.parametrize("module", MODULES)
def test_no_message_of_the_library_names_an_option_of_the_command_line(module):
    """`errors.option` and `errors.command` write an option as the caller does."""
    found = {
        line: text
        for line, text in texts_of(module)
        if OPTION.search(text) and text not in OTHER_PROGRAMS
    }
    assert not found
    assert not [text for _, text in texts_of(module) if re.search(r"\bfastvgg (pack|info)\b", text)]
