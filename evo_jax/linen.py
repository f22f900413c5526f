"""The layers as flax.linen modules, through Flax's own bridge: the same arguments, the same numbers.

The `params` collection of each holds the arrays of its nnx module under the same names, so that
`nnx.to_pure_dict(nnx.state(layer, nnx.Param))` of one is the `params` of the other. Import `evo_jax.linen` itself.
"""

from collections.abc import Callable
from typing import Any, cast

from flax import nnx

from evo_jax import modules, softmax_modules


def EvoAttention(embed_dim: int, num_heads: int, *, name: str | None = None, **options: Any) -> nnx.bridge.ToLinen:
    """evo_jax.EvoAttention; `options` are its keyword arguments, without rngs.

    Raises:
        ValueError: num_heads * head_dim is not embed_dim. TypeError: a dtype, or an unknown option.

    >>> import jax, jax.numpy as jnp
    >>> from evo_jax.linen import EvoAttention
    >>> layer, x = EvoAttention(embed_dim=64, num_heads=4), jnp.ones((2, 10, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x, causal=False).shape
    (2, 10, 64)
    """
    return _twin(modules.EvoAttention, embed_dim, num_heads, name, options)


def LinearAttention(hidden_size: int, num_heads: int, *, name: str | None = None, **options: Any) -> nnx.bridge.ToLinen:
    """evo_jax.LinearAttention; `options` are its keyword arguments, without rngs.

    A call gives (output, cache); the cache before the first token comes from `evo_jax.LinearAttention.init_cache`, or
    is a LinearState of zeros.

    Raises:
        ValueError: sizes that do not divide, or an unknown feature map. TypeError: a dtype, or an unknown option.

    >>> import jax, jax.numpy as jnp
    >>> from evo_jax.linen import LinearAttention
    >>> layer, x = LinearAttention(hidden_size=64, num_heads=4, num_kv_heads=2), jnp.ones((2, 10, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x)[0].shape
    (2, 10, 64)
    """
    return _twin(modules.LinearAttention, hidden_size, num_heads, name, options)


def FlashAttention(hidden_size: int, num_heads: int, *, name: str | None = None, **options: Any) -> nnx.bridge.ToLinen:
    """evo_jax.FlashAttention; `options` are its keyword arguments, without rngs.

    Raises:
        ValueError: sizes that do not divide. TypeError: a dtype, or an unknown option.

    >>> import jax, jax.numpy as jnp
    >>> from evo_jax.linen import FlashAttention
    >>> layer, x = FlashAttention(hidden_size=64, num_heads=4, num_kv_heads=2), jnp.ones((2, 10, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x)[0].shape
    (2, 10, 64)
    """
    return _twin(softmax_modules.FlashAttention, hidden_size, num_heads, name, options)


def SlidingWindowAttention(
    hidden_size: int, num_heads: int, *, name: str | None = None, **options: Any
) -> nnx.bridge.ToLinen:
    """evo_jax.SlidingWindowAttention, as FlashAttention is."""
    return _twin(softmax_modules.SlidingWindowAttention, hidden_size, num_heads, name, options)


def SparseAttention(hidden_size: int, num_heads: int, *, name: str | None = None, **options: Any) -> nnx.bridge.ToLinen:
    """evo_jax.SparseAttention, as FlashAttention is."""
    return _twin(softmax_modules.SparseAttention, hidden_size, num_heads, name, options)


def MultiScaleAttention(
    hidden_size: int, num_heads: int, *, name: str | None = None, **options: Any
) -> nnx.bridge.ToLinen:
    """evo_jax.MultiScaleAttention, as FlashAttention is."""
    return _twin(softmax_modules.MultiScaleAttention, hidden_size, num_heads, name, options)


def _twin(
    module: Callable[..., nnx.Module], width: int, num_heads: int, name: str | None, options: dict[str, Any]
) -> nnx.bridge.ToLinen:
    # Built once without arrays, so that wrong arguments are an error here and not at the first call.
    nnx.eval_shape(lambda: module(width, num_heads, **options, rngs=nnx.Rngs(0)))
    return nnx.bridge.to_linen(cast(Any, module), width, num_heads, name=name, **options)
