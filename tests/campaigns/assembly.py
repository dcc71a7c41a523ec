"""Check the assembly of every kernel for processors that this machine does not have.

    python -m tests.campaigns.assembly                      # every kernel and processor: minutes
    python -m tests.campaigns.assembly --write              # also write instructions.json
    python -m tests.campaigns.assembly --processor haswell  # one processor

A kernel fails if it mixes legacy (non-VEX) SSE instructions with wide registers (on Zen 3 each
costs 380 ns), spills a wide register to an unaligned stack slot (up to 60 times slower if the slot
crosses a page), lacks an expected non-temporal store or store fence, or has more instructions per
pixel than instructions.json allows. LLVM must also compile it: a failed assertion aborts the
process.

Each x86-64 processor has its own process, because Numba reads the target from the environment. For
Arm, the LLVM IR that Numba emits is compiled again for another target.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.helpers.checkout import checkout_environment

TABLE = Path(__file__).parent / "instructions.json"
TOLERANCE = 1.15

V2 = "+cx16,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
V3 = f"{V2},+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe"
V4 = f"{V3},+avx512bw,+avx512cd,+avx512dq,+avx512f,+avx512vl"
ZEN5 = "+avx512bf16,+avx512bitalg,+avx512ifma,+avx512vbmi,+avx512vbmi2,+avx512vnni,+gfni,+sse4a"
X86 = {
    "x86-64-v2": V2,
    "haswell": V3,
    "znver3": f"{V3},+sse4a",
    "skylake-avx512": V4,
    "znver5": f"{V4},{ZEN5}",
}
ARM = ("neoverse-n1", "apple-m1")
ARM_TRIPLE = "aarch64-unknown-linux-gnu"
PROCESSORS = (*X86, *ARM)

LABEL = re.compile(r"^(\.L\w+):")
JUMP = re.compile(r"^\s+(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.L\w+)")
INSTRUCTION = re.compile(r"^\s+[a-z]")
NONTEMPORAL = re.compile(r"^\s+(?:v?movnt\w+\s+%([xyz])mm|stnp\s+([qd]))")
STORE_BYTES = {"x": 16, "y": 32, "z": 64, "q": 32, "d": 16}
UNALIGNED_SLOT = re.compile(
    r"^\s+vmov(?:ups|upd|dqu)\w*\s.*(?:%[yz]mm.*\(%r[sb]p\)|\(%r[sb]p\).*%[yz]mm)"
)


def contract_kernels():
    """Yield the name and spec of each kernel: every mode, storage type and pair of layouts."""
    from fastvgg.kernels.spec import KernelSpec
    from fastvgg.transform import Transform
    from tests.helpers.batches import FLOATS, KERAS_MODES, LAYOUT_PAIRS

    pairs = [*(("uint8", target) for target in FLOATS), *((source, "uint8") for source in FLOATS)]
    for source, target in pairs:
        direction = "restore" if target == "uint8" else "preprocess"
        for mode in (*KERAS_MODES, "identity"):
            for layouts in LAYOUT_PAIRS:
                transform = Transform(mode, direction, *layouts, target)
                name = f"{direction} {mode} {source}-{target} {'-'.join(layouts)}"
                yield (
                    name,
                    KernelSpec.of(transform, source, nontemporal=True, has_aligned_planes=True),
                )


def innermost_loops(lines):
    """Return the lines of each loop that contains no other loop."""
    labels = {match[1]: at for at, line in enumerate(lines) if (match := LABEL.match(line))}
    jumps = [(labels.get(m[1], at), at) for at, line in enumerate(lines) if (m := JUMP.match(line))]
    back = [(begin, end) for begin, end in jumps if begin < end]
    return [
        lines[begin : end + 1]
        for begin, end in back
        if not any(
            (begin, end) != other and begin <= other[0] and other[1] <= end for other in back
        )
    ]


def stored_bytes(lines):
    """Return the number of bytes that the non-temporal stores among some lines write."""
    matches = [match for line in lines if (match := NONTEMPORAL.match(line))]
    return sum(STORE_BYTES[match[1] or match[2]] for match in matches)


def analyze(spec, text):
    """Return the instructions per pixel of a kernel, and its faults."""
    from fastvgg.kernels.vector import ELEMENT_BYTES

    lines = text[: text.index(".Lfunc_end0")].splitlines()
    loops = innermost_loops(lines)
    max_bytes = max(map(stored_bytes, loops))
    faults = []
    if not max_bytes:
        return {"instructions": None, "faults": ["no non-temporal store in any loop"]}
    is_x86 = "%rsp" in text or "%rdi" in text
    if is_x86 and returns_unfenced(lines):
        faults.append("no store fence between a non-temporal store and the return")
    if re.search(r"%[yz]mm", text):
        faults += [f"legacy SSE: {line.strip()}" for line in lines if is_legacy(line)]
    faults += [f"unaligned: {line.strip()}" for line in lines if UNALIGNED_SLOT.match(line)]
    channels = 1 if spec.is_plane_by_plane else 3
    pixels = max_bytes / (channels * ELEMENT_BYTES[spec.target])
    hot = (loop for loop in loops if stored_bytes(loop) == max_bytes)
    count = max(sum(bool(INSTRUCTION.match(line)) for line in loop) for loop in hot)
    return {"instructions": round(count / pixels, 2), "faults": faults}


def returns_unfenced(lines):
    """Return whether a path from a non-temporal store to the return has no store fence."""
    labels = {match[1]: at for at, line in enumerate(lines) if (match := LABEL.match(line))}
    pending = [at + 1 for at, line in enumerate(lines) if NONTEMPORAL.match(line)]
    visited = set()
    while pending:
        at = pending.pop()
        if at in visited or at >= len(lines) or re.match(r"\s+sfence", lines[at]):
            continue
        visited.add(at)
        if re.match(r"\s+ret", lines[at]):
            return True
        if match := JUMP.match(lines[at]):
            pending.append(labels[match[1]])
        if not re.match(r"\s+jmp", lines[at]):
            pending.append(at + 1)
    return False


def is_legacy(line):
    """Return whether a line is an SSE instruction without the VEX prefix."""
    return bool(re.match(r"\s+[a-uw-z]\w*\s.*%xmm", line))


def analyze_native(every, first):
    """Analyze kernels compiled by Numba in this process, for the processor of the environment."""
    from fastvgg.kernels import convert

    for name, spec in [*contract_kernels()][first::every]:
        print(name, file=sys.stderr, flush=True)  # the last name is the culprit if LLVM aborts
        (text,) = convert.compile_kernel(spec).inspect_asm().values()
        yield name, analyze(spec, text)


def analyze_arm(cpu, every, first):
    """Analyze kernels compiled for an Arm processor."""
    from llvmlite import binding

    from fastvgg.kernels import convert, jit

    arm = jit.Processor(
        is_x86=False, has_f16c=True, has_fma=True, vector_bytes=16, min_permute_bytes=1
    )
    jit.processor = lambda: arm
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(ARM_TRIPLE).create_target_machine(cpu=cpu, opt=3)
    for name, kernel_spec in [*contract_kernels()][first::every]:
        print(name, file=sys.stderr, flush=True)
        (text,) = convert.compile_kernel(kernel_spec).inspect_llvm().values()
        text = re.sub(r'(?m)^target triple = ".*"$', f'target triple = "{ARM_TRIPLE}"', text)
        layout = f'target datalayout = "{target.target_data}"'
        text = re.sub(r'(?m)^target datalayout = ".*"$', layout, text)
        module = binding.parse_assembly(text)
        module.verify()
        yield name, analyze(kernel_spec, target.emit_assembly(module))


def analyze_in_child_process(processor, every=1, first=0):
    """Return the analysis of the kernels for a processor, from a child process."""
    environment = checkout_environment()
    if processor in X86:
        environment |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": X86[processor]}
    command = [
        sys.executable,
        "-m",
        "tests.campaigns.assembly",
        "--here",
        processor,
        str(every),
        str(first),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last_line = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 0, f"{processor}: {last_line}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def list_faults(processor, rows, allowed):
    """Return the faults of the kernels of a processor, one per line."""
    lines = [f"{name}: {fault}" for name, row in rows.items() for fault in row["faults"]]
    for name, row in rows.items():
        limit = allowed[processor].get(name)
        if limit is None or row["instructions"] is None or row["instructions"] > TOLERANCE * limit:
            lines.append(
                f"{name}: {row['instructions']} instructions per pixel, in the table {limit}"
            )
    return [f"{processor}: {line}" for line in lines]


def main():
    if sys.argv[1:2] == ["--here"]:
        processor, every, first = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        is_x86 = processor in X86
        rows = analyze_native(every, first) if is_x86 else analyze_arm(processor, every, first)
        print(json.dumps(dict(rows)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processor", choices=PROCESSORS, nargs="+", default=PROCESSORS)
    parser.add_argument("--write", action="store_true", help="write the instructions per pixel")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(analyze_in_child_process, arguments.processor)
        by_processor = dict(zip(arguments.processor, results, strict=True))
    counts = {
        processor: {name: row["instructions"] for name, row in rows.items()}
        for processor, rows in by_processor.items()
    }
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if arguments.write:
        table |= counts
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    faults = [
        line
        for processor, rows in by_processor.items()
        for line in list_faults(processor, rows, table)
    ]
    print(*faults, sep="\n")
    for processor, rows in counts.items():
        mean = sum(count or 0 for count in rows.values()) / len(rows)
        print(f"{processor}: {len(rows)} kernels, {mean:.2f} instructions per pixel on average")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
