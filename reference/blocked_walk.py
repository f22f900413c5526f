"""Softmax attention tile by tile, in O(T + S) memory: the loops over tiles of queries, forward and backward.

Backward, with p the weights, drop() the dropout, o = out, l = lse and delta = d_o . o - d_l:
    ds = p (drop(d_o v^T) - delta)    d_q = ds k    d_k = ds^T q    d_v = drop(p)^T d_o
The last two are summed as (width, S), from the transposed d_o and q of a tile: XLA on CPUs has a slower product where
the left operand's contracted axis is not its last.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from reference import blocked_tile as tiles
from reference.blocked_tile import Blocks, Plan, Slab, Tile
from reference.exp2 import exp2
from reference.logits import cap_slope
from reference.mask import FAR, Mask, Pattern, random_table
from reference.online_softmax import LOG2_E, SoftmaxState, finish, update
from reference.visit import Tiling, Visits, key_visits

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Inputs(NamedTuple):
    """What `walk` differentiates, of the heads of one window."""

    query: Any  # (B, T, N, D)
    key: Any  # (B, S, K, D)
    value: Any  # (B, S, K, V)
    bias: Any = None


class _Scene(NamedTuple):
    """What all tiles share."""

    mask: Mask  # `keep` padded as a bias is
    seeds: Any
    blocks: Blocks
    visits: Visits
    table: Any  # of random blocks


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def walk(plans: tuple[Plan, Plan], inputs: Inputs, mask: Mask, seeds: Any) -> tuple[Array, Array]:
    """(out (B, T, N, V), lse (B, T, N)), float32 or float64; `mask` has one window. Plans: forward, backward."""
    return _forward(plans, inputs, mask, seeds)[0]


def _forward(plans: tuple[Plan, Plan], inputs: Inputs, mask: Mask, seeds: Any) -> Any:
    plan = plans[0]
    scene = _scene(plan, mask, seeds, _blocks(plan, mask, inputs))
    batch, padded, heads, _ = scene.blocks.query.shape
    kv_heads, width = scene.blocks.value.shape[2:]
    row, dtype = (kv_heads, heads // kv_heads * plan.block_q), scene.blocks.query.dtype

    def body(results: Any, tile: Tile, visits: Callable[..., Any]) -> Any:
        def visit(slab: Slab, state: SoftmaxState) -> SoftmaxState:
            key, value = (tiles.take(x, tile.b, slab) for x in (scene.blocks.key, scene.blocks.value))
            found = tiles.scores(plan, scene.mask, tile, scene.blocks, slab, key)[1]
            dot = lambda weights: (_product(tiles.dropped(plan, tile, slab, seeds, weights), value, "krc,kcv->krv"),)  # noqa: E731
            return update(state, found, dot, exp2)

        start = SoftmaxState(jnp.full(row, -jnp.inf, dtype), jnp.zeros(row, dtype), (jnp.zeros((*row, width), dtype),))
        (out,), lse = finish(visits(visit, start))
        new = (tiles.tokens(x, plan.block_q)[None] for x in (out, lse[..., None] / LOG2_E))
        return tuple(
            lax.dynamic_update_slice(x, y, tiles.corner(tile.b, tile.start)) for x, y in zip(results, new, strict=True)
        )

    results = tuple(jnp.zeros((batch, padded, heads, n), dtype) for n in (width, 1))
    out, lse = (x[:, : plan.tokens] for x in _for_each_tile(plan, scene, body, results))
    if mask.q_lengths is not None:  # slabs free of a mask do not ask for it
        here = (jnp.arange(plan.tokens, dtype=jnp.int32)[None] < mask.q_lengths[:, None])[:, :, None, None]
        out, lse = jnp.where(here, out, 0), jnp.where(here, lse, -jnp.inf)
    return (out, lse[..., 0]), (inputs, mask, seeds, out, lse)


def _backward(plans: tuple[Plan, Plan], residuals: Any, cotangents: Any) -> Any:
    plan = plans[1]
    inputs, mask, seeds, out, lse = residuals
    blocks, pull = jax.vjp(partial(_blocks, plan, mask), inputs)
    scene, heads, base = _scene(plan, mask, seeds, blocks), blocks.key.shape[2], tiles.base(plan, blocks)
    # Not a sum of products, which takes XLA on CPUs ten times that.
    delta = _einsum("btnv,btnv->btn", cotangents[0], out)[..., None] - cotangents[1][..., None]
    # A row that sees nothing: an infinite lse makes all its weights 0.
    parts = cotangents[0], jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E), delta
    parts = tuple(_padded(x, 1, plan.block_q) for x in parts)

    def body(grads: Blocks, tile: Tile, visits: Callable[..., Any]) -> Blocks:
        d_o, lse, delta = (
            tiles.rows(lax.dynamic_slice_in_dim(x[tile.b], tile.start, plan.block_q, 0), heads) for x in parts
        )
        d_o, delta = (jnp.where(lse == jnp.inf, 0, x) for x in (d_o, delta))  # NaN lives, and spreads

        # Once per tile: the barrier keeps XLA from folding the transposition into the products.
        q_columns, d_o_columns = lax.optimization_barrier([x.swapaxes(1, 2) for x in (tile.query, d_o)])

        def visit(slab: Slab, grads: Any) -> Any:
            d_query, grads = grads
            key, value = (tiles.take(x, tile.b, slab) for x in (blocks.key, blocks.value))
            bent, scores = tiles.scores(plan, scene.mask, tile, blocks, slab, key)
            drop = partial(tiles.dropped, plan, tile, slab, seeds)
            weights = exp2(scores - lse)
            d_scores = weights * (drop(_product(d_o, value, "krv,kcv->krc")) - delta)
            bias = grads.bias if grads.bias is None else tiles.add_bias(grads.bias, tile, slab, plan.block_q, d_scores)
            d_scores = d_scores * (cap_slope(bent, plan.spec) / base)
            d_key = _product(q_columns, d_scores, "kdr,krc->kdc")
            d_value = _product(d_o_columns, drop(weights), "kvr,krc->kvc")
            grads = grads._replace(
                key=tiles.add(grads.key, tile.b, slab, d_key),
                value=tiles.add(grads.value, tile.b, slab, d_value),
                bias=bias,
            )
            return d_query + _product(d_scores, key, "krc,kcd->krd"), grads

        d_query, grads = visits(visit, (jnp.zeros_like(tile.query), grads))
        new = tiles.tokens(d_query * (plan.spec.scale * base), plan.block_q)[None]
        return grads._replace(query=lax.dynamic_update_slice(grads.query, new, tiles.corner(tile.b, tile.start)))

    across = {name: jnp.moveaxis(getattr(blocks, name), 1, 3) for name in ("key", "value")}
    # Where a mesh of explicit axes is in context, results have its type and arguments may not: the product by 1 has it.
    query = blocks.query * jnp.ones((), blocks.query.dtype)
    start = jax.tree.map(jnp.zeros_like, blocks._replace(**across))._replace(query=query)
    grads = _for_each_tile(plan, scene, body, start)
    back = {name: jnp.moveaxis(getattr(grads, name), 3, 1) for name in across}
    return *pull(grads._replace(**back)), None, None


def _for_each_tile(plan: Plan, scene: _Scene, body: Callable[..., Any], results: Any) -> Any:
    """body(results, tile, visits) over all tiles; visits(visit, state) is visit(slab, state) over all of a tile's."""
    batch, count = len(scene.blocks.query), scene.blocks.query.shape[1] // plan.block_q

    def run(b: Any, number: Any, results: Any) -> Any:
        # The gradients of a tile's queries take their place: nothing reads those again.
        query = results.query if isinstance(results, Blocks) else scene.blocks.query
        tile = tiles.load_tile(plan, scene.mask, scene.table, scene.blocks._replace(query=query), b, number)
        return body(results, tile, partial(_for_each_slab, plan, scene, b, number))

    def run_one(n: Any, results: Any) -> Any:
        return run(lax.div(n, np.int32(count)), lax.rem(n, np.int32(count)), results)

    def run_sequence(b: Any, results: Any) -> Any:
        for number in range(count):
            results = run(b, number, results)
        return results

    if not plan.unrolled:
        return _repeat(np.int32(batch * count), run_one, results)
    return run_sequence(np.int32(0), results) if batch == 1 else _repeat(np.int32(batch), run_sequence, results)


def _for_each_slab(plan: Plan, scene: _Scene, b: Any, number: Any, visit: Callable[..., Any], state: Any) -> Any:
    bounds, extras, counts = scene.visits
    if plan.unrolled:
        first, free, masked, end = (int(n) * plan.block_k for n in bounds[0, 0, number])
        slab = tiles.neighbours(plan, first, end, end)._replace(free=plan.frees and (free, masked) == (first, end))
        return visit(slab, state) if first < end else state
    first, free, masked, end = jnp.asarray(bounds)[b if len(bounds) > 1 else 0, 0, number] * plan.block_k
    width, padded = np.int32(plan.width), scene.blocks.key.shape[1]
    wholes = lax.div(masked - free, width) if plan.frees else np.int32(0)
    resumed = free + wholes * width  # free slabs, [free, resumed), lie between masked ones
    before = lax.div(free - first + width - 1, width) if plan.frees else np.int32(0)
    resumed = resumed if plan.frees else first

    def near(n: Any, state: Any) -> Any:
        begin = jnp.where(n < before, first + n * width, resumed + (n - before) * width)
        return visit(tiles.neighbours(plan, begin, jnp.where(n < before, free, end), padded), state)

    def inside(n: Any, state: Any) -> Any:
        return visit(tiles.neighbours(plan, free + n * width, end, padded)._replace(free=True), state)

    state = _repeat(wholes, inside, state) if plan.frees else state
    state = _repeat(before + lax.div(end - resumed + width - 1, width), near, state)
    at_once = max(min(extras.shape[2], plan.width // plan.block_k), 1)
    if not extras.shape[2]:
        return state
    extras = jnp.asarray(np.pad(extras, ((0, 0), (0, 0), (0, -extras.shape[2] % at_once))))
    counts = jnp.asarray(counts)[:, number]

    def far(n: Any, state: Any) -> Any:
        numbers = lax.dynamic_slice_in_dim(extras[:, number], n * at_once, at_once, 1)
        live = n * at_once + jnp.arange(at_once, dtype=jnp.int32)[None] < counts[:, None]
        return visit(tiles.scattered(plan, numbers, live), state)

    return _repeat(lax.div(counts.max() + np.int32(at_once - 1), np.int32(at_once)), far, state)


def _repeat(count: Any, body: Callable[..., Any], state: Any) -> Any:
    # The index is int64 where float64 is enabled.
    return lax.fori_loop(
        np.int32(0), count, lambda n, state: body(lax.convert_element_type(n, jnp.int32), state), state
    )


def _scene(plan: Plan, mask: Mask, seeds: Any, blocks: Blocks) -> _Scene:
    batch, _, heads, _ = blocks.query.shape
    kv_heads = blocks.key.shape[2]
    tiling = Tiling(batch, heads, kv_heads, plan.tokens, plan.keys, plan.block_q, plan.block_k)
    # Scattered keys of a bias or of `keep` are not gathered: those arrays are O(T S) anyway.
    gathers = blocks.bias is None and mask.keep is None and not plan.unrolled
    visited = mask if gathers else replace(mask, pattern=_without_extras(mask.pattern))
    visits = key_visits(Mask(visited.pattern) if plan.unrolled else visited, tiling)
    table = random_table(mask.pattern, kv_heads, plan.keys)
    keep = None if mask.keep is None else _padded_pairs(plan, mask.keep)
    return _Scene(replace(mask, keep=keep), seeds, blocks, visits, table)


def _without_extras(pattern: Pattern) -> Pattern:
    """One whose bounds hold all that `pattern` allows."""
    if not pattern.scattered:
        return pattern
    return replace(pattern, windows=((FAR, FAR),), num_global=0, num_random=0)


def _blocks(plan: Plan, mask: Mask, inputs: Inputs) -> Blocks:
    """The arrays in the dtype of the sums, tokens that do not exist and padding zero."""
    query, key, value, bias = inputs
    wide = jnp.float64 if any(x.dtype == jnp.float64 for x in inputs[:3]) else jnp.float32
    query = _padded(_existing(query.astype(wide), mask.q_lengths, mask.q_segments), 1, plan.block_q)
    size = max(plan.width, plan.block_k)
    key, value = (_existing(x.astype(wide), mask.kv_lengths, mask.kv_segments) for x in (key, value))
    key, value = (_padded(x, 1, plan.block_k, size) for x in (key, value))
    return Blocks(query, key, value, None if bias is None else _padded_pairs(plan, bias.astype(wide)))


def _existing(x: Array, lengths: Any, segments: Any) -> Array:
    """x (B, L, heads, width) with zeros in tokens that do not exist."""
    if lengths is not None:
        here = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        x = jnp.where(here[:, :, None, None], x, 0)
    return x if segments is None else jnp.where((segments >= 0)[:, :, None, None], x, 0)


def _padded_pairs(plan: Plan, x: Array) -> Array:
    """A bias or `keep`, padded as queries and keys are; axes that it lacks stay of size 1."""
    x = x if x.shape[2] == 1 else _padded(x, 2, plan.block_q)
    return x if x.shape[3] == 1 else _padded(x, 3, plan.block_k, plan.width)


def _padded(x: Array, axis: int, multiple: int, least: int = 0) -> Array:
    """x with zeros at the end of `axis`, up to a multiple and at least `least`."""
    size = x.shape[axis]
    missing = max(-(-size // multiple) * multiple, least) - size
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)]) if missing else x


def _product(a: Array, b: Array, axes: str) -> Array:
    return _einsum(axes, a, b)


# Jitted, so that gradients taken outside of jit do not compile the loops anew at each call.
walk.defvjp(_forward, jax.jit(_backward, static_argnums=0))
