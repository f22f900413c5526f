"""The random key blocks of block-sparse attention: drawn without replacement, by counters, while tracing."""

import numpy as np

from reference.counter_hash import mixed


def random_blocks(
    causal: bool,
    window: tuple[int, int],
    num_global: int,
    block_size: int,
    num_random: int,
    seed: int,
    kv_heads: int,
    keys: int,
) -> np.ndarray:
    """(K, n, num_random) int32 block numbers; -1 where too few. n = ceil(keys / block_size), at least 1, blocks of
    positions.

    Drawn for each block of positions among the key blocks that neither its band (`window`: keys to the left and right)
    nor the global tokens touch, only earlier ones where causal. Floyd's sampling: draw t out of the first m, and take
    the m-th instead where t was taken before.
    """
    count = max(-(-keys // block_size), 1)
    block = np.arange(count)
    first = min(-(-num_global // block_size), count)  # blocks from here on hold no global token
    low = np.clip((block * block_size - window[0]) // block_size, first, None)
    high = np.clip(((block + 1) * block_size - 1 + window[1]) // block_size + 1, low, count)
    before, after = low - first, np.zeros_like(low) if causal else count - high
    before = np.maximum(np.minimum(before, block - first) if causal else before, 0)
    total = before + after
    taken = np.full((kv_heads, count, num_random), -1, np.int64)
    with np.errstate(over="ignore"):
        key = mixed(mixed(np.uint32(seed & 0xFFFFFFFF)) + np.arange(kv_heads, dtype=np.uint32))[:, None]
        key = mixed(key + block.astype(np.uint32))
        for r in range(num_random):
            m = np.maximum(total - num_random, 0) + r + 1  # candidates of this draw
            t = (mixed(key + np.uint32(r + 1)).astype(np.uint64) * m.astype(np.uint64) >> np.uint64(32)).astype(
                np.int64
            )
            again = (taken[..., :r] == t[..., None]).any(-1)
            taken[..., r] = np.where(m <= total, np.where(again, m - 1, t), -1)
    number = np.where(taken < before[:, None], first + taken, high[:, None] + taken - before[:, None])
    return np.where(taken < 0, -1, number).astype(np.int32)
