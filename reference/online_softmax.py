"""SoftmaxState: softmax over keys that come tile by tile, and the rule for a row that sees none.

In base 2: scores arrive multiplied by log2(e), so that each exponential is one exp2. It runs inside kernels too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

LOG2_E = math.log2(math.e)


class SoftmaxState(NamedTuple):
    """Of the keys so far: float32, rows in the last axis but one of `acc`, whose parts are columns."""

    top: Array  # (..., rows) largest score, -inf before the first key
    total: Array  # (..., rows) sum of exp2(score - top)
    acc: tuple[Array, ...]  # (..., rows, columns) sums of exp2(score - top) * value


def _multiply_add(a: Array, b: Any, c: Array) -> Array:
    return a * b + c


def update(
    state: SoftmaxState,
    scores: Array,
    dot: Callable[[Array], tuple[Array, ...]],
    exp2: Callable[[Array], Array] = jnp.exp2,
    scale: float = 1.0,
    fma: Callable[[Array, Any, Array], Array] = _multiply_add,
) -> SoftmaxState:
    """The state with one more tile: scores (..., rows, keys), -inf where hidden; dot(weights) sums weighted values.

    `scale`, which is positive, takes the scores to base 2: in kernels by the same instruction that subtracts.
    """
    top = jnp.maximum(state.top, scores.max(-1) * scale)
    base = jnp.where(top == -jnp.inf, 0.0, top)  # no key yet: all weights come out 0, not NaN
    weights, old = exp2(fma(scores, scale, -base[..., None])), exp2(state.top - base)
    acc = tuple(a * old[..., None] + new for a, new in zip(state.acc, dot(weights), strict=True))
    return SoftmaxState(top, state.total * old + weights.sum(-1), acc)


def merge(states: SoftmaxState, axis: int) -> SoftmaxState:
    """The state of all keys, from those of disjoint sets of them along a leading `axis` of each array."""
    top = states.top.max(axis)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp2(states.top - jnp.expand_dims(base, axis))
    acc = tuple((a * weights[..., None]).sum(axis) for a in states.acc)
    return SoftmaxState(top, (states.total * weights).sum(axis), acc)


def finish(state: SoftmaxState, sink: Any = None) -> tuple[tuple[Array, ...], Array]:
    """(outputs (..., rows, columns), log2-sum-exp2 (..., rows)); a row without a key gives 0 and -inf.

    `sink` (..., rows or 1) is a further score that takes part in the sum and has no value; such a row keeps -inf.
    """
    top, total, seen = state.top, state.total, state.total != 0  # NaN is seen, and stays
    scale = 1.0
    if sink is not None:
        highest = jnp.where(seen, jnp.maximum(top, sink), 0.0)
        scale = jnp.where(seen, jnp.exp2(top - highest), 0.0)
        top, total = highest, total * scale + jnp.exp2(sink - highest)
    lse = jnp.where(seen, top + jnp.log2(jnp.where(seen, total, 1.0)), -jnp.inf)
    factor = jnp.where(seen, scale / jnp.where(seen, total, 1.0), 0.0)
    return tuple(a * factor[..., None] for a in state.acc), lse
