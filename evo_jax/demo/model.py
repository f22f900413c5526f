"""The demo's model: a causal byte-level language model, and the registry of the attention layers it can be built on."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evo_jax.demo.settings import Settings
from evo_jax.factory import CUDA
from evo_jax.modules import EvoAttention
from evo_jax.rotary import rotary_embedding

VOCABULARY = 256
_SHIFTS = 4


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


class FactoryMixer(nnx.Module):
    """A layer of the CUDA factory without its cache, told the positions by rotary embeddings."""

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
        # Odd heads have no pairs to turn: the token shift alone tells their order.
        tables = None if self.head_dim % 2 else rotary_embedding(jnp.arange(x.shape[1]), self.head_dim)
        return self.attention(x, position_embeddings=tables)[0]


# From the name on the command line to what builds the layer, a causal (B, L, E) -> (B, L, E).
ATTENTION: dict[str, Callable[[Settings, Any, nnx.Rngs], nnx.Module]] = {
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


class LanguageModel(nnx.Module):
    """Embedding, blocks, norm, and the embedding again as the head: (B, L) bytes -> (B, L, 256) float32 logits."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(settings.dtype)
        normal = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(VOCABULARY, settings.width, dtype=self.dtype, embedding_init=normal, rngs=rngs)
        self.embedding_norm = nnx.RMSNorm(settings.width, dtype=self.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(settings, self.dtype, rngs) for _ in range(settings.layers)])
        self.norm = nnx.RMSNorm(settings.width, dtype=self.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding_norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x)).astype(jnp.float32)


def token_shift(x: jax.Array) -> jax.Array:
    """(B, L, E) with the k-th quarter of its channels taken from k positions earlier, zeros before the first."""
    parts = jnp.array_split(x, _SHIFTS, axis=-1)
    late = [jnp.pad(part, ((0, 0), (k, 0), (0, 0)))[:, : x.shape[1]] for k, part in enumerate(parts)]
    return jnp.concatenate(late, axis=-1)
