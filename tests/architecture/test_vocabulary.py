"""The package and its documents use the standard terms of the field."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fastvgg

PACKAGE = Path(fastvgg.__file__).parent
CHECKOUT = PACKAGE.parent
FOLDERS = [PACKAGE, CHECKOUT / "tests", CHECKOUT / "benchmarks"]
MODULES = sorted(
    path.relative_to(CHECKOUT).as_posix() for folder in FOLDERS for path in folder.rglob("*.py")
)
DOCUMENTS = [
    CHECKOUT / "README.md",
    *sorted((CHECKOUT / "docs").glob("*.md")),
    CHECKOUT / "CONTRIBUTING.md",
]

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
    "contender": "peer",
    "contenders": "peers",
    "beside": "sidecar, or what is compared",
    "together": "the noun for what is grouped or shared",
    "helper": "worker, or the noun that it is about",
    "helpers": "workers, or the noun that it is about",
}
# As in "at most", "a flipped bit" and "the longest name".
ORDINARY_IN_TESTS = {
    *("flip", "flips", "most", "least", "longest"),
    *("helper", "helpers", "verb", "verbs"),
}
# The names of tests are sentences, as in "files are synced together".
ORDINARY_IN_TEST_NAMES = {"together"}
# A function is named by what it does, in the imperative: `measure_memory`, not `measured_memory`.
# Other participles have ordinary uses, as in `is_closed` or `sorted_names`.
PARTICIPLES = {"measured": "measure"}
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
    for node in ast.walk(ast.parse((CHECKOUT / module).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def functions_of(module):
    """Yield the names of the functions and methods that a module defines."""
    for node in ast.walk(ast.parse((CHECKOUT / module).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node.name


def words_of(identifier):
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_")
    return {part for part in parts if part}


@pytest.mark.parametrize("module", MODULES)
def test_identifiers_use_standard_terms(module):
    ordinary = set() if module.startswith(PACKAGE.name) else ORDINARY_IN_TESTS
    nonstandard = {}
    for name in identifiers_of(module):
        words = words_of(name) & IDENTIFIERS.keys() - ordinary
        if name.startswith("test_"):
            words -= ORDINARY_IN_TEST_NAMES
        if words:
            nonstandard[name] = [IDENTIFIERS[word] for word in sorted(words)]
    assert not nonstandard


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_not_named_by_participles(module):
    first_words = {name: name.strip("_").partition("_")[0] for name in functions_of(module)}
    assert not {
        name: PARTICIPLES[word] for name, word in first_words.items() if word in PARTICIPLES
    }


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *DOCUMENTS], ids=str)
def test_prose_uses_standard_terms(path):
    text = " ".join(path.read_text("utf-8").split())
    nonstandard = {
        text[max(0, match.start() - 30) : match.end() + 30]: term
        for phrase, term in PHRASES.items()
        for match in re.finditer(rf"\b(?:{phrase})\b", text, re.IGNORECASE)
    }
    assert not nonstandard
