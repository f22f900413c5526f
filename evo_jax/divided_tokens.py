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
    dtype, phi = state_dtype(key, value), FEATURE_MAPS[spec.feature_map]
    state = initial_state(key, value) if state is None else state
    key, value = key.astype(dtype), value.astype(dtype)
    if rows is not None:
        return _states_of_runs(key, value, state, rows, phi, over)
    own = _summed(phi(key), value)
    before, total = sums(own, over)
    if not spec.causal:
        before = _add(before, sums(own, over, reverse=True)[0])
    return _add(state, before), _add(state, total)


def _states_of_runs(
    key: jax.Array, value: jax.Array, state: LinearState, rows: jax.Array, phi: Any, over: Axes
) -> tuple[LinearState, LinearState]:
    """linear_states where a state passes on only within a run, and masked tokens add nothing."""
    run, live = jnp.abs(rows), rows > 0
    key, value = (jnp.where(live[:, :, None, None], x, 0) for x in (key, value))
    last = (live & (run == run[:, -1:]))[:, :, None, None]
    own = _summed(jnp.where(last, phi(key), 0), value)
    own, first_runs, last_runs = lax.all_gather((own, run[:, 0], run[:, -1]), over)
    starts = []
    for n in range(len(first_runs)):
        if n:
            state = _where(first_runs[n] == last_runs[n - 1], state)
        starts.append(state)
        state = _add(_where(first_runs[n] == last_runs[n], state), jax.tree.map(lambda x, n=n: x[n], own))
    return jax.tree.map(lambda *x: jnp.stack(x)[lax.axis_index(over)], *starts), state


def _summed(features: jax.Array, value: jax.Array) -> LinearState:
    kv = jnp.einsum("bskd,bskv->bkdv", features, value, precision=lax.Precision.HIGHEST)
    return LinearState(kv, features.sum(1))


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _where(condition: jax.Array, state: LinearState) -> LinearState:
    """The state, or zeros, of each sequence."""
    return jax.tree.map(lambda x: jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, 0), state)
