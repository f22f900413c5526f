"""EvoAttention, the gated prefix sum: a dense oracle differentiated by JAX, and a chunked form of O(L) time and memory.

With lin_n(a) = a @ n_kernel + n_bias and t counting tokens, per head:
    c_t = sum_{s<=t} v_s        g_t = sigmoid(lin_gate(c_t / t))        S_t = sum_{s<=t} g_s v_s
    r_t = lin_q(q_t) / (|S_t| + |lin_local(v_t)| + 1e-8)                f_t = sigmoid(lin_final(silu(r_t) v_t))
    out_t = LayerNorm(f_t c_t);   not causal: c is the sum over all tokens, S = g c, both the same for every t.
A causal sequence may be cut anywhere: (c, S) of the last token is the carry that the next one starts from.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from reference.chunk_loop import Step, chunk_loop
from reference.evo_chunk import Carry as Carry
from reference.evo_chunk import causal_step, causal_step_backward, dtypes, full_step, no_carry, totals
from reference.evo_params import EvoParams as EvoParams
from reference.evo_params import EvoSpec as EvoSpec

_CHUNK_VALUES = 2**17  # of one array of a chunk: half a megabyte of float32, which stays in a core's cache
_WHOLE_VALUES = 2**18  # v of at most this size is one chunk, which XLA need not compute again for the backward
_DENOMINATOR_EPS = 1e-8
_NORM_EPS = 1e-5


def evo_dense(v: Array, query: Array | None, params: EvoParams, rows: Array | None, spec: EvoSpec) -> Array:
    """(B, H, L, D) -> (B, H, L, D), every formula on whole arrays. `rows` is the signed running count of tokens."""
    return evo_dense_from(v, query, params, rows, spec, None)[0]


def evo_dense_from(
    v: Array, query: Array | None, params: EvoParams, rows: Array | None, spec: EvoSpec, carry: Carry | None
) -> tuple[Array, Carry | None]:
    """evo_dense after tokens that left `carry`, and the carry after the last token; `rows` counts those tokens too."""
    if v.size == 0:
        return v, carry
    result_dtype, (dtype, accum) = v.dtype, dtypes(v, spec)
    p, rows = _constants(v, params, rows, spec)
    lin = partial(jnp.einsum, "bhli,ij->bhlj", precision=lax.Precision.HIGHEST)
    v = v.astype(dtype)
    q = v if query is None else query.astype(dtype)
    count = jnp.arange(1, v.shape[2] + 1, dtype=accum)[None, None, :, None]
    live = jnp.ones((1, 1, v.shape[2], 1), bool)
    if rows is not None:
        count, live = jnp.abs(rows).astype(accum)[..., None], jnp.logical_not(rows < 0)[..., None]
    if spec.absent:
        v, q = jnp.where(live, v, 0), jnp.where(live, q, 0)
    if spec.causal:
        c = jnp.cumsum(v.astype(accum), axis=2)
        if carry is not None:
            c = c + carry[0][:, :, None]
    else:
        c, count = jnp.sum(v.astype(accum), axis=2, keepdims=True), jnp.max(count, axis=-2, keepdims=True)
    g = jax.nn.sigmoid(lin((c / count).astype(dtype), p.gate_kernel) + p.gate_bias)
    s = jnp.cumsum((g * v).astype(accum), axis=2) if spec.causal else g.astype(accum) * c
    if carry is not None:
        s = s + carry[1][:, :, None]
    den = jnp.abs(s.astype(dtype)) + jnp.abs(lin(v, p.local_kernel) + p.local_bias) + _DENOMINATOR_EPS
    r = (lin(q, p.q_kernel) + p.q_bias) / den
    f = jax.nn.sigmoid(lin(r * jax.nn.sigmoid(r) * v, p.final_kernel) + p.final_bias)
    y = jnp.where(live, f * c.astype(dtype), 0)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean((y - mean) ** 2, axis=-1, keepdims=True)
    out = (y - mean) / jnp.sqrt(variance + _NORM_EPS) * p.norm_scale + p.norm_bias
    if spec.absent:
        out = jnp.where(live, out, 0)
    return out.astype(result_dtype), (c[:, :, -1], s[:, :, -1])


def evo_chunked(v: Array, query: Array | None, params: EvoParams, rows: Array | None, spec: EvoSpec) -> Array:
    """The same as evo_dense in O(L) time; the backward recomputes each chunk from its start carries (c, S)."""
    if spec.causal:
        return evo_chunked_from(v, query, params, rows, spec, no_carry(v, spec))[0]
    if v.size == 0:
        return v
    consts, rows = _constants(v, params, rows, spec)
    c, s = totals(v, consts, rows, spec)
    result: Any = chunk_loop(Step(full_step, spec, chunk_length(v.shape)), (consts, c, s), (), (v, query), rows)
    return result[1]


def evo_chunked_from(
    v: Array, query: Array | None, params: EvoParams, rows: Array | None, spec: EvoSpec, carry: Carry
) -> tuple[Array, Carry]:
    """The causal evo_chunked after tokens that left `carry`, and the carry after the last; `rows` counts them too."""
    if v.size == 0:
        return v, carry
    consts, rows = _constants(v, params, rows, spec)
    step = Step(causal_step, spec, chunk_length(v.shape), causal_step_backward)
    result: Any = chunk_loop(step, consts, carry, (v, query), rows)
    return result[1], result[0]


def _constants(v: Array, params: EvoParams, rows: Array | None, spec: EvoSpec) -> tuple[EvoParams, Array | None]:
    """What chunks share: params in the dtype of the maths, vectors as (1, 1, 1, D), and rows without a gradient."""
    dtype, _ = dtypes(v, spec)
    rows = None if rows is None else lax.stop_gradient(rows)
    return EvoParams(*(a.astype(dtype) if a.ndim == 2 else a.astype(dtype)[None, None, None] for a in params)), rows


def chunk_length(shape: tuple[int, ...]) -> int:
    """Tokens per chunk for v of this shape: all of a small v, else a power of two from 64 to 256, less for wide v."""
    if math.prod(shape) <= _WHOLE_VALUES:
        return shape[2]
    tokens = _CHUNK_VALUES // max(shape[0] * shape[1] * shape[3], 1)
    return min(max(1 << (tokens.bit_length() - 1 if tokens else 0), 64), 256)
