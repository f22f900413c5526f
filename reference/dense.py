"""Softmax attention as formulas on whole arrays: the O(T S) oracle, differentiated by JAX.

Query i of head n attends to the keys of head n // (N // K) that `reference.mask` allows it, and to a sink if there are:
    s_ij = cap(scale * q_i . k_j) + bias_ij        w_ij = exp(s_ij) / (exp(sink_n) + sum_j exp(s_ij))
    out_i = sum_j w_ij kept_ij / (1 - rate) v_j    lse_i = log(exp(sink_n) + sum_j exp(s_ij))
A bias of -inf hides a key. A query that sees no key gives out 0 and lse -inf, and passes no gradient on. A token beyond
its sequence's length, or of a negative segment, does not exist: whatever it holds, its gradients are 0.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from reference.logits import AttendSpec as AttendSpec
from reference.logits import capped, kept
from reference.mask import Mask, allowed

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class AttendInputs(NamedTuple):
    """The arrays of one call; heads N are a multiple of K, widths D and V may differ."""

    query: Any  # (B, T, N, D)
    key: Any  # (B, S, K, D)
    value: Any  # (B, S, K, V)
    mask: Mask
    bias: Any = None  # (B or 1, N or 1, T or 1, S or 1) float
    sinks: Any = None  # (N,) float: a score per head that takes part in the softmax and has no value
    seeds: Any = None  # (B, N) uint32 of logits.dropout_seeds, where weights are dropped


def attend_dense(inputs: AttendInputs, spec: AttendSpec, dtype: Any = None) -> tuple[Array, Array]:
    """(out (B, T, N, V) in the query's dtype, lse (B, T, N) in float32, or float64), computed in `dtype` if given."""
    query, key, value, mask, bias, sinks, seeds = inputs
    wide = state_dtype(inputs)
    dtype, group = wide if dtype is None else dtype, query.shape[2] // key.shape[2]
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    q = _existing(query.astype(dtype), mask.q_lengths, mask.q_segments)
    k, v = (_existing(x.astype(dtype), mask.kv_lengths, mask.kv_segments) for x in (key, value))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    seen = jnp.broadcast_to(allowed(mask, shape, key.shape[2]), shape)
    scores = capped(_einsum("btnd,bsnd->bnts", q, k), spec)
    if bias is not None:
        seen = seen & (bias != -jnp.inf)
        scores = scores + jnp.where(seen, bias.astype(dtype), 0)
    sink = jnp.full((1, shape[1], 1), -jnp.inf, dtype) if sinks is None else sinks.astype(dtype)[None, :, None]
    weights, lse = _softmax(jnp.where(seen, scores, -jnp.inf), seen, sink)
    if spec.dropout_rate:
        i, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3))
        keep = kept(spec.dropout_rate, seeds[:, :, None, None], i, j)
        weights = jnp.where(keep, weights / (1 - spec.dropout_rate), 0)
    alive = seen.any(-1).swapaxes(1, 2)
    out = jnp.where(alive[..., None], _einsum("bnts,bsnv->btnv", weights, v), 0)  # and no gradient from elsewhere
    lse = jnp.where(alive, lse.swapaxes(1, 2).astype(wide), -jnp.inf)
    return out.astype(query.dtype), lse


def state_dtype(inputs: AttendInputs) -> Any:
    """Of sums and of lse: float32, or float64 where the inputs are."""
    names = (inputs.query.dtype.name, inputs.key.dtype.name, inputs.value.dtype.name)
    return jnp.dtype("float64" if "float64" in names else "float32")


def _softmax(scores: Array, seen: Array, sink: Array) -> tuple[Array, Array]:
    """(weights, lse) of scores (B, N, T, S), 0 and anything in rows that see nothing."""
    alive = seen.any(-1)
    top = jnp.maximum(scores.max(-1, initial=-jnp.inf), sink)
    top = lax.stop_gradient(jnp.where(alive, top, 0))
    # Twice `where`: a gradient of 0 times infinity would be NaN.
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0) - jnp.where(seen, top[..., None], 0)), 0)
    total = weights.sum(-1) + jnp.where(alive, jnp.exp(jnp.where(alive, sink, 0) - top), 0)
    total = jnp.where(alive, total, 1)
    return weights / total[..., None], top + jnp.log(total)


def _existing(x: Array, lengths: Any, segments: Any) -> Array:
    """x (B, L, heads, width) with zeros in tokens that do not exist."""
    live = jnp.ones(x.shape[:2], bool)
    if lengths is not None:
        live = live & (jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None])
    if segments is not None:
        live = live & (segments >= 0)
    return jnp.where(live[:, :, None, None], x, 0)
