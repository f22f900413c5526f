"""Whether time goes by live tiles: `python -m benchmarks.live_tiles [--out FILE]`, on a GPU.

Windows and sparse patterns beside our own dense attention of the same length, forward and with gradients: the time of
each as a share of dense attention's, over the share of its pairs, and of the forward's tiles, that are live. Each is
judged against the reference first; what is wrong is reported and not timed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

import evo_jax
from benchmarks.contenders import compiled_contender
from benchmarks.problems import Problem, problem, results, visible
from benchmarks.run import environment
from benchmarks.shapes import Shape
from benchmarks.timing import errors_of, fault_of, interleave, spread
from evo_jax.attention import sparse_pattern
from pallas_kernels import tuned
from reference.mask import Mask, Pattern
from reference.visit import Tiling, key_visits

WINDOW, BLOCK = 1024, 64
SHAPES = {"sliding_window": Shape(1, 16, 32768, 128, "bfloat16"), "sparse": Shape(1, 32, 8192, 128, "bfloat16")}
PATTERNS = {
    "dense": Pattern(),
    "sliding_window": Pattern(windows=((WINDOW - 1, 0),)),
    "sparse": sparse_pattern("sparse", BLOCK, 1, 3, 0),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense": evo_jax.flash_attention,
    "sliding_window": partial(evo_jax.sliding_window_attention, window_size=WINDOW),
    "sparse": partial(evo_jax.sparse_attention, block_size=BLOCK),
}


def tiles(kind: str, shape: Shape, size: tuple[int, int]) -> int:
    """How many tiles of `size` queries and keys all heads visit."""
    tiling = Tiling(1, shape.heads, shape.heads, shape.length, shape.length, *size)
    visits = key_visits(Mask(PATTERNS[kind]), tiling)
    near = visits.bounds[0, ..., 3] - visits.bounds[0, ..., 0]  # of each head, or of all alike
    return int(sum(shape.heads // len(x) * x.sum() for x in (near, visits.counts)))


def row(kind: str, shape: Shape, gradient: bool, rounds: int, seconds: float) -> dict[str, Any]:
    """Times of the pattern and of dense attention, and the shares that are live."""
    given = problem("flash", shape, gradient)
    sizes: dict[str, Any] = {}
    right, entries = [], {}
    for name in ("dense", kind):
        with tuned.recording() as launches:
            contender = compiled_contender(name, _call(name, given, "triton"), given.arrays, given.cotangent)
        sizes[name] = next((c.launch.block_q, c.launch.block_k) for k, c in launches.items() if "forward" in k.kernel)
        expected = jax.jit(_call(name, given, "reference"))(given.arrays, given.cotangent)
        errors = errors_of(contender.result(), expected)
        fault = fault_of(errors, given.tolerances)
        entries[name] = {"errors": errors, "status": fault or "ok"}
        right += [contender] if fault is None else []
    found = {"case": f"{kind} {'forward+backward' if gradient else 'forward'} {shape}", "contenders": entries}
    if len(right) < 2:
        return found
    for name, samples in interleave(right, rounds, 1, seconds).items():
        entries[name] |= {"median_s": statistics.median(samples), "spread": spread(samples), "samples_s": samples}
    pairs = {name: _pairs(name, shape) for name in sizes}
    covered = {name: tiles(name, shape, size) * size[0] * size[1] for name, size in sizes.items()}
    took = {name: entry["median_s"] for name, entry in entries.items()}
    shares = {what: x[kind] / x["dense"] for what, x in (("pairs", pairs), ("tiles", covered), ("time", took))}
    return found | {"tile": sizes, "share": shares}


def _pairs(kind: str, shape: Shape) -> int:
    """How many pairs of tokens all heads see; only scattered ones need looking at."""
    return int(visible("sparse", shape).sum()) if kind == "sparse" else tiles(kind, shape, (1, 1))


def _call(name: str, given: Problem, how: str) -> Callable[..., Any]:
    function = FUNCTIONS[name]
    return partial(results, lambda a: function(a["query"], a["key"], a["value"], implementation=how), given.gradient)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 without a GPU, or where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_tiles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("runs/benchmarks/live_tiles.json"))
    arguments = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        print("live_tiles: JAX sees no GPU", file=sys.stderr)
        return 1
    report = {"environment": environment(), "rows": []}
    for kind, shape in SHAPES.items():
        for gradient in (False, True):
            found = row(kind, shape, gradient, arguments.rounds, 1.0)
            report["rows"].append(found)
            print(f"{found['case']}: {found.get('share', found['contenders'])}", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all("share" in found for found in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
