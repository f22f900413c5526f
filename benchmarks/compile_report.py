"""Compile kernels for H100, H200 and A100 without a GPU, and report what they take and what the chip allows.

    python -m benchmarks.compile_report                      a part of the matrix that covers all pairs of choices
    python -m benchmarks.compile_report --full               all of it; --op, --pass, --dtype and --target narrow both
    python -m benchmarks.compile_report --op sliding_window --shape B1,L12345,N7,K1,D72,W1000        any shape at all
    python -m benchmarks.compile_report --sweep flash        launches for autotuning to try

Exits 1 if a program does not compile, spills registers or keeps a stack, asks for too much shared memory, has atomics,
an access that can leave its array, or a dot product of another precision than stated or off the tensor cores, or takes
more than benchmarks/budgets.json or the project's aims allow it. --sweep writes pallas_kernels/tables/candidates.json.
Needs `pip install 'evo-jax[aot]'`, no GPU and no CUDA toolkit; without it kernels are lowered and audited only.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import budgets, matrix
from benchmarks.compile_for import Report, missing_wheels, versions
from benchmarks.compile_for import compile_for as compile_for
from benchmarks.compile_pool import run_in_pool
from benchmarks.compile_table import Progress, floor_of, kernel_table, program_table
from benchmarks.examine import NOTHING, Buildable, examine
from benchmarks.examine import problems as problems
from benchmarks.programs import DTYPES, EXTRAS, OPS, PHASES, Program
from benchmarks.targets import TARGETS, allow_no_gpu

_SIZES = {"B": "batch", "L": "length", "N": "heads", "K": "kv_heads", "D": "width", "W": "window", "T": "tokens"}
Results = dict[tuple[Any, str], dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """Compile what is asked for, print tables and failures, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allow_no_gpu()
    try:
        if options.sweep:
            return _sweep(options)
        cells = _cells(options)
    except ValueError as error:
        parser.error(str(error))
    if options.json and os.path.isdir(options.json):
        parser.error(f"--json: {options.json} is a folder")
    if options.json and not os.path.isdir(options.json.parent):
        parser.error(f"--json: there is no folder {options.json.parent}")
    if not cells:
        parser.error("the matrix holds no such program; with a shape any is compiled: --shape D72")
    try:
        return report(cells, options)
    except KeyboardInterrupt:
        print("interrupted; what was compiled is kept, and not compiled again", file=sys.stderr)
        return 130


def report(cells: Sequence[tuple[Buildable, str]], options: argparse.Namespace) -> int:
    """Examine each (program, target), hold it to its budget, print and write what was asked for."""
    start, known = time.monotonic(), {_key(*cell) for cell in matrix.whole()}
    progress = Progress(len(cells))
    tasks = {cell: (*cell, not options.no_cache) for cell in cells}
    results: Results = run_in_pool(
        examine, tasks, options.jobs, options.limit, lambda cell: progress.step(cell[0].label)
    )
    results = {cell: {**NOTHING, **result} for cell, result in results.items()}  # a lost worker says only that it is
    if options.update_budgets:
        sound = {_key(*cell): r["report"] for cell, r in results.items() if r["report"] and not r["failures"]}
        budgets.save({key: budgets.row(found) for key, found in sound.items() if key in known}, known)
    table = budgets.load().get(budgets.series(), {}).get("programs", {})
    for (program, target), result in results.items():
        if compiled := result["report"]:
            result["failures"] += budgets.worsened(compiled, table.get(_key(program, target)))
            result["failures"] += budgets.over_aim(program, compiled)
    unbudgeted = sum(bool(result["report"]) and _key(*cell) not in table for cell, result in results.items())
    _print(results, unbudgeted, time.monotonic() - start)
    written = not options.json or _write(options.json, results)
    failed = any(result["failures"] for result in results.values())
    return 1 if failed or not written or (options.require_compile and missing_wheels()) else 0


def _print(results: Results, unbudgeted: int, seconds: float) -> None:
    compiled = {cell: result for cell, result in results.items() if result["report"]}
    reports = [(program, result["report"]) for (program, _), result in compiled.items()]
    if reports:
        moved = [result["kernel_bytes"] for result in compiled.values()]
        print(kernel_table(reports), program_table(reports, moved), sep="\n\n", end="\n\n")
    failures = [f"FAILED {_key(*cell)}: {line}" for cell, result in results.items() for line in result["failures"]]
    cached = sum(result["cached"] for result in results.values())
    print(*failures, sep="\n", end="\n" * bool(failures))
    counts = f"{len(results)} programs lowered and audited, {len(reports)} compiled ({cached} of them before)"
    print(f"{counts}, {len(failures)} failures, {seconds:.0f} s")
    if unbudgeted:
        print(f"{unbudgeted} of those compiled have no budget")
    if absent := missing_wheels():
        print(f"Nothing was compiled: {absent}")


def _write(path: Path, results: Results) -> bool:
    """Whether the JSON could be written; one line on stderr where not."""
    try:
        path.write_text(_json(results))
    except OSError as error:
        print(f"--json {path}: {error.strerror}", file=sys.stderr)
        return False
    return True


def _sweep(options: argparse.Namespace) -> int:
    """Rank launches of the kernels of one operation (benchmarks.sweep)."""
    from benchmarks import sweep  # here: it imports this module

    start = {"prefix_sum": "prefix", "evo": "evo_", "linear": "linear_"}.get(options.sweep, "attend_")
    if unswept := [dtype for dtype in options.dtype or () if dtype not in sweep.DTYPES]:
        raise ValueError(f"--sweep: {unswept[0]} is not swept; {', '.join(sweep.DTYPES)} are")
    kernels = [kernel for kernel in sweep.GRID if kernel.startswith(start)]
    widths = [options.width] if options.width else None
    return sweep.run(kernels, options.target, options.dtype, widths, jobs=options.jobs, limit=options.limit)


def _key(program: Buildable, target: str) -> str:
    return f"{program.label} @ {target}"


def _json(results: Results) -> str:
    """One line for each program."""
    rows = []
    for (program, target), result in results.items():
        compiled: Report | None = result["report"]
        row = {"program": program.label, "target": target}
        row |= {name: result[name] for name in ("calls", "kernel_bytes", "failures")}
        if compiled:
            least = floor_of(program, compiled)
            row |= {"report": dataclasses.asdict(compiled), "floor": least and dataclasses.asdict(least)}
        rows.append("  " + json.dumps(row))
    head = {"date": datetime.date.today().isoformat(), "versions": versions()}
    return json.dumps(head)[:-1] + ', "results": [\n' + ",\n".join(rows) + "\n]}\n"


def _cells(options: argparse.Namespace) -> list[matrix.Cell]:
    """What to compile: programs of the shape that was given, or a part of the matrix, or all of it."""
    sizes = {name: getattr(options, name) for name in _SIZES.values() if getattr(options, name) is not None}
    sizes = {**shape_of(options.shape), **sizes}
    if sizes or options.extra or options.not_causal:
        return _any_shape(options, sizes)
    wanted = {"op": options.op, "phase": options.phase, "dtype": options.dtype}
    cells = [
        (program, target)
        for program, target in matrix.whole()
        if all(not values or getattr(program, name) in values for name, values in wanted.items())
        and (not options.target or target in options.target)
    ]
    return cells if options.full else matrix.covering(cells)


def _any_shape(options: argparse.Namespace, sizes: dict[str, Any]) -> list[matrix.Cell]:
    if not options.op:
        raise ValueError("a shape needs an operation: --op flash")
    if "heads" in sizes:
        sizes = {"kv_heads": sizes["heads"], **sizes}
    phases = options.phase or (("decode",) if "tokens" in sizes else ("forward", "backward"))
    make: Callable[..., Program] = partial(Program, causal=not options.not_causal, extras=tuple(options.extra))
    return [
        (make(op, phase, dtype, **sizes), target)
        for op in options.op
        for phase in phases
        for dtype in options.dtype or ("bfloat16",)
        for target in options.target or ("h100",)
    ]


def shape_of(text: str) -> dict[str, int]:
    """Sizes by their names, of text such as "B1,L8192"."""
    sizes = {}
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"([A-Z])(\d+)", part.strip())
        if found is None or found.group(1) not in _SIZES:
            letters = ", ".join(f"{letter} {name}" for letter, name in _SIZES.items())
            raise ValueError(f"--shape: {part!r} must be one letter ({letters}) and a number, as in B1,L8192,N32")
        sizes[_SIZES[found.group(1)]] = int(found.group(2))
    return sizes


def _parser() -> argparse.ArgumentParser:
    summary, *rest = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compile_report", description=summary, epilog="\n\n".join(rest).rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    several: Callable[..., Any] = lambda *names, **how: parser.add_argument(*names, action="append", **how)  # noqa: E731
    several(
        "--target", choices=sorted(TARGETS), help="repeatable, as the next three; of the matrix all, of a shape h100"
    )
    several("--op", choices=OPS)
    several("--pass", dest="phase", choices=PHASES, help="backward: output and every gradient")
    several("--dtype", choices=DTYPES)
    parser.add_argument("--shape", default="", metavar="B1,L8192,...", help="the sizes below by their letters")
    for letter, name in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar=letter)
    extras = sorted({extra for names in EXTRAS.values() for extra in names})
    several("--with", dest="extra", choices=extras, default=[], help="of any shape: what it takes besides")
    parser.add_argument("--not-causal", action="store_true", help="of any shape: tokens see later ones too")
    parser.add_argument("--sweep", choices=OPS, help="try launches of its kernels and rank those that spill nothing")
    parser.add_argument("--full", action="store_true", help="the whole matrix, not a part that covers it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every report here")
    parser.add_argument("--require-compile", action="store_true", help="exit 1 where the compiler is not installed")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="processes that compile at a time")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="that one program may take")
    parser.add_argument("--no-cache", action="store_true", help="compile again what was compiled before")
    parser.add_argument("--update-budgets", action="store_true", help="what was compiled is the budget from now on")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
