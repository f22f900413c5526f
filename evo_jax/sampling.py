"""The sampler of generate: from logits to the next token, by temperature, top-k and top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from evo_jax import shapes
from evo_jax.sharding import alike

NO_TOKEN = -1  # where the logits are no distribution


class Sampling(NamedTuple):
    """What may be traced: temperature () and a key, both None for greedy; top_p (), None for all tokens."""

    temperature: Array | None
    top_p: Array | None
    key: Array | None


def next_tokens(logits: Array, step: Array, sampling: Sampling, top_k: int | None) -> Array:
    """(B, V) logits -> (B,) int32: the likeliest, or one drawn by a key of this step and row.

    NO_TOKEN where a row holds a NaN, or nothing above -inf.
    """
    logits = logits.astype(shapes.widest(logits.dtype, jnp.float32))
    chosen = jnp.argmax(logits, axis=-1)
    if sampling.temperature is not None:
        warm = sampling.temperature > 0
        temperature = jnp.where(warm, sampling.temperature, jnp.ones_like(sampling.temperature))
        _, rows = alike("generate", (logits, jnp.arange(logits.shape[0])), ("b", "b"))
        keys = _row_keys(sampling.key, step, rows)
        drawn = jax.vmap(jax.random.categorical)(keys, scores(logits, temperature, top_k, sampling.top_p))
        chosen = jnp.where(warm, drawn, chosen)
    possible = ~jnp.isnan(logits).any(axis=-1) & (logits.max(axis=-1) > -jnp.inf)
    return jnp.where(possible, chosen, NO_TOKEN).astype(jnp.int32)


def scores(logits: Array, temperature: Array, top_k: int | None, top_p: Array | None) -> Array:
    """(..., V) logits to sample from: divided by the temperature, -inf for what top-k, and then top-p, leave out."""
    highest = logits.max(axis=-1, keepdims=True)
    # The likeliest apart: an infinite logit less itself is NaN.
    cooled = (logits - highest) / temperature.astype(logits.dtype)
    kept = jnp.where(logits == highest, jnp.zeros_like(cooled), cooled)
    if top_k is not None and top_k < kept.shape[-1]:
        least = jax.lax.top_k(kept, top_k)[0][..., -1:]
        kept = jnp.where(kept >= least, kept, -jnp.inf)
    if top_p is not None:
        least = _least_of_nucleus(kept, top_p.astype(kept.dtype))
        kept = jnp.where(kept >= least, kept, -jnp.inf)
    return kept


def _least_of_nucleus(kept: Array, top_p: Array) -> Array:
    """(..., 1): the least score among the fewest tokens whose probabilities sum to top_p.

    Source: "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2020).
    """
    falling = jnp.flip(jnp.sort(kept, axis=-1), axis=-1)
    chances = jax.nn.softmax(falling, axis=-1)
    likelier = jnp.cumsum(chances[..., :-1], axis=-1)
    # The likeliest always stays; and all do at 1, to which rounded sums come before the last token.
    inside = jnp.pad((likelier < top_p) | (top_p >= 1), [(0, 0)] * (kept.ndim - 1) + [(1, 0)], constant_values=True)
    return jnp.where(inside, falling, jnp.inf).min(axis=-1, keepdims=True)


def _row_keys(key: Array | None, step: Array, rows: Array) -> Array:
    """One key for each row of the batch, so that no row's tokens depend on the others."""
    assert key is not None
    of_step = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(of_step, row))(rows)
