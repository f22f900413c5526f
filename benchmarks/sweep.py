"""Try launches of each kernel without a GPU, and keep those that spill nothing: the candidates that autotune times.

    python -m benchmarks.sweep [--kernel attend_forward] [--dtype bfloat16] [--width 128] [--target h100]

compiles every launch in GRID for each kernel, dtype and width, drops what does not compile or spills registers, ranks
the rest by a static model, and writes the BEST into pallas_kernels/tables/candidates.json with the versions and the
date. Rows of other kernels, widths and architectures stay as they are. The model is a guess that orders candidates and
no more: only times decide, and those need a GPU.

    score = instruction * warps / (warps + 4) * held / (held + 32) * streamed / (streamed + 16)

of the program's worst kernel: `instruction` is 1, but 0.6 for mma.sync where the architecture has wgmma; `warps` are
those resident on a multiprocessor by registers, shared memory and threads; a tile of `held` rows is read once while
tiles of `streamed` rows pass, so that other bytes are read again 1 / held times, at some fixed cost for each tile, or
for all chunks of a program that takes several.
"""

import argparse
import datetime
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import sweep_programs
from benchmarks.compile_for import compile_for
from benchmarks.compile_pool import run_in_pool
from benchmarks.examine import problems
from benchmarks.ptx import KernelReport, ptxas_version
from benchmarks.targets import TARGETS, Target, allow_no_gpu
from pallas_kernels import tuned

FILE = Path(__file__).resolve().parents[1] / "pallas_kernels" / "tables" / "candidates.json"
BEST = 8
DTYPES = {"bfloat16": (64, 80, 128, 256), "float32": (64, 128)}  # and the widths that are swept by default
PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32x3"}

_ATTEND = {"block_q": (16, 32, 64, 128), "block_k": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
GRID: dict[str, dict[str, tuple[int, ...]]] = {
    **{f"attend_{kind}": _ATTEND for kind in ("forward", "d_query", "d_key_value")},
    "attend_decode": {"block_k": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    "evo_forward": {
        **{"block_m": (64, 128), "block_d": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},
        "repeats": (1, 8),
    },
    "evo_backward": {"block_d": (16, 32, 64), "num_warps": (4, 8)},
    "linear_forward": {"block_m": (32, 64, 128), "block_d": (32, 64), "num_warps": (4, 8)},
    "linear_backward": {"block_m": (32, 64, 128), "block_d": (32, 64), "num_warps": (4, 8)},
    "prefix": {"chunk": (32, 64, 128, 256), "block": (32, 64, 128), "num_warps": (4, 8)},
}
_HELD = {  # which field of a launch is the tile that stays, and which the tile that passes
    "attend_d_key_value": ("block_k", "block_q"),
    "attend_decode": ("block_k", "num_stages"),
    "prefix": ("block", "chunk"),
}


def launches(kernel: str, width: int, dtype: str, default: dict[str, Any]) -> list[dict[str, Any]]:
    """The default, and what of GRID is worth compiling: tiles of 1/4 to 4 times the default's, and not hopeless."""
    names, grid = list(GRID[kernel]), GRID[kernel].values()
    start = {name: default[name] for name in names}
    tried = [dict(zip(names, values, strict=True)) for values in itertools.product(*grid)]
    return [start, *(launch for launch in tried if launch != start and _sensible(kernel, launch, start, width, dtype))]


def _sensible(kernel: str, launch: dict[str, Any], default: dict[str, Any], width: int, dtype: str) -> bool:
    """A quarter of the default's tile is too small to win; sums beyond 160 registers a thread leave too few others."""
    if not kernel.startswith("attend") or kernel == "attend_decode":
        return True
    held, streamed = (launch[name] for name in _HELD.get(kernel, ("block_q", "block_k")))
    area = held * streamed / (default["block_q"] * default["block_k"])
    sums = held * width * (2 if kernel == "attend_d_key_value" else 1) + held * streamed
    stages = launch["num_stages"] != (1 if dtype != "float32" else 3)
    return stages and held >= streamed and 0.5 <= area <= 4 and sums <= 160 * 32 * launch["num_warps"]


def try_launch(kernel: str, dtype: str, width: int, target: str, launch: dict[str, Any]) -> dict[str, Any]:
    """Compile one program under one launch: {"failures": [...]}, or the facts of its kernels. Runs in a worker."""
    fn, args = sweep_programs.program(kernel, dtype, width, launch)
    try:
        with tuned.override({kernel: launch}, stored=False):
            report = compile_for(fn, args, target)
    except Exception as error:
        return {"failures": [f"{type(error).__name__}: {str(error)[:200]}"]}
    if not report.kernels:
        return {"failures": ["no Triton kernel in the program"]}
    return {
        "failures": problems(report),
        "registers": max(k.registers for k in report.kernels),
        "shared_bytes": max(k.shared_bytes for k in report.kernels),
        "score": round(min(score(kernel, launch, k, TARGETS[target]) for k in report.kernels), 4),
    }


def score(kernel: str, launch: dict[str, Any], report: KernelReport, target: Target) -> float:
    """The model of the first paragraph; larger is thought to be faster."""
    warps = resident_warps(report, target)
    hopper = target.capability >= (9, 0)
    slow = hopper and report.instructions["mma.sync"] and not report.instructions["wgmma"]
    pair = _HELD.get(kernel, ("block_q", "block_k") if kernel.startswith("attend") else ("block_d", "block_m"))
    held, streamed = (launch.get(name, 64) for name in pair)
    streamed *= launch.get("repeats", 1)
    return (0.6 if slow else 1.0) * warps / (warps + 4) * held / (held + 32) * streamed / (streamed + 16)


def resident_warps(report: KernelReport, target: Target) -> int:
    """Of one multiprocessor: registers go to warps in portions of 256; a block takes 1 KiB of shared memory more."""
    by_registers = 65536 // (-(-report.registers * 32 // 256) * 256 * report.num_warps)
    by_shared = target.shared_memory_per_core // (report.shared_bytes + 1024)
    return min(by_registers, by_shared, 64 // report.num_warps, 32) * report.num_warps


def points(
    kernels: list[str] | None, dtypes: list[str] | None, widths: list[int] | None
) -> Iterator[tuple[str, str, int]]:
    """(kernel, dtype, width) of each row to make; the width of a prefix sum's rows does not matter beyond 64."""
    for kernel in kernels or GRID:
        for dtype in dtypes or DTYPES:
            for width in (64,) if kernel == "prefix" else widths or DTYPES[dtype]:
                yield kernel, dtype, width


def run(
    kernels: list[str] | None = None,
    targets: list[str] | None = None,
    dtypes: list[str] | None = None,
    widths: list[int] | None = None,
    *,
    jobs: int = 2,
    limit: float = 120,
) -> int:
    """Sweep and store, a row at a time; the exit status is 1 where a kernel has no launch that compiles."""
    failed = 0
    for target in targets or ["h100", "a100"]:
        for kernel, dtype, width in points(kernels, dtypes, widths):
            default = sweep_programs.default(kernel, dtype, width)
            tasks = {
                tuple(launch.items()): (kernel, dtype, width, target, launch)
                for launch in launches(kernel, width, dtype, default)
            }
            row = row_of(run_in_pool(try_launch, tasks, jobs, limit))
            print(f"{target} {kernel} {dtype} D{width}: {summary(row)}", flush=True)
            failed += not row["candidates"]
            store((f"sm_{TARGETS[target].capability[0]}0", kernel, PRECISION[dtype], width), row)
    return 1 if failed else 0


def row_of(results: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """The BEST by score, and where the default (the first) is among all."""
    good = {launch: result for launch, result in results.items() if not result["failures"]}
    ranked = sorted(good, key=lambda launch: -good[launch]["score"])
    first = next(iter(results))
    facts = ("registers", "shared_bytes", "score")
    return {
        "tried": len(results),
        "refused": len(results) - len(good),
        "default_rank": ranked.index(first) + 1 if first in good else None,
        "candidates": [{**dict(x), **{name: good[x][name] for name in facts}} for x in ranked[:BEST]],
    }


def summary(row: dict[str, Any]) -> str:
    best = row["candidates"][0] if row["candidates"] else None
    return f"{row['tried']} tried, {row['refused']} refused, the default is no. {row['default_rank']}; best {best}"


def store(where: tuple[str, str, str, int], row: dict[str, Any]) -> None:
    """Put one row in its place in FILE, a line each."""
    names = ("arch", "kernel", "precision", "width")
    rows = json.loads(FILE.read_text(encoding="utf-8"))["rows"] if FILE.is_file() else []
    rows = [old for old in rows if tuple(old[name] for name in names) != where]
    made = {"jax": jax.__version__, "ptxas": ptxas_version(), "date": datetime.date.today().isoformat()}
    rows.append({**dict(zip(names, where, strict=True)), **made, **row})
    rows.sort(key=lambda old: tuple(old[name] for name in names))
    about = "Launches that compile without register spills, best guess first; by python -m benchmarks.sweep, not timed."
    lines = ",\n".join(json.dumps(old) for old in rows)
    FILE.parent.mkdir(exist_ok=True)
    FILE.with_suffix(".tmp").write_text(f'{{"about": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(FILE.with_suffix(".tmp"), FILE)


def main(argv: list[str] | None = None) -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=tuple(GRID), help="repeatable; default: all")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="repeatable; default: both")
    parser.add_argument("--width", action="append", type=int, choices=(64, 80, 96, 128, 256), help="repeatable")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="repeatable; default: h100 and a100")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at a time")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allow_no_gpu()
    return run(options.kernel, options.target, options.dtype, options.width, jobs=options.jobs)


if __name__ == "__main__":
    sys.exit(main())
