"""One sequence on several devices: what each must know of the tokens that others hold.

Within jax.shard_map; `over` are the mesh axes that divide the tokens.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from reference.dense import AttendInputs
from reference.linear import FEATURE_MAPS, LinearSpec, LinearState, initial_state, state_dtype

Axes = Any  # names of mesh axes


def first(over: Axes, tokens: int) -> jax.Array:
    """The number of this device's first token, where each has as many."""
    return lax.axis_index(over) * jnp.int32(tokens)


def sums(own: Any, over: Axes, reverse: bool = False) -> tuple[Any, Any]:
    """(the sum of what the devices before this one give, after it where `reverse`; the sum of all)."""
    gathered = jax.tree.map(lambda x: lax.all_gather(x, over), own)

    def before(x: jax.Array) -> jax.Array:
        number, here = jnp.arange(len(x), dtype=jnp.int32), lax.axis_index(over)
        earlier = number > here if reverse else number < here
        return jnp.where(earlier.reshape(-1, *[1] * (x.ndim - 1)), x, 0).sum(0, dtype=x.dtype)

    return jax.tree.map(before, gathered), jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), gathered)


def queries_of(inputs: AttendInputs, over: Axes) -> AttendInputs:
    """The inputs of softmax attention, all keys and part of the queries, which its mask and its seeds number from 0."""
    mask, (batch, tokens) = inputs.mask, inputs.query.shape[:2]
    pattern, seeds, start = mask.pattern, inputs.seeds, first(over, tokens)
    offset = jnp.full((batch,), pattern.offset, jnp.int32) if mask.offset is None else mask.offset
    placed = pattern.causal or pattern.banded or pattern.scattered  # else positions play no part
    lengths = None if mask.q_lengths is None else jnp.clip(mask.q_lengths - start, 0, tokens)
    mask = replace(mask, offset=offset + start if placed else None, q_lengths=lengths)
    return inputs._replace(mask=mask, seeds=None if seeds is None else seeds + start.astype(jnp.uint32))


def linear_states(
    key: jax.Array, value: jax.Array, state: LinearState | None, rows: jax.Array | None, spec: LinearSpec, over: Axes
) -> tuple[LinearState, LinearState]:
    """(the state that this device's tokens start from, the state after the last token of all); `rows` as there.

    Not causal, it has the tokens of all other devices; `rows` must be None.
    """
    dtype = state_dtype(key, value)
    start = initial_state(key, value) if state is None else state
    k, v, run = key.astype(dtype), value.astype(dtype), None
    if rows is not None:
        run, live = jnp.abs(rows), (rows > 0)[:, :, None, None]
        k, v = jnp.where(live, k, 0), jnp.where(live, v, 0)
    k = FEATURE_MAPS[spec.feature_map](k)
    if run is not None and rows is not None:
        k = jnp.where(((rows > 0) & (run == run[:, -1:]))[:, :, None, None], k, 0)
    own = LinearState(jnp.einsum("bskd,bskv->bkdv", k, v, precision=lax.Precision.HIGHEST), k.sum(1))
    if run is None:
        (before, total), here = sums(own, over), start
        if not spec.causal:
            before = jax.tree.map(jnp.add, before, sums(own, over, reverse=True)[0])
        return jax.tree.map(jnp.add, here, before), jax.tree.map(jnp.add, here, total)
    parts, ends = lax.all_gather((own, (run[:, 0], run[:, -1])), over)
    starts = []
    for n in range(len(ends[0])):
        if n:  # a run that began before goes on, or does not
            start = _where(ends[0][n] == ends[1][n - 1], start)
        starts.append(start)
        passed = _where(ends[0][n] == ends[1][n], start)
        start = jax.tree.map(lambda x, y, n=n: x + y[n], passed, parts)
    return jax.tree.map(lambda *x: jnp.stack(x)[lax.axis_index(over)], *starts), start


def _where(condition: jax.Array, state: LinearState) -> LinearState:
    """The state, or zeros, of each sequence."""
    return jax.tree.map(lambda x: jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, 0), state)
