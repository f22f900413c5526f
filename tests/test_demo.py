"""The demo: its text and baselines against hand computations, tiny runs end to end, Ctrl-C and --resume."""

import bz2
import dataclasses
import importlib.util
import io
import json
import math
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_environment

from evo_jax import __main__ as command
from evo_jax import backend
from evo_jax.backend import has_cuda_device
from evo_jax.demo import baselines, checkpoint, continuation, evaluate, model, report, run, settings, text, train
from evo_jax.demo.continuation import Sampler
from evo_jax.demo.settings import DemoError, Settings

_CORPUS = text.read_corpus()
_TINY = ["--width=32", "--layers=1", "--heads=2", "--seq-len=16", "--batch-size=4", "--lr=0.01"]
_STEPS = 12


def _demo(out: Path, *flags: str) -> int:
    return command.main(["demo", *_TINY, f"--steps={_STEPS}", f"--out={out}", *flags])


def _losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(len(records)))
    return [record["loss"] for record in records]


@pytest.fixture
def little_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real training text, but only so much held-out text as is scored at once."""
    monkeypatch.setattr(run, "read_corpus", lambda: _CORPUS._replace(held_out=_CORPUS.held_out[:5000]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run, never stopped."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "read_corpus", lambda: _CORPUS._replace(held_out=_CORPUS.held_out[:5000]))
        assert _demo(out) == 0
    return out


def test_a_run_leaves_losses_that_fall_and_its_plot_scores_and_checkpoint(finished: Path) -> None:
    losses = _losses(finished)
    assert len(losses) == _STEPS
    assert abs(losses[0] - math.log(256)) < 0.3, "an untrained model spreads its bets over 256 bytes"
    assert np.mean(losses[-3:]) < losses[0] - 0.5
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (finished / "checkpoints" / str(_STEPS)).is_dir()
    scores = json.loads((finished / "scores.json").read_text())
    assert list(scores) == ["this model (evo)", "gzip -9", "bzip2 -9", "order-0 model"]
    assert 1.0 < scores["this model (evo)"] < 8.0


@pytest.mark.parametrize("name", [name for name in model.ATTENTION if name != "evo"])
def test_every_attention_trains(
    name: str, tmp_path: Path, little_held_out: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _demo(tmp_path, f"--attention={name}") == 0
    losses = _losses(tmp_path)
    assert len(losses) == _STEPS and losses[-1] < losses[0] - 0.3
    if name == "flash":  # one is enough: the continuation of each was written by the same function
        capsys.readouterr()
        assert command.main(["generate", f"--checkpoint={tmp_path}", "--prompt=import ", "--top-k=9"]) == 0
        assert capsys.readouterr().out.startswith("import ")


def test_a_later_checkpoint_replaces_an_earlier_one(finished: Path) -> None:
    kept = sorted(int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [9, _STEPS]


def test_the_same_seed_gives_the_same_losses(finished: Path, tmp_path: Path, little_held_out: None) -> None:
    assert _demo(tmp_path) == 0
    assert _losses(tmp_path) == _losses(finished)
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads((finished / "scores.json").read_text())


def test_ctrl_c_in_the_midst_and_resume_give_the_losses_of_a_whole_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, little_held_out: None
) -> None:
    """Stopped here by a real signal after step 5; resumed in another process, in which every warning is an error."""
    show = run.Meter.advance

    def show_and_stop(meter, losses) -> None:
        show(meter, losses)
        if len(losses) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.Meter, "advance", show_and_stop)
    before = signal.getsignal(signal.SIGINT)
    assert _demo(tmp_path) == command.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is before
    assert _losses(tmp_path) == _losses(finished)[:5]
    assert not (tmp_path / "loss.png").exists()
    again = _process("--resume", f"--out={tmp_path}")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "bits per byte" in output
    assert _losses(tmp_path) == _losses(finished)
    assert (tmp_path / "loss.png").exists()


def test_ctrl_c_from_outside_ends_the_process_cleanly(tmp_path: Path) -> None:
    process = _process(*_TINY, "--steps=1000000", f"--out={tmp_path}")
    try:
        deadline = time.monotonic() + 240
        path = tmp_path / "losses.jsonl"
        while not (path.exists() and path.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline, "no first step"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == command.INTERRUPTED, output
    assert f"--resume --out {tmp_path}" in output
    assert "Traceback" not in output
    assert (tmp_path / "checkpoints" / str(len(_losses(tmp_path)))).is_dir()


def _process(*flags: str) -> subprocess.Popen[str]:
    python = [sys.executable, "-W", "error", "-m", "evo_jax", "demo", *flags]
    environment = quick_environment()
    return subprocess.Popen(python, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_resume_of_a_finished_run_evaluates_again_and_trains_no_further(
    finished: Path, capsys: pytest.CaptureFixture[str], little_held_out: None
) -> None:
    before = _losses(finished)
    assert command.main(["demo", "--resume", f"--out={finished}"]) == 0
    assert _losses(finished) == before
    assert "this model (evo)" in capsys.readouterr().out


def test_resume_refuses_other_settings_but_more_steps(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["demo", "--resume", "--width=64", f"--out={finished}"]) == 1
    error = capsys.readouterr().err
    assert "--width 32, not 64" in error
    said: list[str] = []
    assert settings.load(finished, {"steps": 20}, warn=said.append).steps == 20
    assert "--steps 20, earlier 12" in said[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "--resume: there is no run"),
        (["--width=30", "--heads=4"], "--width 30 must be a multiple of --heads 4"),
        (["--steps=0"], "--steps 0 must be at least 1"),
        (["--seq-len=15"], "--seq-len 15 must be even"),
        (["--lr=-1"], "--lr -1.0 must be positive"),
        (["--seq-len=100000000"], "--seq-len 100000000 must be less than"),
    ],
)
def test_a_wrong_setting_is_named(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["demo", *flags, f"--out={tmp_path / 'new'}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_missing_libraries_are_named_with_the_extra_that_brings_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("optax", "orbax") else find(name))
    assert command.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "optax, orbax-checkpoint:" in error
    assert "pip install 'evo-jax[demo]'" in error


@pytest.fixture(scope="module", params=model.ATTENTION)
def tiny_model(request: pytest.FixtureRequest) -> tuple[Settings, train.Trainer, Any, jax.Array]:
    """Settings, trainer, parameters and a row of bytes; `logits` is jitted."""
    tiny = Settings(width=32, layers=1, heads=2, seq_len=16, attention=request.param)
    trainer = train.build(tiny)
    trainer = trainer._replace(logits=jax.jit(trainer.logits))
    return tiny, trainer, trainer.init().params, jnp.arange(60, 76)[None]


def test_bfloat16_and_the_interpreted_kernels_compute_the_same_model(tiny_model) -> None:
    tiny, trainer, params, tokens = tiny_model
    expected = np.asarray(trainer.logits(params, tokens))
    with backend("interpret"):
        interpreted = np.asarray(trainer.logits(params, tokens))
    np.testing.assert_allclose(interpreted, expected, atol=1e-4)
    with jax.numpy_dtype_promotion("standard"):
        coarse = train.build(dataclasses.replace(tiny, dtype="bfloat16")).logits
        rounded = np.asarray(jax.jit(coarse)(params, tokens))
    assert rounded.dtype == np.float32 and (rounded != expected).any()
    np.testing.assert_allclose(rounded, expected, atol=0.1)


def test_a_backend_that_cannot_run_here_is_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if has_cuda_device():
        pytest.skip("a CUDA device is present, so --backend triton runs")
    assert _demo(tmp_path, "--backend=triton") == 1
    output = capsys.readouterr()
    assert "triton (evo_jax.backend('triton')" in output.out
    assert "demo: evo_attention: implementation='triton' needs a CUDA device" in output.err


def test_the_corpus_is_split_by_module_the_same_way_every_time(tmp_path: Path) -> None:
    assert text.read_corpus() == _CORPUS
    assert not set(_CORPUS.train_modules) & set(_CORPUS.held_out_modules)
    assert all(map(text.is_held_out, _CORPUS.held_out_modules))
    assert not any(map(text.is_held_out, _CORPUS.train_modules))
    assert 0.03 < len(_CORPUS.held_out) / len(_CORPUS.train) < 0.3
    source = Path(text.__file__).with_name("nowhere")
    with pytest.raises(DemoError, match=r"\.pyc or a zip"):
        text.read_corpus(source)


def test_the_corpus_takes_modules_and_packages_and_leaves_their_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, kept = "collections", "json"
    assert text.is_held_out(held_out) and not text.is_held_out(kept)
    monkeypatch.setattr(text, "_LEAST_BYTES", 1)
    files = {
        "collections/__init__.py": "a\r\n",
        "collections/abc.py": "b\n",
        "collections/test/test_abc.py": "no\n",
        "json/tool.py": "d\n",
        "json/__init__.py": "c\n",
        "zipfile.py": "e\n",
        "not_of_the_library.py": "no\n",
        "encodings/cp037.py": "no\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    corpus = text.read_corpus(tmp_path)
    assert corpus == text.Corpus(b"c\nd\ne\n", b"a\nb\n", ("json", "zipfile"), ("collections",))


def test_baselines_against_hand_computations() -> None:
    # Train: a twice, b once; with one more each, of 3 + 256.
    by_hand = -(math.log2(3 / 259) + math.log2(2 / 259) + math.log2(1 / 259)) / 3
    assert baselines.order0_bits_per_byte(b"aab", b"abc") == pytest.approx(by_hand, rel=1e-12)
    assert baselines.order0_bits_per_byte(bytes(range(256)), b"hello") == pytest.approx(8, rel=1e-12)
    sample = _CORPUS.held_out[:20_000]
    deflate = zlib.compressobj(9, wbits=-15)
    deflated = len(deflate.compress(sample) + deflate.flush()) + 10 + 8  # gzip's header and trailer
    assert baselines.gzip_bits_per_byte(sample) == 8 * deflated / len(sample)
    stream = bz2.BZ2Compressor(9)
    assert baselines.bz2_bits_per_byte(sample) == 8 * len(stream.compress(sample) + stream.flush()) / len(sample)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1000])
def test_held_out_score_counts_every_byte_once(length: int) -> None:
    """Under a model that knows only the byte before, the score is a sum that a loop can do."""
    table = jax.random.normal(jax.random.key(0), (256, 256))
    trainer: Any = SimpleNamespace(logits=lambda params, tokens: params[tokens])
    sample = _CORPUS.held_out[:length]
    log_p = np.asarray(jax.nn.log_softmax(table), np.float64)
    previous = b"\n" + sample
    by_hand = -sum(log_p[previous[i], sample[i]] for i in range(length)) / length / math.log(2)
    tiny = Settings(seq_len=16)
    assert evaluate.held_out_bits_per_byte(trainer, tiny, table, sample) == pytest.approx(by_hand, rel=1e-5)


def test_continuation_follows_the_model_past_the_window() -> None:
    """Under a model certain that each byte is the sum of the two before it, modulo 256; and up to a stop byte."""

    def decode(params: jax.Array, tokens: jax.Array, cache: jax.Array, attention_mask: jax.Array) -> Any:
        seen = jnp.concatenate([cache, tokens], axis=1)
        last = jnp.take_along_axis(seen, attention_mask.sum(axis=1, keepdims=True), axis=1)
        return params * jax.nn.one_hot((seen[:, 1:] + seen[:, :-1]) % 256, 256), last

    trainer: Any = SimpleNamespace(decode=decode, init_cache=lambda batch, _: jnp.zeros((batch, 1), jnp.int32))
    by_hand = [1, 2]
    for _ in range(11):
        by_hand.append((by_hand[-1] + by_hand[-2]) % 256)
    params, window = jnp.asarray(1e4), Settings(seq_len=8)
    written = continuation.continuation(trainer, window, params, b"\1\2", Sampler(11))
    assert list(written.text) == by_hand[2:]
    written = continuation.continuation(trainer, window, params, b"\1\2", Sampler(11, 0.0, stop=by_hand[8]))
    assert list(written.text) == by_hand[2:9]


def test_generate_continues_a_checkpoint(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bytes that the model without a cache finds likeliest, for the trained model."""
    flags = ["generate", f"--checkpoint={finished}", "--length=7", "--temperature=0"]
    assert command.main([*flags, "--prompt=def f("]) == 0
    output = capsys.readouterr()
    assert "7 tokens in" in output.err and "tokens/s" in output.err
    trainer = train.build(settings.of_checkpoint(finished))
    with jax.numpy_dtype_promotion("standard"), checkpoint.Checkpoints(finished, fresh=False) as kept:
        params = kept.restore(jax.eval_shape(trainer.init)).params
        logits = jax.jit(trainer.logits)
        text = bytearray(b"def f(")
        for _ in range(7):
            padded = np.frombuffer(bytes(text).ljust(16), np.uint8).astype(np.int32)[None]
            text.append(int(np.argmax(np.asarray(logits(params, padded))[0, len(text) - 1])))
    assert output.out == report.printable(bytes(text)) + "\n"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"def f(")))
    assert command.main([*flags, "--prompt=-"]) == 0
    assert capsys.readouterr().out == output.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--length=0"], "--length 0 must be at least 1"),
        (["--temperature=-1"], "--temperature -1.0 must be"),
        (["--temperature=nan"], "--temperature nan must be"),
        (["--top-k=0"], "--top-k 0 must be"),
        (["--top-p=1.5"], "--top-p 1.5 must be"),
        (["--seed=-1"], "--seed -1 must be"),
        (["--stop=ab"], "--stop 'ab' must be one byte"),
        (["--checkpoint=nowhere"], "--checkpoint: there is no run in 'nowhere'"),
        (["--prompt="], "--prompt is empty"),
    ],
)
def test_generate_names_what_is_wrong(
    flags: list[str], message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["generate", f"--checkpoint={finished}", "--prompt=a", *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_cache_changes_nothing(tiny_model) -> None:
    """Prompts of different lengths in pieces, with holes, then bytes one by one, against whole sequences."""
    _, trainer, params, _ = tiny_model
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (3, 60)).astype(np.int32)
    expected = np.asarray(trainer.logits(params, tokens))
    decode, cache, done = jax.jit(trainer.decode), trainer.init_cache(3, 60), np.zeros(3, int)
    for size in (25, 25, 25, 1, 1):
        exists = rng.random((3, size)) < 0.6 if size > 1 else np.ones((3, 1), bool)
        given = rng.integers(0, 256, exists.shape).astype(np.int32)
        for row, some in enumerate(exists):
            given[row, some] = tokens[row, done[row] : done[row] + some.sum()]
        logits, cache = decode(params, given, cache, exists)
        for row, some in enumerate(exists):
            until = done[row] + some.sum()
            np.testing.assert_allclose(logits[row, some], expected[row, done[row] : until], atol=2e-6)
            done[row] = until
    np.testing.assert_array_equal(cache.lengths, done)
    backwards = cache.take(np.array([2, 1, 0]))
    last = np.stack([tokens[row, at] for row, at in enumerate(done)])[:, None]
    logits, _ = decode(params, last[::-1], backwards, np.ones((3, 1), bool))
    np.testing.assert_allclose(logits[::-1, 0], expected[range(3), done], atol=2e-6)


def test_the_model_does_not_see_the_future_and_sees_all_the_past(tiny_model) -> None:
    _, trainer, params, tokens = tiny_model
    base = trainer.logits(params, tokens)
    changed = trainer.logits(params, tokens.at[0, 8].set(99))
    assert base.shape == (1, 16, 256) and base.dtype == jnp.float32
    np.testing.assert_array_equal(base[:, :8], changed[:, :8])
    assert bool((base[:, 8:] != changed[:, 8:]).any(-1).all()), "every later position sees the change"


def test_the_batch_depends_on_seed_and_step_alone() -> None:
    some = jnp.asarray(np.frombuffer(_CORPUS.train[:3000], np.uint8))
    tiny = Settings(seq_len=16, batch_size=4)
    one, same, next_step = (train._batch(tiny, jnp.asarray(step), some) for step in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (4, 17)
    assert (one != next_step).any()
    other_seed = train._batch(Settings(seq_len=16, batch_size=4, seed=1), jnp.asarray(3), some)
    assert (one != other_seed).any()
    whole = bytes(np.asarray(some))
    assert all(bytes(np.asarray(window)) in whole for window in one)


def test_every_registered_attention_is_a_choice_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    for name in model.ATTENTION:
        assert command._parser().parse_args(["demo", f"--attention={name}"]).attention == name
    with pytest.raises(SystemExit):
        command.main(["demo", "--attention=none"])
    assert "invalid choice: 'none'" in capsys.readouterr().err


def test_what_a_model_writes_is_safe_on_a_terminal() -> None:
    assert report.printable(b"a\x1b[31m\n\tb\xff") == "a\ufffd[31m\n\tb\ufffd"
