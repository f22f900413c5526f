"""Mask: which key each query may see. One rule, for the oracle, the fallback and the kernels' tiles.

With p = i + offset the position of query i, where `offset` puts the last query on the last key unless given,
    allows(b, h, i, j) =  i < q_length[b] and j < kv_length[b] and segment_q[b, i] == segment_kv[b, j] >= 0
                     and  (not causal or j <= p)
                     and  ( p - j <= left[h] and j - p <= right[h]      the band; unlimited for flash attention
                            or j < G or 0 <= p < G                      global tokens
                            or j // block in random[h, p // block] )    block-sparse attention
A query that may see no key gives 0, its log-sum-exp is -inf, and nothing flows back through it.
"""

from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import groupby, pairwise
from operator import and_, or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from reference.random_blocks import random_blocks

FAR = 2**30  # a window that no sequence is longer than


@dataclass(frozen=True, slots=True)
class Pattern:
    """What of a mask is known while tracing."""

    causal: bool = True
    windows: tuple[tuple[int, int], ...] = ((FAR, FAR),)  # (left, right): one pair for all heads, or one per head
    num_global: int = 0  # G
    block_size: int = 1  # of the random blocks
    num_random: int = 0  # of them per block of queries
    seed: int = 0  # they are drawn by
    offset: int = 0  # position of query 0, where Mask.offset is None

    @property
    def banded(self) -> bool:
        return any(left < FAR or right < FAR for left, right in self.windows)

    @property
    def scattered(self) -> bool:
        """Whether keys outside the band may be seen."""
        return self.num_global > 0 or self.num_random > 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["offset", "q_lengths", "kv_lengths", "q_segments", "kv_segments", "keep"],
    meta_fields=["pattern"],
)
@dataclass(frozen=True, slots=True)
class Mask:
    """A pattern, and the arrays that narrow it; int32, None for what does not narrow."""

    pattern: Pattern = field(default_factory=Pattern)
    offset: Any = None  # (B,), instead of pattern.offset
    q_lengths: Any = None  # (B,)
    kv_lengths: Any = None  # (B,)
    q_segments: Any = None  # (B, T), both or neither
    kv_segments: Any = None  # (B, S); negative: the token does not exist, whatever it holds
    keep: Any = None  # (B or 1, N or 1, T, S) bool: besides the rule, False hides a key


class Queries(NamedTuple):
    """What the rule asks of queries; each broadcasts against those of Keys."""

    position: Any  # p
    left: Any = FAR
    right: Any = FAR
    live: Any = None  # bool
    segment: Any = None
    random: tuple[Any, ...] = ()  # numbers of key blocks, -1 for none


class Keys(NamedTuple):
    """What the rule asks of keys."""

    index: Any  # j
    live: Any = None  # bool
    segment: Any = None
    block: Any = None  # j // block_size, where there are random blocks


def allows(pattern: Pattern, q: Queries, k: Keys) -> Array:
    """The rule, elementwise; bool of the broadcast shape. It runs inside kernels too.

    Of each pair it asks as little as it can, for kernels spend their time there: band and causality are one unsigned
    comparison, and a key that is seen outside of the band, by a wider band.
    """
    conditions = [live for live in (q.live, k.live) if live is not None]
    if pattern.banded:
        far = [k.block == block for block in q.random]
        if pattern.num_global:
            far += [k.index < pattern.num_global]
            if not pattern.causal:  # unsigned, positions before the first token are larger than any
                far += [q.position.astype(jnp.uint32) < jnp.uint32(pattern.num_global)]
        left, right = _reach(far, q.left), jnp.uint32(0) if pattern.causal else _reach(far, q.right)
        distance = (q.position - k.index).astype(jnp.uint32)  # of a later key, 2**32 less what it is before
        conditions.append(distance + right <= left + right)
    elif pattern.causal:
        conditions.append(k.index <= q.position)
    if q.segment is not None:
        conditions += [q.segment == k.segment, k.segment >= 0]
    everywhere = jnp.ones(jnp.broadcast_shapes(jnp.shape(q.position), jnp.shape(k.index)), bool)
    return reduce(and_, conditions, everywhere)


def _reach(far: list[Any], window: Any) -> Any:
    """How far the band reaches on one side, uint32: without end for pairs of which any of `far` is true."""
    window = jnp.asarray(window).astype(jnp.uint32)
    return jnp.where(reduce(or_, far), jnp.uint32(FAR), window) if far else window


def window_runs(windows: Any, heads: int, group: int) -> list[tuple[int, int, Any]]:
    """(first, last + 1, window) of neighbouring heads with one window, which share key heads evenly."""
    if len(windows) == 1:
        return [(0, heads, windows[0])]
    runs = []
    for window, members in groupby(range(heads), key=lambda h: windows[h]):
        numbers = list(members)
        first, end = numbers[0], numbers[-1] + 1
        whole = {-(-first // group) * group, end // group * group}  # between these, all heads of each key head
        cuts = sorted({first, end} | {cut for cut in whole if first < cut < end})
        runs += [(a, b, window) for a, b in pairwise(cuts)]
    return runs


def random_table(pattern: Pattern, kv_heads: int, keys: int) -> Any:
    """(K, blocks of keys, R) int32: the random key blocks of each block of positions, or None if there are none."""
    if not pattern.num_random:
        return None
    return random_blocks(pattern.causal, pattern.windows[0], pattern.num_global, pattern.block_size,
                         pattern.num_random, pattern.seed, kv_heads, keys)  # fmt: skip


def queries_of(mask: Mask, b: Any, h: Any, i: Any, table: Any, group: int) -> Queries:
    """The facts of queries i of heads h of sequences b: arrays of int32 that broadcast. `group` is N // K."""
    pattern = mask.pattern
    p = i + (pattern.offset if mask.offset is None else mask.offset[b])
    left, right = (
        jnp.asarray(x, jnp.int32)[h if len(pattern.windows) > 1 else 0] for x in zip(*pattern.windows, strict=True)
    )
    random = ()
    if table is not None:
        table = jnp.asarray(table)
        block = lax.div(jnp.maximum(p, 0), jnp.int32(pattern.block_size))
        known = (p >= 0) & (block < table.shape[1])
        rows = table[lax.div(h, jnp.int32(group)), jnp.minimum(block, table.shape[1] - 1)]
        random = tuple(jnp.where(known, rows[..., r], -1) for r in range(table.shape[2]))
    live = None if mask.q_lengths is None else i < mask.q_lengths[b]
    return Queries(p, left, right, live, None if mask.q_segments is None else mask.q_segments[b, i], random)


def keys_of(mask: Mask, b: Any, j: Any) -> Keys:
    """The facts of keys j of sequences b."""
    live = None if mask.kv_lengths is None else j < mask.kv_lengths[b]
    block = lax.div(j, jnp.int32(mask.pattern.block_size)) if mask.pattern.num_random else None
    return Keys(j, live, None if mask.kv_segments is None else mask.kv_segments[b, j], block)


def allowed(mask: Mask, shape: tuple[int, int, int, int], kv_heads: int) -> Array:
    """(B or 1, N or 1, T, S) bool for shape (B, N, T, S): the rule on all pairs, `keep` included."""
    batch, heads, queries, keys = shape
    b, h, i, j = (lax.broadcasted_iota(jnp.int32, (n,) + (1,) * (3 - d), 0)[(None,) * d] for d, n in
                  enumerate((batch, heads, queries, keys)))  # fmt: skip
    table = random_table(mask.pattern, kv_heads, keys)
    seen = allows(mask.pattern, queries_of(mask, b, h, i, table, heads // kv_heads), keys_of(mask, b, j))
    return seen if mask.keep is None else seen & mask.keep
