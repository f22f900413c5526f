"""Decoding on a GPU: one query of each head over a long cache, as a share of what a copy of its bytes takes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import evo_jax
from benchmarks.contenders import compiled_contender
from benchmarks.measure import Case
from benchmarks.problems import Arrays, Problem
from benchmarks.shapes import Shape
from benchmarks.timing import Contender

GROUP = 4  # query heads of one key/value head


def decode_problem(shape: Shape) -> Problem:
    """query (B, 1, H, D), key and value (B, L, H / GROUP, D): standard normal values."""
    keys, size = jax.random.split(jax.random.key(3), 3), (shape.batch, shape.length, shape.heads // GROUP, shape.width)
    draw = partial(jax.random.normal, dtype=shape.dtype)
    query = draw(keys[0], (shape.batch, 1, shape.heads, shape.width))
    return Problem(
        "decode", shape, False, {"query": query, "key": draw(keys[1], size), "value": draw(keys[2], size)}, query
    )


def _decode(implementation: str, arrays: Arrays) -> dict[str, jax.Array]:
    lengths = jnp.full((arrays["key"].shape[0],), arrays["key"].shape[1], jnp.int32)  # all full
    options: dict[str, Any] = {"key_value_seq_lengths": lengths, "implementation": implementation}
    return {"out": evo_jax.flash_attention(arrays["query"], arrays["key"], arrays["value"], **options)}


def case(shape: Shape, kernel: str = "triton") -> Case:
    """Kernel and reference."""
    given = decode_problem(shape)

    def contender(how: str) -> Contender:
        return compiled_contender(f"evo_jax {how}", partial(_decode, how), given.arrays)

    def truth() -> Arrays:
        wide = {name: a.astype(jnp.float32) for name, a in given.arrays.items()}
        return jax.jit(partial(_decode, "reference"))(wide)

    make = {f"evo_jax {how}": partial(contender, how) for how in (kernel, "reference")}
    return Case(given, make, truth)
