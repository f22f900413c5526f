"""One chunk of linear attention, arrays (B, C, N or K, width): its steps, and the causal one's backward by hand.

Names are those of reference/linear.py; the carry is the state before the chunk. The G query heads of a key/value head
are rows of one product. Dots contract the last axis of their left operand where they can: XLA on CPUs is faster there.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from reference.linear_maps import FEATURE_MAPS, FEATURE_PULLS, LinearSpec, LinearState

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Sight(NamedTuple):
    """Which tokens of a chunk see what; None stands for all of them."""

    seen: Any  # (B or 1, query, key): each other
    live: Array | None = None  # (B, C): exists
    first: Array | None = None  # (B, C): in the run of the token before the chunk, so sees the carry
    kept: Array | None = None  # (B, C): lives in the run of the chunk's last token, so goes into the next carry
    whole: Array | None = None  # (B, 1): the carry goes into the next carry


def with_previous(rows: Array | None) -> tuple[Array, Array] | None:
    """The `aux` of the steps: rows, and the run of each token's predecessor (the first token's own)."""
    if rows is None:
        return None
    rows = lax.stop_gradient(rows)
    run = jnp.abs(rows)
    return rows, jnp.concatenate([run[:, :1], run[:, :-1]], axis=1)


def sums_step(spec: LinearSpec, consts: Any, carry: LinearState, xs: Any, aux: None, start: Any) -> Any:
    """(the state with the keys of the chunk added, no output); xs = (key, value), all one run."""
    key, value = (x.astype(carry.z.dtype) for x in xs)
    key = FEATURE_MAPS[spec.feature_map](key)
    kv = carry.kv + _einsum("bskd,bskv->bkdv", key, value)
    return LinearState(kv, carry.z + key.sum(1)), value[..., :0]


def read_step(spec: LinearSpec, state: LinearState, carry: Any, xs: Any, aux: None, start: Any) -> Any:
    """(carry, the output of the queries xs = (query,)), which see `state` and nothing else."""
    q = _rows(FEATURE_MAPS[spec.feature_map](xs[0].astype(state.z.dtype)), state.z.shape[1])
    denominator = _einsum("bktd,bkd->bkt", q, state.z) + spec.eps
    out = _einsum("bktd,bkdv->bktv", q, state.kv) * (1 / denominator)[..., None]
    return carry, _tokens(out, xs[0].shape[1]).astype(xs[0].dtype)


def causal_step(spec: LinearSpec, consts: Any, carry: LinearState, xs: Any, aux: Any, start: Any) -> Any:
    """(the state after the chunk, its output)."""
    sight = _sight(aux, xs[0].shape[1], inclusive=True)
    carry, numerator, denominator = _sums(spec, carry, xs, sight)
    out = numerator * (1 / (denominator + spec.eps))[..., None]
    return carry, _keep(sight.live, _tokens(out, xs[0].shape[1])).astype(xs[0].dtype)


def sweep_step(static: tuple[LinearSpec, bool], consts: Any, carry: LinearState, xs: Any, aux: Any, start: Any) -> Any:
    """As causal_step, or without each token itself, but numerators and denominators (B, C, N, V + 1), not divided."""
    spec, inclusive = static
    carry, *sums = _sums(spec, carry, xs, _sight(aux, xs[0].shape[1], inclusive))
    return carry, _tokens(jnp.concatenate([sums[0], sums[1][..., None]], axis=-1), xs[0].shape[1])


def causal_backward(
    spec: LinearSpec, consts: Any, carry: LinearState, xs: Any, aux: Any, start: Any, d_carry: LinearState, d_out: Array
) -> Any:
    """Gradients (of consts, carry, xs) of causal_step. Queries are columns here: q (B, K, D, G C), scores (key, query).

    With scores A and out = n / d: dn = do / d, dd = -(do . out) / d = -(sum_s A_st (v_s . dn_t) + q_t . (S dn_t)) / d.
    """
    size, heads, sight = d_out.shape[1], carry.z.shape[1], _sight(aux, d_out.shape[1], inclusive=True)
    phi, pull = FEATURE_MAPS[spec.feature_map], FEATURE_PULLS[spec.feature_map]
    query, key, value, d_out = (_keep(sight.live, x.astype(carry.z.dtype)) for x in (*xs, d_out))
    q, k, v = _columns(phi(query), heads), _rows(phi(key), heads), _rows(value, heads)
    score = _visible(sight, _einsum("bksd,bkdt->bkst", k, q), keys_first=True)
    reader = _first(sight, q)  # the queries that see the carry
    scale = 1 / (score.sum(2) + _einsum("bkdt,bkd->bkt", reader, carry.z) + spec.eps)
    dn = _rows(d_out, heads) * scale[..., None]
    d_score = _einsum("bksv,bktv->bkst", v, dn)
    dq = _first(sight, _einsum("bkdv,bktv->bkdt", carry.kv, dn))
    dd = -(_column_sums(score * d_score) + _column_sums(q * dq)) * scale
    d_score = _visible(sight, d_score + dd[:, :, None], keys_first=True)
    dq = dq + _first(sight, carry.z[..., None] * dd[:, :, None]) + _einsum("bksd,bkst->bkdt", k, d_score)
    dk = _einsum("bksv,bkdv->bksd", v, d_carry.kv) + d_carry.z[:, :, None]
    dk = _einsum("bkst,bkdt->bksd", d_score, q) + _kept(sight, dk)
    dv = _einsum("bkst,bktv->bksv", score, dn) + _kept(sight, _einsum("bksd,bkdv->bksv", k, d_carry.kv))
    d_carry = _next(sight, d_carry, _einsum("bkdt,bktv->bkdv", reader, dn), _einsum("bkdt,bkt->bkd", reader, dd))
    dq, dk = pull(q, dq, 2), pull(k, dk, 3)
    return (), d_carry, (_tokens(jnp.swapaxes(dq, 2, 3), size), _tokens(dk, size), _tokens(dv, size))


def _sums(spec: LinearSpec, carry: LinearState, xs: Any, sight: Sight) -> tuple[LinearState, Array, Array]:
    """(the state after the chunk, the numerators (B, K, G C, V), the denominators without eps (B, K, G C))."""
    phi, heads = FEATURE_MAPS[spec.feature_map], carry.z.shape[1]
    query, key, value = (_keep(sight.live, x.astype(carry.z.dtype)) for x in xs)
    q, k, v = _rows(phi(query), heads), _rows(phi(key), heads), _rows(value, heads)
    score = _visible(sight, _einsum("bktd,bksd->bkts", q, k), keys_first=False)
    numerator = _einsum("bktd,bkdv->bktv", q, carry.kv)
    denominator = _einsum("bktd,bkd->bkt", q, carry.z)
    if sight.first is not None:
        first = _tile(sight.first, q.shape[2])
        numerator = jnp.where(first[..., None], numerator, 0)
        denominator = jnp.where(first, denominator, 0)
    numerator, denominator = numerator + _einsum("bkts,bksv->bktv", score, v), denominator + score.sum(3)
    k = _kept(sight, k)
    return _next(sight, carry, _einsum("bksd,bksv->bkdv", k, v), k.sum(2)), numerator, denominator


def _sight(aux: tuple[Array, Array] | None, size: int, inclusive: bool) -> Sight:
    earlier = np.tril(np.ones((1, size, size), bool), 0 if inclusive else -1)
    if aux is None:
        return Sight(earlier)
    rows, before = aux
    run, live, before = jnp.abs(rows), rows > 0, before[:, :1]
    seen = earlier & live[:, None] & (run[:, :, None] == run[:, None])
    last = run[:, -1:]
    return Sight(seen, live, run == before, live & (run == last), last == before)


def _visible(sight: Sight, score: Array, keys_first: bool) -> Array:
    """Scores (B, K, G C, C), or (B, K, C, G C) with `keys_first`, with zeros where a query does not see a key."""
    size = sight.seen.shape[1]
    if keys_first:
        grouped = score.reshape(*score.shape[:3], -1, size)
        seen = jnp.swapaxes(sight.seen, 1, 2)[:, None, :, None]
    else:
        grouped = score.reshape(*score.shape[:2], -1, size, size)
        seen = sight.seen[:, None, None]
    return jnp.where(seen, grouped, 0).reshape(score.shape)


def _next(sight: Sight, carry: LinearState, kv: Array, z: Array) -> LinearState:
    """The carry, where its run goes on, plus (kv, z)."""
    if sight.whole is not None:
        carry = LinearState(
            jnp.where(sight.whole[..., None, None], carry.kv, 0), jnp.where(sight.whole[..., None], carry.z, 0)
        )
    return LinearState(carry.kv + kv, carry.z + z)


def _keep(live: Array | None, x: Array) -> Array:
    """x (B, C, heads, width) with zeros where a token does not live."""
    return x if live is None else jnp.where(live[:, :, None, None], x, 0)


def _kept(sight: Sight, x: Array) -> Array:
    """x (B, K, C, width) with zeros where a key does not go into the next carry."""
    return x if sight.kept is None else jnp.where(sight.kept[:, None, :, None], x, 0)


def _first(sight: Sight, x: Array) -> Array:
    """x (B, K, width, G C) with zeros where a query does not see the carry."""
    return x if sight.first is None else jnp.where(_tile(sight.first, x.shape[3])[:, :, None], x, 0)


def _tile(flag: Array, count: int) -> Array:
    """(B, C) as (B, 1, G C), where `count` is G C."""
    return jnp.tile(flag, (1, count // flag.shape[1]))[:, None]


def _rows(x: Array, heads: int) -> Array:
    """(B, C, N, width) as (B, K, G C, width)."""
    b, c, n, width = x.shape
    return x.reshape(b, c, heads, n // heads, width).transpose(0, 2, 3, 1, 4).reshape(b, heads, -1, width)


def _columns(x: Array, heads: int) -> Array:
    """(B, C, N, width) as (B, K, width, G C)."""
    b, c, n, width = x.shape
    return x.reshape(b, c, heads, n // heads, width).transpose(0, 2, 4, 3, 1).reshape(b, heads, width, -1)


def _tokens(x: Array, size: int) -> Array:
    """(B, K, G C, width) as (B, C, N, width), where `size` is C."""
    b, heads, _, width = x.shape
    return x.reshape(b, heads, -1, size, width).transpose(0, 3, 1, 2, 4).reshape(b, size, -1, width)


def _column_sums(x: Array) -> Array:
    """The sum over axis 2 as a product with ones: XLA on CPUs is four times slower at that reduction."""
    return _einsum("bkst,s->bkt", x, jnp.ones(x.shape[2], x.dtype))
