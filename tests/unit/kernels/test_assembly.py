"""Kernels compiled for every named processor: a sample of `assembly.py`, which compiles all."""

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
    analyze,
    analyze_in_child_process,
    contract_kernels,
    is_legacy,
    list_faults,
)
from tests.helpers.kernel_harness import Task
from tests.helpers.samples import parts

EVERY = 9  # shares no factor with the four layouts and modes, so that a processor sees them all
PARTS = 13


@parts(PARTS)
@pytest.mark.parametrize("number", range(len(PROCESSORS)), ids=lambda number: PROCESSORS[number])
def test_kernels_compile_to_fast_code_on_every_processor(number, part):
    name = PROCESSORS[number]
    found = analyze_in_child_process(name, EVERY * PARTS, number + EVERY * part)
    assert len(found) >= len([*contract_kernels()]) // (EVERY * PARTS)
    assert list_faults(name, found, json.loads(TABLE.read_text())) == []


def test_table_covers_every_kernel_and_processor():
    table = json.loads(TABLE.read_text())
    kernels = {name for name, _ in contract_kernels()}
    assert set(table) == set(PROCESSORS)
    assert all(set(rows) == kernels for rows in table.values())
    assert all(0 < count < 60 for rows in table.values() for count in rows.values())


needs_x86 = pytest.mark.skipif(not processor().is_x86, reason="reads the assembly of x86-64")
RESTORE = Task(Transform("caffe", "restore"), "float32", nontemporal=True)


def assembly_of(task):
    (text,) = convert.compile_kernel(task.spec).inspect_asm().values()
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
def test_assembly_faults_are_detected(pattern, replacement, fault):
    text = assembly_of(RESTORE)
    assert analyze(RESTORE.spec, text)["faults"] == []
    broken, count = re.subn(pattern, replacement, text)
    assert count
    assert any(fault in line for line in analyze(RESTORE.spec, broken)["faults"])


def test_excess_instructions_are_a_fault():
    found = {"a": {"instructions": 4.7, "faults": []}, "b": {"instructions": 4.5, "faults": []}}
    faults = list_faults("haswell", found, {"haswell": {"a": 4.0, "b": 4.0}})
    assert faults == ["haswell: a: 4.7 instructions per pixel, in the table 4.0"]
    assert len(list_faults("haswell", found, {"haswell": {"a": 5.0}})) == 1


def test_legacy_sse_instructions_are_recognized():
    assert is_legacy("\textrq\t$0, $40, %xmm7")
    assert is_legacy("\tmovaps\t%xmm0, (%rax)")
    assert not is_legacy("\tvpand\t%xmm0, %xmm1, %xmm2")
    assert not is_legacy("\taddq\t$16, %rax")
