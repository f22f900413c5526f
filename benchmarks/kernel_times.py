"""Microseconds of each kernel of our operations on a GPU: `python -m benchmarks.kernel_times [--op OP] [--launch ...]`.

By torch's profiler, which sees the kernels of the whole process, JAX's too: unlike a call's time, a kernel's is free of
what the host needs to start it. Cases are those of the GPU suite that bound something different each. `--launch
KERNEL:FIELD=N,...` times other launches (those of pallas_kernels.tuned). Nothing is judged here: `pytest -m gpu` is.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape

CALLS = 10
CASES = (
    *(("prefix_sum", Shape(2, 8, 65536, width, "bfloat16")) for width in (64, 128)),
    ("prefix_sum", Shape(1, 1, 1048576, 64)),
    *(("evo", Shape(2, 8, 65536, width, "bfloat16")) for width in (64, 128)),
    ("evo", Shape(1, 1, 65536, 64, "bfloat16")),
    *((op, Shape(1, 32, 8192, 128, "bfloat16")) for op in ("flash", "sparse", "multiscale", "linear")),
    *((op, Shape(4, 16, 4096, 64, "bfloat16")) for op in ("flash", "linear")),
    *((op, Shape(1, 16, 4096, 64)) for op in ("flash", "linear")),
    ("flash", Shape(1, 16, 8192, 256, "bfloat16")),
    ("sliding_window", Shape(1, 32, 32768, 128, "bfloat16")),
    *(("decode", Shape(batch, 32, 131072, 128, "bfloat16")) for batch in (8, 1)),
    ("decode", Shape(8, 32, 8192, 64)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 without a GPU or torch for it, or where a case failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_times", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--op", action="append", choices=sorted({op for op, _ in CASES}), default=[])
    parser.add_argument("--launch", action="append", type=_launch, default=[], metavar="KERNEL:FIELD=N,...")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report, as JSON")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device
    if (missing := _missing()) is not None:
        print(f"kernel_times: {missing}", file=sys.stderr)
        return 1
    from benchmarks.run import environment
    from pallas_kernels import tuned

    report: dict[str, Any] = {"environment": environment(), "launches": dict(arguments.launch), "rows": []}
    for op, shape in CASES:
        for gradient in (False,) if op == "decode" else (False, True):
            if arguments.op and op not in arguments.op:
                continue
            with tuned.override(dict(arguments.launch)):
                report["rows"].append(_row(op, shape, gradient))
            print("\n".join(_lines(report["rows"][-1])), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any("error" in row for row in report["rows"]) else 0


def _launch(text: str) -> tuple[str, dict[str, int]]:
    kernel, _, fields = text.partition(":")
    try:
        return kernel, {name: int(value) for name, value in (field.split("=") for field in fields.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not KERNEL:FIELD=N,...") from None


def _missing() -> str | None:
    import jax

    if jax.default_backend() != "gpu":
        return "JAX sees no GPU"
    try:
        import torch
    except ImportError:
        return "torch, whose profiler this uses, is not installed"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def _row(op: str, shape: Shape, gradient: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"case": f"{op} {'forward+backward' if gradient else 'forward'} {shape}"}
    try:
        run = _program(op, shape, gradient)
        row["kernels"] = {name: {"calls": calls, "us": us} for name, calls, us in _profiled(run)}
        row["wall_us"] = _wall(run)
    except Exception as error:  # the other cases may do
        row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    gc.collect()
    return row


def _program(op: str, shape: Shape, gradient: bool) -> Callable[[], Any]:
    import jax

    from benchmarks import decoding, problems

    if op == "decode":
        given = decoding.decode_problem(shape)
        fn, args = partial(decoding._decode, "triton"), (given.arrays,)
    else:
        given = problems.problem(op, shape, gradient)
        fn = partial(problems.results, problems.ours(given, "triton"), gradient)
        args = (given.arrays, given.cotangent)
    return partial(jax.jit(fn).lower(*args).compile(), *args)


def _queued(run: Callable[[], Any]) -> None:
    import jax

    out = None
    for _ in range(CALLS):
        out = run()
    jax.block_until_ready(out)


def _wall(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    _queued(run)
    return 1e6 * (time.perf_counter() - start) / CALLS


def _profiled(run: Callable[[], Any]) -> Iterator[tuple[str, float, float]]:
    """(kernel, launches in a call, microseconds in a call), the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    _queued(run)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _queued(run)
        torch.cuda.synchronize()
    events = [(e.key, e.count / CALLS, e.self_device_time_total / CALLS) for e in profiler.key_averages()]
    yield from sorted(events, key=lambda event: -event[2])


def _lines(row: dict[str, Any]) -> Iterator[str]:
    if "error" in row:
        yield f"{row['case']}: FAILED: {row['error']}"
        return
    total = sum(kernel["us"] for kernel in row["kernels"].values())
    yield f"{row['case']}: kernels {total:.0f} us, a call {row['wall_us']:.0f} us"
    for name, kernel in row["kernels"].items():
        if kernel["us"] > 0.01 * total:
            yield f"    {kernel['us']:9.1f} us  x{kernel['calls']:g}  {name[:60]}"


if __name__ == "__main__":
    sys.exit(main())
