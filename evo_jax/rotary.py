"""Rotary position embeddings, made and applied to heads: the half-split form of Llama and GPT-NeoX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import shapes


def rotary_embedding(positions: Any, head_dim: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) for `position_embeddings`: angle t / theta**(2 m / D) for pair m < D / 2 of a token at position t.

    Args:
        positions: (L,) or (B, L), integers or floats.
        head_dim: D, even.
        theta: the base of the wavelengths.

    Returns:
        Two float32 arrays, (L, D) or (B, L, D), with the D / 2 frequencies repeated in both halves.

    Raises:
        ValueError: an odd head_dim, or positions of another rank. Source: "RoFormer" (Su et al., 2021).

    >>> import jax.numpy as jnp, evo_jax
    >>> cos, sin = evo_jax.rotary_embedding(jnp.arange(100), head_dim=64)
    >>> cos.shape
    (100, 64)
    """
    op, positions = "rotary_embedding", jnp.asarray(positions)
    head_dim = shapes.at_least(op, "head_dim", head_dim, 2)
    if head_dim % 2 or positions.ndim not in (1, 2):
        raise ValueError(f"{op}: {head_dim=} must be even, and {positions.shape=} (L,) or (B, L)")
    if not shapes.finite(op, "theta", theta) > 0:
        raise ValueError(f"{op}: {theta=} must be greater than 0")
    frequencies = np.float64(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
    frequencies = frequencies.astype(np.float32).reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(op: str, x: jax.Array, position_embeddings: Any) -> jax.Array:
    """x (B, L, heads, D) turned by (cos, sin) of its tokens' positions; None leaves it as it is.

    Each of cos and sin is (L, D), (B, L, D) or (1 or B, L, 1, D), with the D / 2 frequencies repeated in both halves:
    `x * cos + concat(-x_second, x_first) * sin`, computed in at least float32.
    """
    if position_embeddings is None:
        return x
    try:
        given_cos, given_sin = position_embeddings
    except (TypeError, ValueError):
        raise ValueError(f"{op}: position_embeddings must be a pair (cos, sin)") from None
    dtype = shapes.widest(x.dtype, jnp.float32)
    cos, sin = (_table(op, name, a, x).astype(dtype) for name, a in (("cos", given_cos), ("sin", given_sin)))
    wide = x.astype(dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


def _table(op: str, name: str, array: Any, x: jax.Array) -> jax.Array:
    """cos or sin as (1 or B, L, 1, D)."""
    array = shapes.float_array(op, f"position_embeddings {name}", array)
    batch, length, _, width = x.shape
    if width % 2:
        raise ValueError(f"{op}: position_embeddings need an even head width, not {width}")
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 3:
        array = array[:, :, None]
    if array.shape not in ((1, length, 1, width), (batch, length, 1, width)):
        raise ValueError(
            f"{op}: position_embeddings {name} must be (L, D), (B, L, D) or (1, L, 1, D) with B={batch}, L={length}, "
            f"D={width}, the positions of the new tokens alone; got {array.shape} after adding axes"
        )
    return array
