"""Caches for decoding, pytrees of static size that a layer takes and gives back: KVCache, RingCache, MultiScaleCache.

LinearState and EvoState, the caches of linear attention and of EvoAttention, are sums and lie with their references.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evo_jax import shapes
from evo_jax.sharding import by_shards
from reference.states import take_sequences

AXES = ("b.k", "b.k", "b")  # of key, value and lengths, for by_shards


class KVCache(NamedTuple):
    """Keys and values of up to C tokens of each sequence; token number t is in slot t.

    Attributes:
        key: (B, C, K, D), turned by their positions where the layer is given any.
        value: (B, C, K, D).
        lengths: (B,) int32, how many tokens each sequence has; slots from there on hold nothing that is read.

    >>> import jax.numpy as jnp, evo_jax
    >>> from flax import nnx
    >>> layer = evo_jax.FlashAttention(hidden_size=64, num_heads=4, num_kv_heads=2, rngs=nnx.Rngs(0))
    >>> cache = layer.init_cache(batch_size=2, capacity=100)
    >>> out, cache = layer(jnp.ones((2, 7, 64)), cache=cache)
    >>> cache.key.shape, cache.lengths.tolist(), cache.take(jnp.array([1, 1, 0])).lengths.shape
    ((2, 100, 2, 16), [7, 7], (3,))
    """

    key: Any
    value: Any
    lengths: Any

    take = take_sequences


class RingCache(NamedTuple):
    """Keys and values of the last W tokens of each sequence, however long it is; token number t is in slot t % W.

    Attributes: those of KVCache, with W slots; `lengths` counts all tokens that there ever were.
    """

    key: Any
    value: Any
    lengths: Any

    take = take_sequences


class MultiScaleCache(NamedTuple):
    """One cache for each run of neighbouring heads with one window: a RingCache, or a KVCache where there is none.

    Key/value heads that two runs share are in both. The caches are in the order of the heads.
    """

    groups: tuple[KVCache | RingCache, ...]

    take = take_sequences


def empty(kind: Any, sizes: tuple[int, int, int, int], dtype: Any) -> Any:
    """A KVCache or RingCache without tokens; `sizes` are B, C or W, K and D."""
    return kind(jnp.zeros(sizes, dtype), jnp.zeros(sizes, dtype), jnp.zeros(sizes[:1], jnp.int32))


def append(cache: KVCache, key: jax.Array, value: jax.Array, count: Any) -> KVCache:
    """With the first `count` (B,) of the new tokens (B, T, K, D), those for which there is room."""
    return _with_tokens(_append, cache, key, value, count)


def turn(cache: RingCache, key: jax.Array, value: jax.Array, count: Any) -> RingCache:
    """With the first `count` (B,) of the new tokens (B, T, K, D) in place of the oldest ones."""
    return _with_tokens(_turn, cache, key, value, count)


def unrolled(cache: RingCache) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(key, value, which of them exist (B, W)) of the last W tokens from old to new."""
    return by_shards("RingCache", _unrolled, (cache,), (RingCache(*AXES),), AXES)


def _with_tokens(update: Any, cache: Any, key: jax.Array, value: jax.Array, count: Any) -> Any:
    op, own = type(cache).__name__, type(cache)(*AXES)
    return by_shards(op, update, (cache, key, value, count), (own, *AXES), own)


def _append(cache: KVCache, key: jax.Array, value: jax.Array, count: Any) -> KVCache:
    capacity, tokens = cache.key.shape[1], key.shape[1]
    number = jnp.arange(tokens, dtype=jnp.int32)[None]
    slots = cache.lengths[:, None] + number
    fits = (number < count[:, None]) & (slots < capacity)
    lengths = jnp.minimum(cache.lengths + count, capacity)
    return KVCache(*_written(cache, key, value, jnp.where(fits, slots, capacity + number)), lengths)


def _turn(cache: RingCache, key: jax.Array, value: jax.Array, count: Any) -> RingCache:
    slots, tokens = cache.key.shape[1], key.shape[1]
    number = jnp.arange(tokens, dtype=jnp.int32)[None]
    last = (number < count[:, None]) & (number >= count[:, None] - slots)
    place = jnp.where(last, (cache.lengths[:, None] + number) % slots, slots + number)
    return RingCache(*_written(cache, key, value, place), cache.lengths + count)


def _unrolled(cache: RingCache) -> tuple[jax.Array, jax.Array, jax.Array]:
    slots = cache.key.shape[1]
    number = jnp.arange(slots, dtype=jnp.int32)[None]
    place = ((cache.lengths[:, None] + number) % slots)[:, :, None, None]
    key, value = (jnp.take_along_axis(x, place, axis=1) for x in (cache.key, cache.value))
    return key, value, number >= slots - cache.lengths[:, None]


def _written(cache: Any, key: jax.Array, value: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values with the new ones in their slots; those beyond the last slot go nowhere."""
    sequence = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]

    def set_in(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[sequence, slots].set(new, mode="drop", unique_indices=True)

    return set_in(cache.key, key), set_in(cache.value, value)


def checked(op: str, cache: Any, kind: Any, sizes: tuple[int, int | None, int, int]) -> Any:
    """`cache`, which must be a `kind` of B, C (None: any), K and D."""
    if not isinstance(cache, kind):
        raise TypeError(f"{op}: cache is a {type(cache).__name__} and must be what init_cache gives, a {kind.__name__}")
    for name, array in (("key", cache.key), ("value", cache.value)):
        array = shapes.float_array(op, f"cache.{name}", array)
        expected = tuple(n if m is None else m for n, m in zip(array.shape, sizes, strict=False))
        if array.ndim != 4 or array.shape != expected or array.shape != cache.key.shape:
            raise ValueError(f"{op}: cache.{name}.shape={array.shape} must be (B, C, K, D) = {sizes}, as of init_cache")
    lengths = shapes.lengths(op, "cache.lengths", cache.lengths, sizes[0])
    return kind(jnp.asarray(cache.key), jnp.asarray(cache.value), lengths)
