"""CUDA (and its alias Triton): the factory of the complexity package, giving the nnx modules of evo_jax.modules."""

from collections.abc import Callable
from typing import Any, cast

from flax import nnx

from evo_jax.modules import LinearAttention


class CUDA:
    """Attention layers by name, with the original's names and keywords; each gives (output, cache) when called.

    `rngs` may be left out everywhere: parameters are then drawn from `nnx.Rngs(0)`.

    >>> import jax.numpy as jnp, evo_jax
    >>> layer = evo_jax.CUDA.create(attn_type="linear", hidden_size=64, num_heads=4, feature_map="relu")
    >>> layer(jnp.ones((2, 10, 64)))[0].shape
    (2, 10, 64)
    """

    @staticmethod
    def linear(
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> LinearAttention:
        """LinearAttention: O(N) time and memory; `options` are those of evo_jax.LinearAttention."""
        rngs = nnx.Rngs(0) if rngs is None else rngs
        return LinearAttention(hidden_size, num_heads, num_kv_heads=num_kv_heads, rngs=rngs, **options)

    @staticmethod
    def create(attn_type: str, hidden_size: int, num_heads: int, **options: Any) -> nnx.Module:
        """The layer that `attn_type` names: "linear" or "linear_attention".

        Raises:
            ValueError: another name, and whatever the layer raises.
        """
        if attn_type not in _TYPES:
            raise ValueError(f"CUDA.create: {attn_type=} must be one of {', '.join(map(repr, _TYPES))}")
        make = cast(Callable[..., nnx.Module], getattr(CUDA, _TYPES[attn_type]))
        return make(hidden_size, num_heads, **options)


_TYPES = {"linear": "linear", "linear_attention": "linear"}
Triton = CUDA
