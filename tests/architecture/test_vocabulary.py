"""The package and its documents use the standard terms of the field."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fastvgg

PACKAGE = Path(fastvgg.__file__).parent
TOP = PACKAGE.parent
FOLDERS = [PACKAGE, TOP / "tests", TOP / "benchmarks"]
MODULES = sorted(
    path.relative_to(TOP).as_posix() for folder in FOLDERS for path in folder.rglob("*.py")
)
DOCUMENTS = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md")), TOP / "CONTRIBUTING.md"]

# Non-standard word -> standard term. Words that also have an ordinary meaning are omitted.
IDENTIFIERS = {
    "woven": "interleaved",
    "weave": "interleave",
    "flip": "reverse_channels",
    "flips": "reverses_channels",
    "yardstick": "bandwidth",
    "yardsticks": "bandwidth",
    "lot": "group",
    "lots": "task queue",
    "staging": "buffer",
    "stagings": "buffers",
    "behind": "pipeline",
    "again": "retry",
    "ledger": "state",
    "verb": "command",
    "verbs": "commands",
    "told": "reported",
    "tells": "reports",
    "meanwhile": "concurrently",
    "piece": "chunk, tile or buffer",
    "pieces": "chunks, tiles or buffers",
    "said": "header",
    "refuse": "check",
    "most": "max",
    "least": "min",
    "longest": "max",
    "room": "module",
    "rooms": "modules",
    "stranger": "user",
    "helper": "worker, or the noun that it is about",
    "helpers": "workers, or the noun that it is about",
}
# As in "at most", "a flipped bit" and "the longest name".
ORDINARY_IN_TESTS = {
    *("flip", "flips", "most", "least", "longest"),
    *("helper", "helpers", "verb", "verbs"),
}
PHRASES = {
    r"woven|weave": "interleaved",
    r"yardsticks?": "roofline",
    r"stagings?": "buffers",
    r"carry out|carries out|carried out": "run",
    r"mend(?:s|ed|ing)?": "fix",
    r"leave (?:\S+ )?away|left away|leaves away": "omit",
    r"taken? up(?: again)?|takes up": "resume, or retry",
    r"past the caches": "with non-temporal stores",
    r"the next but one": "valid until two more",
    r"of others": "foreign",
    r"verbs?": "command",
}


def identifiers_of(module):
    """Yield the names that a module defines; names that it only uses may come from a library."""
    for node in ast.walk(ast.parse((TOP / module).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words_of(identifier):
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_")
    return {part for part in parts if part}


@pytest.mark.parametrize("module", MODULES)
def test_identifiers_use_standard_terms(module):
    words = IDENTIFIERS.keys()
    if not module.startswith(PACKAGE.name):
        words -= ORDINARY_IN_TESTS
    found = {name: words_of(name) & words for name in identifiers_of(module)}
    assert not {name: words for name, words in found.items() if words}


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *DOCUMENTS], ids=str)
def test_prose_uses_standard_terms(path):
    text = " ".join(path.read_text("utf-8").split())
    found = {
        text[max(0, match.start() - 30) : match.end() + 30]: term
        for phrase, term in PHRASES.items()
        for match in re.finditer(rf"\b(?:{phrase})\b", text, re.IGNORECASE)
    }
    assert not found
