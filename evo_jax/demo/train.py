"""The demo's training step: one jitted function of the state, which draws its own batch from the number of the step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from evo_jax.demo.model import LanguageModel, ModelCache
from evo_jax.demo.settings import Settings

_MOST_WARMUP = 100
_WEIGHT_DECAY = 0.1
_CLIP = 1.0


class TrainState(NamedTuple):
    """All that a checkpoint holds; `step` counts the steps done, and with the seed decides every later batch."""

    params: Any
    opt_state: Any
    step: jax.Array


class Trainer(NamedTuple):
    """The jitted functions of a run, and the model as functions of its parameters, with a cache and without.

    `decode` takes (params, tokens, cache, attention_mask=None); `init_cache` takes how many sequences and their
    capacity.
    """

    init: Callable[[], TrainState]
    step: Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array]]
    logits: Callable[[Any, jax.Array], jax.Array]
    decode: Callable[..., tuple[jax.Array, Any]]
    init_cache: Callable[[int, int], Any]


def build(settings: Settings) -> Trainer:
    """The functions of a run: initial state, one training step, and the model as a pure function of its parameters."""
    abstract = nnx.eval_shape(lambda: LanguageModel(settings, nnx.Rngs(settings.seed)))
    graph, _ = nnx.split(abstract)
    optimizer = _optimizer(settings)

    @jax.jit
    def init() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(LanguageModel(settings, nnx.Rngs(settings.seed)), nnx.Param))
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, nnx.State(params))
        return model(tokens)

    def decode(
        params: Any, tokens: jax.Array, cache: ModelCache, attention_mask: jax.Array | None = None
    ) -> tuple[jax.Array, ModelCache]:
        return nnx.merge(graph, nnx.State(params))(tokens, cache, attention_mask)

    def step(state: TrainState, text: jax.Array) -> tuple[TrainState, jax.Array]:
        windows = _batch(settings, state.step, text)
        loss, gradients = jax.value_and_grad(lambda params: next_byte_loss(logits, params, windows).mean())(
            state.params
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), loss

    return Trainer(init, jax.jit(step, donate_argnums=0), logits, decode, abstract.init_cache)


def next_byte_loss(logits: Callable[[Any, jax.Array], jax.Array], params: Any, windows: jax.Array) -> jax.Array:
    """(B, L + 1) bytes -> (B, L) losses in nats: of each byte but the first, given those before it."""
    windows = windows.astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, windows[:, :-1]), windows[:, 1:])


def _batch(settings: Settings, step: jax.Array, text: jax.Array) -> jax.Array:
    """(batch_size, seq_len + 1) bytes from random places of the text, drawn from the seed and the step alone."""
    key = jax.random.fold_in(jax.random.key(settings.seed), step)
    starts = jax.random.randint(key, (settings.batch_size, 1), 0, text.size - settings.seq_len)
    return text[starts + jnp.arange(settings.seq_len + 1)[None]]


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    warmup = min(_MOST_WARMUP, settings.steps // 10 + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        settings.lr / warmup, settings.lr, warmup, max(settings.steps, warmup + 1), settings.lr / 20
    )
    decayed = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(_CLIP),
        optax.adamw(schedule, b2=0.98, weight_decay=_WEIGHT_DECAY, mask=decayed),
    )
