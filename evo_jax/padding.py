"""Padding masks: which tokens are valid, and EvoAttention's signed running count of tokens that all its forms consume.

That count, `rows`, is float32, (B, 1, L) or (B, H, L): its size is the divisor of the mean at that token and its sign
says whether the token lives. NaN counts as alive and spreads, so a mask that could not be checked is never silently
wrong.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import shapes


def resolve(
    op: str, v: jax.Array, mask: Any, semantics: str, causal: bool, before: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """(v, rows) for a mask of any accepted form; rows is None when every token lives and counts, from 1 on.

    `before` (B,) int32 says how many tokens precede the first (causal form).
    """
    batch, _, length, _ = v.shape
    if semantics == "multiply":
        mask = None if mask is None else shapes.token_mask(op, mask, batch, length)
        return _multiplied(v, mask, causal, before)
    if mask is not None:
        return v, jax.lax.stop_gradient(_absent(*valid(op, mask, batch, length), causal, before))
    return v, None if before is None else _positions(length, before)


def count_after(op: str, before: jax.Array, mask: Any, semantics: str, length: int) -> jax.Array:
    """(B,) int32, `before` and the tokens of this call that count: the valid ones, or every position ("multiply")."""
    if mask is None or semantics == "multiply":
        return before + jnp.int32(length)
    return before + valid_tokens(op, mask, before.shape[0], length).sum(1, dtype=jnp.int32)


def valid(op: str, mask: Any, batch: int, length: int) -> tuple[jax.Array, jax.Array | None]:
    """((B, L) bool, True for a valid token; where a traced mask is neither 0 nor 1, None if it cannot be)."""
    mask = shapes.token_mask(op, mask, batch, length)
    if mask.dtype == bool:
        bad = None
    elif shapes.known(mask):
        bad = shapes.zeros_and_ones(op, mask)
    else:
        bad = jnp.asarray((mask != 0) & (mask != 1))
    return jnp.asarray(mask).astype(bool), bad


def valid_tokens(op: str, mask: Any, batch: int, length: int) -> jax.Array:
    """(B, L) bool, True where the mask does not say 0."""
    return jnp.asarray(shapes.token_mask(op, mask, batch, length)).astype(bool)


def _positions(length: int, before: jax.Array) -> jax.Array:
    """(B, 1, L) float32 numbers of the tokens, counted from the start of the sequence."""
    return (before[:, None, None] + jnp.arange(1, length + 1, dtype=jnp.int32)[None, None]).astype(jnp.float32)


def _absent(valid: jax.Array, bad: jax.Array | None, causal: bool, before: jax.Array | None) -> jax.Array:
    """Masked tokens do not exist: the mean at a token is over the valid tokens so far, or over all of them."""
    running = jnp.cumsum if causal else _total
    count = running(valid.astype(jnp.int32), axis=1)
    count = jnp.maximum(count if before is None else before[:, None] + count, 1).astype(jnp.float32)
    rows = jnp.where(valid, count, -count)
    if bad is not None:
        rows = jnp.where(running(bad.astype(jnp.int32), axis=1) > 0, np.float32("nan"), rows)
    return rows[:, None]


def _multiplied(v: jax.Array, mask: Any, causal: bool, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The original's arithmetic: v * mask, positions as divisors, and an all-zero row of v counts as masked."""
    if mask is not None:
        v = v * jnp.asarray(mask).astype(v.dtype)[:, None, :, None]
    length = v.shape[2]
    count = jnp.arange(1, length + 1, dtype=jnp.float32) if causal else jnp.full(length, length, jnp.float32)
    count = count if before is None else _positions(length, before)
    alive = jnp.any(v != 0, axis=3)
    return v, jax.lax.stop_gradient(jnp.where(alive, count, -count))


def _total(x: jax.Array, axis: int) -> jax.Array:
    return jnp.broadcast_to(jnp.sum(x, axis=axis, keepdims=True), x.shape)
