"""Device-side helpers of the softmax kernels: what a program reads, whom a tile visits, scores, masks, dropout."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import _pallas as plk
from pallas_kernels.dots import Dots
from pallas_kernels.launch import AttendLaunch
from reference.logits import AttendSpec, cap_slope, capped, kept
from reference.mask import Keys, Pattern, Queries, allows
from reference.online_softmax import LOG2_E
from reference.visit import Tiling

LN_2 = math.log(2)


@dataclass(frozen=True, slots=True)
class Task:
    """Statics of one kernel. Its grid is (tiles, heads, batch): a program may see several heads and sequences."""

    name: str
    spec: AttendSpec
    pattern: Pattern
    tiling: Tiling
    widths: tuple[int, int]  # of keys and values
    programs: tuple[int, int]  # along heads and sequences
    loops: tuple[bool, bool]  # whether some tiles need the mask, and whether some do not
    launch: AttendLaunch
    dots: Dots  # of rows, and of weights with rows
    wide_dots: Dots  # of gradients of scores with rows
    group: int = 1  # consecutive rows of the queries' tile that are one token's, by different heads

    @property
    def share(self) -> tuple[int, int]:
        """Query heads and sequences of one program."""
        return self.tiling.heads // self.programs[0], self.tiling.batch // self.programs[1]

    def parts(self, width: int) -> list[tuple[int, int]]:
        """(start, size) of parts of a row; of one size where they are read in a loop."""
        size = self.launch.widest
        if self.launch.reread:
            return [(start, size) for start in range(0, width, size)]
        return parts_of(width, size)

    @property
    def base_2(self) -> AttendSpec:
        """Gives scores times log2(e)."""
        cap = self.spec.soft_cap
        return replace(self.spec, scale=self.spec.scale * LOG2_E, soft_cap=None if cap is None else cap * LOG2_E)


class Refs(NamedTuple):
    """Arrays of one kernel, in memory order; None for what there is not."""

    query: Any = None  # (B, T, N, D)
    key: Any = None  # (B, S, K, D)
    value: Any = None  # (B, S, K, V)
    out: Any = None  # (B, T, N, V), or its cotangent
    lse: Any = None  # (B, N, T) in base 2; in the backward its negative
    delta: Any = None  # (B, N, T)
    bounds: Any = None  # of reference.visit.Visits
    extras: Any = None  # (B or 1, K or 1, tiles, E), and counts (B or 1, K or 1, tiles)
    counts: Any = None
    windows: Any = None  # (N, 2)
    table: Any = None  # (K, blocks, R)
    offset: Any = None
    q_lengths: Any = None
    kv_lengths: Any = None
    q_segments: Any = None
    kv_segments: Any = None
    keep: Any = None
    bias: Any = None
    sinks: Any = None
    seeds: Any = None  # (B, N), of dropout


# How a program finds its part: "b" sequences, "h" heads, "w" columns (in parts), "." whole.
_AXES = Refs(
    *("b.hw", "b.hw", "b.hw", "b.hw", "bh.", "bh."),
    *("bh..", "bh..", "bh.", "h.", "h..", "b", "b", "b", "b.", "b.", "bh..", "bh..", "h", "bh"),
)


def run(kernel: Callable[..., None], task: Task, refs: Refs, out_types: Refs, tiles: int) -> Refs:
    """Launch `kernel(refs, outs, task=task)`, one program per tile, share of heads and share of sequences."""

    def specs(arrays: Refs) -> Refs:
        return Refs(*(None if x is None else _spec(x, axes, task) for x, axes in zip(arrays, _AXES, strict=True)))

    return plk.call(
        partial(kernel, task=task),
        refs,
        name=task.name,
        grid=(tiles, *task.programs),
        in_specs=(specs(refs),),
        out_specs=specs(out_types),
        out_shape=out_types,
        num_warps=task.launch.num_warps,
        num_stages=task.launch.num_stages,
        interpret=task.launch.interpret,
    )


def _spec(array: Any, axes: str, task: Task) -> Any:
    def along(axis: str, n: int) -> Any:
        if axis == ".":
            return None
        if axis == "w":
            return sum(size for _, size in task.parts(n))
        programs = task.programs["hb".index(axis)]
        return plk.Along(1 + "hb".index(axis), max(programs // n, 1), max(n // programs, 1))

    return plk.block(array, *(along(axis, n) for axis, n in zip(axes, array.shape, strict=True)))


def parts_of(width: int, widest: int) -> list[tuple[int, int]]:
    """(start, size) of parts of a row: powers of two from 16 on, so that 80 columns take 64 and 16, not 128."""
    parts, start, rest = [], 0, -(-width // 16) * 16
    while rest:
        size = min(1 << (rest.bit_length() - 1), widest)
        parts.append((start, size))
        start, rest = start + size, rest - size
    return parts


class Place(NamedTuple):
    """Which of a program's heads and sequences it is at."""

    b: Any
    h: Any
    share: tuple[int, int]

    def of(self, ref: Any, batch_axis: int | None, head_axis: int | None) -> tuple[Any, ...]:
        """Indices of the sequence and the head in a ref; heads that share one, or all of them, index the same."""
        pairs = ((self.b, self.share[1], batch_axis), (self.h, self.share[0], head_axis))
        return tuple(_shared(i, n, ref.shape[axis]) for i, n, axis in pairs if axis is not None)


def _shared(i: Any, count: int, length: int) -> Any:
    repeat = count // length
    return jnp.int32(0) if length == 1 else i if repeat == 1 else lax.div(i, jnp.int32(repeat))


def first_place(task: Task) -> Place:
    return Place(jnp.int32(0), jnp.int32(0), task.share)


def over_places(step: Callable[[Place, Any], Any], init: Any, task: Task) -> Any:
    """Fold `step(place, state)` over the heads and sequences of this program, in their order."""
    (heads, batch), zero = task.share, jnp.int32(0)

    def at_sequence(b: Any, state: Any) -> Any:
        def at_head(h: Any, state: Any) -> Any:
            return step(Place(b, h, task.share), state)

        return at_head(zero, state) if heads == 1 else lax.fori_loop(zero, jnp.int32(heads), at_head, state)

    return at_sequence(zero, init) if batch == 1 else lax.fori_loop(zero, jnp.int32(batch), at_sequence, init)


class Tokens(NamedTuple):
    """The queries, or the keys, of one tile."""

    start: Any
    index: jax.Array  # 1-D token numbers
    inside: jax.Array  # 1-D: in the array
    here: jax.Array  # 1-D: exists; else nothing of it is read
    across: jax.Array  # the numbers, on their axis of the tile
    facts: Any  # Queries or Keys of the mask's rule


def queries(refs: Refs, place: Place, tile: Any, task: Task, axis: int) -> Tokens:
    """Those of tile number `tile`, on `axis` of the tiles of scores."""
    size, length, pattern = task.tiling.block_q, task.tiling.queries, task.pattern
    start = tile * size
    index, inside, here, segment = _tokens(start, size, length, refs.q_lengths, refs.q_segments, place)
    across = partial(jnp.expand_dims, axis=1 - axis)
    offset = pattern.offset if refs.offset is None else plk.load_one(refs.offset, *place.of(refs.offset, 0, None))
    left, right = pattern.windows[0]
    if refs.windows is not None:
        (head,) = place.of(refs.windows, None, 0)
        left, right = (plk.load_one(refs.windows, head, n) for n in (0, 1))
    position = (index if task.group == 1 else lax.div(index, jnp.int32(task.group))) + offset
    blocks: tuple[Any, ...] = ()
    if refs.table is not None:
        first = start + offset if _of_one_block(refs, task) else across(position)
        blocks = _random_blocks(refs.table, place, first, task)
    ragged = refs.q_lengths is not None or length % size
    live = across(index < _length(refs.q_lengths, length, place)) if ragged else None
    facts = Queries(across(position), left, right, live, None if segment is None else across(segment), blocks)
    return Tokens(start, index, inside, here, across(index), facts)


def keys(refs: Refs, place: Place, tile: Any, task: Task, axis: int) -> Tokens:
    """As `queries`."""
    size, length = task.tiling.block_k, task.tiling.keys
    start = tile * size
    index, inside, here, segment = _tokens(start, size, length, refs.kv_lengths, refs.kv_segments, place)
    across = partial(jnp.expand_dims, axis=1 - axis)
    ragged = refs.kv_lengths is not None or length % size
    live = across(index < _length(refs.kv_lengths, length, place)) if ragged else None
    block = None
    if refs.table is not None:  # one number, where a tile lies in one block
        block = lax.div(across(index) if task.pattern.block_size % size else start, jnp.int32(task.pattern.block_size))
    facts = Keys(across(index), live, None if segment is None else across(segment), block)
    return Tokens(start, index, inside, here, across(index), facts)


def _length(lengths: Any, length: int, place: Place) -> Any:
    return length if lengths is None else jnp.minimum(plk.load_one(lengths, *place.of(lengths, 0, None)), length)


def _tokens(start: Any, size: int, length: int, lengths: Any, segments: Any, place: Place) -> tuple[Any, ...]:
    """(index, inside, here, segment or None)."""
    index = start + plk.arange(size)
    inside = index < length
    here = inside if lengths is None else index < _length(lengths, length, place)
    if segments is None:
        return index, inside, here, None
    segment = plk.load(segments, (*place.of(segments, 0, None), plk.span(start, size)), inside)
    return index, inside, here & (segment >= 0), jnp.where(inside, segment, -1)


def _of_one_block(refs: Refs, task: Task) -> bool:
    """Whether each tile of queries lies in one block of positions."""
    size, pattern = task.tiling.block_q, task.pattern
    return refs.offset is None and task.group == 1 and pattern.block_size % size == pattern.offset % size == 0


def _random_blocks(table: Any, place: Place, position: jax.Array, task: Task) -> tuple[Any, ...]:
    """Of queries at `position`, an array or one number for them all: each of their random blocks, -1 for none."""
    (head,) = place.of(table, None, 0)
    block = lax.div(position, jnp.int32(task.pattern.block_size))
    known = (position >= 0) & (block < table.shape[1])
    block = jnp.clip(block, 0, table.shape[1] - 1)

    def drawn(r: int) -> jax.Array:
        if block.ndim == 0:
            number = plk.load_one(table, head, block, r)
        else:
            number = plk.load(table, (jnp.full_like(block, head), block, jnp.full_like(block, r)), known)
        return jnp.where(known, number, -1)

    return tuple(drawn(r) for r in range(task.pattern.num_random))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of (B, L, heads, width) in parts: held, or read again wherever they are used."""

    size: int
    parts: list[tuple[int, int]]
    load: Callable[[Any, int], jax.Array]  # of (first column, columns); 0 for tokens that do not exist
    held: tuple[jax.Array, ...] | None

    def part(self, n: int) -> jax.Array:
        return self.load(*self.parts[n]) if self.held is None else self.held[n]


def rows(ref: Any, place: Place, tokens: Tokens, width: int, task: Task) -> Rows:
    """Those of a tile of tokens."""
    (b, h), size, parts = place.of(ref, 0, 2), tokens.index.shape[0], task.parts(width)
    ragged = sum(columns for _, columns in parts) > width

    def load(start: Any, columns: int) -> jax.Array:
        here = tokens.here[:, None]
        if ragged:
            here = here & (plk.arange(columns) < width - start)[None, :]
        index = (b, plk.span(tokens.start, size), h, plk.span(start, columns))
        return plk.load(ref, index, jnp.broadcast_to(here, (size, columns)))

    return Rows(size, parts, load, None if task.launch.reread else tuple(load(*part) for part in parts))


def store_rows(ref: Any, place: Place, tokens: Tokens, parts: tuple[jax.Array, ...], width: int, task: Task) -> None:
    """Write parts of the tokens' rows, where the array has such."""
    (b, h), size = place.of(ref, 0, 2), tokens.index.shape[0]
    for (start, columns), value in zip(task.parts(width), parts, strict=True):
        ok = tokens.inside[:, None] & (plk.arange(columns) < width - start)[None, :]
        plk.store(ref, (b, plk.span(tokens.start, size), h, plk.span(start, columns)), value, ok)


def vector(ref: Any, place: Place, tokens: Tokens) -> jax.Array:
    """(size,) of (B, heads, L), 0 past its end."""
    return plk.load(ref, (*place.of(ref, 0, 1), plk.span(tokens.start, tokens.index.shape[0])), tokens.inside)


def store_vector(ref: Any, place: Place, tokens: Tokens, value: jax.Array) -> None:
    plk.store(ref, (*place.of(ref, 0, 1), plk.span(tokens.start, tokens.index.shape[0])), value, tokens.inside)


def pairs(ref: Any, place: Place, i: Tokens, j: Tokens) -> jax.Array:
    """The tile of (B, N, T or 1, S or 1), laid out as the scores are; it broadcasts to them."""
    index, mask = _pair_index(ref, place, i.across, j.across)
    return plk.load(ref, index, mask)


def store_pairs(ref: Any, place: Place, value: jax.Array, i: jax.Array, j: jax.Array) -> None:
    """Write a tile of rows i and columns j, 1-D both; an axis of length 1 has one row or column in `value` as well."""
    index, mask = _pair_index(ref, place, i[:, None], j[None, :])
    plk.store(ref, index, value, mask)


def _pair_index(ref: Any, place: Place, i: jax.Array, j: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
    lengths, mask = ref.shape[2:], jnp.ones((1, 1), bool)
    for length, number in zip(lengths, (i, j), strict=True):
        mask = mask if length == 1 else mask & (number < length)
    i, j = (n if length > 1 else jnp.zeros((1, 1), jnp.int32) for length, n in zip(lengths, (i, j), strict=True))
    b, h = (jnp.full((1, 1), x, jnp.int32) for x in place.of(ref, 0, 1))
    return (b, h, i, j), mask


def over_visits(
    step: Callable[[Any, Any, bool], Any],
    init: Any,
    refs: Refs,
    place: Place,
    tile: Any,
    task: Task,
    share: tuple[Any, int] | None = None,
) -> Any:
    """Fold `step(tile of the other kind, state, masked)` over the tiles that `tile` visits, or over one share of them.

    `share` is its number and how many there are; they differ by no more than the last one being short.
    """
    where = place.of(refs.bounds, 0, 1)
    first, free, masked, end = (plk.load_one(refs.bounds, *where, tile, n) for n in range(4))
    before, count = free - first, (free - first) + (end - masked)
    total = count
    if refs.extras is not None:
        where = place.of(refs.counts, 0, 1)
        total = count + plk.load_one(refs.counts, *where, tile)

    def number(t: Any) -> Any:
        near = jnp.where(t < before, first + t, masked + t - before)
        if refs.extras is None:
            return near
        far = plk.load(refs.extras, (*where, tile, jnp.maximum(t - count, 0)), t >= count)
        return jnp.where(t < count, near, far)

    with_mask, without = (0, total), (free, masked)
    if share is not None:
        whole = masked - free if task.loops[1] else jnp.int32(0)
        low, high = _range(share, whole + total)
        without = (free + jnp.minimum(low, whole), free + jnp.minimum(high, whole))
        with_mask = (jnp.maximum(low - whole, 0), jnp.maximum(high - whole, 0))
    if task.loops[0]:
        init = lax.fori_loop(with_mask[0], with_mask[1], lambda t, state: step(number(t), state, True), init)
    if task.loops[1]:
        init = lax.fori_loop(without[0], without[1], lambda t, state: step(t, state, False), init)
    return init


def _range(share: tuple[Any, int], count: Any) -> tuple[Any, Any]:
    """(first, end) of one share of 0..count."""
    number, shares = share
    size = lax.div(count + (shares - 1), jnp.int32(shares))
    return jnp.minimum(number * size, count), jnp.minimum((number + 1) * size, count)


def visited(refs: Refs, place: Place, q_tile: Any, k_tile: Any) -> Any:
    """1 or, where no key of the tile can be seen, 0."""
    if refs.extras is not None:
        return jnp.int32(1)
    first, end = (plk.load_one(refs.bounds, *place.of(refs.bounds, 0, 1), q_tile, n) for n in (0, 3))
    return ((first <= k_tile) & (k_tile < end)).astype(jnp.int32)


def loops_of(visits: Any, mask: Any) -> tuple[bool, bool]:
    """Task.loops: what is known of the visits while tracing."""
    free = mask.q_segments is None and mask.keep is None
    if not isinstance(visits.bounds, np.ndarray):
        return True, free
    first, start, stop, end = (visits.bounds[..., n] for n in range(4))
    some = bool(((start - first) + (end - stop)).any()) or visits.extras.shape[-1] > 0
    return some, free and bool((stop > start).any())


def product(task: Task, a: Rows, b: Rows) -> jax.Array:
    """a b^T. Rows that are not held are read in a loop: nothing less keeps the compiler from holding them."""
    if a.held is not None and b.held is not None:
        return reduce(add, (task.dots(x, y, (1, 1)) for x, y in zip(a.held, b.held, strict=True)))
    _, columns = a.parts[0]

    def add_part(n: Any, total: jax.Array) -> jax.Array:
        return total + task.dots(a.load(n * columns, columns), b.load(n * columns, columns), (1, 1))

    return lax.fori_loop(0, len(a.parts), add_part, jnp.zeros((a.size, b.size), jnp.float32))


def scores(
    products: jax.Array, refs: Refs, place: Place, i: Tokens, j: Tokens, task: Task, masked: bool
) -> tuple[jax.Array, Any]:
    """(scores, -inf where hidden; the slope of their cap): in base 2 once they are multiplied by score_scale."""
    spec = replace(task.base_2, scale=task.base_2.scale / score_scale(refs, task))
    values = products if spec.scale == 1 and spec.soft_cap is None else capped(products, spec)
    slope = cap_slope(values, spec)
    if refs.bias is not None:
        values = values + pairs(refs.bias, place, i, j).astype(jnp.float32) * LOG2_E
    if masked:
        seen = allows(task.pattern, i.facts, j.facts)
        seen = seen if refs.keep is None else seen & pairs(refs.keep, place, i, j)
        values = jnp.where(seen, values, -jnp.inf)
    return values, slope


def score_scale(refs: Refs, task: Task) -> float:
    """What `scores` leaves to who uses them, positive: all of the scale where only a difference comes after it."""
    scale = task.base_2.scale
    return scale if refs.bias is None and task.spec.soft_cap is None and 2.0**-100 < scale < 2.0**100 else 1.0


def dropped(weights: jax.Array, refs: Refs, place: Place, i: Tokens, j: Tokens, task: Task) -> jax.Array:
    """The weights that dropout keeps, 0 for the others; not scaled up."""
    if not task.spec.dropout_rate:
        return weights
    seed = plk.load_one(refs.seeds, *place.of(refs.seeds, 0, 1))
    keep = kept(task.spec.dropout_rate, seed, i.across, j.across)
    return jnp.where(keep, weights, 0.0)
