"""From products of queries and keys to what softmax sees: scale, soft cap, bias; and dropout of its weights."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from reference.counter_hash import mixed


@dataclass(frozen=True, slots=True)
class AttendSpec:
    """Statics of softmax attention, besides the pattern of its mask."""

    scale: float
    soft_cap: float | None = None
    dropout_rate: float = 0.0


def capped(products: Array, spec: AttendSpec) -> Array:
    """scale * products, bent to stay within soft_cap; a bias is added after that."""
    scores = products * spec.scale
    return scores if spec.soft_cap is None else spec.soft_cap * jnp.tanh(scores / spec.soft_cap)


def cap_slope(scores: Array, spec: AttendSpec) -> Any:
    """d capped / d (scale * products), from the capped scores."""
    return 1.0 if spec.soft_cap is None else 1.0 - (scores / spec.soft_cap) ** 2


def dropout_seeds(seed: Any, batch: int, heads: int) -> Array:
    """(B, N) uint32, one for each head of each sequence, from a uint32 scalar."""
    b, h = jnp.arange(batch, dtype=jnp.uint32)[:, None], jnp.arange(heads, dtype=jnp.uint32)[None]
    return mixed(mixed(seed + b) + h)


def kept(rate: float, seed: Any, i: Any, j: Any) -> Array:
    """Whether dropout keeps the weight of query i and key j: int32 that broadcast, with `seed` of dropout_seeds.

    One mixing per pair, the rest per row: every implementation draws the same, in any order.
    """
    i, j = (jnp.asarray(x).astype(jnp.uint32) for x in (i, j))
    row = mixed(seed + i)
    draw = mixed(row ^ (j * np.uint32(0x9E3779B9)))
    # 24 bits, which float32 and int32 hold exactly
    return (draw >> np.uint32(8)).astype(jnp.int32) >= np.int32(round(rate * 2**24))
