"""What kernels compile to, for processors that are not at hand: speed without a clock.

    python -m tests.campaigns.assembly                      # every kernel and processor: minutes
    python -m tests.campaigns.assembly --write              # and keep the instructions per pixel
    python -m tests.campaigns.assembly --processor haswell  # one processor

A kernel is faulty if it has an SSE instruction without the VEX prefix beside wide registers (on
Zen 3 each costs 380 ns), a wide register spilled to an unaligned slot of the stack (up to 60 times
slower where the slot crosses a page), no non-temporal store where one is meant, no store fence, or
more instructions per pixel than instructions.json allows. LLVM must compile it at all: one of its
assertions ends the process.

x86-64 processors are compiled for in a process of their own, as Numba reads them from the
environment. For Arm, what Numba emits is compiled once more for another target.
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


def contract():
    """The kernels of the contract by name: every mode, storage type and pair of layouts."""
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
    """Each stretch of lines that is repeated and has no other such stretch inside."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := LABEL.match(line))}
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
    """How many bytes the non-temporal stores of some lines write."""
    found = [match for line in lines if (match := NONTEMPORAL.match(line))]
    return sum(STORE_BYTES[match[1] or match[2]] for match in found)


def analyze(spec, text):
    """The instructions per pixel of a kernel, and its faults."""
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
    """Whether the return can be reached from a non-temporal store without a store fence."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := LABEL.match(line))}
    pending = [at + 1 for at, line in enumerate(lines) if NONTEMPORAL.match(line)]
    seen = set()
    while pending:
        at = pending.pop()
        if at in seen or at >= len(lines) or re.match(r"\s+sfence", lines[at]):
            continue
        seen.add(at)
        if re.match(r"\s+ret", lines[at]):
            return True
        if found := JUMP.match(lines[at]):
            pending.append(labels[found[1]])
        if not re.match(r"\s+jmp", lines[at]):
            pending.append(at + 1)
    return False


def is_legacy(line):
    """Whether a line is an SSE instruction without the VEX prefix."""
    return bool(re.match(r"\s+[a-uw-z]\w*\s.*%xmm", line))


def analyze_native(every, first):
    """What kernels compile to in this process, for the processor of the environment."""
    from fastvgg.kernels import convert

    for name, spec in [*contract()][first::every]:
        print(name, file=sys.stderr, flush=True)  # the last one, if LLVM ends the process
        (text,) = convert.compile_kernel(spec).inspect_asm().values()
        yield name, analyze(spec, text)


def analyze_arm(cpu, every, first):
    """What kernels compile to for an Arm processor."""
    from llvmlite import binding

    from fastvgg.kernels import convert, jit

    arm = jit.Processor(
        is_x86=False, has_f16c=True, has_fma=True, vector_bytes=16, min_permute_bytes=1
    )
    jit.processor = lambda: arm
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(ARM_TRIPLE).create_target_machine(cpu=cpu, opt=3)
    for name, kernel_spec in [*contract()][first::every]:
        print(name, file=sys.stderr, flush=True)
        (text,) = convert.compile_kernel(kernel_spec).inspect_llvm().values()
        text = re.sub(r'(?m)^target triple = ".*"$', f'target triple = "{ARM_TRIPLE}"', text)
        layout = f'target datalayout = "{target.target_data}"'
        text = re.sub(r'(?m)^target datalayout = ".*"$', layout, text)
        module = binding.parse_assembly(text)
        module.verify()
        yield name, analyze(kernel_spec, target.emit_assembly(module))


def compiled(processor, every=1, first=0):
    """What kernels compile to for a processor, from a process of its own."""
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
    last = done.stderr.strip().splitlines()[-1:]
    assert done.returncode == 0, f"{processor}: {last}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


def list_faults(processor, found, allowed):
    """What is wrong with the kernels of a processor, a line each."""
    lines = [f"{name}: {fault}" for name, row in found.items() for fault in row["faults"]]
    for name, row in found.items():
        max_bytes = allowed[processor].get(name)
        if (
            max_bytes is None
            or row["instructions"] is None
            or row["instructions"] > TOLERANCE * max_bytes
        ):
            lines.append(
                f"{name}: {row['instructions']} instructions per pixel, in the table {max_bytes}"
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
    parser.add_argument("--write", action="store_true", help="keep the instructions per pixel")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(arguments.processor, pool.map(compiled, arguments.processor), strict=True))
    counts = {
        processor: {name: row["instructions"] for name, row in rows.items()}
        for processor, rows in found.items()
    }
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if arguments.write:
        table |= counts
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    faults = [
        line for processor, rows in found.items() for line in list_faults(processor, rows, table)
    ]
    print(*faults, sep="\n")
    for processor, rows in counts.items():
        mean = sum(count or 0 for count in rows.values()) / len(rows)
        print(f"{processor}: {len(rows)} kernels, {mean:.2f} instructions per pixel on average")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
