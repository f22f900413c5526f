"""What the benchmarks compute: an operation's arrays at a shape, our way, the right results, and the work in it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import evo_jax
from benchmarks.programs import Program
from benchmarks.roofline import operations
from benchmarks.shapes import Shape
from evo_jax import EvoParams
from evo_jax.attention import head_windows, sparse_pattern
from reference.mask import Mask, Pattern, allowed

WINDOW, WINDOWS, BLOCK = 256, (256, 512, 1024), 64
OPS = ("prefix_sum", "evo", "flash", "sliding_window", "sparse", "multiscale", "linear")
Arrays = dict[str, jax.Array]

# Relative L2 by which right results may differ from those in float32; evo is ill-conditioned where r has denominator 0.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
_EVO_TOLERANCE = {"float32": (1e-4, 1e-2, 1e-2), "bfloat16": (2e-2, 6e-2, 1e-1), "float16": (4e-3, 2e-2, 2e-2)}


@dataclass(frozen=True, slots=True)
class Problem:
    """An operation on named arrays: (B, L, H, D), or (B, H, L, D) and parameters for prefix sums and Evo."""

    op: str
    shape: Shape
    gradient: bool
    arrays: Arrays
    cotangent: jax.Array

    @property
    def heads_first(self) -> bool:
        return self.op in ("prefix_sum", "evo")

    @property
    def tolerances(self) -> dict[str, float]:
        dtype = self.shape.dtype
        if self.op != "evo":
            return dict.fromkeys(("out", *self.arrays), _TOLERANCE[dtype])
        out, values, weights = _EVO_TOLERANCE[dtype]
        return {"out": out, "v": values, **dict.fromkeys(EvoParams._fields, weights)}


def problem(op: str, shape: Shape, gradient: bool) -> Problem:
    """Standard normal values, the same in every process."""
    keys = jax.random.split(jax.random.key(2), 5)
    size = shape.v if op in ("prefix_sum", "evo") else (shape.batch, shape.length, shape.heads, shape.width)
    draw = lambda key: jax.random.normal(key, size, jnp.float32).astype(shape.dtype)  # noqa: E731
    if op == "prefix_sum":
        arrays = {"x": draw(keys[0])}
    elif op == "evo":
        params = evo_jax.init_evo_params(keys[4], shape.width, jnp.dtype(shape.dtype))
        arrays = {"v": draw(keys[0]), **params._asdict()}
    else:
        arrays = {name: draw(key) for name, key in zip(("query", "key", "value"), keys, strict=False)}
    return Problem(op, shape, gradient, arrays, draw(keys[3]))


def ours(given: Problem, implementation: str | None) -> Callable[[Arrays], jax.Array]:
    """evo_jax's function of the arrays."""
    how: dict[str, Any] = {"implementation": implementation}
    if given.op == "prefix_sum":
        return lambda a: evo_jax.prefix_sum(a["x"], axis=2, **how)
    if given.op == "evo":
        return lambda a: evo_jax.evo_attention(a["v"], evo_params(a), **how)
    functions: dict[str, Any] = {
        "flash": evo_jax.flash_attention,
        "sliding_window": partial(evo_jax.sliding_window_attention, window_size=WINDOW),
        "sparse": partial(evo_jax.sparse_attention, block_size=BLOCK),
        "multiscale": partial(evo_jax.multiscale_attention, window_sizes=WINDOWS),
        "linear": evo_jax.linear_attention,
    }
    return lambda a: functions[given.op](a["query"], a["key"], a["value"], **how)


def evo_params(arrays: Arrays) -> EvoParams:
    return EvoParams(**{name: arrays[name] for name in EvoParams._fields})


def results(function: Callable[[Arrays], jax.Array], gradient: bool, arrays: Arrays, cotangent: Any) -> Arrays:
    """out and, named like the arrays, their gradients."""
    if not gradient:
        return {"out": function(arrays)}
    out, vjp = jax.vjp(function, arrays)
    return {"out": out, **vjp(cotangent.astype(out.dtype))[0]}


def truth(given: Problem, function: Callable[[Arrays], jax.Array]) -> Arrays:
    """The results in float32 of the same values by our reference, which the tests hold to whole-array formulas."""
    arrays = {name: a.astype(jnp.float32) for name, a in given.arrays.items()}
    right = jax.jit(partial(results, function, given.gradient))
    return jax.block_until_ready(right(arrays, given.cotangent.astype(jnp.float32)))


def pattern(op: str, heads: int, random_blocks: int = 3) -> Pattern:
    """Which keys the softmax operations see."""
    if op == "sliding_window":
        return Pattern(windows=((WINDOW - 1, 0),))
    if op == "sparse":
        return sparse_pattern("sparse", BLOCK, 1, random_blocks, 0)
    return Pattern(windows=head_windows("multiscale", heads, None, WINDOWS)) if op == "multiscale" else Pattern()


def visible(op: str, shape: Shape, random_blocks: int = 3) -> jax.Array:
    """(heads or 1, L, L) bool: what a dense mask would have to say."""
    size, mask = (1, shape.heads, shape.length, shape.length), Mask(pattern(op, shape.heads, random_blocks))
    return jax.jit(lambda: allowed(mask, size, shape.heads)[0])()


def work(given: Problem) -> tuple[float | None, float]:
    """(flops, bytes) that the operation must do and move; no flops of what nobody counts, as whole layers.

    Bytes: every argument is read and every result is written once. Flops: those of benchmarks.roofline.
    """
    size = (
        sum(a.size * a.dtype.itemsize for a in given.arrays.values()) + given.cotangent.size * given.cotangent.itemsize
    )
    moved = float(2 * size if given.gradient else size)  # out is as large as its cotangent, gradients as their arrays
    program = _program(given)
    return None if program is None else float(operations(program)), moved


def _program(given: Problem) -> Program | None:
    """The same as the compile report knows it."""
    shape, op = given.shape, given.op
    sizes: dict[str, Any] = {"batch": shape.batch, "length": shape.length, "heads": shape.heads, "width": shape.width}
    kv_heads = given.arrays["key"].shape[2] if "key" in given.arrays else shape.heads
    sizes |= {"dtype": shape.dtype, "kv_heads": kv_heads, "window": WINDOW}
    if op == "decode":
        return Program("flash", "decode", **sizes)
    return Program(op, "backward" if given.gradient else "forward", **sizes) if op in OPS else None
