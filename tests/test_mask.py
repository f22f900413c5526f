"""The rule of reference.mask against loops over tokens, tiles of reference.visit against the rule, random blocks."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from cases import ATTEND_CASES, attend_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.counter_hash import mixed
from reference.mask import FAR, Mask, Pattern, allowed
from reference.random_blocks import random_blocks
from reference.visit import Tiling, Visits, key_visits, query_visits

# Few shapes, as JAX compiles each operation for each: B, N, K, T, S and the sizes of tiles.
TILINGS = (Tiling(2, 4, 2, 33, 40, 8, 16), Tiling(2, 2, 2, 40, 17, 16, 8), Tiling(2, 2, 1, 5, 40, 8, 8))


def loops(mask: Mask, tiling: Tiling) -> np.ndarray:
    """(B, N, T, S): the rule as its documentation has it, one pair at a time."""
    p, t = mask.pattern, tiling
    seen = np.zeros((t.batch, t.heads, t.queries, t.keys), bool)
    arrays: list[Any] = [None if a is None else np.asarray(a) for a in
              (mask.offset, mask.q_lengths, mask.kv_lengths, mask.q_segments, mask.kv_segments, mask.keep)]  # fmt: skip
    offsets, q_lengths, kv_lengths, q_segments, kv_segments, keep = arrays
    blocks = random_blocks(p.causal, p.windows[0], p.num_global, p.block_size, p.num_random, p.seed, t.kv_heads, t.keys)

    def may_see(b: int, h: int, i: int, j: int) -> bool:
        position = i + (p.offset if offsets is None else int(offsets[b]))
        if (q_lengths is not None and i >= q_lengths[b]) or (kv_lengths is not None and j >= kv_lengths[b]):
            return False
        if q_segments is not None and not q_segments[b, i] == kv_segments[b, j] >= 0:
            return False
        if (p.causal and j > position) or (keep is not None and not keep[b, 0, i, j]):
            return False
        left, right = p.windows[h if len(p.windows) > 1 else 0]
        if position - j <= left and j - position <= right:
            return True
        if j < p.num_global or 0 <= position < p.num_global:
            return True
        block = position // p.block_size
        return 0 <= block < blocks.shape[1] and j // p.block_size in blocks[h // (t.heads // t.kv_heads), block]

    for pair in np.ndindex(seen.shape):
        seen[pair] = may_see(*pair)
    return seen


@st.composite
def masks(draw: Any) -> tuple[Mask, Tiling]:
    """A tiling and any mask of its sizes."""
    t = draw(st.sampled_from(TILINGS))
    band = st.tuples(st.sampled_from((0, 3, 20)), st.sampled_from((0, 3, 20)))
    reach = st.sampled_from((0, 4, 20, FAR)).map(lambda n: (n, n))
    windows, sparse = ((FAR, FAR),), (0, 1, 0)
    kind = draw(st.sampled_from(("all", "band", "each head", "sparse")))
    if kind == "band":
        windows = (draw(band),)
    elif kind == "each head":
        windows = tuple(draw(st.lists(reach, min_size=t.heads, max_size=t.heads)))
    elif kind == "sparse":
        size = draw(st.sampled_from((4, 8, 16)))
        windows = ((size // 2, size // 2),)
        sparse = (draw(st.sampled_from((0, 1, 9))), size, draw(st.sampled_from((0, 2, 3))))
    offset = draw(st.sampled_from((t.keys - t.queries, -3, 0, 5)))
    pattern = Pattern(draw(st.booleans()), windows, *sparse, seed=draw(st.integers(0, 99)), offset=offset)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    parts = {
        "offset": lambda: {"offset": rng.integers(-5, 9, t.batch)},
        "q_lengths": lambda: {"q_lengths": rng.integers(0, t.queries + 1, t.batch)},
        "kv_lengths": lambda: {"kv_lengths": rng.integers(0, t.keys + 1, t.batch)},
        "segments": lambda: {
            "q_segments": np.sort(rng.integers(-1, 4, (t.batch, t.queries)), 1),
            "kv_segments": rng.integers(-1, 4, (t.batch, t.keys)),
        },
        "keep": lambda: {"keep": rng.random((t.batch, 1, t.queries, t.keys)) < 0.6},
    }
    arrays = {}
    for name in draw(st.sets(st.sampled_from(sorted(parts)), max_size=2)):
        arrays |= {key: a.astype(a.dtype if a.dtype == bool else np.int32) for key, a in parts[name]().items()}
    return Mask(pattern, **arrays), t


def count_visits(visits: Visits, t: Tiling, transposed: bool) -> np.ndarray:
    """(B, N, q_tiles, k_tiles): how often each pair of tiles is visited."""
    bounds = np.broadcast_to(np.asarray(visits.bounds), (t.batch, t.heads, *visits.bounds.shape[2:]))
    count = np.zeros((t.batch, t.heads, *((t.k_tiles, t.q_tiles) if transposed else (t.q_tiles, t.k_tiles))), int)
    for b, h, own in np.ndindex(bounds.shape[:3]):
        first, free, masked, end = bounds[b, h, own]
        assert first <= free <= masked <= end
        count[b, h, own, first:end] += 1
        k = 0 if len(visits.counts) == 1 else h // (t.heads // t.kv_heads)
        np.add.at(count[b, h, own], visits.extras[k, own, : visits.counts[k, own]], 1)
    return count.swapaxes(2, 3) if transposed else count


def tiles(pairs: np.ndarray, t: Tiling, fill: bool) -> np.ndarray:
    """(B, N, q_tiles, block_q, k_tiles, block_k): pairs of tokens by tile, those past the ends `fill`."""
    padded = np.full((*pairs.shape[:2], t.q_tiles * t.block_q, t.k_tiles * t.block_k), fill)
    padded[:, :, : t.queries, : t.keys] = pairs
    return padded.reshape(*pairs.shape[:2], t.q_tiles, t.block_q, t.k_tiles, t.block_k)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(masks())
def test_every_allowed_pair_is_in_a_visited_tile_and_each_tile_is_visited_once(drawn):
    mask, t = drawn
    pairs = loops(mask, t)
    found = np.asarray(allowed(mask, pairs.shape, t.kv_heads))
    np.testing.assert_array_equal(np.broadcast_to(found, pairs.shape), pairs)
    live = tiles(pairs, t, False).any((3, 5))
    # What rows past a query length or the array do is left to whoever reads a free tile; its keys are all there.
    beyond = False if mask.q_lengths is None else np.arange(t.queries)[:, None] >= _column(mask.q_lengths)
    free: Any = tiles(pairs | beyond, t, True).all((3, 5))
    there: Any = np.arange(1, t.k_tiles + 1) * t.block_k <= t.keys
    for transposed, visits in ((False, key_visits(mask, t)), (True, query_visits(mask, t))):
        count = count_visits(visits, t, transposed)
        assert count.max(initial=0) <= 1 and (count[live] == 1).all()
        bounds = np.broadcast_to(np.asarray(visits.bounds), (t.batch, t.heads, *visits.bounds.shape[2:]))
        for b, h, own in np.ndindex(bounds.shape[:3]):
            for other in range(bounds[b, h, own, 1], bounds[b, h, own, 2]):
                q, k = (other, own) if transposed else (own, other)
                assert free[b, h, q, k] and there[k]


def _column(lengths: Any) -> np.ndarray:
    return np.asarray(lengths)[:, None, None, None]


@cache
def drawn_blocks(causal: bool, size: int, num_global: int, count: int, seed: int = 3, keys: int = 650) -> np.ndarray:
    return random_blocks(causal, (size // 2, size // 2), num_global, size, count, seed, 4, keys)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("size", "num_global", "count"), [(8, 0, 2), (8, 9, 3), (16, 1, 50), (1, 2, 3), (7, 700, 2)])
def test_random_blocks_are_distinct_uncovered_and_as_many_as_there_are(causal, size, num_global, count):
    table = drawn_blocks(causal, size, num_global, count)
    blocks = -(-650 // size)
    assert table.shape == (4, blocks, count) and table.dtype == np.int32
    for n in range(blocks):
        own = range(n * size, (n + 1) * size)
        covered = {j // size for p in (own[0], own[-1]) for j in (p - size // 2, p, p + size // 2)}
        candidates = set(range(blocks)) - covered - {j // size for j in range(min(num_global, 650))}
        candidates = {m for m in candidates if m < n or not causal}
        for row in table[:, n]:
            found = [m for m in row.tolist() if m >= 0]
            assert len(found) == len(set(found)) == min(count, len(candidates)) and set(found) <= candidates


def test_random_blocks_depend_on_the_seed_and_the_head_and_nothing_else():
    table = drawn_blocks(True, 8, 1, 3)
    np.testing.assert_array_equal(table, drawn_blocks.__wrapped__(True, 8, 1, 3))
    assert (table != drawn_blocks(True, 8, 1, 3, seed=4)).any((1, 2)).all()
    assert all((table[a] != table[b]).any() for a in range(4) for b in range(a))
    # Longer sequences draw the same for earlier blocks, if what comes later may not be drawn anyway.
    np.testing.assert_array_equal(table, drawn_blocks(True, 8, 1, 3, keys=1300)[:, : table.shape[1]])


def test_random_blocks_are_about_uniform():
    """Of some 6,000 draws among 100 candidates each, chi-squared within five deviations of its mean."""
    last = np.concatenate([drawn_blocks(True, 8, 0, 3, seed, keys=102 * 8)[:, 101] for seed in range(500)])
    counts = np.bincount(last.reshape(-1), minlength=100)
    assert len(counts) == 100 and counts.sum() == 6000
    assert abs(((counts - 60) ** 2 / 60).sum() - 99) <= 5 * (2 * 99) ** 0.5


def test_counter_hash_is_the_same_in_both_libraries_and_a_bijection():
    x = np.arange(2**16, dtype=np.uint32)
    import jax.numpy as jnp

    np.testing.assert_array_equal(mixed(x), np.asarray(mixed(jnp.asarray(x))))
    assert len(np.unique(mixed(x))) == len(x) and abs(np.unpackbits(mixed(x).view(np.uint8)).mean() - 0.5) < 0.01


# ---- cost: visited tiles against live ones


COST_CASES = [case for case in ATTEND_CASES if case.length >= 60 and case.segments is None and not case.keep]


@pytest.mark.parametrize("case", COST_CASES, ids=str)
def test_visited_tiles_are_the_live_ones_within_one_tile_row(case):
    """Each row of tiles visits at most one dead tile on each side of its band, unless offsets are not known."""
    keys = case.length if case.keys is None else case.keys
    t = Tiling(case.batch, case.heads[0], case.heads[1], case.length, keys, 16, 16)
    mask = attend_mask(case)
    pairs = np.broadcast_to(np.asarray(allowed(mask, (t.batch, t.heads, t.queries, t.keys), t.kv_heads)),
                            (t.batch, t.heads, t.queries, t.keys))  # fmt: skip
    live = tiles(pairs, t, False).any((3, 5))
    for transposed, visits in ((False, key_visits(mask, t)), (True, query_visits(mask, t))):
        dead = count_visits(visits, t, transposed) - live
        allowance = t.q_tiles * t.k_tiles if mask.offset is not None and mask.pattern.scattered else 2
        assert dead.sum(2 if transposed else 3).max() <= allowance


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("windows", "sparse", "most"),
    [
        (((511, 0),), (0, 1, 0), 9),
        (((255, 0), (1023, 0)), (0, 1, 0), 11),  # 5 and 17
        (((32, 32),), (1, 64, 3), 6),
        (((32, 32),), (0, 64, 3), 5),
    ],
)
def test_visits_of_windows_and_sparse_patterns_grow_with_the_length_alone(windows, sparse, most, transposed):
    """At most so many tiles of 64 keys for each tile of 64 queries, on average, whatever the length."""
    for length in (4096, 16384):
        t = Tiling(1, 2, 2, length, length, 64, 64)
        visits = (query_visits if transposed else key_visits)(Mask(Pattern(True, windows, *sparse)), t)
        visited = np.mean(visits.bounds[..., 3] - visits.bounds[..., 0]) + np.mean(visits.counts)
        assert visited <= most
