"""Streams: a long sequence through one layer chunk by chunk, so that it costs the memory of a chunk and a cache."""

import inspect
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from evo_jax import padding, shapes
from evo_jax.sharding import placed_as


class _OfConstructor:
    """`inspect.signature` of a class is that of its constructor, which nnx hides behind one of its own."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:  # that of an instance is that of its call
            raise AttributeError("__signature__")
        _, *rest = inspect.signature(cast(Any, owner).__init__).parameters.values()
        return inspect.Signature(rest)


class Streams(nnx.Module):
    """Gives a layer that takes a cache the method `stream`."""

    __signature__ = _OfConstructor()

    def stream(
        self,
        hidden_states: Any,
        chunk_size: int,
        *,
        cache: Any = None,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, Any]:
        """(B, L, E) -> ((B, L, E), the cache after the last token), `chunk_size` tokens at a time.

        The numbers are those of one call on the whole causal sequence, but nothing is ever as long as the sequence
        except input, output and, where heads see everything, their KVCache. Only a masked token between others counts
        differently: it has a position in a whole call, for windows and sparse attention, and none in a cache. One
        jitted loop over the chunks; gradients flow through it. Many bfloat16 chunks are slow on a CPU, whose compiler
        copies the output for each.

        Args:
            hidden_states: the tokens.
            chunk_size: tokens of a chunk, at least 1; L need not be a multiple.
            cache: what the tokens before left; None: no tokens, in a cache with room for these.
            attention_mask: (B, L), (B, 1, L) or (B, 1, L, 1), 1 for a valid token.
            position_embeddings: (cos, sin) of all the tokens, as the layer takes them; EvoAttention takes none.
            implementation: None, "triton", "reference" or "interpret".

        Raises:
            ValueError: as the layer, or chunk_size below 1. TypeError: as the layer.

        >>> import jax.numpy as jnp, evo_jax
        >>> from flax import nnx
        >>> layer = evo_jax.SlidingWindowAttention(64, 4, window_size=16, rngs=nnx.Rngs(0))
        >>> out, cache = layer.stream(jnp.ones((1, 1000, 64)), chunk_size=128)
        >>> out.shape, cache.key.shape
        ((1, 1000, 64), (1, 16, 4, 16))
        """
        op = type(self).__name__
        x = shapes.float_array(op, "hidden_states", hidden_states)
        if x.ndim != 3:
            raise ValueError(f"{op}: hidden_states.shape={x.shape} must be (B, L, E)")
        size = shapes.at_least(op, "chunk_size", chunk_size, 1)
        batch, length, _ = x.shape
        extras: dict[str, Any] = {}
        count = np.full(batch, length)
        if attention_mask is not None:
            valid, wrong = padding.valid(op, attention_mask, batch, length)
            count = valid.sum(axis=1)
            extras["attention_mask"] = valid if wrong is None else shapes.token_mask(op, attention_mask, batch, length)
        if position_embeddings is not None:
            extras["position_embeddings"] = self._tables(position_embeddings, length)
        layer: Any = self
        if cache is None:
            dtype = layer.dtype or shapes.widest(x.dtype, layer.param_dtype)
            cache = layer.init_cache(batch, max(length, 1), dtype=dtype)
        self._check_stream(cache, count)
        graph, state = nnx.split(self)
        return _run(graph, size, implementation, state, x, cache, extras)

    def _check_stream(self, cache: Any, count: Any) -> None:
        """ValueError where it is known that `count` (B,) tokens are too many for the cache."""

    def _tables(self, position_embeddings: Any, length: int) -> tuple[jax.Array, jax.Array]:
        """(cos, sin) of all tokens, of the right lengths: a slice of a table that is too short would not fail."""
        op, layer = type(self).__name__, cast(Any, type(self))
        if "position_embeddings" not in inspect.signature(layer.__call__).parameters:
            raise TypeError(f"{op}: it takes no position_embeddings")
        if not isinstance(position_embeddings, tuple | list) or len(position_embeddings) != 2:
            raise ValueError(f"{op}: position_embeddings must be a pair (cos, sin)")
        cos, sin = (shapes.float_array(op, "position_embeddings", table) for table in position_embeddings)
        for table in (cos, sin):
            if table.ndim < 2 or table.shape[0 if table.ndim == 2 else 1] != length:
                raise ValueError(
                    f"{op}: position_embeddings of shape {table.shape} are not those of all {length} tokens"
                )
        return cos, sin


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(graph: Any, size: int, implementation: str | None, state: Any, x: Any, cache: Any, extras: Any) -> Any:
    def call(start: Any, count: int, cache: Any) -> tuple[jax.Array, Any]:
        cut = lambda a, axis: lax.dynamic_slice_in_dim(a, start, count, axis)  # noqa: E731
        own = dict(extras)
        if "attention_mask" in own:
            own["attention_mask"] = cut(own["attention_mask"], 1)
        if "position_embeddings" in own:
            own["position_embeddings"] = tuple(cut(a, 0 if a.ndim == 2 else 1) for a in own["position_embeddings"])
        return nnx.merge(graph, state)(cut(x, 1), cache=cache, implementation=implementation, **own)

    full, rest = divmod(x.shape[1], size)
    like, after = jax.eval_shape(lambda cache: call(0, min(size, x.shape[1]), cache), cache)
    out, cache = placed_as((jnp.zeros((*x.shape[:2], *like.shape[2:]), like.dtype), cache), (like, after))

    def step(state: Any, number: Any) -> tuple[Any, None]:
        cache, out = state
        chunk, cache = call(number * size, size, cache)
        return (cache, lax.dynamic_update_slice_in_dim(out, chunk, number * size, 1)), None

    if full:
        (cache, out), _ = lax.scan(step, (cache, out), jnp.arange(full, dtype=jnp.int32))
    if rest:
        chunk, cache = call(full * size, rest, cache)
        out = lax.dynamic_update_slice_in_dim(out, chunk, full * size, 1)
    return out, cache
