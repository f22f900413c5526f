"""Softmax attention in O(T + S) memory, and in time proportional to the tiles that a mask leaves alive: the fallback.

The same as reference/dense.py. Heads that share a window go through one walk over tiles (reference/blocked_walk.py).
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from reference.blocked_tile import Plan
from reference.blocked_walk import Inputs, walk
from reference.dense import AttendInputs, AttendSpec, attend_dense
from reference.mask import Mask, Pattern, window_runs
from reference.visit import Tiling, key_visits

WIDEST = 1280  # keys that are worth a single slab
SHORT = 512  # tokens, and keys, that are not worth loops


def attend_blocked(
    inputs: AttendInputs,
    spec: AttendSpec,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    width: int | None = None,
) -> tuple[Array, Array]:
    """As attend_dense. A tile is `block_q` queries, a slab `width` keys; keys are skipped by tiles of `block_k`."""
    query, key, value, mask, bias, sinks, seeds = inputs
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return attend_dense(inputs, spec)
    group = query.shape[2] // key.shape[2]
    results: list[tuple[Array, Array]] = []
    for first, last, window in window_runs(mask.pattern.windows, query.shape[2], group):
        pattern = replace(mask.pattern, windows=(window,))
        sizes = (last - first, query.shape[1], key.shape[1])
        narrowed = replace(mask, pattern=pattern, keep=_heads(mask.keep, first, last))
        plans = _plans(narrowed, spec, sizes, (block_q, block_k, width))
        kv = slice(first // group, -(-last // group))
        arrays = Inputs(query[:, :, first:last], key[:, :, kv], value[:, :, kv], _heads(bias, first, last))
        own_seeds = None if seeds is None else seeds[:, first:last]
        results.append(walk(plans, arrays, narrowed, own_seeds))
    out, lse = results[0]
    if len(results) > 1:
        out, lse = (jnp.concatenate(x, axis=2) for x in zip(*results, strict=True))
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks.astype(lse.dtype))
    return out.astype(query.dtype), lse


def _plans(mask: Mask, spec: AttendSpec, sizes: Any, given: Any) -> tuple[Plan, Plan]:
    """For the forward and the backward pass. Measured: outside of loops XLA on CPUs runs small tiles side by side."""
    pattern, (heads, tokens, keys) = mask.pattern, sizes
    looped = _looped(pattern, spec, sizes, given)
    many = max(tokens, keys) > SHORT or (pattern.scattered and heads > 8)
    if any(given) or many or mask.offset is not None:
        return looped, looped
    narrow = (mask.q_segments, mask.kv_segments, mask.keep, mask.q_lengths, mask.kv_lengths)
    frees, block_k = not pattern.scattered and all(x is None for x in narrow), min(64, keys)
    plan = replace(looped, block_k=block_k, width=_up(keys, block_k), frees=frees, unrolled=True)
    if not pattern.causal and not pattern.banded:
        return plan, plan
    forward = replace(plan, block_q=min(64, tokens))
    if _near(pattern) and not pattern.scattered:
        return forward, looped
    half = _up(-(-tokens // -(-tokens // 256)), 8)  # at most 256 rows, no tile of which is mostly padding
    return forward, replace(plan, block_q=min(half, tokens))


def _looped(pattern: Pattern, spec: AttendSpec, sizes: Any, given: Any) -> Plan:
    """Measured: XLA on CPUs takes more threads than one for products from 256 x 64 x 512 or 512 x 64 x 256 on."""
    heads, tokens, keys = sizes
    size = pattern.block_size
    most = 512 if heads <= 8 and not pattern.banded else 256  # their scores stay in a cache
    block_q = given[0] or min(max(64, min(size, 256)) if pattern.num_random or _near(pattern) else most, tokens)
    block_k = given[1] or min(max(16, min(size, 64)) if pattern.num_random else 64, keys)
    slab = _up(min(256 if block_q == 512 and tokens > 512 else 512, keys), block_k)
    if given[2] or not pattern.banded:
        return Plan(spec, tokens, keys, block_q, block_k, given[2] or slab, True)
    tiling = Tiling(1, 1, 1, tokens, keys, block_q, block_k)
    bounds = key_visits(Mask(replace(pattern, num_global=0, num_random=0)), tiling).bounds
    extent = int(np.max(bounds[..., 3] - bounds[..., 0])) * block_k
    width = extent if 0 < extent <= WIDEST else slab
    return Plan(spec, tokens, keys, block_q, block_k, width, width < extent)


def _near(pattern: Pattern) -> bool:
    left, right = pattern.windows[0]
    return left + (0 if pattern.causal else right) <= 128


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _heads(x: Any, first: int, last: int) -> Any:
    """Of a bias or `keep` what belongs to these heads."""
    return x if x is None or x.shape[1] == 1 else x[:, first:last]


def _with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """The same with a further score per head that has no value; rows that see nothing stay as they are."""
    alive = lse != -jnp.inf  # NaN lives, and spreads
    before = jnp.where(alive, lse, 0)
    after = jnp.logaddexp(before, jnp.broadcast_to(sinks, lse.shape))
    factor = jnp.exp(before - after)
    return jnp.where(alive[..., None], out * factor[..., None], 0), jnp.where(alive, after, -jnp.inf)
