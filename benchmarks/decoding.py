"""Decoding on a GPU: one query of each head over a long cache, as a share of what a copy of its bytes takes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evo_jax
from benchmarks.contenders import wait
from benchmarks.layers import OP_TOLERANCES
from benchmarks.shapes import EvoShape
from benchmarks.timing import Contender, compare

GROUP = 4  # query heads of one key/value head


def decode_arrays(shape: EvoShape) -> tuple[jax.Array, ...]:
    """query (B, 1, H, D), key and value (B, L, H / GROUP, D), lengths (B,), all full: standard normal values."""
    keys, size = jax.random.split(jax.random.key(3), 3), (shape.batch, shape.length, shape.heads // GROUP, shape.width)
    draw = partial(jax.random.normal, dtype=shape.dtype)
    query = draw(keys[0], (shape.batch, 1, shape.heads, shape.width))
    return query, draw(keys[1], size), draw(keys[2], size), jnp.full((shape.batch,), shape.length, jnp.int32)


def decode_contender(arrays: tuple[jax.Array, ...], implementation: str) -> Contender:
    """flash_attention of the last token, jitted."""

    def decode(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> jax.Array:
        return evo_jax.flash_attention(query, key, value, key_value_seq_lengths=lengths, implementation=implementation)

    run = partial(wait, jax.jit(decode), *arrays)
    return Contender(f"evo_jax {implementation}", run, lambda: {"out": np.asarray(run(), np.float32)})


def row(shape: EvoShape, rounds: int, kernel: str = "triton") -> dict[str, Any]:
    """Kernel and reference; a copy of the keys alone reads and writes as many bytes as keys and values have."""
    arrays = decode_arrays(shape)
    pair = [decode_contender(arrays, how) for how in ("reference", kernel)]
    result = compare(f"decode {shape}, {shape.heads // GROUP} kv heads", pair, OP_TOLERANCES[shape.dtype], rounds)
    copy = partial(wait, jax.jit(jnp.negative), arrays[1])
    seconds = compare("copy", [Contender("copy", copy, dict)], {}, rounds)["median_s"]["copy"]
    return result | {"copy_s": seconds, "share_of_copy": seconds / result["median_s"][f"evo_jax {kernel}"]}
