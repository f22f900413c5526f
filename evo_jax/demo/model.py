"""The demo's model: a causal byte-level language model, and the registry of the attention layers it can be built on."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast, overload

import jax
import jax.numpy as jnp
from flax import nnx

from evo_jax.demo.settings import Settings
from evo_jax.demo.shift import SHIFTS, Arrivals, token_shift, token_shift_after
from evo_jax.factory import CUDA
from evo_jax.modules import EvoAttention
from evo_jax.rotary import rotary_embedding
from reference.states import take_sequences

VOCABULARY = 256


class BlockCache(NamedTuple):
    """The attention's own cache, and the last tokens (B, SHIFTS - 1, E) that each of the two shifts has seen."""

    attention: Any
    before_attention: jax.Array
    before_mlp: jax.Array


class ModelCache(NamedTuple):
    """How many tokens the model has seen, `lengths` (B,) int32, and the cache of each block."""

    lengths: jax.Array
    blocks: tuple[BlockCache, ...]

    take = take_sequences


class EvoMixer(nnx.Module):
    """EvoAttention between two linear maps, which mix the channels of its heads; the second starts small.

    The layer's output is normalised and much the same from one byte to the next: at full size it would drown the
    byte itself in the residual stream, and training would have to find it again.
    """

    def __init__(self, settings: Settings, dtype: Any, rngs: nnx.Rngs):
        width, small = settings.width, nnx.initializers.variance_scaling(0.04, "fan_in", "truncated_normal")
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.attention = EvoAttention(width, settings.heads, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(width, width, dtype=dtype, kernel_init=small, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(self.attention(self.value(x), causal=True))

    def resume(self, x: jax.Array, cache: Any, new: Arrivals) -> tuple[jax.Array, Any]:
        """The same for the tokens after those in the cache."""
        # With a cache the layer gives a pair.
        out, cache = cast(Any, self.attention)(self.value(x), attention_mask=new.mask, cache=cache)
        return self.output(out), cache


class FactoryMixer(nnx.Module):
    """A layer of the CUDA factory, told the positions by rotary embeddings."""

    def __init__(self, name: str, settings: Settings, dtype: Any, rngs: nnx.Rngs):
        self.head_dim = settings.width // settings.heads
        # Windows and blocks that the demo's short sequences are longer than.
        options = {
            "sliding_window": {"window_size": 32},
            "sparse": {"block_size": 16},
            "multiscale": {"window_sizes": (16, 64)[: settings.heads // 2]},
        }.get(name, {})
        self.attention = CUDA.create(name, settings.width, settings.heads, dtype=dtype, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attention(x, position_embeddings=self._tables(jnp.arange(x.shape[1])))[0]

    def resume(self, x: jax.Array, cache: Any, new: Arrivals) -> tuple[jax.Array, Any]:
        """The same for the tokens after those in the cache."""
        tables = self._tables(new.positions)
        return self.attention(x, attention_mask=new.mask, position_embeddings=tables, cache=cache)

    def _tables(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        # Odd heads have no pairs to turn: the token shift alone tells their order.
        return None if self.head_dim % 2 else rotary_embedding(positions, self.head_dim)


# From the name on the command line to what builds the layer, a causal (B, L, E) -> (B, L, E).
ATTENTION: dict[str, Callable[[Settings, Any, nnx.Rngs], Any]] = {
    "evo": EvoMixer,
    **{name: partial(FactoryMixer, name) for name in ("flash", "sliding_window", "sparse", "linear", "multiscale")},
}


class MLP(nnx.Module):
    """Linear, squared ReLU, linear; the squared ReLU because tanh and erf are slow on CPUs."""

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


class Block(nnx.Module):
    """norm, attention, norm, MLP, each pair around a residual; both read some channels a few bytes late."""

    def __init__(self, settings: Settings, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(settings.width, dtype=dtype, rngs=rngs)
        self.attention = ATTENTION[settings.attention](settings, dtype, rngs)
        self.norm2 = nnx.RMSNorm(settings.width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(settings.width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(token_shift(self.norm1(x)))
        return x + self.mlp(token_shift(self.norm2(x)))

    def resume(self, x: jax.Array, cache: BlockCache, new: Arrivals) -> tuple[jax.Array, BlockCache]:
        """The same for the tokens after those in the cache."""
        shifted, before_attention = token_shift_after(cache.before_attention, self.norm1(x), new)
        mixed, attention = self.attention.resume(shifted, cache.attention, new)
        x = x + mixed
        shifted, before_mlp = token_shift_after(cache.before_mlp, self.norm2(x), new)
        return x + self.mlp(shifted), BlockCache(attention, before_attention, before_mlp)


class LanguageModel(nnx.Module):
    """Embedding, blocks, norm, and the embedding again as the head: (B, L) bytes -> (B, L, 256) float32 logits."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(settings.dtype)
        self.width = settings.width
        normal = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(VOCABULARY, settings.width, dtype=self.dtype, embedding_init=normal, rngs=rngs)
        self.embedding_norm = nnx.RMSNorm(settings.width, dtype=self.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(settings, self.dtype, rngs) for _ in range(settings.layers)])
        self.norm = nnx.RMSNorm(settings.width, dtype=self.dtype, rngs=rngs)

    def init_cache(self, batch_size: int, capacity: int) -> ModelCache:
        """The cache before the first byte, with room for `capacity` of them in each sequence."""
        rows = lambda: jnp.zeros((batch_size, SHIFTS - 1, self.width), self.dtype)  # noqa: E731  arrays of their own
        attention = (block.attention.attention.init_cache(batch_size, capacity) for block in self.blocks)
        blocks = tuple(BlockCache(cache, rows(), rows()) for cache in attention)
        return ModelCache(jnp.zeros(batch_size, jnp.int32), blocks)

    @overload
    def __call__(self, tokens: jax.Array) -> jax.Array: ...

    @overload
    def __call__(
        self, tokens: jax.Array, cache: ModelCache, attention_mask: jax.Array | None = None
    ) -> tuple[jax.Array, ModelCache]: ...

    def __call__(self, tokens, cache=None, attention_mask=None):
        """Logits; with a cache, of the tokens after those in it, and the cache after them.

        `attention_mask` (B, L) bool, with a cache only, is False for a token that does not exist: its logits mean
        nothing, and it leaves no trace in the cache.
        """
        x = self.embedding_norm(self.embedding(tokens))
        if cache is None:
            assert attention_mask is None
            for block in self.blocks:
                x = block(x)
            return self._head(x)
        new, blocks = Arrivals.of(cache.lengths, tokens.shape, attention_mask), []
        for block, before in zip(self.blocks, cache.blocks, strict=True):
            x, after = block.resume(x, before, new)
            blocks.append(after)
        return self._head(x), ModelCache(cache.lengths + new.counts, tuple(blocks))

    def _head(self, x: jax.Array) -> jax.Array:
        return self.embedding.attend(self.norm(x)).astype(jnp.float32)
