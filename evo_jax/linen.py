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

    A call gives (output, cache), and takes cache=, at first that of `init_cache` below.

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


def init_cache(layer: nnx.bridge.ToLinen, batch_size: int, *args: Any, **options: Any) -> Any:
    """The cache of a layer made here before the first token: what its nnx module's `init_cache` gives.

    Args:
        layer: of this module, bound or not; its parameters play no part.
        batch_size: B; further arguments, as capacity and dtype, are those of the nnx module's `init_cache`.

    Raises:
        TypeError: `layer` is no such layer, and whatever the nnx module raises.

    >>> import jax, jax.numpy as jnp
    >>> from evo_jax.linen import SlidingWindowAttention, init_cache
    >>> layer, x = SlidingWindowAttention(hidden_size=64, num_heads=4, window_size=8), jnp.ones((2, 10, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> out, cache = layer.apply(variables, x, cache=init_cache(layer, batch_size=2))
    >>> out.shape, cache.key.shape
    ((2, 10, 64), (2, 8, 4, 16))
    """
    if not isinstance(layer, nnx.bridge.ToLinen):
        raise TypeError(f"init_cache: layer is a {type(layer).__name__} and must be one of evo_jax.linen")
    module: Any = nnx.eval_shape(lambda: layer.nnx_class(*layer.args, **layer.kwargs, rngs=nnx.Rngs(0)))
    return module.init_cache(batch_size, *args, **options)


def _twin(
    module: Callable[..., nnx.Module], width: int, num_heads: int, name: str | None, options: dict[str, Any]
) -> nnx.bridge.ToLinen:
    # Built once without arrays, so that wrong arguments are an error here and not at the first call.
    nnx.eval_shape(lambda: module(width, num_heads, **options, rngs=nnx.Rngs(0)))
    return nnx.bridge.to_linen(cast(Any, module), width, num_heads, name=name, **options)
