"""Kernels for every processor that is named: some of `assembly.py`, which compiles all of them."""

from __future__ import annotations

import json
import re

import pytest

from fastvgg.kernels import convert
from fastvgg.kernels.jit import processor
from fastvgg.transform import Transform
from tests.campaigns.assembly import (
    PROCESSORS,
    TABLE,
    compiled,
    contract,
    faults_of,
    is_legacy,
    look,
)
from tests.helpers.kernel_harness import Task
from tests.helpers.samples import parts

EVERY = 9  # shares no factor with the four layouts and modes, so that a processor sees them all
PARTS = 13


@parts(PARTS)
@pytest.mark.parametrize("number", range(len(PROCESSORS)), ids=lambda number: PROCESSORS[number])
def test_kernels_compile_to_what_is_fast_on_every_processor(number, part):
    name = PROCESSORS[number]
    found = compiled(name, EVERY * PARTS, number + EVERY * part)
    assert len(found) >= len([*contract()]) // (EVERY * PARTS)
    assert faults_of(name, found, json.loads(TABLE.read_text())) == []


def test_the_table_has_every_kernel_and_every_processor():
    table = json.loads(TABLE.read_text())
    kernels = {name for name, _ in contract()}
    assert set(table) == set(PROCESSORS)
    assert all(set(rows) == kernels for rows in table.values())
    assert all(0 < count < 60 for rows in table.values() for count in rows.values())


needs_x86 = pytest.mark.skipif(not processor().is_x86, reason="reads the assembly of x86-64")
RESTORE = Task(Transform("caffe", "restore"), "float32", nontemporal=True)


def assembly_of(task):
    (text,) = convert.compiled(task.spec).inspect_asm().values()
    return text


@needs_x86
@pytest.mark.parametrize(
    ("pattern", "replacement", "fault"),
    [
        (r"\tsfence\n", "", "no store fence"),
        (r"(?s)^(.*?\n)(.*)\tsfence\n", r"\1\tsfence\n\2", "no store fence"),  # too early
        (r"(?m)^\tv?movnt\w+", "\tvmovdqa", "no non-temporal store"),
        (r"(?m)^(\tsfence)", r"\tvmovups\t%ymm3, 32(%rsp)\n\1", "unaligned: vmovups"),
        (r"(?m)^(\tsfence)", r"\tvmovdqu\t96(%rsp), %ymm3\n\1", "unaligned: vmovdqu"),
        (r"(?m)^(\tsfence)", r"\textrq\t$0, $40, %xmm7\n\tvpor %ymm1, %ymm2, %ymm3\n\1", "extrq"),
    ],
)
def test_a_kernel_with_a_fault_is_found_to_have_it(pattern, replacement, fault):
    text = assembly_of(RESTORE)
    assert look(RESTORE.spec, text)["faults"] == []
    broken, count = re.subn(pattern, replacement, text)
    assert count
    assert any(fault in line for line in look(RESTORE.spec, broken)["faults"])


def test_more_instructions_than_allowed_are_a_fault():
    found = {"a": {"instructions": 4.7, "faults": []}, "b": {"instructions": 4.5, "faults": []}}
    faults = faults_of("haswell", found, {"haswell": {"a": 4.0, "b": 4.0}})
    assert faults == ["haswell: a: 4.7 instructions per pixel, in the table 4.0"]
    assert len(faults_of("haswell", found, {"haswell": {"a": 5.0}})) == 1


def test_legacy_instructions_are_told_from_others():
    assert is_legacy("\textrq\t$0, $40, %xmm7")
    assert is_legacy("\tmovaps\t%xmm0, (%rax)")
    assert not is_legacy("\tvpand\t%xmm0, %xmm1, %xmm2")
    assert not is_legacy("\taddq\t$16, %rax")
