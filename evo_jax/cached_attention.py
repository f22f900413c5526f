"""Softmax attention of new tokens over a cache: what they see of it, how they enter it, and where there is no room."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import attention, padding, shapes
from evo_jax import cache as caches
from evo_jax.cache import KVCache, MultiScaleCache, RingCache
from evo_jax.sharding import alike

Attend = Callable[..., jax.Array]


class Group(NamedTuple):
    """Query heads first <= n < last, neighbours with one window (None: they see all), and their key/value heads."""

    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    window: int | None


class Layout(NamedTuple):
    """What of a layer decides the form of its cache: `split` where that is a MultiScaleCache."""

    op: str
    groups: tuple[Group, ...]
    split: bool


class _New(NamedTuple):
    """New tokens, those that exist first: arrays (B, T, heads, D); how many exist, (B,), and whether all do."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    count: jax.Array
    all_exist: bool
    kept: jax.Array  # (B,): as many of those as there is room for


def init(layout: Layout, batch: Any, capacity: Any, width: int, dtype: Any) -> Any:
    """The cache before the first token."""
    op, batch = layout.op, shapes.at_least(layout.op, "batch_size", batch, 0)
    capacity = None if capacity is None else shapes.at_least(op, "capacity", capacity, 1)
    if capacity is None and any(group.window is None for group in layout.groups):
        raise ValueError(f"{op}: init_cache needs capacity, the most tokens of a sequence: some heads see them all")
    groups = tuple(
        caches.empty(_kind(g), (batch, g.window or capacity or 0, g.kv_heads[1] - g.kv_heads[0], width), dtype)
        for g in layout.groups
    )
    return MultiScaleCache(groups) if layout.split else groups[0]


def attend(
    layout: Layout,
    function: Attend,
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    cache: Any,
    mask: Any,
    options: dict[str, Any],
) -> tuple[jax.Array, Any]:
    """(B, T, N, D) of new tokens, and the cache with them. `function` serves the heads that have no window.

    `mask` is a module's attention_mask: of the new tokens, or of pairs of them with the tokens of a KVCache.
    """
    op, (query, key, value) = layout.op, arrays
    groups = [alike(op, (own, key), (type(own)(*caches.AXES), "b.k"))[0] for own in _groups(layout, cache, query)]
    valid, bad, pairs = _masks(op, mask, query, groups)
    options = options | pairs
    if bad is not None:  # what such a mask lets into the cache is not to be taken for tokens later
        poison = jnp.where(bad, jnp.nan, 0.0)[:, None, None, None]
        key, value = key + poison.astype(key.dtype), value + poison.astype(value.dtype)
    new, order = _existing_first(query, key, value, valid)
    check_room(op, groups, new.count)
    for own in groups:
        if isinstance(own, KVCache):
            new = new._replace(kept=jnp.clip(own.key.shape[1] - own.lengths, 0, new.kept))
    results = []
    for group, own in zip(layout.groups, groups, strict=True):
        part = _part(new, group)
        sinks = options["sinks"] if options["sinks"] is None else options["sinks"][slice(*group.heads)]
        own_options = options | {"sinks": sinks}
        ring = isinstance(own, RingCache)
        results.append(_over_ring(part, own, own_options) if ring else _over_all(function, part, own, own_options))
    out = results[0][0] if len(results) == 1 else jnp.concatenate([out for out, _ in results], axis=2)
    if order is not None:
        out = jnp.take_along_axis(out, jnp.argsort(order, axis=1)[:, :, None, None], axis=1)
    if bad is not None:
        out = jnp.where(bad[:, None, None, None], jnp.asarray(jnp.nan, out.dtype), out)
    after = tuple(own for _, own in results)
    return out, MultiScaleCache(after) if layout.split else after[0]


def _kind(group: Group) -> Any:
    return KVCache if group.window is None else RingCache


def _groups(layout: Layout, cache: Any, query: jax.Array) -> list[Any]:
    """The caches of the layer's groups, checked."""
    op, batch, width = layout.op, query.shape[0], query.shape[3]
    if layout.split and not isinstance(cache, MultiScaleCache):
        raise TypeError(f"{op}: cache is a {type(cache).__name__} and must be what init_cache gives, a MultiScaleCache")
    groups = cache.groups if layout.split else (cache,)
    if len(groups) != len(layout.groups):
        raise ValueError(f"{op}: cache.groups are {len(groups)} and must be {len(layout.groups)}, as of init_cache")
    return [
        caches.checked(op, own, _kind(group), (batch, group.window, group.kv_heads[1] - group.kv_heads[0], width))
        for group, own in zip(layout.groups, groups, strict=True)
    ]


def _masks(
    op: str, mask: Any, query: jax.Array, groups: list[Any]
) -> tuple[jax.Array | None, jax.Array | None, dict[str, Any]]:
    """(which new tokens exist (B, T) or None, which sequences have a bad mask or None, options of a mask of pairs)."""
    if mask is None:
        return None, None, {}
    (batch, tokens, heads, _), mask = query.shape, mask if isinstance(mask, jax.Array) else np.asarray(mask)
    floating, of_keys = jnp.issubdtype(mask.dtype, jnp.floating), mask.ndim == 4 and mask.shape[1:3] == (1, 1)
    if of_keys and mask.shape[3] == tokens and not floating:
        mask = jnp.broadcast_to(mask[:, 0, 0], (batch, tokens))
    if mask.ndim != 4 or (mask.shape == (batch, 1, tokens, 1) and tokens > 1):
        valid, wrong = padding.valid(op, mask, batch, tokens)
        return valid, None if wrong is None else wrong.any(axis=1), {}
    if len(groups) > 1 or isinstance(groups[0], RingCache):
        raise ValueError(
            f"{op}: attention_mask.shape={mask.shape}: with a cache of windows it must be {shapes.MASK_SHAPES}"
        )
    capacity, bad = groups[0].key.shape[1], None
    if mask.shape[3] > capacity:
        raise ValueError(f"{op}: attention_mask.shape={mask.shape} has more keys than the cache's {capacity}")
    if of_keys and not floating:
        seen, wrong = padding.valid(op, jnp.broadcast_to(mask[:, 0, 0], (batch, mask.shape[3])), batch, mask.shape[3])
        mask, bad = seen[:, None, None], None if wrong is None else wrong.any(axis=1)
    if mask.dtype != bool and not floating:
        raise TypeError(f"{op}: attention_mask {mask.shape} of {mask.dtype.name}, of pairs, must be bool or float")
    shapes.broadcastable(op, "attention_mask", mask, (batch, heads, tokens, max(mask.shape[3], 1)))
    if floating:
        shapes.additive(op, mask)
    hidden = jnp.asarray(-jnp.inf if floating else False, mask.dtype)
    missing = 0 if mask.shape[3] == 1 else capacity - mask.shape[3]  # one column stands for all keys, as elsewhere
    full = jnp.pad(mask, [(0, 0)] * 3 + [(0, missing)], constant_values=hidden)
    causal = {} if mask.shape[2] == 1 else {"is_causal": False}  # as without a cache: one of keys comes on top of it
    return None, bad, {"bias" if floating else "mask": full, **causal}


def _existing_first(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None
) -> tuple[_New, jax.Array | None]:
    """(the tokens in a new order, that order or None)."""
    batch, tokens = query.shape[:2]
    if valid is None:
        _, count = alike("cache", (query, jnp.full((batch,), tokens, jnp.int32)), ("b.h", "b"))
        return _New(query, key, value, count, True, count), None
    order = jnp.argsort(jnp.logical_not(valid), axis=1, stable=True)
    query, key, value = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (query, key, value))
    count = valid.sum(axis=1, dtype=jnp.int32)
    return _New(query, key, value, count, False, count), order


def check_room(op: str, groups: list[Any], count: Any) -> None:
    """ValueError where it is known that `count` (B,) new tokens do not fit into a cache."""
    for cache in groups:
        if not isinstance(cache, KVCache) or not (shapes.known(cache.lengths) and shapes.known(count)):
            continue
        capacity, after = cache.key.shape[1], np.asarray(cache.lengths) + np.asarray(count)
        if (after > capacity).any():
            raise ValueError(
                f"{op}: with the new tokens a sequence has {after.max()}, and the cache's capacity is {capacity}; "
                "make a larger one with init_cache(batch_size, capacity)"
            )


def _part(new: _New, group: Group) -> _New:
    """What concerns one group of heads."""
    kv = slice(*group.kv_heads)
    return new._replace(query=new.query[:, :, slice(*group.heads)], key=new.key[:, :, kv], value=new.value[:, :, kv])


def _over_all(function: Attend, new: _New, cache: KVCache, options: dict[str, Any]) -> tuple[jax.Array, KVCache]:
    """Over all tokens of the cache; the rows of tokens for which there was no room are NaN."""
    after = caches.append(cache, new.key.astype(cache.key.dtype), new.value.astype(cache.value.dtype), new.count)
    lengths = {"q_offset": cache.lengths, "key_value_seq_lengths": after.lengths, **_query_lengths(new)}
    out = function(new.query, after.key, after.value, **lengths, **options)
    number = jnp.arange(new.query.shape[1], dtype=jnp.int32)[None]
    lost = (number < new.count[:, None]) & (cache.lengths[:, None] + number >= cache.key.shape[1])
    return jnp.where(lost[:, :, None, None], jnp.asarray(jnp.nan, out.dtype), out), after


def _over_ring(new: _New, cache: RingCache, options: dict[str, Any]) -> tuple[jax.Array, RingCache]:
    """Over the last W tokens; those of the ring are laid out before the new ones, which stand at W and on."""
    key, value = new.key.astype(cache.key.dtype), new.value.astype(cache.value.dtype)
    tokens, window = new.query.shape[1], cache.key.shape[1]
    after = caches.turn(cache, key, value, new.kept)
    if tokens == 1:  # it sees all that the ring now holds, in whatever order
        lengths = {"key_value_seq_lengths": jnp.minimum(after.lengths, window), **_query_lengths(new)}
        return attention.flash_attention(
            new.query, after.key, after.value, is_causal=False, **lengths, **options
        ), after
    old_key, old_value, there = caches.unrolled(cache)
    exists = jnp.arange(tokens, dtype=jnp.int32)[None] < new.count[:, None]
    segments = tuple(jnp.where(x, 0, -1) for x in (exists, jnp.concatenate([there, exists], axis=1)))
    out = attention.sliding_window_attention(
        new.query,
        jnp.concatenate([old_key, key], axis=1),
        jnp.concatenate([old_value, value], axis=1),
        window_size=window,
        q_offset=window,
        segment_ids=segments,
        **options,
    )
    return out, after


def _query_lengths(new: _New) -> dict[str, Any]:
    return {} if new.all_exist else {"query_seq_lengths": new.count}
