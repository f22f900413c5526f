"""`python -m evo_jax check`: the operations on this machine's own device, in a table of what passed."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from evo_jax import check
from evo_jax._version import __version__
from evo_jax.backend import has_cuda_device
from evo_jax.check_cases import OPS

_HEADER = ("operation", "dtype", "implementation", "result: error / limit", "gradient: error / limit", "rerun", "")


def add(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "check",
        help="run every operation on this machine's device and compare it with exact formulas",
        description="Run every operation, with its gradients, in every dtype on this machine's device, compare the "
        "results with whole-array formulas in float64, and run it again for the same bits. Exit status 1 if any fails.",
    )
    command.add_argument("--op", action="append", choices=OPS, help="repeatable: only these operations")
    command.add_argument("--dtype", action="append", choices=check.DTYPES, help="repeatable: only these dtypes")
    command.add_argument(
        "--backend",
        action="append",
        choices=tuple(check.EPSILON),
        help="repeatable: only these implementations (default: reference, and triton where there is a CUDA device)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write every error and its limit")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0 where all passed, 1 where not, 2 where it could not begin."""
    implementations = _once(arguments.backend or (["triton"] if has_cuda_device() else []) + ["reference"])
    if refusal := _refusal(implementations, arguments.json):
        print(f"check: {refusal}", file=sys.stderr)
        return 2
    chosen = (_once(arguments.op or OPS), _once(arguments.dtype or check.DTYPES), implementations)
    done: list[check.Row] = []
    written = True
    try:
        for row in _with_progress(check.rows(*chosen), check.count(*chosen)):
            done.append(row)
    finally:
        print(table(done))
        if arguments.json:
            written = _write(arguments.json, done)
    failed = [row for row in done if not row.passed]
    print(f"{len(done) - len(failed)} of {len(done)} passed on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    return 1 if failed or not written else 0


def _refusal(implementations: list[str], path: Path | None) -> str | None:
    """Why the command cannot begin."""
    if "triton" in implementations and not has_cuda_device():
        return "--backend triton needs a CUDA device, and JAX sees none"
    if path and os.path.isdir(path):
        return f"--json {path}: it is a folder"
    if path and not os.path.isdir(path.parent):
        return f"--json {path}: there is no folder {path.parent}"
    return None


def _write(path: Path, rows: list[check.Row]) -> bool:
    """Whether the JSON could be written; one line on stderr where not."""
    report = {"environment": environment(), "rows": [row.as_dict() for row in rows]}
    try:
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        print(f"check: --json {path}: {error.strerror}", file=sys.stderr)
        return False
    return True


def table(rows: Iterable[check.Row]) -> str:
    """A line for each row with its worst result and gradient; a failed one is followed by a line for each fault."""
    lines: list[tuple[str, ...]] = [_HEADER]
    faults: dict[int, list[str]] = {}
    for row in rows:
        results = [figure for figure in row.figures if not figure.name.startswith("d_")]
        grads = [figure for figure in row.figures if figure.name.startswith("d_")]
        verdict = "pass" if row.passed else "FAIL"
        rerun = "-" if row.problem else "same bits" if row.same_bits else "DIFFERS"
        operation = f"{row.op} {row.case}"
        lines.append((operation, row.dtype, row.implementation, _worst(results), _worst(grads), rerun, verdict))
        faults[len(lines)] = [row.problem] if row.problem else [_text(f) for f in row.figures if not f.passed]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for number, line in enumerate(lines, 1):
        text.append("  ".join(map(str.ljust, line, widths)).rstrip())
        text += [f"    FAIL {fault}" for fault in faults.get(number, [])]
    return "\n".join(text)


def _worst(figures: list[check.Figure]) -> str:
    return _text(max(figures, key=lambda f: f.error / f.limit if f.passed else float("inf"))) if figures else "-"


def _text(figure: check.Figure) -> str:
    return f"{figure.name}: {figure.error:.1e} / {figure.limit:.1e}"


def environment() -> dict[str, Any]:
    """Where a report was made."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "driver": device.client.platform_version,
        "python": platform.python_version(),
        "versions": {"evo-jax": __version__, **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}},
    }


def _with_progress(rows: Iterable[check.Row], total: int) -> Iterable[check.Row]:
    """The rows, counted on a terminal's standard error."""
    shown = sys.stderr.isatty()
    for number, row in enumerate(rows, 1):
        if shown:
            filled = 30 * number // total
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r\033[K[{bar}] {number}/{total} {row.op} {row.case}", end="", file=sys.stderr, flush=True)
        yield row
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
