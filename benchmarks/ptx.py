"""Static facts of compiled GPU code: registers and spills by ptxas, instruction counts, launches from XLA's dump."""

import functools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"^\.(?:visible|weak) \.entry (\w+)\(", re.MULTILINE)
_USAGE = re.compile(
    r"Function properties for (\w+)\s+(?:ptxas info\s+:\s+)?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers"
)
_LAUNCH = re.compile(r"(\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+) bytes")
_INSTRUCTIONS = {
    "wgmma": re.compile(r"(?<![\w.])wgmma\.mma_async"),
    "mma.sync": re.compile(r"(?<![\w.])mma\.sync"),
    "cp.async": re.compile(r"(?<![\w.])cp\.async\.(?:ca|cg|bulk)"),
    "atom/red": re.compile(r"(?<![\w.])(?:atom|red)\."),
    "shfl": re.compile(r"(?<![\w.])shfl\."),
    "ld.global": re.compile(r"(?<![\w.])ld\.global"),
    "st.global": re.compile(r"(?<![\w.])st\.global"),
}


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One GPU kernel as XLA compiled it; bytes of spills and stack are per thread, `shared_bytes` per block."""

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    num_warps: int
    grid: tuple[int, ...]
    instructions: dict[str, int]
    ir_bytes: int = 0  # of its Triton IR as text; the longest, where kernels share a name
    stack_bytes: int = 0

    @property
    def tensor_cores(self) -> int:
        """How many of its instructions are matrix products."""
        return self.instructions["wgmma"] + self.instructions["mma.sync"]


@dataclass(frozen=True, slots=True)
class Launch:
    """Grid, threads per block and shared memory of one kernel, as XLA's thunk sequence states them."""

    grid: tuple[int, ...]
    threads: int
    shared_bytes: int


def find_ptxas() -> str | None:
    """Path of the ptxas of the nvidia-cuda-nvcc wheel (the one XLA uses), else of the one on PATH, or None."""
    site = [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]
    for path in (path for root in site for path in sorted(root.glob("nvidia/*/bin/ptxas"), reverse=True)):
        return str(path)
    return shutil.which("ptxas")


@functools.cache
def ptxas_version() -> str:
    """What `ptxas --version` says of its build, or "none"."""
    if (ptxas := find_ptxas()) is None:
        return "none"
    done = subprocess.run([ptxas, "--version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"V([\d.]+)", done.stdout)
    return found.group(1) if found else "unknown"


def entries(ptx: str) -> Iterator[tuple[str, str]]:
    """(kernel name, its PTX text) for every entry point of a PTX module."""
    found = list(_ENTRY.finditer(ptx))
    ends = [match.start() for match in found[1:]] + [len(ptx)] * bool(found)
    for match, end in zip(found, ends, strict=True):
        yield match.group(1), ptx[match.start() : end]


def count_instructions(body: str) -> dict[str, int]:
    """How often each instruction class that matters here stands in `body` (static, not executed, counts)."""
    return {name: len(pattern.findall(body)) for name, pattern in _INSTRUCTIONS.items()}


def assemble(path: Path, out: Path | str) -> str:
    """Write the machine code of one PTX file to `out`, and return what ptxas says of it."""
    arch = re.search(r"^\.target (\w+)", path.read_text(), re.MULTILINE)
    assert arch is not None, f"{path.name} names no target"
    ptxas = find_ptxas()
    if ptxas is None:
        raise FileNotFoundError("no ptxas: install the nvidia-cuda-nvcc wheel (13.0 or later) beside jax-cuda13-plugin")
    command = [ptxas, "-v", f"-arch={arch.group(1)}", str(path), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refused {path.name}: {(done.stderr or done.stdout).strip()[:2000]}")
    return done.stderr + done.stdout


def register_usage(path: Path) -> dict[str, dict[str, int]]:
    """{kernel: its registers and bytes of spills and stack, by the names of KernelReport} of one PTX file."""
    usage = _USAGE.findall(assemble(path, "/dev/null"))
    fields = ("stack_bytes", "spill_store_bytes", "spill_load_bytes", "registers")
    return {name: dict(zip(fields, map(int, numbers), strict=True)) for name, *numbers in usage}


def launches(dump: Path) -> dict[str, Launch]:
    """{kernel: its launch} from the thunk sequences in an XLA dump directory."""
    found = {}
    for path in dump.glob("*thunk_sequence.txt"):
        for name, grid, threads, shared in _LAUNCH.findall(path.read_text()):
            x, y, z = (int(n) for n in threads.split(","))
            found[name] = Launch(tuple(int(n) for n in grid.split(",")), x * y * z, int(shared))
    return found


def kernel_reports(dump: Path, wanted: Callable[[str], bool]) -> tuple[tuple[KernelReport, ...], tuple[str, ...]]:
    """Reports of the `wanted` GPU kernels in an XLA dump directory, and the names of the others.

    Raises:
        RuntimeError: no thunk sequence states a kernel's launch, so that its shared memory is not known.
    """
    launch_of, reports, others = launches(dump), [], []
    for path in sorted(dump.glob("*.ptx")):
        every = dict(entries(path.read_text()))
        bodies = {name: body for name, body in every.items() if wanted(name)}
        others += every.keys() - bodies.keys()
        usage = register_usage(path) if bodies else {}
        for name, body in bodies.items():
            if (launch := launch_of.get(name)) is None:
                raise RuntimeError(f"XLA's dump does not state the launch of {name}: the dump options have changed")
            reports.append(
                KernelReport(
                    name,
                    shared_bytes=launch.shared_bytes,
                    num_warps=-(-launch.threads // 32),
                    grid=launch.grid,
                    instructions=count_instructions(body),
                    **usage[name],
                )
            )
    return tuple(sorted(reports, key=lambda report: report.name)), tuple(sorted(others))
