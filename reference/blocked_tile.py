"""One tile of queries against one slab of keys: which keys, their scores, and the forward and backward of both.

Of one sequence, Q queries and C keys, and G = N // K heads that share a key head: arrays of a tile are (K, G Q, width),
those of a slab (K, C, width), scores (K, G Q, C).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from reference.logits import AttendSpec, capped, kept
from reference.mask import Mask, allows, keys_of, queries_of
from reference.online_softmax import LOG2_E

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclass(frozen=True, slots=True)
class Plan:
    """Statics of a walk over tiles."""

    spec: AttendSpec
    tokens: int  # T, without padding
    keys: int  # S
    block_q: int
    block_k: int  # of the tiles that are visited
    width: int  # keys of a slab of neighbours, a multiple of block_k
    frees: bool  # slabs may be free of a mask
    unrolled: bool = False  # no loops over tiles and slabs: a tile has one slab, all that its pattern lets it see


class Blocks(NamedTuple):
    """The arrays of a call, cut by slabs: all float32 or all float64, padded to whole tiles, zeros in padding."""

    query: Any  # (B, T', N, D)
    key: Any  # (B, S', K, D)
    value: Any  # (B, S', K, V)
    bias: Any  # (B or 1, N or 1, T' or 1, S' or 1) or None


class Tile(NamedTuple):
    """A tile of queries."""

    b: Any  # its sequence
    start: Any  # its first token
    query: Array  # (K, G Q, D), scaled
    facts: Any  # Queries, (K or 1, 1, Q, 1)


class Slab(NamedTuple):
    """Some keys: neighbours from `start` on, or the tiles `numbers` (K or 1, E)."""

    start: Any
    numbers: Any
    index: Array  # (K or 1, 1, 1, C) int32
    live: Array  # of the same shape: those of this visit
    free: bool = False  # the tile sees all of them


def load_tile(plan: Plan, mask: Mask, table: Any, blocks: Blocks, b: Any, number: Any) -> Tile:
    start = number * plan.block_q
    query = rows(lax.dynamic_slice_in_dim(blocks.query[b], start, plan.block_q, 0), blocks.key.shape[2])
    i = start + lax.broadcasted_iota(jnp.int32, (1, 1, plan.block_q, 1), 2)
    heads, group = blocks.key.shape[2], blocks.query.shape[2] // blocks.key.shape[2]
    h = jnp.int32(0) if table is None else group * lax.broadcasted_iota(jnp.int32, (heads, 1, 1, 1), 0)
    return Tile(b, start, query * (plan.spec.scale * base(plan, blocks)), queries_of(mask, b, h, i, table, group))


def base(plan: Plan, blocks: Blocks) -> float:
    """What queries are multiplied by besides `scale`: where nothing comes between, products are scores in base 2."""
    return LOG2_E if blocks.bias is None and plan.spec.soft_cap is None else 1.0


def neighbours(plan: Plan, begin: Any, end: Any, padded: int) -> Slab:
    """The keys begin <= j < end, at most plan.width where it is not unrolled."""
    width = end - begin if plan.unrolled else plan.width
    start = jnp.minimum(begin, padded - width)
    j = start + lax.broadcasted_iota(jnp.int32, (1, 1, 1, width), 3)
    return Slab(start, None, j, (j >= begin) & (j < jnp.minimum(end, plan.keys)))


def scattered(plan: Plan, numbers: Array, live: Array) -> Slab:
    """The keys of the tiles `numbers` (K or 1, E) that are `live`."""
    j = numbers[:, :, None] * plan.block_k + jnp.arange(plan.block_k, dtype=jnp.int32)[None, None]
    here = live[:, :, None] & (j < plan.keys)
    shape = (len(numbers), 1, 1, -1)
    return Slab(None, numbers, j.reshape(shape), here.reshape(shape))


def take(x: Array, b: Any, slab: Slab) -> Array:
    """Of x (B, S', K, width) the slab's keys, (K, C, width)."""
    if slab.numbers is not None:
        found = jnp.take_along_axis(x[b], slab.index[:, 0, 0].T[..., None], axis=0, mode="clip")
    else:
        found = lax.dynamic_slice(x, corner(b, slab.start), (1, slab.index.shape[3], *x.shape[2:]))[0]
    return found.swapaxes(0, 1)


def add(x: Array, b: Any, slab: Slab, update: Array) -> Array:
    """x (B, K, width, S') with `update` (K, width, C) added to the slab's keys."""
    if slab.numbers is None:
        start = corner(b, 0, 0, slab.start)
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, (1, *update.shape)) + update[None], start)
    heads, count = update.shape[0], slab.numbers.shape[1]
    tiled = x.reshape(*x.shape[:3], -1, update.shape[2] // count)
    numbers, kv_head = jnp.broadcast_to(slab.numbers, (heads, count)), jnp.arange(heads, dtype=jnp.int32)[:, None]
    tiles = update.reshape(*update.shape[:2], count, -1).swapaxes(1, 2)  # (K, E, width, block_k)
    return tiled.at[b, kv_head, :, numbers].add(tiles).reshape(x.shape)


def scores(plan: Plan, mask: Mask, tile: Tile, blocks: Blocks, slab: Slab, key: Array) -> tuple[Array, Array]:
    """Of the slab's keys (K, C, D): scores, capped alone, and in base 2 with the bias, -inf where hidden."""
    heads, size = len(key), plan.block_q
    bent = capped(_einsum("krd,kcd->krc", tile.query, key), replace(plan.spec, scale=1.0))
    final = bent.reshape(heads, -1, size, key.shape[1])
    if blocks.bias is not None:
        final = final + cut(blocks.bias, tile, slab, heads, size)
    final = final * LOG2_E if base(plan, blocks) == 1.0 else final
    if not slab.free:
        seen = allows(mask.pattern, tile.facts, keys_of(mask, tile.b, slab.index)) & slab.live
        if mask.keep is not None:
            seen = seen & cut(mask.keep, tile, slab, heads, size)
        final = jnp.where(seen, final, -jnp.inf)
    return bent, final.reshape(bent.shape)


def dropped(plan: Plan, tile: Tile, slab: Slab, seeds: Any, x: Array) -> Array:
    """x (K, G Q, C) with dropout."""
    rate, heads, size = plan.spec.dropout_rate, len(x), plan.block_q
    if not rate:
        return x
    group = x.shape[1] // size
    i = tile.start + lax.broadcasted_iota(jnp.int32, (1, 1, size, 1), 2)
    keep = kept(rate, seeds[tile.b].reshape(heads, group, 1, 1), i, slab.index)
    return jnp.where(keep.reshape(x.shape), x / (1 - rate), 0)


def cut(x: Array, tile: Tile, slab: Slab, heads: int, size: int) -> Array:
    """Of x (B or 1, N or 1, T' or 1, S' or 1) what the pair sees, (K or 1, G or 1, Q or 1, C or 1)."""
    starts, sizes = _corner(x, tile, slab, size)
    found = lax.dynamic_slice(x, starts, sizes)[0]
    return found.reshape(heads if x.shape[1] > 1 else 1, -1, *found.shape[1:])


def add_bias(x: Array, tile: Tile, slab: Slab, size: int, update: Array) -> Array:
    """x, shaped as a bias, with `update` (K, G Q, C) added, summed over the axes that x lacks."""
    starts, sizes = _corner(x, tile, slab, size)
    update = update.reshape(1, -1, size, update.shape[2])
    axes = tuple(axis for axis in (1, 2, 3) if sizes[axis] == 1 < update.shape[axis])
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, starts, sizes) + update.sum(axes, keepdims=True), starts)


def _corner(x: Array, tile: Tile, slab: Slab, size: int) -> tuple[Any, Any]:
    b, _, t, s = (n > 1 for n in x.shape)
    starts = corner(tile.b if b else 0, 0, tile.start if t else 0, slab.start if s else 0)
    return starts, (1, x.shape[1], size if t else 1, slab.index.shape[3] if s else 1)


def corner(*starts: Any) -> tuple[Any, ...]:
    """Four starts of a slice, in one dtype also where float64 is enabled."""
    return tuple(jnp.asarray(n, jnp.int32) for n in (*starts, 0, 0)[:4])


def rows(x: Array, heads: int) -> Array:
    """(Q, N, width) as (K, G Q, width)."""
    size, count, width = x.shape
    return x.reshape(size, heads, count // heads, width).transpose(1, 2, 0, 3).reshape(heads, -1, width)


def tokens(x: Array, size: int) -> Array:
    """(K, G Q, width) as (Q, N, width), where `size` is Q."""
    heads, _, width = x.shape
    return x.reshape(heads, -1, size, width).transpose(2, 0, 1, 3).reshape(size, -1, width)
