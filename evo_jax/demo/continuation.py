"""Text written by a trained model after a prompt: at the end of the demo, and for `python -m evo_jax generate`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from evo_jax.demo import settings
from evo_jax.demo.checkpoint import Checkpoints
from evo_jax.demo.settings import DemoError, Settings
from evo_jax.demo.train import Trainer, build
from evo_jax.generate import generate


@dataclass(frozen=True, slots=True)
class Sampler:
    """How many bytes are drawn after a prompt, and how; `stop` is the byte after which the text ends.

    Raises:
        DemoError: a value that makes no sense.
    """

    length: int = 300
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    stop: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DemoError(f"--length {self.length} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise DemoError(f"--temperature {self.temperature} must be a finite number, at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise DemoError(f"--top-k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise DemoError(f"--top-p {self.top_p} must be greater than 0 and at most 1")
        if not 0 <= self.seed < 2**31:
            raise DemoError(f"--seed {self.seed} must be at least 0 and below 2**31")


class Written(NamedTuple):
    """The new bytes, and the seconds that they took, compilation apart."""

    text: bytes
    seconds: float


def continue_checkpoint(folder: Path, prompt: bytes, sampler: Sampler) -> Written:
    """Continue `prompt` by the newest checkpoint of the run in `folder`.

    Raises:
        DemoError: there is no such checkpoint.
    """
    chosen = settings.of_checkpoint(folder)
    promotion = jax.numpy_dtype_promotion("standard")  # flax's norms in bfloat16 rely on it
    with promotion, Checkpoints(folder, fresh=False) as checkpoints:
        trainer = build(chosen)
        state = checkpoints.restore(jax.eval_shape(trainer.init))
        return continuation(trainer, chosen, state.params, prompt, sampler)


def continuation(trainer: Trainer, chosen: Settings, params: Any, prompt: bytes, sampler: Sampler) -> Written:
    """Draw bytes after `prompt`, each given at least the half window of bytes before it, or all that there are.

    The model was trained on windows of seq_len bytes, and has no practice with later positions: a text that outgrows
    the window goes on from its own later half, in a new cache.
    """
    if not prompt:
        raise DemoError("--prompt is empty; give at least one byte")
    half = chosen.seq_len // 2
    most = min(half, sampler.length)
    write = _compiled(trainer, params, half, most, sampler)
    key, started, written = jax.random.key(sampler.seed), time.perf_counter(), bytearray(prompt)
    for part in range(-(-sampler.length // most)):
        fresh = write(bytes(written[-half:]), jax.random.fold_in(key, part))
        written += fresh
        if len(fresh) < most or fresh[-1] == sampler.stop:
            break
    return Written(bytes(written[len(prompt) :][: sampler.length]), time.perf_counter() - started)


def _compiled(
    trainer: Trainer, params: Any, context: int, most: int, sampler: Sampler
) -> Callable[[bytes, jax.Array], bytes]:
    """A function from the latest bytes, at most `context`, to at most `most` new ones."""

    def run(params: Any, latest: jax.Array, count: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        written = generate(
            jax.tree_util.Partial(trainer.decode, params),
            trainer.init_cache(1, context + most),
            latest,
            max_new_tokens=most,
            prompt_lengths=count,
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            stop_token=sampler.stop,
            key=key,
        )
        return written.tokens, written.lengths

    def arguments(latest: bytes) -> tuple[np.ndarray, np.ndarray]:
        padded = np.frombuffer(latest.ljust(context, b"\n"), np.uint8)
        return padded.astype(np.int32)[None], np.asarray([len(latest)], np.int32)

    compiled = jax.jit(run).lower(params, *arguments(b"\n"), jax.random.key(0)).compile()

    def write(latest: bytes, key: jax.Array) -> bytes:
        tokens, lengths = compiled(params, *arguments(latest), key)
        return bytes(np.asarray(tokens)[0, : int(lengths[0])].astype(np.uint8))

    return write
