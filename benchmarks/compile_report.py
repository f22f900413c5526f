"""Compile kernels for H100, H200 and A100 without a GPU and report registers, spills, shared memory and instructions.

    python -m benchmarks.compile_report [--target h100 --target a100] [--match evo] [--json FILE]

compiles every member of `benchmarks.compile_configs.CONFIGS` (another module: --configs) and exits non-zero when one
fails to compile, spills registers, asks for more shared memory than a block may have, or exceeds its memory budget.
Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jaxlib's version, nvidia-cuda-nvcc and nvidia-nvvm.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.compile_pool import run_in_pool
from benchmarks.ptx import KernelReport, find_ptxas, kernel_reports
from benchmarks.targets import TARGETS, allow_no_gpu
from benchmarks.ttir import quiet_lowering, triton_calls, ttir
from benchmarks.ttir_audit import audit, dot_precisions, unsafe

__all__ = [
    "TARGETS",
    "KernelReport",
    "Report",
    "audit",
    "compile_for",
    "dot_precisions",
    "missing_wheels",
    "problems",
    "ttir",
    "unsafe",
]

_COLUMNS = (
    *("case", "target", "kernel", "regs", "spill", "smem", "warps", "grid"),
    *("wgmma", "mma.sync", "cp.async", "atom", "temp", "s"),
)
_LEVEL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # whatever XLA_FLAGS says
_DUMP = {"xla_dump_hlo_as_text": True, "xla_dump_emitter_re": "ptx"}  # the second: jax >= 0.12 writes no PTX without it


@dataclass(frozen=True, slots=True)
class Report:
    """One compiled function: XLA's buffers in bytes, its Triton kernels, and the names of XLA's own kernels."""

    target: str
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    kernels: tuple[KernelReport, ...]
    fusions: tuple[str, ...]
    seconds: float


def missing_wheels() -> str | None:
    """Why `compile_for` cannot run here, or None: which of the wheels it needs is not installed."""
    needed = {"jax_cuda13_plugin": "jax-cuda13-plugin", "jax_plugins.xla_cuda13": "jax-cuda13-pjrt"}
    absent = [wheel for module, wheel in needed.items() if not _importable(module)]
    absent += ["nvidia-cuda-nvcc"] * (find_ptxas() is None)
    return f"not installed: {', '.join(absent)}" if absent else None


def compile_for(fn: Callable[..., Any], args: Any, target: str = "h100") -> Report:
    """Compile `fn(*args)` to machine code for `target` and report what the compiler says of it.

    Args:
        fn: the function; jitted here.
        args: a tuple of pytrees of jax.ShapeDtypeStruct.
        target: a key of TARGETS.

    Raises:
        jax.errors.JaxRuntimeError: XLA or ptxas refuses (too much shared memory, invalid PTX, too few registers).
    """
    start, mesh = time.perf_counter(), _topology_mesh(target)
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    with jax.sharding.set_mesh(mesh), quiet_lowering():
        lowered = jax.jit(fn).lower(*placed)
    with tempfile.TemporaryDirectory(prefix="compile_report_") as dump:
        compiled = lowered.compile(compiler_options={"xla_dump_to": dump, **_LEVEL, **_DUMP})
        text = compiled.as_text() or ""  # without the kernels whose results nobody asks for
        names = {call.name for call in triton_calls(lowered) if 0 not in call.grid and call.name in text}
        kernels, fusions = kernel_reports(Path(dump), lambda entry: _base_name(entry, names) is not None)
    if lost := names - {_base_name(kernel.name, names) for kernel in kernels}:
        raise RuntimeError(
            f"XLA compiled {sorted(lost)} but its dump holds no PTX of them: the dump options have changed"
        )
    memory = compiled.memory_analysis()
    assert memory is not None, "the CUDA compiler states its buffers"
    return Report(
        target,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        kernels,
        fusions,
        round(time.perf_counter() - start, 2),
    )


def problems(report: Report) -> list[str]:
    """What makes `report` a failure: spills, or more shared memory than the target lets a block have."""
    limit, found = TARGETS[report.target].shared_memory_limit, []
    for kernel in report.kernels:
        if spilled := kernel.spill_store_bytes + kernel.spill_load_bytes:
            found.append(f"{kernel.name} spills {spilled} bytes")
        if kernel.shared_bytes > limit:
            found.append(f"{kernel.name} wants {kernel.shared_bytes} bytes of shared memory, {limit} available")
    return found


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _topology_mesh(target: str) -> Mesh:
    allow_no_gpu()
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=TARGETS[target].proto, topology="1x1x1")
    except NotImplementedError as error:
        advice = missing_wheels() or "set JAX_PLATFORMS=cpu before JAX starts its backends"
        raise RuntimeError(f"JAX's CUDA plugin is not available: {advice}") from error
    return topologies.make_mesh(topology, (1,), ("device",))


def _base_name(entry: str, names: set[str]) -> str | None:
    """The Triton kernel that PTX entry `entry` is; XLA appends __1, __2, ... to a repeated name."""
    if entry in names:
        return entry
    stem, _, number = entry.rpartition("__")
    return stem if number.isdigit() and stem in names else None


def compile_case(module: str, index: int, dtype: str, width: int, target: str) -> dict[str, Any]:
    """Build and compile one member of CONFIGS in this process; the report or the error as plain data."""
    config = importlib.import_module(module).CONFIGS[index]
    fn, args = config.build(dtype, width)
    try:
        report = compile_for(fn, args, target)
    except Exception as error:
        return {"failures": [f"{type(error).__name__}: {error}"]}
    failures = problems(report) if report.kernels else ["no Triton kernel in the compiled program"]
    first = jax.tree.leaves(args)[0]
    ratio = report.temp_bytes / (first.size * first.dtype.itemsize)
    if config.temp_ratio is not None and ratio > config.temp_ratio:
        failures.append(f"temporary memory is {ratio:.3f} of the first argument, {config.temp_ratio} allowed")
    return {"failures": failures, "report": dataclasses.asdict(report)}


def _table(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for (label, target), result in results.items():
        report = result.get("report")
        if report is None:
            lines.append(f"| {label} | {target} | FAILED |" + " |" * (len(_COLUMNS) - 3))
            continue
        for k in report["kernels"]:
            counts = [k["instructions"][key] for key in ("wgmma", "mma.sync", "cp.async", "atom/red")]
            spill = k["spill_store_bytes"] + k["spill_load_bytes"]
            grid = "x".join(map(str, k["grid"]))
            cells = [label, target, k["name"], k["registers"], spill, k["shared_bytes"], k["num_warps"], grid, *counts]
            lines.append("| " + " | ".join(map(str, [*cells, report["temp_bytes"], report["seconds"]])) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile what is asked for, print the table and the failures, and return the exit status."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=summary)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="repeatable; default: h100 and a100")
    parser.add_argument("--configs", default="benchmarks.compile_configs", metavar="MODULE", help="module with CONFIGS")
    parser.add_argument("--match", default="", help="only the cases whose label contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every report here")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds one compilation may take")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allow_no_gpu()
    tasks = {
        (label, target): (options.configs, index, dtype, width, target)
        for index, config in enumerate(importlib.import_module(options.configs).CONFIGS)
        for label, dtype, width in config.cases()
        for target in options.target or ["h100", "a100"]
        if options.match in label
    }
    if not tasks:
        print("nothing to compile", file=sys.stderr)
        return 2
    results = run_in_pool(compile_case, tasks, options.jobs, options.limit)
    print(_table(results))
    failures = [f"{label} on {target}: {text}" for (label, target), r in results.items() for text in r["failures"]]
    print("\n".join([*(f"FAILED {line}" for line in failures), f"{len(tasks)} compilations, {len(failures)} failures"]))
    if options.json:
        rows = [{"case": label, "target": target, **result} for (label, target), result in results.items()]
        options.json.write_text(json.dumps({"jax": jax.__version__, "results": rows}, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
