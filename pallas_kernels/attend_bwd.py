"""The backward kernels of softmax attention: gradients of queries, of keys and values, and of a bias.

With p_ij the softmax weights, recomputed from lse, and d_p_ij = d_out_i . v_j (times what dropout did),
    delta_i = d_out_i . out_i - d_lse_i        d_s_ij = p_ij (d_p_ij - delta_i)
    d_q_i = scale sum_j d_s_ij k_j             d_k_j = scale sum_i d_s_ij q_i         d_v_j = sum_i p_ij d_out_i
    d_bias_ij = d_s_ij                         d_sink = - sum_i p_sink,i delta_i
(Dao, FlashAttention-2, algorithm 2). Each program owns what it sums: no atomics, and the same bits in every run.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _pallas as plk
from pallas_kernels import tile as t
from pallas_kernels.attend_fwd import Plan, query_tile, refs_of, tiling_of
from pallas_kernels.dots import Dots
from pallas_kernels.tile import Refs, Task
from reference.dense import AttendInputs
from reference.online_softmax import LOG2_E
from reference.visit import key_visits, query_visits


class Gradients(NamedTuple):
    query: Any
    key: Any
    value: Any
    bias: Any
    sinks: Any


def backward(
    inputs: AttendInputs, out: jax.Array, lse: jax.Array, cotangents: tuple[jax.Array, jax.Array], plan: Plan
) -> Gradients:
    """From the output, lse (B, N, T) in base 2, and the cotangents of the output and of the natural lse (B, T, N)."""
    d_out, d_lse = cotangents
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_lse
    unseen = lse == -jnp.inf
    delta = jnp.where(unseen, 0, delta.transpose(0, 2, 1))
    extra = Refs(out=d_out, lse=jnp.where(unseen, -jnp.inf, -lse), delta=delta)  # so that all weights come out 0
    d_key, d_value = _d_key_value(inputs, extra, plan)
    return Gradients(
        _d_query(inputs, extra, plan), d_key, d_value, _d_bias(inputs, extra, plan), _d_sinks(inputs, lse, delta)
    )


def _d_query(inputs: AttendInputs, extra: Refs, plan: Plan) -> jax.Array:
    batch, _, heads, _ = inputs.query.shape
    launch = plan.launch("d_query", inputs)
    tiling = tiling_of(inputs, launch)
    visits = key_visits(inputs.mask, tiling)
    task = plan.task("d_query", inputs, visits, (heads, batch), launch)
    refs = _with(refs_of(inputs, visits), extra)
    return t.run(_d_query_kernel, task, refs, Refs(query=_like(inputs.query)), tiling.q_tiles).query


def _d_key_value(inputs: AttendInputs, extra: Refs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    batch, _, kv_heads, _ = inputs.key.shape
    launch = plan.launch("d_key_value", inputs)
    tiling = tiling_of(inputs, launch)
    visits = query_visits(inputs.mask, tiling)
    task = plan.task("d_key_value", inputs, visits, (kv_heads, batch), launch)
    types = Refs(key=_like(inputs.key), value=_like(inputs.value))
    outs = t.run(_d_key_value_kernel, task, _with(refs_of(inputs, visits), extra), types, tiling.k_tiles)
    return outs.key, outs.value


def _d_bias(inputs: AttendInputs, extra: Refs, plan: Plan) -> jax.Array | None:
    """One program per tile of the bias, or per row or column of tiles where it is broadcast along the other axis."""
    bias = inputs.bias
    if bias is None:
        return None
    batch, heads, queries, keys = bias.shape
    launch = plan.launch("d_bias", inputs)
    tiling = tiling_of(inputs, launch)
    by_key = keys > 1 and queries == 1
    visits = (query_visits if by_key else key_visits)(inputs.mask, tiling)
    task = plan.task("d_bias", inputs, visits, (heads, batch), launch)
    shape = bias.shape if keys > 1 else (batch, heads, tiling.queries, 1)
    tiles = tiling.k_tiles if by_key else tiling.q_tiles * (tiling.k_tiles if keys > 1 else 1)
    types = Refs(bias=jax.ShapeDtypeStruct(shape, jnp.float32 if shape != bias.shape else bias.dtype))
    refs = _with(refs_of(inputs, visits), extra)
    grad = t.run(_d_bias_kernel, task, refs, types, tiles).bias
    return grad if shape == bias.shape else grad.sum(2, keepdims=True).astype(bias.dtype)


def _d_sinks(inputs: AttendInputs, lse: jax.Array, delta: jax.Array) -> jax.Array | None:
    if inputs.sinks is None:
        return None
    sinks = inputs.sinks.astype(jnp.float32)[None, :, None] * LOG2_E
    alive = lse != -jnp.inf  # NaN lives, and spreads
    weights = jnp.where(alive, jnp.exp2(sinks - jnp.where(alive, lse, 0)), 0)
    return -(weights * delta).sum((0, 2)).astype(inputs.sinks.dtype)


def _like(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _with(refs: Refs, extra: Refs) -> Refs:
    return refs._replace(out=extra.out, lse=extra.lse, delta=extra.delta, sinks=None)


class _Rows(NamedTuple):
    """Queries of a tile and what the backward knows of them."""

    i: t.Tokens
    q: t.Rows
    d_out: t.Rows
    minus_lse: jax.Array  # on the queries' axis; -inf where nothing is seen
    delta: jax.Array


def _rows(refs: Refs, place: t.Place, tile: Any, task: Task, axis: int) -> _Rows:
    i = t.queries(refs, place, tile, task, axis)
    q, d_out = (t.rows(x, place, i, w, task) for x, w in zip((refs.query, refs.out), task.widths, strict=True))
    minus_lse, delta = (jnp.expand_dims(t.vector(x, place, i), 1 - axis) for x in (refs.lse, refs.delta))
    return _Rows(i, q, d_out, minus_lse, delta)


class _Columns(NamedTuple):
    """Keys of a tile."""

    j: t.Tokens
    k: t.Rows
    v: t.Rows


def _columns(refs: Refs, place: t.Place, tile: Any, task: Task, axis: int) -> _Columns:
    j = t.keys(refs, place, tile, task, axis)
    return _Columns(
        j, *(t.rows(x, place, j, w, task) for x, w in zip((refs.key, refs.value), task.widths, strict=True))
    )


class _Weights(NamedTuple):
    p: jax.Array
    kept: jax.Array  # p after dropout
    d_s: jax.Array  # gradient of the scores, bias included
    slope: Any  # d score / d (scale * product)


def _weights(
    rows: _Rows, columns: _Columns, refs: Refs, place: t.Place, task: Task, masked: bool, axis: int = 0
) -> _Weights:
    """Of one tile, queries on `axis`."""
    multiply = (lambda a, b: t.product(task, a, b)) if axis == 0 else (lambda a, b: t.product(task, b, a))
    scores, slope = t.scores(multiply(rows.q, columns.k), refs, place, rows.i, columns.j, task, masked)
    p = plk.exp2(plk.fma(scores, t.score_scale(refs, task), rows.minus_lse))
    drop = partial(t.dropped, refs=refs, place=place, i=rows.i, j=columns.j, task=task)
    scale = 1 / (1 - task.spec.dropout_rate)
    d_p = drop(multiply(rows.d_out, columns.v)) * scale
    return _Weights(p, drop(p) * scale, p * (d_p - rows.delta), slope)


def _zeros(size: int, width: int, task: Task) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((size, columns), jnp.float32) for _, columns in task.parts(width))


def _plus(acc: tuple[jax.Array, ...], weights: jax.Array, rows: t.Rows, dots: Dots) -> tuple[Any, ...]:
    return tuple(a + dots(weights, rows.part(n)) for n, a in enumerate(acc))


def _scaled(acc: tuple[jax.Array, ...], task: Task) -> tuple[jax.Array, ...]:
    return tuple(a * task.spec.scale for a in acc)


def _d_query_kernel(refs: Refs, outs: Refs, *, task: Task) -> None:
    tile = query_tile(task)

    def at(place: t.Place, _: Any) -> None:
        rows = _rows(refs, place, tile, task, axis=0)

        def step(k_tile: Any, acc: Any, masked: bool) -> Any:
            columns = _columns(refs, place, k_tile, task, axis=1)
            w = _weights(rows, columns, refs, place, task, masked)
            return _plus(acc, w.d_s * w.slope, columns.k, task.wide_dots)

        acc = _zeros(task.tiling.block_q, task.widths[0], task)
        acc = t.over_visits(step, acc, refs, place, tile, task)
        t.store_rows(outs.query, place, rows.i, _scaled(acc, task), task.widths[0], task)

    t.over_places(at, None, task)


def _d_key_value_kernel(refs: Refs, outs: Refs, *, task: Task) -> None:
    """Tiles are transposed, (keys, queries): the weights are left operands of both sums as they are."""
    tile, first = plk.program_id(0), t.first_place(task)
    columns = _columns(refs, first, tile, task, axis=0)

    def at(place: t.Place, acc: Any) -> Any:
        def step(q_tile: Any, acc: Any, masked: bool) -> Any:
            rows = _rows(refs, place, q_tile, task, axis=1)
            w = _weights(rows, columns, refs, place, task, masked, axis=1)
            d_key = _plus(acc[0], w.d_s * w.slope, rows.q, task.wide_dots)
            return d_key, _plus(acc[1], w.kept, rows.d_out, task.dots)

        return t.over_visits(step, acc, refs, place, tile, task)

    zeros = tuple(_zeros(task.tiling.block_k, width, task) for width in task.widths)
    d_key, d_value = t.over_places(at, zeros, task)
    t.store_rows(outs.key, first, columns.j, _scaled(d_key, task), task.widths[0], task)
    t.store_rows(outs.value, first, columns.j, d_value, task.widths[1], task)


def _d_bias_kernel(refs: Refs, outs: Refs, *, task: Task) -> None:
    per_query, per_key = (n > 1 for n in outs.bias.shape[2:])
    per_query = per_query or not per_key
    number, k_tiles = plk.program_id(0), jnp.int32(task.tiling.k_tiles)
    own = lax.div(number, k_tiles) if per_query and per_key else number

    def at(place: t.Place, acc: Any) -> Any:
        def step(q_tile: Any, k_tile: Any, acc: Any, masked: bool) -> Any:
            rows = _rows(refs, place, q_tile, task, axis=0)
            columns = _columns(refs, place, k_tile, task, axis=1)
            w = _weights(rows, columns, refs, place, task, masked)
            d_s = jnp.where(w.p == 0, 0.0, w.d_s)  # hidden keys may hold anything
            return acc + (d_s if per_query and per_key else d_s.sum(1 if per_query else 0))

        if per_query and per_key:
            k_tile = lax.rem(number, k_tiles)
            visited = t.visited(refs, place, own, k_tile)
            return lax.fori_loop(0, visited, lambda _, acc: step(own, k_tile, acc, True), acc)
        if per_query:
            return t.over_visits(lambda k, acc, masked: step(own, k, acc, masked), acc, refs, place, own, task)
        return t.over_visits(lambda q, acc, masked: step(q, own, acc, masked), acc, refs, place, own, task)

    q_size, k_size = task.tiling.block_q, task.tiling.block_k
    shape = (q_size, k_size) if per_query and per_key else (q_size,) if per_query else (k_size,)
    acc = t.over_places(at, jnp.zeros(shape, jnp.float32), task)
    acc = acc if per_query and per_key else jnp.expand_dims(acc, 1 if per_query else 0)
    i, j = (
        own * q_size + plk.arange(q_size),
        (lax.rem(number, k_tiles) if per_query else own) * k_size + plk.arange(k_size),
    )
    if outs.bias.shape[2:] == (1, 1):  # one query: a tile with a single row to write
        acc = jnp.where(i[:, None] == 0, acc, 0.0).sum(0, keepdims=True)
    t.store_pairs(outs.bias, t.first_place(task), acc, i, j)
