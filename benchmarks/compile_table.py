"""The tables that the compile report prints, and the line on the terminal that says how far it is."""

import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.compile_for import Report
from benchmarks.programs import Program
from benchmarks.roofline import Floor, floor, occupancy

_KERNELS = ("program", "target", "kernel", "grid", "threads", "regs", "spill", "shared", "occupancy",
            "wgmma", "mma.sync", "cp.async", "IR")  # fmt: skip
_PROGRAMS = (
    "program",
    "target",
    "arguments",
    "output",
    "temporary",
    "moved",
    "by kernels",
    "operations",
    "floor",
    "bound",
    "seconds",
)
_UNITS = ("", "k", "M", "G", "T", "P")


def kernel_table(reports: Sequence[tuple[Any, Report]]) -> str:
    """A row for each kernel; spills and shared memory in bytes, occupancy as registers and shared memory allow it."""
    rows = []
    for program, report in reports:
        for k in report.kernels:
            grid, spilled = "x".join(map(str, k.grid)), k.spill_store_bytes + k.spill_load_bytes
            counts = [k.instructions[name] for name in ("wgmma", "mma.sync", "cp.async")]
            share = f"{occupancy(k, report.target):.0%}"
            launch = (grid, 32 * k.num_warps, k.registers, spilled, k.shared_bytes, share)
            rows.append((program.label, report.target, k.name, *launch, *counts, k.ir_bytes))
    return _table(_KERNELS, rows)


def program_table(reports: Sequence[tuple[Any, Report]], by_kernels: Sequence[int]) -> str:
    """A row for each program: XLA's buffers in bytes, and the least time that the chip needs (benchmarks.roofline).

    "moved" are arguments and results, each once; "by kernels" what `by_kernels` says of each program: the arrays of its
    kernels, each once a call, a call in a loop once.
    """
    rows = []
    for (program, report), launched in zip(reports, by_kernels, strict=True):
        buffers = [_short(n) for n in (report.argument_bytes, report.output_bytes, report.temp_bytes)]
        least, bound = floor_of(program, report), ("", _short(launched), "", "", "")
        if least is not None:
            flops, time = _short(least.flops), f"{least.seconds * 1e6:.1f} us"
            bound = (_short(least.bytes), _short(launched), flops, time, least.bound)
        rows.append((program.label, report.target, *buffers, *bound, f"{report.seconds:.1f}"))
    return _table(_PROGRAMS, rows)


def floor_of(program: Any, report: Report) -> Floor | None:
    """Its roofline, if it is a program of which that is known."""
    return floor(program, report) if isinstance(program, Program) else None


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    cells = [head, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" if n != 1 else f"|-{line}-|" for n, line in enumerate(lines))


def _short(number: float) -> str:
    """Three digits and the power of a thousand."""
    power = 0
    while number >= 999.5 and power < len(_UNITS) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g}{_UNITS[power]}" if power else str(int(number))


class Progress:
    """A line on stderr that counts what is done; nothing where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.lock, self.shown = threading.Lock(), sys.stderr.isatty()

    def step(self, label: str = "") -> None:
        """One more is done; called from any thread."""
        with self.lock:
            self.done += 1
            if self.shown:
                filled = 30 * self.done // self.total
                spent = time.monotonic() - self.start
                left = spent / self.done * (self.total - self.done)
                bar = "#" * filled + "." * (30 - filled)
                text = f"[{bar}] {self.done}/{self.total}  {spent:.0f} s, {left:.0f} s left  {label}"
                print(f"\r{text[:118]:<118}", end="" if self.done < self.total else "\n", file=sys.stderr, flush=True)
