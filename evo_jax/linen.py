"""The layers of evo_jax.modules for flax.linen users, through Flax's own bridge. Import `evo_jax.linen` itself."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from evo_jax import modules


def EvoAttention(
    embed_dim: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    out_proj: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    name: str | None = None,
) -> nnx.bridge.ToLinen:
    """A flax.linen module that is evo_jax.EvoAttention: same arguments, same numbers from the same parameters.

    Its `params` collection holds the arrays of the nnx module under the same names, so that
    `nnx.to_pure_dict(nnx.state(layer, nnx.Param))` of one is the `params` of the other.

    Raises:
        ValueError: num_heads * head_dim is not embed_dim. TypeError: a dtype that is not a float.

    >>> import jax, jax.numpy as jnp
    >>> from evo_jax.linen import EvoAttention
    >>> layer, x = EvoAttention(embed_dim=64, num_heads=4), jnp.ones((2, 10, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x, causal=False).shape
    (2, 10, 64)
    """
    head_dim = modules.check_arguments(embed_dim, num_heads, head_dim, dtype, param_dtype)
    options = {"head_dim": head_dim, "out_proj": out_proj, "dtype": dtype, "param_dtype": param_dtype}
    return nnx.bridge.to_linen(modules.EvoAttention, embed_dim, num_heads, name=name, **options)


def LinearAttention(hidden_size: int, num_heads: int, *, name: str | None = None, **options: Any) -> nnx.bridge.ToLinen:
    """A flax.linen module that is evo_jax.LinearAttention: same arguments (`options`), same numbers.

    Its `params` collection holds the arrays of the nnx module under the same names. A call gives (output, cache); the
    cache before the first token comes from `evo_jax.LinearAttention.init_cache`, or is a LinearState of zeros.

    Raises:
        ValueError: sizes that do not divide, or an unknown feature map. TypeError: a dtype, or an unknown option.

    >>> import jax, jax.numpy as jnp
    >>> from evo_jax.linen import LinearAttention
    >>> layer, x = LinearAttention(hidden_size=64, num_heads=4, num_kv_heads=2), jnp.ones((2, 10, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x)[0].shape
    (2, 10, 64)
    """
    # Built once without arrays, so that wrong arguments are an error here and not at the first call.
    nnx.eval_shape(lambda: modules.LinearAttention(hidden_size, num_heads, **options, rngs=nnx.Rngs(0)))
    return nnx.bridge.to_linen(modules.LinearAttention, hidden_size, num_heads, name=name, **options)
