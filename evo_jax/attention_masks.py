"""From the options of softmax attention to its Mask and bias: causality, lengths, segments, padding, 4-D masks."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import padding, shapes
from reference.mask import FAR, Mask, Pattern


def build(
    op: str, query: jax.Array, key: jax.Array, pattern: Pattern, options: Mapping[str, Any]
) -> tuple[Mask, jax.Array | None, jax.Array | None]:
    """(mask, bias, which sequences have a traced mask that is neither 0 nor 1, or such ids; None if they cannot)."""
    batch, queries, heads, _ = query.shape
    shape = (batch, heads, queries, key.shape[1])
    pattern = replace(pattern, causal=shapes.boolean(op, "is_causal", options.get("is_causal", True)))
    limits = {"query_seq_lengths": queries, "key_value_seq_lengths": shape[3]}
    given = [(name, options.get(name), limit) for name, limit in limits.items()]
    lengths = [None if x is None else jnp.clip(shapes.lengths(op, name, x, batch), 0, n) for name, x, n in given]
    static, offset = _offset(op, pattern, shape, lengths, options.get("q_offset"))
    q_segments, kv_segments, bad = _segments(op, shape, options.get("attention_mask"), options.get("segment_ids"))
    keep = shapes.broadcastable(op, "mask", options.get("mask"), shape)
    if keep is not None and keep.dtype != bool:
        raise TypeError(f"{op}: mask.dtype={keep.dtype.name} must be bool; an additive one is a bias")
    if keep is not None and keep.shape[1:3] == (1, 1):  # of keys alone: (B, S) numbers do
        q_segments, kv_segments = _hidden_keys(shape, keep, q_segments, kv_segments)
        keep = None
    if keep is not None:
        keep = jnp.broadcast_to(keep, (*keep.shape[:2], *shape[2:]))
    bias = shapes.broadcastable(op, "bias", options.get("bias"), shape)
    bias = None if bias is None else shapes.float_array(op, "bias", bias)
    pattern = replace(pattern, offset=static)
    return Mask(pattern, offset, lengths[0], lengths[1], q_segments, kv_segments, keep), bias, bad


def _offset(
    op: str, pattern: Pattern, shape: tuple[int, ...], lengths: list[Any], given: Any
) -> tuple[int, jax.Array | None]:
    """(position of query 0 where it is known, else of each sequence's): the last query stands on the last key."""
    batch, _, queries, keys = shape
    if not (pattern.causal or pattern.banded or pattern.scattered):
        return 0, None  # positions play no part
    if given is not None:
        if isinstance(given, int) and not isinstance(given, bool):
            if abs(given) > FAR // 2:
                raise ValueError(f"{op}: q_offset={given} must be within {-FAR // 2} and {FAR // 2}")
            return given, None
        offset = shapes.lengths(op, "q_offset", given, batch, shared=True)
        return 0, jnp.clip(offset, -FAR // 2, FAR // 2)  # as good as any beyond
    if lengths == [None, None]:
        return keys - queries, None
    last_q, last_k = (n if x is None else x for x, n in zip(lengths, (queries, keys), strict=True))
    return 0, jnp.broadcast_to(jnp.asarray(last_k - last_q, jnp.int32), (batch,))


def _segments(op: str, shape: tuple[int, ...], mask: Any, segment_ids: Any) -> tuple[Any, Any, jax.Array | None]:
    """(ids of queries, ids of keys, bad sequences); -1 for a token that does not exist."""
    batch, _, queries, keys = shape
    q_ids, kv_ids, bad = None, None, []
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        if len(pair) != 2:
            raise ValueError(f"{op}: segment_ids must be one array or a pair of them, not {len(pair)}")
        (q_ids, *bad_q), (kv_ids, *bad_kv) = (_ids(op, x, batch, n) for x, n in zip(pair, (queries, keys), strict=True))
        bad = bad_q + bad_kv
    if mask is not None:
        if queries > keys:
            raise ValueError(
                f"{op}: attention_mask needs queries among the keys, not {queries} of them and {keys} keys"
            )
        valid, wrong = padding.valid(op, mask, batch, keys)
        bad += [] if wrong is None else [wrong.any(axis=1)]
        q_ids = jnp.where(valid[:, keys - queries :], 0 if q_ids is None else q_ids, jnp.int32(-1))
        kv_ids = jnp.where(valid, 0 if kv_ids is None else kv_ids, jnp.int32(-1))
    return q_ids, kv_ids, reduce(or_, bad) if bad else None


def _ids(op: str, ids: Any, batch: int, length: int) -> tuple[jax.Array, ...]:
    """(segment ids as int32, and, where traced ones may be too large for that, which sequences have such)."""
    ids = shapes.segment_ids(op, ids, batch, length)
    small = shapes.known(ids) or shapes.fits_int32(ids)
    return (shapes.int32(ids),) if small else (shapes.int32(ids), (ids > shapes.INT32.max).any(axis=1))


def _hidden_keys(shape: tuple[int, ...], keep: jax.Array, q_ids: Any, kv_ids: Any) -> tuple[jax.Array, jax.Array]:
    """The segments with the keys hidden that `keep` (B or 1, 1, 1, S or 1) says."""
    batch, _, queries, keys = shape
    keep = jnp.broadcast_to(keep[:, 0, 0], (batch, keys))
    q_ids = jnp.zeros((batch, queries), jnp.int32) if q_ids is None else q_ids
    return q_ids, jnp.where(keep, jnp.zeros((batch, keys), jnp.int32) if kv_ids is None else kv_ids, -1)


def of_module(op: str, mask: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The options that a module's attention_mask stands for; `shape` is that of its query, (B, L, N, D).

    A mask of pairs of tokens takes the place of causality, as in the originals; one of tokens comes on top of it.
    """
    if mask is None or jnp.ndim(mask) != 4:
        return {"attention_mask": mask}
    batch, length, heads, _ = shape
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.shape == (batch, 1, length, 1) and length > 1:
        return {"attention_mask": mask}
    if mask.shape[1:3] == (1, 1) and not jnp.issubdtype(mask.dtype, jnp.floating):
        return {"attention_mask": jnp.broadcast_to(mask[:, 0, 0], (batch, length))}
    shapes.broadcastable(op, "attention_mask", mask, (batch, heads, length, length))
    if mask.dtype == bool:
        return {"mask": mask, "is_causal": False}
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        raise TypeError(f"{op}: attention_mask {mask.shape} of {mask.dtype.name}, of pairs, must be bool or float")
    shapes.additive(op, mask)
    return {"bias": mask} if mask.shape[2] == 1 and length > 1 else {"bias": mask, "is_causal": False}
