"""`python -m evo_jax tune`: times launches on this machine's GPU, and stores the fastest for all later calls."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax

from evo_jax import attention, evo, linear, scan
from evo_jax.autotune import Tuned, TuneReport, in_a_line, tune
from evo_jax.backend import has_cuda_device
from pallas_kernels import tuned_store
from reference.evo_params import EvoParams

DTYPES = ("bfloat16", "float16", "float32")
_SOFTMAX = {
    "flash": attention.flash_attention,
    "sliding_window": partial(attention.sliding_window_attention, window_size=512),
    "sparse": attention.sparse_attention,
    "multiscale": attention.multiscale_attention,
    "linear": linear.linear_attention,
}
OPS = (*_SOFTMAX, "decode", "evo", "prefix_sum")


def add(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser(
        "tune",
        help="find and store the fastest launches of the kernels on this machine's GPU",
        description="Time the launches that compile without register spills, check that their results are the "
        "default's, and store the fastest, forward and backward, for later calls on this device.",
        epilog="Results lie in EVO_CACHE_DIR, else in evo-jax under XDG_CACHE_HOME (~/.cache).",
    )
    command.add_argument("--op", action="append", choices=OPS, help="repeatable; default: all")
    command.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable; default: bfloat16")
    command.add_argument("--head-dim", action="append", type=_size, metavar="D", help="repeatable; default: 64 and 128")
    command.add_argument("--length", action="append", type=_size, metavar="L", help="repeatable; default: 8192")
    command.add_argument("--heads", type=_size, default=32, metavar="N", help="attention heads (default %(default)s)")
    command.add_argument("--batch", type=_size, default=1, metavar="B", help="sequences (default %(default)s)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status: 0, or 1 where there is nothing to tune on, or a case failed; Ctrl-C shows what was found first."""
    if not has_cuda_device():
        print("tune: kernels are timed on a GPU, and JAX sees no CUDA device", file=sys.stderr)
        return 1
    sizes = (arguments.head_dim or [64, 128], arguments.length or [8192])
    cases = list(product(arguments.op or OPS, arguments.dtype or DTYPES[:1], *sizes))
    rows, failed = [], 0
    try:
        for number, case in enumerate(cases):
            found = _rows_of(case, arguments, _bar(number, len(cases)))
            rows, failed = rows + (found or []), failed + (found is None)
    finally:
        _bar(len(cases), len(cases))("")
        if rows:
            print(TuneReport(str(tuned_store.device_kind()), tuple(rows)))
            with contextlib.suppress(RuntimeError):  # no home: autotune has said so
                print(f"stored in {tuned_store.folder()}")
    if not rows and not failed:
        print(TuneReport(str(tuned_store.device_kind()), ()))
    return 1 if failed else 0


def _rows_of(case: Any, arguments: argparse.Namespace, progress: Callable[[str], None]) -> list[Tuned] | None:
    """What was found for one case, or None where it failed: too little memory, say. Others may do."""
    try:
        call, arrays = problem(*case, heads=arguments.heads, batch=arguments.batch)
        return list(tune(call, arrays, progress).rows)
    except Exception as error:
        print(f"tune: {' '.join(map(str, case))}: {in_a_line(error)}", file=sys.stderr)
        return None


def problem(op: str, dtype: str, width: int, length: int, *, heads: int, batch: int) -> tuple[Any, list[Any]]:
    """(call, its arrays as jax.ShapeDtypeStruct): one operation with all its gradients; decoding has none."""
    x = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    if op == "prefix_sum":
        return _with_gradient(lambda x: scan.prefix_sum(x, axis=1)), [x]
    if op == "evo":
        v, shapes = jax.ShapeDtypeStruct((batch, heads, length, width), dtype), ((width, width), (width,))
        matrix, vector = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
        params = [matrix if name.endswith("kernel") else vector for name in EvoParams._fields]
        return _with_gradient(lambda v, *params: evo.evo_attention(v, EvoParams(*params))), [v, *params]
    if op == "decode":
        query = jax.ShapeDtypeStruct((batch, 1, heads, width), dtype)
        return lambda arrays: attention.flash_attention(*arrays), [query, x, x]
    return _with_gradient(_SOFTMAX[op]), [x, x, x]


def _with_gradient(fn: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """(result, gradients), the result as the cotangent."""

    def call(arrays: list[Any]) -> Any:
        out, pull = jax.vjp(fn, *arrays)
        return out, pull(out)

    return call


def _bar(number: int, total: int) -> Callable[[str], None]:
    """Shows what is timed, on a terminal's standard error alone."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            filled = 30 * number // total
            bar = f"[{'#' * filled}{'.' * (30 - filled)}] {number}/{total} {text}" if number < total else ""
            print(f"\r\033[K{bar}", end="", file=sys.stderr, flush=True)

    return show


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)
