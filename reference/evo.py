"""EvoAttention, the gated prefix sum: a dense oracle differentiated by JAX, and a chunked form of O(L) time and memory.

With lin_n(a) = a @ n_kernel + n_bias and t counting tokens, per head (SEMANTICS section 1):
    c_t = sum_{s<=t} v_s        g_t = sigmoid(lin_gate(c_t / t))        S_t = sum_{s<=t} g_s v_s
    r_t = lin_q(q_t) / (|S_t| + |lin_local(v_t)| + 1e-8)                f_t = sigmoid(lin_final(silu(r_t) v_t))
    out_t = LayerNorm(f_t c_t);   not causal: c is the sum over all tokens, S = g c, both the same for every t.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from reference.chunk_loop import Step, chunk_loop
from reference.evo_params import EvoParams as EvoParams
from reference.evo_params import EvoSpec as EvoSpec
from reference.prefix_scan import default_accum_dtype, prefix_sum_chunked

_CHUNK_VALUES = 2**17  # of one array of a chunk: half a megabyte of float32, which stays in a core's cache
_DENOMINATOR_EPS = 1e-8
_NORM_EPS = 1e-5


def evo_dense(v: Array, query: Array | None, params: EvoParams, rows: Array | None, spec: EvoSpec) -> Array:
    """(B, H, L, D) -> (B, H, L, D), every formula on whole arrays. `rows` is the signed running count of tokens."""
    if v.size == 0:
        return v
    result_dtype, (dtype, accum) = v.dtype, _dtypes(v, spec)
    p = EvoParams(*(a.astype(dtype) for a in params))
    lin = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    v = v.astype(dtype)
    q = v if query is None else query.astype(dtype)
    count = jnp.arange(1, v.shape[2] + 1, dtype=accum)[:, None]
    live = jnp.ones((v.shape[2], 1), bool)
    if rows is not None:
        count, live = jnp.abs(rows).astype(accum)[..., None], jnp.logical_not(rows < 0)[..., None]
    if spec.absent:
        v, q = jnp.where(live, v, 0), jnp.where(live, q, 0)
    if spec.causal:
        c = jnp.cumsum(v.astype(accum), axis=2)
    else:
        c, count = jnp.sum(v.astype(accum), axis=2, keepdims=True), jnp.max(count, axis=-2, keepdims=True)
    g = jax.nn.sigmoid(lin((c / count).astype(dtype), p.gate_kernel) + p.gate_bias)
    s = jnp.cumsum((g * v).astype(accum), axis=2) if spec.causal else g.astype(accum) * c
    den = jnp.abs(s.astype(dtype)) + jnp.abs(lin(v, p.local_kernel) + p.local_bias) + _DENOMINATOR_EPS
    r = (lin(q, p.q_kernel) + p.q_bias) / den
    f = jax.nn.sigmoid(lin(r * jax.nn.sigmoid(r) * v, p.final_kernel) + p.final_bias)
    y = jnp.where(live, f * c.astype(dtype), 0)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    variance = jnp.mean((y - mean) ** 2, axis=-1, keepdims=True)
    out = (y - mean) / jnp.sqrt(variance + _NORM_EPS) * p.norm_scale + p.norm_bias
    if spec.absent:
        out = jnp.where(live, out, 0)
    return out.astype(result_dtype)


def evo_chunked(v: Array, query: Array | None, params: EvoParams, rows: Array | None, spec: EvoSpec) -> Array:
    """The same as evo_dense in O(L) time; the backward recomputes each chunk from its start carries (c, S)."""
    if v.size == 0:
        return v
    dtype, accum = _dtypes(v, spec)
    consts = EvoParams(*(a.astype(dtype) for a in params))
    if rows is not None:
        rows = lax.stop_gradient(rows)
    size, xs = chunk_length(v.shape), (v, query)
    result: Any
    if spec.causal:
        zero = jnp.zeros((*v.shape[:2], v.shape[3]), accum)
        result = chunk_loop(Step(_causal_step, spec, size), consts, (zero, zero), xs, rows)
    else:
        c, s = _totals(v, consts, rows, spec)
        result = chunk_loop(Step(_full_step, spec, size), (consts, c, s), (), xs, rows)
    return result[1]


def chunk_length(shape: tuple[int, ...]) -> int:
    """Tokens per chunk for v of this shape: a power of two from 64 to 256, less for many or wide heads."""
    tokens = _CHUNK_VALUES // max(shape[0] * shape[1] * shape[3], 1)
    return min(max(1 << (tokens.bit_length() - 1 if tokens else 0), 64), 256)


def _dtypes(v: Array, spec: EvoSpec) -> tuple[jnp.dtype, jnp.dtype]:
    """(dtype of the elementwise maths, dtype of the sums): at least float32, and sums never narrower than the maths."""
    dtype, accum = default_accum_dtype(v.dtype), jnp.dtype(spec.accum_dtype)
    return dtype, accum if accum.itemsize > dtype.itemsize else dtype


def _live(v: Array, q: Array | None, rows: Array | None, spec: EvoSpec) -> tuple[Array, Array, Array | None]:
    """v and q in the dtype of the maths, zeros where a token is absent; and which tokens live, None for all."""
    dtype = _dtypes(v, spec)[0]
    live = None if rows is None else jnp.logical_not(rows < 0)[..., None]
    v = _where(live if spec.absent else None, v.astype(dtype))
    return v, v if q is None else _where(live if spec.absent else None, q.astype(dtype)), live


def _where(live: Array | None, x: Array) -> Array:
    return x if live is None else jnp.where(live, x, jnp.zeros((), x.dtype))


def _totals(v: Array, p: EvoParams, rows: Array | None, spec: EvoSpec) -> tuple[Array, Array]:
    dtype, accum = _dtypes(v, spec)
    c = jnp.sum(_live(v, None, rows, spec)[0], axis=2, keepdims=True, dtype=accum)
    count = jnp.asarray(v.shape[2], accum) if rows is None else _count(rows, accum).max(axis=2, keepdims=True)
    g = _gate((c / count).astype(dtype), p)
    return c.astype(dtype), (g.astype(accum) * c).astype(dtype)


def _count(rows: Array, dtype: jnp.dtype) -> Array:
    return jnp.abs(rows).astype(dtype)[..., None]


def _causal_step(spec, p, carry, xs, rows, start):
    v, q, live = _live(xs[0], xs[1], rows, spec)
    dtype, accum = _dtypes(v, spec)
    c_before, s_before = carry
    c = c_before[:, :, None] + prefix_sum_chunked(v.astype(accum), axis=2)
    count = start + 1 + jnp.arange(v.shape[2]) if rows is None else rows
    g = _gate((c / _count(count, accum)).astype(dtype), p)
    s = s_before[:, :, None] + prefix_sum_chunked((g * v).astype(accum), axis=2)
    out = _output(v, q, c.astype(dtype), s.astype(dtype), p, live, spec)
    return (c[:, :, -1], s[:, :, -1]), out.astype(xs[0].dtype)


def _full_step(spec, consts, carry, xs, rows, start):
    v, q, live = _live(xs[0], xs[1], rows, spec)
    p, c, s = consts
    return carry, _output(v, q, c, s, p, live, spec).astype(xs[0].dtype)


def _gate(mean: Array, p: EvoParams) -> Array:
    return jax.nn.sigmoid(_dot(mean, p.gate_kernel) + p.gate_bias)


def _output(v, q, c, s, p, live, spec):
    local, numerator = _local_and_q(v, q, p)
    gate = jax.nn.silu(numerator / (jnp.abs(s) + jnp.abs(local) + _DENOMINATOR_EPS)) * v
    y = _where(live, jax.nn.sigmoid(_dot(gate, p.final_kernel) + p.final_bias) * c)
    out = _layer_norm(y) * p.norm_scale + p.norm_bias
    return _where(live, out) if spec.absent else out


def _local_and_q(v, q, p):
    """lin_local(v) and lin_q(q), as one product where q is v."""
    if q is not v:
        return _dot(v, p.local_kernel) + p.local_bias, _dot(q, p.q_kernel) + p.q_bias
    kernel, bias = jnp.concatenate([p.local_kernel, p.q_kernel], axis=1), jnp.concatenate([p.local_bias, p.q_bias])
    return jnp.split(_dot(v, kernel) + bias, 2, axis=-1)


def _layer_norm(y: Array) -> Array:
    centred = y - y.mean(axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + _NORM_EPS)


def _dot(x: Array, kernel: Array) -> Array:
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=lax.Precision.HIGHEST)
    return flat.reshape(*x.shape[:-1], kernel.shape[1])
