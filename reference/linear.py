"""Linear attention: a dense O(T S) oracle differentiated by JAX, and a chunked form of O(L) time and memory.

With phi the feature map, per query head and its key/value head:
    S_i = S_0 + sum_j phi(k_j) v_j^T      z_i = z_0 + sum_j phi(k_j)      over j <= i if causal, else over all j
    out_i = phi(q_i)^T S_i / (phi(q_i) . z_i + eps)
`rows`, int32 (B, L), cuts a sequence into runs: |rows| is the number of the token's run, rows < 0 a masked token. Token
i sees j iff rows_j > 0 and |rows_i| == |rows_j|. The initial state belongs to the first token's run, the last to the
last token's. A masked token does not exist: its output and its gradients are 0, whatever it holds.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from reference.chunk_loop import Step, chunk_loop
from reference.linear_chunk import causal_backward, causal_step, read_step, sums_step, sweep_step, with_previous
from reference.linear_maps import FEATURE_MAPS as FEATURE_MAPS
from reference.linear_maps import LinearSpec as LinearSpec
from reference.linear_maps import LinearState as LinearState

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
_loop: Any = chunk_loop


def linear_dense(
    query: Array, key: Array, value: Array, state: LinearState | None, rows: Array | None, spec: LinearSpec
) -> tuple[Array, LinearState]:
    """query (B, T, N, D), key (B, S, K, D), value (B, S, K, V) -> out (B, T, N, V), state; formulas on whole arrays."""
    phi, (batch, tokens, count, width), heads = FEATURE_MAPS[spec.feature_map], query.shape, key.shape[2]
    state = initial_state(key, value) if state is None else state
    dtype = state_dtype(key, value)
    kv, z = state.kv.astype(dtype), state.z.astype(dtype)
    if rows is None:
        rows = jnp.ones((batch, max(tokens, key.shape[1])), jnp.int32)
    run, live = jnp.abs(rows), rows > 0
    seen = live[:, None, : key.shape[1]] & (run[:, :tokens, None] == run[:, None, : key.shape[1]])
    if spec.causal:
        seen = jnp.tril(seen)
    q = phi(_where(live[:, :tokens], query.astype(dtype))).reshape(batch, tokens, heads, count // heads, width)
    k, v = (_where(live[:, : key.shape[1]], x.astype(dtype)) for x in (key, value))
    k = phi(k)
    score = jnp.where(seen[:, None, None], _einsum("btkgd,bskd->bkgts", q, k), 0)
    first = (run[:, :tokens] == run[:, :1]).astype(dtype)[..., None, None]
    numerator = _einsum("bkgts,bskv->btkgv", score, v) + first[..., None] * _einsum("btkgd,bkdv->btkgv", q, kv)
    denominator = jnp.moveaxis(score.sum(-1), 3, 1) + first * _einsum("btkgd,bkd->btkg", q, z)
    out = (numerator / (denominator[..., None] + spec.eps)).reshape(batch, tokens, count, value.shape[3])
    out = _where(live[:, :tokens], out).astype(query.dtype)
    if not key.shape[1]:
        return out, LinearState(kv, z)
    kept = (live & (run == run[:, -1:]))[:, : key.shape[1], None, None].astype(dtype)
    whole = (run[:, 0] == run[:, -1]).astype(dtype)[:, None, None]
    kv = whole[..., None] * kv + _einsum("bskd,bskv->bkdv", k * kept, v)
    return out, LinearState(kv, whole * z + (k * kept).sum(1))


def linear_chunked(
    query: Array, key: Array, value: Array, state: LinearState | None, rows: Array | None, spec: LinearSpec
) -> tuple[Array, LinearState]:
    """The same as linear_dense in O(T + S) time; the backward recomputes each chunk from the state before it."""
    dtype = state_dtype(key, value)
    state = initial_state(key, value) if state is None else LinearState(state.kv.astype(dtype), state.z.astype(dtype))
    if not query.shape[0]:
        return _empty(query, value), state
    if not spec.causal and rows is None:
        return _one_run(query, key, value, state, spec)
    if not query.shape[1]:
        return _empty(query, value), state
    xs, aux, size = (query, key, value), with_previous(rows), chunk_length(key, value)
    if spec.causal:
        end, out = _loop(Step(causal_step, spec, size, causal_backward, axis=1), (), state, xs, aux)
        return out, end
    return _both_ways(xs, aux, state, spec, size)


def chunk_length(key: Any, value: Any) -> int:
    """Tokens per chunk: more for wide heads, of which a state is saved for every chunk."""
    return 64 if key.shape[3] * value.shape[3] <= 2**14 else 128


def _one_run(query: Array, key: Array, value: Array, state: LinearState, spec: LinearSpec) -> tuple[Array, LinearState]:
    """Not causal: every query sees every key."""
    size = chunk_length(key, value)
    if key.shape[1]:
        state, _ = _loop(Step(sums_step, spec, size, axis=1), (), state, (key, value), None)
    if not query.shape[1]:
        return _empty(query, value), state
    return _loop(Step(read_step, spec, size, axis=1), state, (), (query,), None)[1], state


def _both_ways(xs: Any, aux: Any, state: LinearState, spec: LinearSpec, size: int) -> tuple[Array, LinearState]:
    """Not causal, with rows: what each token sees up to itself, and by a second sweep from the end, after itself."""
    query, key, value = xs
    rows = aux[0]
    state, before = _loop(Step(sweep_step, (spec, True), size, axis=1), (), state, xs, aux)
    reverse = [jnp.flip(x, 1) for x in (*xs, rows)]
    none, step = initial_state(key, value), Step(sweep_step, (spec, False), size, axis=1)
    after = _loop(step, (), none, tuple(reverse[:3]), with_previous(reverse[3]))[1]
    sums = before + jnp.flip(after, 1)
    out = sums[..., :-1] / (sums[..., -1:] + spec.eps)
    return _where(rows > 0, out).astype(query.dtype), state


def _empty(query: Array, value: Array) -> Array:
    return jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)


def state_dtype(key: Array, value: Array) -> jnp.dtype:
    """The dtype of the sums: float32, or float64 where the inputs are."""
    return jnp.dtype("float64" if "float64" in (key.dtype.name, value.dtype.name) else "float32")


def initial_state(key: Array, value: Array) -> LinearState:
    """The state before any token: zeros."""
    (batch, _, heads, width), dtype = key.shape, state_dtype(key, value)
    kv = jnp.zeros((batch, heads, width, value.shape[3]), dtype)
    return LinearState(kv, jnp.zeros((batch, heads, width), dtype))


def _where(live: Array, x: Array) -> Array:
    """x (B, L, heads, width) with zeros, and no gradient, in the tokens that do not live."""
    return jnp.where(live[:, :, None, None], x, jnp.zeros((), x.dtype))
