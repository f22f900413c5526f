"""CUDA (and its alias Triton): the factory of the complexity package, giving the nnx modules of evo_jax."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from flax import nnx

from evo_jax.attention import DEFAULT_WINDOWS
from evo_jax.modules import LinearAttention
from evo_jax.softmax_modules import (
    FlashAttention,
    MultiScaleAttention,
    SlidingWindowAttention,
    SparseAttention,
)

Layer = TypeVar("Layer", bound=nnx.Module)


class CUDA:
    """Attention layers by name, with the original's names, arguments and defaults; each gives (output, cache).

    `options` of each are the further keyword arguments of its module, num_kv_heads and head_dim among them; an unknown
    one is a TypeError. `rngs` may be left out everywhere: parameters are then drawn from `nnx.Rngs(0)`.

    >>> import jax.numpy as jnp, evo_jax
    >>> layer = evo_jax.CUDA.create(attn_type="sliding_window", hidden_size=64, num_heads=4, window_size=8)
    >>> layer(jnp.ones((2, 10, 64)))[0].shape
    (2, 10, 64)
    """

    @staticmethod
    def flash(
        hidden_size: int = 768, num_heads: int = 12, num_kv_heads: int | None = None, **options: Any
    ) -> FlashAttention:
        """Softmax attention over all earlier tokens."""
        return _made(FlashAttention, hidden_size, num_heads, num_kv_heads=num_kv_heads, **options)

    @staticmethod
    def sliding_window(
        hidden_size: int = 768,
        num_heads: int = 12,
        window_size: int = 4096,
        num_kv_heads: int | None = None,
        **options: Any,
    ) -> SlidingWindowAttention:
        """Softmax attention over the last `window_size` tokens."""
        options |= {"window_size": window_size, "num_kv_heads": num_kv_heads}
        return _made(SlidingWindowAttention, hidden_size, num_heads, **options)

    @staticmethod
    def local(
        hidden_size: int = 768, num_heads: int = 12, window_size: int = 512, **options: Any
    ) -> SlidingWindowAttention:
        """A sliding window of 512 tokens."""
        return CUDA.sliding_window(hidden_size, num_heads, window_size, **options)

    sliding = sliding_window

    @staticmethod
    def sparse(
        hidden_size: int = 768,
        num_heads: int = 12,
        block_size: int = 64,
        num_global_tokens: int = 1,
        num_random_blocks: int = 3,
        **options: Any,
    ) -> SparseAttention:
        """A band, global tokens and random blocks."""
        options |= {"block_size": block_size, "num_global_tokens": num_global_tokens}
        return _made(SparseAttention, hidden_size, num_heads, num_random_blocks=num_random_blocks, **options)

    @staticmethod
    def linear(
        hidden_size: int = 768, num_heads: int = 12, feature_map: Any = "elu", **options: Any
    ) -> LinearAttention:
        """Linear attention: O(L) time, and a state of constant size."""
        return _made(LinearAttention, hidden_size, num_heads, feature_map=feature_map, **options)

    @staticmethod
    def multiscale(
        hidden_size: int = 768,
        num_heads: int = 12,
        local_heads: int | None = None,
        window_sizes: tuple[int, ...] = DEFAULT_WINDOWS,
        **options: Any,
    ) -> MultiScaleAttention:
        """Heads of different reach."""
        options |= {"local_heads": local_heads, "window_sizes": window_sizes}
        return _made(MultiScaleAttention, hidden_size, num_heads, **options)

    @staticmethod
    def create(attn_type: str = "flash", hidden_size: int = 768, num_heads: int = 12, **options: Any) -> nnx.Module:
        """The layer that `attn_type` names.

        Raises:
            ValueError: another name than "flash", "flash_attention", "sliding_window", "local", "sparse",
                "block_sparse", "linear", "linear_attention" or "multiscale", and whatever the layer raises.
        """
        if not isinstance(attn_type, str) or attn_type not in TYPES:
            raise ValueError(f"CUDA.create: {attn_type=} must be one of {', '.join(map(repr, TYPES))}")
        make = cast(Callable[..., nnx.Module], getattr(CUDA, TYPES[attn_type]))
        return make(hidden_size, num_heads, **options)


def _made(kind: Callable[..., Layer], hidden_size: int, num_heads: int, **options: Any) -> Layer:
    known = _keywords(kind)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"CUDA: {kind.__name__} takes no {', '.join(map(repr, unknown))}, but {', '.join(known)}")
    if options.get("rngs") is None:
        options["rngs"] = nnx.Rngs(0)
    return kind(hidden_size, num_heads, **options)


def _keywords(kind: Callable[..., Any]) -> list[str]:
    """The keyword arguments of a module's constructor."""
    parameters = inspect.signature(kind).parameters.values()
    return sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


TYPES = {  # from a type's name to the method that makes it
    "flash": "flash",
    "flash_attention": "flash",
    "sliding_window": "sliding_window",
    "local": "local",
    "sparse": "sparse",
    "block_sparse": "sparse",
    "linear": "linear",
    "linear_attention": "linear",
    "multiscale": "multiscale",
}
Triton = CUDA
