"""The demo from beginning to end: text, training with checkpoints, evaluation, report."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from evo_jax import backend, explain
from evo_jax.demo import baselines, evaluate, report, settings
from evo_jax.demo.checkpoint import Checkpoints
from evo_jax.demo.continuation import Sampler, continuation
from evo_jax.demo.losses import Losses
from evo_jax.demo.progress import Meter
from evo_jax.demo.settings import DemoError, Settings
from evo_jax.demo.text import Corpus, read_corpus
from evo_jax.demo.train import Trainer, TrainState, build

_CHECKPOINTS_PER_RUN = 5
_PROMPT = b"import os\n\n\ndef "
_SAMPLE_BYTES = 300


class _Run(NamedTuple):
    """What stays the same from the first step to the report."""

    console: Console
    chosen: Settings
    corpus: Corpus
    trainer: Trainer
    out: Path


def demo(given: Mapping[str, Any], out: Path, *, resume: bool) -> bool:
    """Train, evaluate and report into `out`; False if Ctrl-C ended the training, after a checkpoint.

    Raises:
        DemoError: settings that make no sense, --resume without a run to go on from, or no text to train on.
    """
    console = Console(soft_wrap=True)
    chosen = settings.load(out, given, warn=console.print) if resume else Settings(**given)
    corpus = read_corpus()
    if chosen.seq_len >= len(corpus.train):
        raise DemoError(
            f"--seq-len {chosen.seq_len} must be less than the {len(corpus.train)} bytes there are to train on"
        )
    out.mkdir(parents=True, exist_ok=True)
    implementation = contextlib.nullcontext() if chosen.backend is None else backend(chosen.backend)
    promotion = jax.numpy_dtype_promotion("standard")  # flax's norms in bfloat16 and optax rely on it
    with implementation, promotion, Checkpoints(out, fresh=not resume) as checkpoints:
        run = _Run(console, chosen, corpus, build(chosen), out)
        with _interruption() as interrupted:
            state = run.trainer.init()
            state = checkpoints.restore(state) if resume else state
            chosen.save(out)
            _introduce(run, state)
            with Losses(out, keep=int(state.step)) as losses:
                state = _train(run, state, checkpoints, losses, interrupted)
        if int(state.step) < chosen.steps:
            console.print(f"Stopped after {int(state.step)} of {chosen.steps} steps, with a checkpoint. To go on:")
            console.print(f"  python -m evo_jax demo --resume --out {out}", highlight=False)
            return False
        _finish(run, state, losses)
    return True


def _introduce(run: _Run, state: TrainState) -> None:
    size, corpus = sum(x.size for x in jax.tree.leaves(state.params)), run.corpus
    run.console.print(
        f"{size:,} parameters; {len(corpus.train):,} bytes of {len(corpus.train_modules)} modules to train on, "
        f"{len(corpus.held_out):,} bytes of {len(corpus.held_out_modules)} modules held out"
    )
    tokens = jax.ShapeDtypeStruct((run.chosen.batch_size, run.chosen.seq_len), jnp.int32)
    for choice in explain(run.trainer.logits, state.params, tokens):
        run.console.print(f"{choice.op} on {jax.devices()[0].device_kind}: {choice.implementation} ({choice.reason})")


def _train(
    run: _Run, state: TrainState, checkpoints: Checkpoints, losses: Losses, interrupted: threading.Event
) -> TrainState:
    """Step until the last step or Ctrl-C; a checkpoint at either, and a few between."""
    text = jnp.asarray(np.frombuffer(run.corpus.train, np.uint8))
    steps = run.chosen.steps
    every = -(-steps // _CHECKPOINTS_PER_RUN)
    done = int(state.step)
    with Meter(run.console, run.chosen, done) as meter:
        while done < steps and not interrupted.is_set():
            state, loss = run.trainer.step(state, text)
            losses.append(float(loss))
            done += 1
            meter.advance(losses.values)
            if done % every == 0:
                checkpoints.save(state)
    checkpoints.save(state)
    return state


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, in place of KeyboardInterrupt; the second Ctrl-C raises that."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may set handlers, and only it receives Ctrl-C
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(run: _Run, state: TrainState, losses: Losses) -> None:
    """Score, sample, plot."""
    console, chosen, held_out = run.console, run.chosen, run.corpus.held_out
    started = time.perf_counter()
    with console.status("scoring the held-out text"):
        score = evaluate.held_out_bits_per_byte(run.trainer, chosen, state.params, held_out)
    bits_per_byte = {
        f"this model ({chosen.attention})": score,
        "gzip -9": baselines.gzip_bits_per_byte(held_out),
        "bzip2 -9": baselines.bz2_bits_per_byte(held_out),
        "order-0 model": baselines.order0_bits_per_byte(run.corpus.train, held_out),
    }
    console.print(report.table(bits_per_byte, len(held_out)))
    with console.status("writing a continuation"):
        written = continuation(run.trainer, chosen, state.params, _PROMPT, Sampler(_SAMPLE_BYTES, seed=chosen.seed))
    console.rule("a continuation")
    console.print(report.printable(_PROMPT + written.text), markup=False, highlight=False)
    console.rule()
    report.plot_losses(run.out / "loss.png", losses.values, bits_per_byte)
    report.save_scores(run.out / "scores.json", bits_per_byte)
    console.print(
        f"Evaluated in {time.perf_counter() - started:.0f} s; loss.png, losses.jsonl and checkpoints are in {run.out}"
    )
