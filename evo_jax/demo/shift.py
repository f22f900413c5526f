"""The demo's token shift, over whole sequences and after a cache, where some of the new tokens may not exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SHIFTS = 4


class Arrivals(NamedTuple):
    """New tokens (B, L): `mask` is False for one that does not exist, or None where all do.

    `rank` counts the new tokens before each and `positions` all that there are, both (B, L) int32; `counts` (B,) those
    that exist; and `order` (B, L) puts these first, as they came.
    """

    mask: jax.Array | None
    rank: jax.Array
    positions: jax.Array
    counts: jax.Array
    order: jax.Array

    @classmethod
    def of(cls, lengths: jax.Array, shape: tuple[int, ...], mask: jax.Array | None) -> "Arrivals":
        """Tokens of `shape` after `lengths` (B,) others."""
        exists = jnp.ones(shape, bool) if mask is None else mask
        rank = jnp.cumsum(exists, axis=1, dtype=jnp.int32) - exists.astype(jnp.int32)
        order = jnp.argsort(~exists, axis=1, stable=True)
        return cls(mask, rank, lengths[:, None] + rank, exists.sum(axis=1, dtype=jnp.int32), order)


def token_shift(x: jax.Array) -> jax.Array:
    """(B, L, E) with the k-th quarter of its channels taken from k positions earlier, zeros before the first."""
    parts = jnp.array_split(x, SHIFTS, axis=-1)
    late = [jnp.pad(part, ((0, 0), (k, 0), (0, 0)))[:, : x.shape[1]] for k, part in enumerate(parts)]
    return jnp.concatenate(late, axis=-1)


def token_shift_after(before: jax.Array, x: jax.Array, new: Arrivals) -> tuple[jax.Array, jax.Array]:
    """token_shift of x (B, L, E) after the last tokens `before` (B, SHIFTS - 1, E), and the last after these."""
    length, kept = x.shape[1], SHIFTS - 1
    if new.mask is None:
        rows = jnp.concatenate([before, x], axis=1)
        parts = jnp.array_split(rows, SHIFTS, axis=-1)
        late = [part[:, kept - k : kept - k + length] for k, part in enumerate(parts)]
        return jnp.concatenate(late, axis=-1), rows[:, length:]
    rows = jnp.concatenate([before, jnp.take_along_axis(x, new.order[..., None], axis=1)], axis=1)
    late = [_rows(part, new.rank + (kept - k)) for k, part in enumerate(jnp.array_split(rows, SHIFTS, axis=-1))]
    return jnp.concatenate(late, axis=-1), _rows(rows, new.counts[:, None] + jnp.arange(kept)[None])


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[..., None], axis=1)
