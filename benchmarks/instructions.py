"""Count the instructions of compiled kernels, loop by loop: where a kernel that they bound spends its time.

    python -m benchmarks.instructions --op sparse --pass forward --shape L8192,N32,D128

Machine code is what ptxas makes of XLA's PTX, as nvdisasm lists it; needs `pip install 'evo-jax[aot]'` and no GPU.
Counts are of the code of one thread as it stands, so a loop's are those of one turn. The kernels of a program come
in the order of its PTX modules.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compile_for import base_name, compile_dumping, lower_placed, missing_wheels
from benchmarks.compile_report import shape_of
from benchmarks.programs import DTYPES, OPS, PHASES, Program
from benchmarks.ptx import assemble, entries
from benchmarks.targets import TARGETS, allow_no_gpu
from benchmarks.ttir import triton_calls

_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.MULTILINE)
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)\S*(.*)")
_SHOWN = 16  # opcodes of a line


class Listing(NamedTuple):
    """Of one kernel: how often each opcode stands in it, and in each of its loops."""

    whole: Counter[str]
    loops: list[Counter[str]]


def listings(sass: str) -> dict[str, Listing]:
    """{kernel: its Listing} of what `nvdisasm -c` prints; a loop is what a branch back to an earlier label encloses."""
    found = list(_FUNCTION.finditer(sass))
    ends = [match.start() for match in found[1:]] + [len(sass)] * bool(found)
    return {match.group(1): _listing(sass[match.end() : end]) for match, end in zip(found, ends, strict=True)}


def _listing(text: str) -> Listing:
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(opcodes)
        elif found := _INSTRUCTION.search(line):
            opcodes.append(found.group(1))
            target = re.search(r"\.L_\w+", found.group(2)) if found.group(1) == "BRA" else None
            start = labels.get(target.group(), len(opcodes)) if target else len(opcodes)
            if start < len(opcodes) - 1:  # a branch to itself only fills the end
                loops.append(Counter(opcodes[start:]))
    return Listing(Counter(opcodes), loops)


def find_nvdisasm() -> str | None:
    """Path of the nvdisasm of the triton wheel, else of the one on PATH, or None."""
    spec = find_spec("triton")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / "backends/nvidia/bin/nvdisasm").exists():
            return str(path)
    return shutil.which("nvdisasm")


def disassembled(program: Program, target: str, nvdisasm: str) -> dict[str, Listing]:
    """{Triton kernel of `program`: its Listing}, compiled for `target`."""
    lowered = lower_placed(*program.build(), target)
    names, result = {call.name for call in triton_calls(lowered)}, {}
    with tempfile.TemporaryDirectory(prefix="instructions_") as dump:
        compile_dumping(lowered, dump)
        for path in sorted(Path(dump).glob("*.ptx")):
            if any(base_name(entry, names) for entry, _ in entries(path.read_text())):
                assemble(path, cubin := path.with_suffix(".cubin"))
                command = [nvdisasm, "-c", str(cubin)]
                result |= listings(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {name: listing for name, listing in result.items() if base_name(name, names)}


def line(counts: Counter[str]) -> str:
    """All of them, and the most frequent by name."""
    names = ", ".join(f"{name} {count}" for name, count in counts.most_common(_SHOWN))
    return f"{counts.total()}: {names}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts of every kernel of one program."""
    parser = argparse.ArgumentParser("python -m benchmarks.instructions", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", choices=OPS, required=True)
    parser.add_argument("--pass", dest="phase", choices=PHASES, default="forward")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shape", default="", metavar="B1,L8192,...", help="as of benchmarks.compile_report")
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument("--target", choices=sorted(TARGETS), default="h100")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allow_no_gpu()
    try:
        sizes: dict[str, Any] = shape_of(options.shape)
        sizes = {"kv_heads": sizes["heads"], **sizes} if "heads" in sizes else sizes
        program = Program(options.op, options.phase, options.dtype, causal=not options.not_causal, **sizes)
    except ValueError as error:
        parser.error(str(error))
    nvdisasm = find_nvdisasm()
    if absent := missing_wheels() or (None if nvdisasm else "not found: nvdisasm (pip install triton)"):
        print(absent, file=sys.stderr)
        return 1
    assert nvdisasm is not None
    for name, listing in disassembled(program, options.target, nvdisasm).items():
        print(f"{name} {line(listing.whole)}")
        for loop in listing.loops:
            print(f"  loop of {line(loop)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
