"""What every program of the matrix may cost: one checked-in table, and what a change makes worse than it says."""

import json
from operator import gt, lt
from pathlib import Path
from typing import Any

import jax

from benchmarks.compile_for import Report, versions
from benchmarks.matrix import AIMED
from benchmarks.ptx import KernelReport

PATH = Path(__file__).with_name("budgets.json")
_AIMS = {"forward": 2 * 2**20, "backward": 8 * 2**20}  # bytes for 8,192 tokens, 32 heads of 128, bfloat16


def series() -> str:
    """The versions of JAX that share a table: registers and shared memory are the compiler's."""
    return ".".join(jax.__version__.split(".")[:2])


def load(path: Path = PATH) -> dict[str, Any]:
    """{series: {"versions": ..., "programs": {"label @ target": {"temp": bytes, kernel: [numbers]}}}}."""
    return json.loads(path.read_text()) if path.exists() else {}


def row(report: Report) -> dict[str, Any]:
    """What the table holds of one program: temporary bytes, and of each kernel what `_numbers` says."""
    return {"temp": report.temp_bytes, **{kernel.name: _numbers(kernel) for kernel in report.kernels}}


def _numbers(kernel: KernelReport) -> list[int]:
    """Registers, bytes of shared memory, and how many wgmma and mma.sync instructions there are."""
    counts = kernel.instructions
    return [kernel.registers, kernel.shared_bytes, counts["wgmma"], counts["mma.sync"]]


def worsened(report: Report, allowed: dict[str, Any] | None) -> list[str]:
    """What is worse than the row `allowed`, with both figures, and kernels that it does not name.

    Nothing for a program without a row. Fewer tensor-core instructions of one kind are worse unless there are more of
    the other, and no wgmma any more is worse in any case.
    """
    if allowed is None:
        return []
    found = []
    if report.temp_bytes > allowed["temp"]:
        found.append(f"temporary memory is {report.temp_bytes} bytes, {allowed['temp']} budgeted")
    for kernel in report.kernels:
        now, before = _numbers(kernel), allowed.get(kernel.name)
        if before is None:
            found.append(f"{kernel.name} is in no budget of this program (--update-budgets puts it there)")
            continue
        for name, new, old in zip(("registers", "bytes of shared memory"), now, before, strict=False):
            if new > old:
                found.append(f"{kernel.name} takes {new} {name}, {old} budgeted")
        fewer, more = (any(map(compare, now[2:], before[2:])) for compare in (lt, gt))
        if (fewer and not more) or (before[2] and not now[2]):
            found.append(
                f"{kernel.name} has {now[2]} wgmma and {now[3]} mma.sync, {before[2]} and {before[3]} budgeted"
            )
    return found


def over_aim(program: Any, report: Report) -> list[str]:
    """That more temporary memory is taken than the project set itself for the programs AIMED."""
    if program not in AIMED or report.temp_bytes <= (most := _AIMS[program.phase]):
        return []
    return [f"temporary memory is {report.temp_bytes} bytes, {most} allowed at this shape"]


def save(rows: dict[str, dict[str, Any]], known: set[str], path: Path = PATH) -> None:
    """Put `rows` into this series of the table, and drop what is not `known` any more; one line for each program."""
    table = load(path)
    before = table.get(series(), {}).get("programs", {})
    merged = {key: value for key, value in sorted({**before, **rows}.items()) if key in known}
    table[series()] = {"versions": versions(), "programs": merged}
    path.write_text(_text(table))


def _text(table: dict[str, Any]) -> str:
    parts = []
    for name, content in sorted(table.items()):
        lines = [f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in content["programs"].items()]
        head = f' {json.dumps(name)}: {{\n  "versions": {json.dumps(content["versions"])},\n  "programs": {{\n'
        parts.append(head + ",\n".join(lines) + "\n  }\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"
