"""Control characters never reach a terminal through the text of an error or a table."""

from __future__ import annotations

import unicodedata

import pytest

from fastvgg.errors import FastvggError, StoppedError
from fastvgg.escaping import escape_controls
from fastvgg.formatting import html_table

HOSTILE = [chr(code) for code in (*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x2028, 0xDC80)]


@pytest.mark.parametrize("character", HOSTILE, ids=ascii)
def test_control_characters_are_escaped(character):
    escaped = escape_controls(f"a{character}b")
    assert escaped.isascii()
    assert escaped.isprintable()
    assert escaped != "ab"


def test_all_controls_directions_and_surrogates_are_escaped():
    text = "".join(map(chr, range(0x110000)))
    left = {unicodedata.category(character) for character in escape_controls(text)}
    assert not left & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(c) for c in escape_controls(text)} & {
        *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }


@pytest.mark.parametrize("text", ["", "plain", "café 日本 🙂", "a\\b", "e\u0301", "ع\u200dב"])
def test_other_text_is_kept(text):
    assert escape_controls(text) == text


def test_errors_show_controls_escaped_and_keep_them_for_programs():
    error = FastvggError("a\x1b[2J\nb is missing", "see\x07 \u202eit")
    assert str(error) == "a\\x1b[2J\\nb is missing\nsee\\x07 \\u202eit"
    assert error.problem == "a\x1b[2J\nb is missing"
    stopped = StoppedError.from_os_error(OSError(5, "I/O"), "pwrite", "x\x9b.npy", 0)
    assert "x\\x9b.npy" in str(stopped)


def test_tables_of_notebooks_show_controls_escaped():
    table = html_table("a\x1b", [("b\u202e", "c\x9b")])
    assert "a\\x1b" in table
    assert "b\\u202e" in table
    assert "c\\x9b" in table
