"""GroupedHeads: the query, key, value and output projections that the attention modules share, and dtype rules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evo_jax import rotary, shapes
from evo_jax.sharding import is_sharded, without_last
from evo_jax.stream import Streams


class GroupedHeads(Streams):
    """Four nnx.Linear without biases around an attention over grouped heads.

    q_proj (hidden_size, N D), k_proj and v_proj (hidden_size, K D) and o_proj (N D, hidden_size), drawn uniformly
    within 1 / sqrt(fan in), as the complexity package does. Arguments are those that the modules document.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        op = type(self).__name__
        check_dtypes(op, dtype, param_dtype)
        check_rngs(op, rngs)
        self.num_kv_heads, self.head_dim = shapes.grouped_heads(op, hidden_size, num_heads, num_kv_heads, head_dim)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.dtype, self.param_dtype = dtype, param_dtype
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = _projection(hidden_size, wide, dtype, param_dtype, rngs)
        self.k_proj = _projection(hidden_size, narrow, dtype, param_dtype, rngs)
        self.v_proj = _projection(hidden_size, narrow, dtype, param_dtype, rngs)
        self.o_proj = _projection(wide, hidden_size, dtype, param_dtype, rngs)

    def project(self, hidden_states: Any, position_embeddings: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """query (B, L, N, D), key and value (B, L, K, D); query and key turned by their positions."""
        op = type(self).__name__
        x = shapes.hidden_states(op, "hidden_states", hidden_states, self.hidden_size)
        projections = (self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads), (self.v_proj, self.num_kv_heads)
        flat = _tokens(x, self.hidden_size)
        query, key, value = (
            project(flat).reshape(*x.shape[:2], heads, self.head_dim) for project, heads in projections
        )
        query, key = (rotary.rotate(op, a, position_embeddings) for a in (query, key))
        return query, key, value

    def merge(self, out: jax.Array) -> jax.Array:
        """The output projection of (B, L, N, D)."""
        x = _tokens(out, self.num_heads * self.head_dim)
        summed = without_last(x)  # heads on several devices
        projected = self.o_proj(x) if summed is None else self.o_proj(x, out_sharding=summed)
        return projected.reshape(*out.shape[:2], self.hidden_size)


def _tokens(x: jax.Array, width: int) -> jax.Array:
    """(B, L, ...) as (B L, width): XLA on CPUs is slower where the gradient of a kernel sums over two axes."""
    return x.reshape(*x.shape[:2], width) if is_sharded(x) else x.reshape(-1, width)


def _projection(inputs: int, outputs: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear map without bias, its weights uniform within 1 / sqrt(inputs)."""
    init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    options = {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": promote}
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, **options, rngs=rngs)


def check_dtypes(op: str, dtype: Any, param_dtype: Any) -> None:
    """TypeError unless both are float dtypes; `dtype` may be None."""
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value is not None or name == "param_dtype":
            shapes.float_dtype(op, name, value)


def check_rngs(op: str, rngs: Any) -> None:
    """TypeError for what draws no parameters."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"{op}: rngs={rngs!r} must be an nnx.Rngs, as nnx.Rngs(0)")


def promote(arrays: Any, *, dtype: Any = None, **_: Any) -> tuple[Any, ...]:
    """Flax's promote_dtype, which also works where strict dtype promotion is on; None stays None."""
    if dtype is None:
        dtype = shapes.widest(*(a.dtype for a in arrays if a is not None))
    return tuple(None if a is None else a.astype(dtype) for a in arrays)
