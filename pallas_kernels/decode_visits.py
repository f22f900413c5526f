"""Which tiles of keys a few queries of a scattered pattern visit where each sequence stands at its own position."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from reference.mask import Mask, Pattern, random_table
from reference.visit import Tiling, Visits, key_visits


def sought(mask: Mask) -> bool:
    """Whether `seek` serves. Only a causal global query sees no more keys than those of global tokens."""
    return mask.pattern.scattered and mask.pattern.causal and mask.offset is not None


def most_far(pattern: Pattern, tiling: Tiling) -> int:
    """The most tiles that hold global tokens or one sequence's random blocks."""
    spread = (pattern.block_size - 1) // tiling.block_k + 2  # tiles that one block can touch
    return -(-pattern.num_global // tiling.block_k) + _blocks(pattern, tiling) * pattern.num_random * spread


def seek(mask: Mask, tiling: Tiling) -> Visits:
    """As reference.visit.key_visits, of the one tile of queries: extras (B, K, 1, E) and counts (B, K, 1)."""
    plain = replace(mask.pattern, num_global=0, num_random=0)
    bounds = key_visits(replace(mask, pattern=plain), tiling).bounds  # of the band, (B, 1, 1, 4)
    tile = jnp.arange(tiling.k_tiles, dtype=jnp.int32)[None, None]
    end = mask.offset[:, None, None] + tiling.queries  # of the positions
    outside = (tile < bounds[..., 0, :1]) | (tile >= bounds[..., 0, 3:])
    live = (tile * tiling.block_k < mask.pattern.num_global) | _random(mask, tiling, tile)
    live = live & outside & (tile * tiling.block_k < end)
    rank = jnp.cumsum(live, axis=2, dtype=jnp.int32)
    number = jnp.arange(min(most_far(mask.pattern, tiling), tiling.k_tiles), dtype=jnp.int32)[None, None, :, None]
    extras = (rank[:, :, None] <= number).sum(3, dtype=jnp.int32)  # where the rank is reached
    return Visits(bounds, jnp.minimum(extras, tiling.k_tiles - 1)[:, :, None], rank[:, :, -1:])


def _blocks(pattern: Pattern, tiling: Tiling) -> int:
    """Blocks of positions that the queries can touch."""
    return min((tiling.queries - 1) // pattern.block_size + 2, tiling.queries)


def _random(mask: Mask, tiling: Tiling, tile: jax.Array) -> jax.Array:
    """(B, K, tiles), for `tile` (1, 1, tiles): whether a tile holds keys of a random block of these queries."""
    pattern, size = mask.pattern, mask.pattern.block_size
    table = random_table(pattern, tiling.kv_heads, tiling.keys)
    if table is None:
        return jnp.zeros((1, 1, 1), bool)
    first, last = mask.offset, mask.offset + tiling.queries - 1
    number = jnp.arange(_blocks(pattern, tiling), dtype=jnp.int32)[None]
    block = lax.div(jnp.maximum(first, 0), jnp.int32(size))[:, None] + number
    known = (block * size <= last[:, None]) & (block < table.shape[1])
    drawn = jnp.asarray(table)[:, jnp.minimum(block, table.shape[1] - 1)]  # (K, B, blocks, R)
    drawn = jnp.where(known[None, :, :, None], drawn, -1).swapaxes(0, 1).reshape(tiling.batch, tiling.kv_heads, -1, 1)
    low, high = (
        lax.div(drawn * size, jnp.int32(tiling.block_k)),
        lax.div((drawn + 1) * size - 1, jnp.int32(tiling.block_k)),
    )
    return ((drawn >= 0) & (low <= tile[None]) & (tile[None] <= high)).any(2)
