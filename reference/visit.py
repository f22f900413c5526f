"""Which key tiles a query tile visits, and the transpose of that for the gradients of keys and values.

Plans are tables of integers, made outside the kernels: computed while tracing unless lengths, segments or offsets are
arrays. Each pair of tiles is visited at most once; one that holds an allowed pair of tokens is visited.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from reference.mask import Mask, random_table


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes: B, N, K, T, S, and the tokens of a tile of queries and of keys."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    block_q: int
    block_k: int

    @property
    def q_tiles(self) -> int:
        return -(-self.queries // self.block_q)

    @property
    def k_tiles(self) -> int:
        return -(-self.keys // self.block_k)


class Visits(NamedTuple):
    """For each tile (of queries, or of keys in the transpose), the tiles of the other kind that it visits.

    bounds: (B or 1, N or 1, tiles, 4) int32, (first, free, masked, end): tiles first <= t < end are visited, and those
        with free <= t < masked need no mask at all, save for rows past the end of an array and query lengths.
    extras: (K or 1, tiles, E) int32 tiles outside of first..end, visited too, the rule applied; E may be 0.
    counts: (K or 1, tiles) int32, how many of the extras there are; the rest are 0.
    """

    bounds: Any
    extras: Any
    counts: Any


def key_visits(mask: Mask, tiling: Tiling) -> Visits:
    """Of each tile of queries: which tiles of keys."""
    return Visits(_narrowed(mask, tiling, transposed=False), *_extras(mask, tiling, transposed=False))


def query_visits(mask: Mask, tiling: Tiling) -> Visits:
    """Of each tile of keys: which tiles of queries."""
    return Visits(_narrowed(mask, tiling, transposed=True), *_extras(mask, tiling, transposed=True))


def _bounds(mask: Mask, tiling: Tiling, transposed: bool) -> Any:
    """`Visits.bounds` by the pattern and its offset alone, (B or 1, N or 1, tiles, 4)."""
    t, pattern = tiling, mask.pattern
    xp: Any = np if mask.offset is None else jnp
    offset = pattern.offset if mask.offset is None else jnp.asarray(mask.offset)[:, None, None]
    left, right = (np.asarray(x, np.int32)[None, :, None] for x in zip(*pattern.windows, strict=True))
    right = np.minimum(right, 0) if pattern.causal else right
    size, other, count = (t.block_k, t.block_q, t.k_tiles) if transposed else (t.block_q, t.block_k, t.q_tiles)
    tokens, others = (t.keys, t.queries) if transposed else (t.queries, t.keys)
    tile = np.arange(count, dtype=np.int32)[None, None]
    low, high = tile * size, np.minimum((tile + 1) * size, tokens) - 1  # the first and last token of each tile
    full = high
    if (
        transposed
    ):  # the queries whose positions see any key, and all keys, of the tile; on its last, those not there too
        left, right, offset, full = right, left, -offset, low + size - 1
    first, last = low + offset - left, high + offset + right
    free_first, free_last = full + offset - left, low + offset + right
    if pattern.scattered:
        everywhere = (low + (0 if transposed else offset) < pattern.num_global) | (mask.offset is not None)
        whole = (low + offset, others) if transposed else (0, high + offset)
        first = xp.where(everywhere, whole[0] if pattern.causal else 0, first)
        last = xp.where(everywhere, whole[1] if pattern.causal else others, last)
    first, stop = xp.clip(first, 0, others), xp.clip(last + 1, 0, others)
    first, stop = first // other, xp.where(stop <= first, first // other, -(-stop // other))
    # A tile is free if all of it lies within free_first..free_last and the array.
    free, masked = -(-xp.clip(free_first, 0, others) // other), xp.clip(free_last + 1, 0, others) // other
    free = xp.clip(free, first, stop)
    masked = free if mask.q_segments is not None or mask.keep is not None else xp.clip(masked, free, stop)
    if transposed:
        masked = xp.where(low + size <= tokens, masked, free)
    return xp.stack(xp.broadcast_arrays(first, free, masked, stop), -1).astype(np.int32)


def _narrowed(mask: Mask, tiling: Tiling, transposed: bool) -> Any:
    """The bounds, cut by lengths and segments."""
    t, bounds = tiling, _bounds(mask, tiling, transposed)
    if mask.q_lengths is not None or mask.kv_lengths is not None:
        ends = [
            jnp.clip(n if x is None else jnp.asarray(x, jnp.int32), 0, n).reshape(-1, 1, 1)
            for x, n in ((mask.q_lengths, t.queries), (mask.kv_lengths, t.keys))
        ]
        (end, other_end), sizes = (ends[::-1] if transposed else ends), (t.block_q, t.block_k)
        size, other = sizes[::-1] if transposed else sizes
        tile = jnp.arange(bounds.shape[2], dtype=jnp.int32)[None, None] * size
        first, free, masked, stop = (bounds[..., n] for n in range(4))
        stop = jnp.minimum(stop, jnp.where(tile >= end, 0, -(-other_end // other)))
        first, whole = jnp.minimum(first, stop), (tile + size <= end) | (not transposed)
        free = jnp.clip(free, first, stop)
        masked = jnp.where(whole, jnp.clip(jnp.minimum(masked, other_end // other), free, stop), free)
        bounds = jnp.stack(jnp.broadcast_arrays(first, free, masked, stop), -1)
    return bounds if mask.q_segments is None else _within_segments(bounds, mask, tiling, transposed)


def _within_segments(bounds: Any, mask: Mask, tiling: Tiling, transposed: bool) -> Any:
    """The bounds cut to the first and last tile that holds a segment of this one's; no tile is free."""
    spans = [_spans(mask.q_segments, tiling.block_q), _spans(mask.kv_segments, tiling.block_k)]
    (low, high), (other_low, other_high) = spans[::-1] if transposed else spans
    alive = (low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= high[:, :, None])  # (B, tiles, others)
    number = jnp.arange(alive.shape[2], dtype=jnp.int32)[None, None]
    first = jnp.where(alive, number, alive.shape[2]).min(-1)[:, None]
    end = jnp.where(alive, number + 1, 0).max(-1)[:, None]
    first = jnp.maximum(bounds[..., 0], first)
    end = jnp.maximum(jnp.minimum(bounds[..., 3], end), first)
    return jnp.stack([first, first, first, end], -1)


def _spans(segments: Any, block: int) -> tuple[Any, Any]:
    """(B, tiles) smallest and largest segment of each tile; an empty span where no token of it exists."""
    length = segments.shape[1]
    padded = jnp.pad(segments, ((0, 0), (0, -length % block)), constant_values=-1)
    tiles = padded.reshape(padded.shape[0], -1, block)
    top = np.iinfo(np.int32).max
    return jnp.where(tiles >= 0, tiles, top).min(-1), tiles.max(-1)


def _extras(mask: Mask, tiling: Tiling, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """`Visits.extras` and `.counts`: what lies outside the static bounds."""
    count = tiling.k_tiles if transposed else tiling.q_tiles
    if not mask.pattern.scattered or mask.offset is not None:
        return np.zeros((1, count, 0), np.int32), np.zeros((1, count), np.int32)
    head, q, k = _scattered_pairs(mask, tiling)
    own, other = (k, q) if transposed else (q, k)
    bounds = _bounds(Mask(mask.pattern), tiling, transposed)[0, 0]
    outside = (other < bounds[own, 0]) | (other >= bounds[own, 3])
    head, own, other = head[outside], own[outside], other[outside]
    order = np.lexsort((other, own, head))
    head, own, other = head[order], own[order], other[order]
    heads = tiling.kv_heads if mask.pattern.num_random else 1
    counts = np.zeros((heads, count), np.int32)
    np.add.at(counts, (head, own), 1)
    extras = np.zeros((heads, count, int(counts.max(initial=0))), np.int32)
    starts = np.concatenate([[0], np.cumsum(counts.reshape(-1))])[:-1].reshape(counts.shape)
    extras[head, own, np.arange(own.size) - starts[head, own]] = other
    return extras, counts


def _scattered_pairs(mask: Mask, tiling: Tiling) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(key/value head, query tile, key tile), each once: pairs that hold global tokens or random blocks."""
    t, pattern = tiling, mask.pattern
    heads = t.kv_heads if pattern.num_random else 1
    low = np.arange(t.q_tiles) * t.block_q + pattern.offset  # position of each tile's first query
    high = np.minimum((np.arange(t.q_tiles) + 1) * t.block_q, t.queries) - 1 + pattern.offset
    rows, columns = np.flatnonzero(low < pattern.num_global), np.arange(t.k_tiles)
    columns = columns[columns * t.block_k < pattern.num_global]
    codes = [_product(heads, t, rows, np.arange(t.k_tiles)), _product(heads, t, np.arange(t.q_tiles), columns)]
    table = random_table(pattern, t.kv_heads, t.keys)
    if table is not None:
        size = pattern.block_size
        reach = (t.block_q - 1) // size + 2  # blocks of positions that one tile of queries can touch
        spread = (size - 1) // t.block_k + 2  # tiles of keys that one block can touch
        block = np.maximum(low, 0)[:, None] // size + np.arange(reach)
        block = np.where((block * size <= high[:, None]) & (block < table.shape[1]), block, -1)
        drawn = np.where(block[None, :, :, None] >= 0, table[:, block], -1)  # (K, q_tiles, reach, R)
        tile = (drawn * size // t.block_k)[..., None] + np.arange(spread)
        last = (np.minimum((drawn + 1) * size, t.keys) - 1) // t.block_k
        head, q, *_ = np.nonzero(found := (drawn >= 0)[..., None] & (tile <= last[..., None]))
        codes.append((head * t.q_tiles + q) * t.k_tiles + tile[found])
    code = np.unique(np.concatenate(codes))
    q, k = code // t.k_tiles % t.q_tiles, code % t.k_tiles
    possible = (k * t.block_k <= high[q]) | (not pattern.causal)
    return tuple(x[possible] for x in (code // (t.q_tiles * t.k_tiles), q, k))  # type: ignore[return-value]


def _product(heads: int, t: Tiling, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Codes of all pairs (head, q, k)."""
    return ((np.arange(heads)[:, None, None] * t.q_tiles + q[:, None]) * t.k_tiles + k).reshape(-1)
