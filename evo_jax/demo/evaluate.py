"""The held-out bits per byte of a trained model."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.demo.settings import Settings
from evo_jax.demo.train import Trainer, next_byte_loss

_BATCH_TOKENS = 4096


def held_out_bits_per_byte(
    trainer: Trainer, settings: Settings, params: Any, text: bytes, progress: Callable[[float], None] = lambda _: None
) -> float:
    """Bits per byte of the whole `text`, each byte scored once, given at least the half window of bytes before it.

    Windows of seq_len overlap by half and only their later half counts; newlines stand for what precedes the text.
    """
    half = settings.seq_len // 2
    batch = max(1, _BATCH_TOKENS // settings.seq_len)
    count = -(-len(text) // half)
    padded = np.full(half + count * half + 1, ord("\n"), np.uint8)
    padded[half + 1 : half + 1 + len(text)] = np.frombuffer(text, np.uint8)
    scored = np.arange(count * half) < len(text)

    @jax.jit
    def score(params: Any, starts: jax.Array, padded: jax.Array) -> jax.Array:
        windows = padded[starts[:, None] + jnp.arange(settings.seq_len + 1)[None]]
        return next_byte_loss(trainer.logits, params, windows)[:, half:]

    nats, device_text = 0.0, jnp.asarray(padded)
    for first in range(0, count, batch):
        windows = np.minimum(np.arange(first, first + batch), count - 1)
        losses = np.asarray(score(params, jnp.asarray(windows * half), device_text), np.float64)
        fresh = losses[: count - first].reshape(-1)
        nats += float(fresh[scored[first * half : first * half + fresh.size]].sum())
        progress(min(1.0, (first + batch) / count))
    return nats / len(text) / math.log(2)
