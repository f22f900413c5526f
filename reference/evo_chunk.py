"""One chunk of EvoAttention, (B, H, C, D): its output, and for the causal form a backward written out by hand.

Names are those of reference/evo.py. Autodiff of the causal step gives the same gradients, more slowly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from reference.evo_params import EvoParams, EvoSpec
from reference.prefix_scan import default_accum_dtype, prefix_sum_chunked

_DENOMINATOR_EPS = 1e-8
_NORM_EPS = 1e-5
Carry = tuple[Array, Array]


class _Causal(NamedTuple):
    """What a chunk computes on its way to the output; `q` is None where the query is v."""

    v: Array
    q: Array | None
    live: Array | None
    count: Array
    c: Array  # in the dtype of the sums, as s
    mean: Array
    g: Array
    s: Array
    local: Array
    den: Array
    r: Array
    silu: Array
    f: Array
    centred: Array
    rstd: Array


def dtypes(v: Array, spec: EvoSpec) -> tuple[jnp.dtype, jnp.dtype]:
    """(dtype of the elementwise maths, dtype of the sums): at least float32, and sums never narrower than the maths."""
    dtype, accum = default_accum_dtype(v.dtype), jnp.dtype(spec.accum_dtype)
    return dtype, accum if accum.itemsize > dtype.itemsize else dtype


def causal_step(spec, p: EvoParams, carry: Carry, xs, rows, start) -> tuple[Carry, Array]:
    """(carry after the chunk, its output); the carry is (c, S) after the last token before it."""
    x = _causal(spec, p, carry, xs, rows, start)
    return (x.c[:, :, -1], x.s[:, :, -1]), _output(spec, p, x).astype(xs[0].dtype)


def causal_step_backward(spec, p: EvoParams, carry: Carry, xs, rows, start, d_carry: Carry, d_out: Array) -> Any:
    """Gradients (of p, carry, xs): causal_step recomputed, then transposed."""
    return _transpose(spec, p, _causal(spec, p, carry, xs, rows, start), d_carry, d_out)


def _output(spec: EvoSpec, p: EvoParams, x: _Causal) -> Array:
    return _where(x.live if spec.absent else None, x.centred * x.rstd * p.norm_scale + p.norm_bias)


def _transpose(spec: EvoSpec, p: EvoParams, x: _Causal, d_carry: Carry, d_out: Array) -> Any:
    """Gradients (of p, carry, xs) from those of (carry after, output), line by line from last to first."""
    dtype, accum = dtypes(x.v, spec)
    c = x.c.astype(dtype)
    # LayerNorm and the final gate
    d_out = _where(x.live if spec.absent else None, d_out.astype(dtype))
    normed, d_normed = x.centred * x.rstd, d_out * p.norm_scale
    d_y = d_normed - _mean(d_normed) - normed * _mean(d_normed * normed)
    d_c = _where(x.live, x.rstd * d_y) * x.f
    d_final = d_c * c * (1 - x.f)
    d_gate = _dot(d_final, p.final_kernel.T)
    # r = q / den
    sigmoid = jax.nn.sigmoid(x.r)
    d_q = d_gate * x.v * (sigmoid + x.silu * (1 - sigmoid)) / x.den
    d_den = -d_q * x.r
    d_local = d_den * jnp.sign(x.local)
    d_s = (d_den * jnp.sign(x.s).astype(dtype)).astype(accum)
    # S = running sum of g v; c = running sum of v
    d_s = d_carry[1][:, :, None] + prefix_sum_chunked(d_s, axis=2, reverse=True)
    d_gated = d_s.astype(dtype)
    d_lin_gate = d_gated * x.v * x.g * (1 - x.g)
    d_c = d_c.astype(accum) + _dot(d_lin_gate, p.gate_kernel.T).astype(accum) / x.count
    d_c = d_carry[0][:, :, None] + prefix_sum_chunked(d_c, axis=2, reverse=True)
    d_v = d_gate * x.silu + d_gated * x.g + d_c.astype(dtype)
    products, d_v, d_query = _local_and_q_backward(p, x, d_local, d_q, d_v)
    gates = (*_weights(x.mean, d_lin_gate), *_weights(x.silu * x.v, d_final))
    d_p = EvoParams._make((*products, *gates, _rows_sum(d_out * normed), _rows_sum(d_out)))
    absent = x.live if spec.absent else None
    d_query = None if d_query is None else _where(absent, d_query)
    return d_p, (d_c[:, :, 0], d_s[:, :, 0]), (_where(absent, d_v), d_query)


def full_step(spec, consts, carry, xs, rows, start):
    """A chunk of the form that is not causal: (carry, unchanged; output); consts is (params, c, S)."""
    v, q, live = _live(xs[0], xs[1], rows, spec)
    p, c, s = consts
    local, numerator = _local_and_q(v, q, p)
    silu = jax.nn.silu(numerator / (jnp.abs(s) + jnp.abs(local) + _DENOMINATOR_EPS))
    centred, rstd = _normalise(_where(live, _final_gate(silu * v, p) * c))
    out = _where(live if spec.absent else None, centred * rstd * p.norm_scale + p.norm_bias)
    return carry, out.astype(xs[0].dtype)


def no_carry(v: Array, spec: EvoSpec) -> Carry:
    """The carry before the first token."""
    zero = jnp.zeros((*v.shape[:2], v.shape[3]), dtypes(v, spec)[1])
    return zero, zero


def totals(v: Array, p: EvoParams, rows: Array | None, spec: EvoSpec) -> tuple[Array, Array]:
    """(c, S) of the whole sequence, (B, H, 1, D), for the form that is not causal."""
    dtype, accum = dtypes(v, spec)
    c = jnp.sum(_live(v, None, rows, spec)[0], axis=2, keepdims=True, dtype=accum)
    count = jnp.asarray(v.shape[2], accum) if rows is None else _count(rows, accum).max(axis=2, keepdims=True)
    g = _sequence_gate((c / count).astype(dtype), p)
    return c.astype(dtype), (g.astype(accum) * c).astype(dtype)


def _causal(spec, p: EvoParams, carry: Carry, xs, rows, start) -> _Causal:
    v, q, live = _live(xs[0], xs[1], rows, spec)
    dtype, accum = dtypes(v, spec)
    count = _count((start + 1 + jnp.arange(v.shape[2]))[None, None] if rows is None else rows, accum)
    c = carry[0][:, :, None] + prefix_sum_chunked(v.astype(accum), axis=2)
    mean = (c / count).astype(dtype)
    g = _sequence_gate(mean, p)
    s = carry[1][:, :, None] + prefix_sum_chunked((g * v).astype(accum), axis=2)
    local, numerator = _local_and_q(v, q, p)
    den = jnp.abs(s.astype(dtype)) + jnp.abs(local) + _DENOMINATOR_EPS
    r = numerator / den
    silu = jax.nn.silu(r)
    f = _final_gate(silu * v, p)
    centred, rstd = _normalise(_where(live, f * c.astype(dtype)))
    return _Causal(v, q, live, count, c, mean, g, s, local, den, r, silu, f, centred, rstd)


def _live(v: Array, q: Array | None, rows: Array | None, spec: EvoSpec) -> tuple[Array, Any, Array | None]:
    """v and q in the dtype of the maths, zeros where a token is absent; and which tokens live, None for all."""
    dtype = dtypes(v, spec)[0]
    live = None if rows is None else jnp.logical_not(rows < 0)[..., None]
    absent = live if spec.absent else None
    return _where(absent, v.astype(dtype)), None if q is None else _where(absent, q.astype(dtype)), live


def _where(live: Array | None, x: Array) -> Array:
    return x if live is None else jnp.where(live, x, jnp.zeros((), x.dtype))


def _count(rows: Array, dtype: jnp.dtype) -> Array:
    return jnp.abs(rows).astype(dtype)[..., None]


def _sequence_gate(mean: Array, p: EvoParams) -> Array:
    return jax.nn.sigmoid(_dot(mean, p.gate_kernel) + p.gate_bias)


def _final_gate(x: Array, p: EvoParams) -> Array:
    return jax.nn.sigmoid(_dot(x, p.final_kernel) + p.final_bias)


def _local_and_q(v: Array, q: Array | None, p: EvoParams) -> tuple[Array, Array]:
    """lin_local(v) and lin_q(q), as one product where q is v (None)."""
    if q is not None:
        return _dot(v, p.local_kernel) + p.local_bias, _dot(q, p.q_kernel) + p.q_bias
    bias = jnp.concatenate([p.local_bias, p.q_bias], axis=-1)
    local, numerator = jnp.split(_dot(v, _joint_kernel(p)) + bias, 2, axis=-1)
    return local, numerator


def _local_and_q_backward(p: EvoParams, x: _Causal, d_local: Array, d_q: Array, d_v: Array) -> Any:
    """(q_kernel, q_bias, local_kernel, local_bias) gradients, d_v with what comes through them, d_query or None."""
    if x.q is not None:
        d_v = d_v + _dot(d_local, p.local_kernel.T)
        return (*_weights(x.q, d_q), *_weights(x.v, d_local)), d_v, _dot(d_q, p.q_kernel.T)
    joint = jnp.concatenate([d_local, d_q], axis=-1)
    kernels, biases = (jnp.split(a, 2, axis=-1) for a in _weights(x.v, joint))
    return (kernels[1], biases[1], kernels[0], biases[0]), d_v + _dot(joint, _joint_kernel(p).T), None


def _joint_kernel(p: EvoParams) -> Array:
    return jnp.concatenate([p.local_kernel, p.q_kernel], axis=1)


def _normalise(y: Array) -> tuple[Array, Array]:
    centred = y - _mean(y)
    return centred, lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + _NORM_EPS)


def _mean(x: Array) -> Array:
    """Mean over the head width, (..., 1), by a product: XLA's reduction on CPUs would compute x a second time."""
    return _dot(x, jnp.ones((x.shape[-1], 1), x.dtype)) / x.shape[-1]


def _weights(x: Array, d_z: Array) -> tuple[Array, Array]:
    """Gradients of kernel and bias of z = x @ kernel + bias."""
    kernel = jnp.matmul(x.reshape(-1, x.shape[-1]).T, d_z.reshape(-1, d_z.shape[-1]), precision=lax.Precision.HIGHEST)
    return kernel, _rows_sum(d_z)


def _rows_sum(z: Array) -> Array:
    """Sum over all tokens, (1, 1, 1, D), by a product with ones as in _mean."""
    flat = z.reshape(-1, z.shape[-1])
    return jnp.matmul(jnp.ones((1, flat.shape[0]), z.dtype), flat, precision=lax.Precision.HIGHEST)[None, None]


def _dot(x: Array, kernel: Array) -> Array:
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=lax.Precision.HIGHEST)
    return flat.reshape(*x.shape[:-1], kernel.shape[1])
