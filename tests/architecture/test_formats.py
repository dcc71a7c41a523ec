"""The properties of formats are in one table, not in lists of names elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastvgg
from fastvgg.datasets import open as factory
from fastvgg.datasets.formats import SOURCES, TARGETS
from tests.helpers import formats

PACKAGE = Path(fastvgg.__file__).parent
# In journals and reports, "images" is the name of a count.
NAMES = SOURCES.keys() - {"images"}


def listed_formats(source):
    """Return the format names that are elements of tuples, lists and sets, or keys of dicts."""
    elements = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            elements += node.elts
        elif isinstance(node, ast.Dict):
            elements += node.keys
    return {node.value for node in elements if isinstance(node, ast.Constant)} & NAMES


def test_listed_formats_finds_names_in_every_collection():
    source = 'a = ("npy", 1), ["tar"], {"zarr": 2, **b}, {"hdf5"}, {"images": 3}\nc = "parts"'
    assert listed_formats(source) == {"npy", "tar", "zarr", "hdf5"}


@pytest.mark.parametrize("folder", ["stream", "executors"])
def test_names_of_formats_are_listed_only_in_datasets(folder):
    files = list((PACKAGE / folder).rglob("*.py"))
    listed = {file.name: listed_formats(file.read_text()) for file in files}
    assert files
    assert not {name: found for name, found in listed.items() if found}


def test_every_format_is_in_the_table_and_has_a_contract():
    assert {form.kind for form in formats.SOURCES.values()} == SOURCES.keys()
    assert {form.kind for form in formats.TARGETS.values()} == TARGETS.keys()
    assert set(factory.ARRAY_FORMATS.values()) <= TARGETS.keys()
    decoded = {kind for kind, entry in SOURCES.items() if entry.has_image_files}
    assert factory.IMAGE_SOURCES.keys() == decoded
