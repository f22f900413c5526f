"""The benchmark harness: what is wrong is reported and never timed, and an interrupted run keeps what it has."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    contenders,
    decoding,
    kernel_times,
    layers,
    live_tiles,
    measure,
    peak,
    problems,
    run,
    shapes,
    suites,
    tables,
    timing,
)
from benchmarks.measure import Case, Effort
from benchmarks.run import main
from benchmarks.shapes import Shape
from benchmarks.timing import Contender, GateError, compare, gate, interleave
from reference.mask import Mask, allowed

SMALL = Shape(1, 2, 48, 16)
QUICK = Effort(rounds=2, seconds=0.001, growth=False)


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0)
    monkeypatch.setattr(timing, "SETTLE", 0)


def _contender(name, value, calls):
    return Contender(name, lambda: calls.append(name), lambda: {"out": np.full(4, value)})


@pytest.mark.parametrize("wrong", [1.1, np.nan])
def test_the_gate_stops_a_wrong_contender_before_it_is_timed(wrong):
    calls = []
    pair = [_contender("right", 1.0, calls), _contender("wrong", wrong, calls)]
    with pytest.raises(GateError, match="wrong: out differs"):
        compare("case", pair, {"out": 1e-3}, rounds=3)
    assert calls == []


def test_the_gate_reports_the_largest_difference():
    pair = [_contender("right", 1.0, []), _contender("near", 1.001, [])]
    assert gate(pair, {"out": 1e-2})["out"] == pytest.approx(1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_arrays_are_judged_whole(monkeypatch, dtype):
    """By JAX in float32, as small ones in float64; one NaN and one wrong tile among the last elements are seen."""
    right = np.random.default_rng(0).standard_normal((3, 70, 64), np.float32)
    near, tile, nan = (jnp.asarray(right, dtype) for _ in range(3))
    near, tile, nan = near * 1.01, tile.at[-1, -2:].set(0), nan.at[-1, -1, -1].set(jnp.nan)
    actual = {"near": near, "tile": tile, "nan": nan, "shape": near[:1]}
    small = timing.errors_of(actual, dict.fromkeys(actual, right))
    monkeypatch.setattr(timing, "LARGE", 1000)
    for arrays in (actual, {name: np.asarray(a, np.float32) for name, a in actual.items()}):
        errors = timing.errors_of(arrays, dict.fromkeys(actual, right))
        assert errors == pytest.approx(small, rel=1e-4, nan_ok=True)
    assert small["tile"] > 0.05 and np.isnan(small["nan"]) and small["shape"] == np.inf


def test_rounds_interleave():
    calls = []
    samples = interleave([_contender("a", 1, calls), _contender("b", 1, calls)], rounds=3, warmup=1)
    assert calls == ["a", "b"] * 2 + ["a", "a", "b", "b"] * 3  # warm-up, a look at the duration, three rounds
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_a_sample_is_many_short_calls_and_counts_one(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0.01)
    calls = []
    nap = Contender("nap", lambda: (calls.append(1), time.sleep(0.001)), dict)
    seconds = interleave([nap], rounds=2, warmup=0)["nap"]
    assert 6 <= len(calls) <= 23 and all(0.001 <= s < 0.01 for s in seconds)


def test_a_slow_contender_gets_fewer_rounds_and_others_all(monkeypatch):
    took = {"slow": 0.02, "fast": 0.001}
    monkeypatch.setattr(timing, "_seconds", lambda contender, calls: took[contender.name])
    contenders = [Contender(name, lambda: None, dict) for name in took]
    samples = interleave(contenders, rounds=5, warmup=0, seconds=0.045)
    assert {name: len(times) for name, times in samples.items()} == {"slow": 2, "fast": 5}


def test_one_that_is_quick_beside_a_long_one_is_sampled_often(monkeypatch):
    """By what their calls are said to take: other work on the machine must not decide this."""
    took = {"long": 2.0, "less": 1.7, "quick": 0.1}
    monkeypatch.setattr(timing, "_seconds", lambda contender, calls: took[contender.name])
    samples = interleave([Contender(name, lambda: None, dict) for name in took], rounds=2, warmup=0)
    assert {name: len(times) for name, times in samples.items()} == {"long": 2, "less": 2, "quick": 6}


def test_a_first_call_that_compiled_is_no_measure_of_the_others(monkeypatch):
    monkeypatch.setattr(measure, "LONG", 0.05)
    monkeypatch.setattr(timing, "LONG", 0.05)
    calls = []

    def result():
        time.sleep(0.06)
        return {"out": np.ones(3)}

    given = problems.problem("prefix_sum", SMALL, False)
    case = Case(
        given, {"peer": lambda: Contender("peer", lambda: calls.append(1), result)}, lambda: {"out": np.ones(3)}
    )
    entry = measure.measure(case, Effort(rounds=3, seconds=1.0, growth=False), {})["contenders"]["peer"]
    assert len(entry["samples_s"]) == 3 and len(calls) == 1 + 1 + 2 * 3  # the second call, a look, warmed rounds


def test_queued_calls_hold_no_outputs_of_those_before(monkeypatch):
    class Output:
        alive = most = 0

        def __init__(self):
            Output.alive += 1
            Output.most = max(Output.most, Output.alive)

        def __del__(self):
            Output.alive -= 1

    compiled = SimpleNamespace(lower=lambda *_: compiled, compile=lambda: call)
    call: Any = lambda *_: Output()  # noqa: E731
    call.memory_analysis = lambda: None
    monkeypatch.setattr(contenders, "jax", SimpleNamespace(
        jit=lambda _: compiled, default_backend=lambda: "gpu", block_until_ready=lambda x: x))  # fmt: skip
    made = contenders.compiled_contender("peer", lambda: {})
    assert made.repeat is not None
    made.repeat(8)
    assert Output.most == 1


def _case(**values):
    """A prefix sum whose contenders give these values: a number, or an exception to raise."""

    def make(name, value):
        if isinstance(value, Exception):
            raise value
        return Contender(name, lambda: calls.append(name), lambda: {"out": np.full(3, value)})

    calls = []
    given = problems.problem("prefix_sum", SMALL, False)
    makers = {name: lambda name=name, value=value: make(name, value) for name, value in values.items()}
    return Case(given, makers, lambda: {"out": np.ones(3)}), calls


def test_a_row_reports_what_is_wrong_or_fails_and_times_the_rest():
    values = {"wrong": 2.0, "nan": np.nan, "absent": ImportError("no such peer"), "evo_jax": 1.0, "peer": 1.0}
    case, calls = _case(**values)
    row = measure.measure(case, QUICK, {"copy_bytes_per_s": 1e9, "flops_per_s": {"float32": 1e12}})
    entries = row["contenders"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "wrong": "wrong",
        "nan": "wrong",
        "absent": "failed",
        "evo_jax": "ok",
        "peer": "ok",
    }
    assert set(calls) == {"evo_jax", "peer"} and "median_s" not in entries["wrong"]
    assert entries["absent"]["reason"] == "ImportError: no such peer"
    assert entries["nan"]["errors"]["out"] is None  # JSON has no NaN
    seconds, moved = entries["peer"]["median_s"], 2 * 4 * 2 * 48 * 16
    assert entries["peer"]["bytes_per_s"] == pytest.approx(moved / seconds)
    assert entries["peer"]["share_of_copy"] == pytest.approx(moved / seconds / 1e9)
    json.dumps(row, allow_nan=False)
    assert not run.ours_failed(row)
    assert run.ours_failed(measure.measure(_case(evo_jax=3.0)[0], QUICK, {}))


@pytest.mark.parametrize("op", ["flash", "sliding_window", "sparse", "multiscale"])
def test_work_counts_the_pairs_that_the_mask_allows(op):
    shape = Shape(3, 6, 300, 16)
    seen = allowed(Mask(problems.pattern(op, 6)), (1, 6, 300, 300), 6)
    pairs = 3 * int(np.broadcast_to(np.asarray(seen), (1, 6, 300, 300)).sum())
    moved = 4 * 4 * 3 * 6 * 300 * 16
    assert problems.work(problems.problem(op, shape, False)) == (4 * 16 * pairs, moved)
    assert problems.work(problems.problem(op, shape, True)) == (14 * 16 * pairs, 2 * moved)


@pytest.mark.parametrize("op, forward, both", [("linear", 4, 14), ("evo", 8, 32), ("prefix_sum", 1 / 16, 2 / 16)])
def test_work_follows_the_roofline_with_gradients_too(op, forward, both):
    size = 2 * 48 * 16**2
    counted = [problems.work(problems.problem(op, SMALL, gradient))[0] for gradient in (False, True)]
    assert counted == [forward * size, both * size]


def test_nobody_counts_the_work_of_a_layer():
    assert problems.work(layers.layer_problem("sparse_layer", SMALL, True))[0] is None


@pytest.fixture
def small_suite(monkeypatch):
    monkeypatch.setattr(shapes, "CPU", (SMALL, Shape(1, 2, 80, 16)))
    monkeypatch.setattr(shapes, "CPU_LONG", ())
    monkeypatch.setattr("benchmarks.ceilings.ceilings", lambda *_: {"copy_bytes_per_s": 1e9, "flops_per_s": {}})


def test_a_suite_agrees_with_its_peers_and_becomes_tables_and_plots(small_suite, tmp_path, capsys):
    """Some of the real suite: evo against the original's mathematics, all gradients."""
    pytest.importorskip("torch", reason="the peer is torch, which the newest lane leaves out (gigabytes of CUDA)")
    out = tmp_path / "cpu.json"
    assert main(["--rounds", "2", "--no-growth", "--op", "evo", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = {row["case"]: row["contenders"] for row in report["rows"]}
    assert len(rows) == 4 and report["complete"]
    both = rows["evo forward+backward B1 H2 L80 D16 float32"]
    assert {entry["status"] for entries in rows.values() for entry in entries.values()} == {"ok"}
    assert both["original's mathematics (torch)"]["errors"].keys() >= {"out", "v", "gate_kernel"}
    assert both["evo_jax reference"]["temp_bytes"] >= 0 and both["evo_jax reference"]["samples_s"]
    assert report["environment"]["versions"]["jax"] and report["environment"]["commit"]
    capsys.readouterr()
    assert tables.main([str(out), "--plots", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| evo forward B1 H2 L48 D16 float32 | jnp formulas |" in table
    assert (tmp_path / "evo_b1_h2_d16_float32.png").stat().st_size > 10_000


@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_an_interrupted_run_keeps_its_rows(monkeypatch, small_suite, tmp_path, how):
    def stop(*_):
        if how == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    row = {"case": "first", "contenders": {}}
    monkeypatch.setitem(suites.SUITES, "cpu", lambda _: iter([("first", lambda *_: row), ("second", stop)]))
    out = tmp_path / "cpu.json"
    assert main(["--out", str(out)]) == run.INTERRUPTED
    report = json.loads(out.read_text())
    assert report["rows"] == [row] and not report["complete"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_no_row_begins_after_the_time_is_over(small_suite, tmp_path, capsys):
    out = tmp_path / "cpu.json"
    assert main(["--op", "flash", "--minutes", "0", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["rows"] == [] and len(report["left_out"]) == 4 and not report["complete"]
    assert "left out" in capsys.readouterr().out


def test_a_row_that_raises_is_reported_and_the_run_goes_on(monkeypatch, small_suite, tmp_path):
    def fail(*_):
        raise MemoryError("too large")

    row = {"case": "second", "contenders": {}}
    monkeypatch.setitem(suites.SUITES, "cpu", lambda _: iter([("first", fail), ("second", lambda *_: row)]))
    out = tmp_path / "cpu.json"
    assert main(["--out", str(out)]) == 1
    assert json.loads(out.read_text())["rows"] == [{"case": "first", "error": "MemoryError: too large"}, row]


def test_a_run_goes_on_without_ceilings(monkeypatch, small_suite, tmp_path, capsys):
    def fail(*_):
        raise MemoryError("2 GB")

    row = {"case": "only", "contenders": {}}
    monkeypatch.setattr("benchmarks.ceilings.ceilings", fail)
    monkeypatch.setitem(suites.SUITES, "cpu", lambda _: iter([("only", lambda *_: row)]))
    out = tmp_path / "cpu.json"
    assert main(["--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["rows"] == [row] and report["ceilings"] == {}
    capsys.readouterr()
    assert tables.main([str(out)]) == 0
    assert "- no ceilings: MemoryError: 2 GB" in capsys.readouterr().out


def test_the_gpu_suite_begins_with_every_operation():
    titles = [title for title, _ in suites.gpu(suites.Options())]
    first = next(number for number, title in enumerate(titles) if " forward+backward " in title)
    kinds = list(dict.fromkeys(title.split()[0] for title in titles[:first]))
    assert kinds == [*problems.OPS, "decode"] and first == len(problems.OPS) + len(shapes.GPU_DECODE)
    gradients = titles[first : first + len(problems.OPS)]
    assert gradients == [title.replace("forward", "forward+backward") for title in titles[: len(problems.OPS)]]
    assert len(set(titles)) == len(titles) > 60


def test_decoding_is_judged_and_measured():
    row = measure.measure(decoding.case(Shape(2, 4, 70, 16), "interpret"), QUICK, {"copy_bytes_per_s": 1e9})
    assert [entry["status"] for entry in row["contenders"].values()] == ["ok", "ok"]
    assert row["bytes"] == 4 * 16 * (2 * 2 * 70 + 2 * 2 * 4)
    assert row["flops"] == 4 * 16 * 2 * 4 * 70  # one query of each head sees the whole cache


def test_growth_is_that_of_one_call(monkeypatch):
    """A softmax over all pairs holds at least the scores."""
    shape = Shape(1, 4, 1024, 16)
    assert (peak.growth("flash", shape, False, "jax.nn xla", []) or 0) > 4 * 4 * 1024 * 1024 * 0.9
    monkeypatch.setattr(peak, "TIMEOUT", 0)
    assert peak.growth("flash", shape, False, "jax.nn xla", []) is None


def test_a_peer_gets_contiguous_tensors_in_the_layout_that_it_takes(monkeypatch):
    """flash-linear-attention copies what is not contiguous as (B, L, H, D)."""
    pytest.importorskip("torch", reason="the peer is in torch, which the newest lane leaves out")
    from benchmarks import peers_torch

    def chunk_linear_attn(*tensors, scale, normalize):
        assert scale == 1 and normalize
        assert all(a.is_contiguous() and a.shape == (1, 48, 2, 16) for a in tensors)
        return peers_torch.linear_of(*(a.transpose(1, 2) for a in tensors)).transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", SimpleNamespace(chunk_linear_attn=chunk_linear_attn))
    given = problems.problem("linear", SMALL, True)
    right = problems.ours(given, "reference")
    name = "flash-linear-attention"
    case = Case(given, {name: lambda: peers_torch._fla(given)}, lambda: problems.truth(given, right))
    entry = measure.measure(case, QUICK, {})["contenders"][name]
    assert entry["status"] == "ok" and entry["errors"].keys() == {"out", "query", "key", "value"}


def test_flex_attention_is_compiled_anew_and_makes_no_huge_masks(monkeypatch):
    torch = pytest.importorskip("torch", reason="the peer is torch, which the newest lane leaves out")
    from benchmarks import peers_torch

    done = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: done.append(dynamic) or f)
    peers_torch._flex(problems.problem("sliding_window", SMALL, False), False)
    assert done == ["reset", False]
    with pytest.raises(NotImplementedError, match="16384 x 16384 values a head"):
        peers_torch._flex(problems.problem("multiscale", Shape(1, 1, 16384, 1), False), False)


ORIGINAL = '''
import torch
from benchmarks import peers_torch

class EvoAttention(torch.nn.Module):
    """Makes its parameters in its first call, as the original does."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.heads, self.width, self.core = num_heads, embed_dim // num_heads, torch.nn.Module()

    def forward(self, x, causal=True):
        core, names = self.core, {"q": "q_proj", "local": "v_proj_local", "gate": "global_stat_gate_proj",
                                  "final": "final_gate_proj"}
        if not hasattr(core, "norm"):
            for name in names.values():
                setattr(core, name, torch.nn.Linear(self.width, self.width))
            core.norm = torch.nn.LayerNorm(self.width)
        v = x.view(*x.shape[:2], self.heads, self.width).transpose(1, 2)
        arrays = {"v": v, "norm_scale": core.norm.weight, "norm_bias": core.norm.bias}
        for short, name in names.items():
            arrays |= {f"{short}_kernel": getattr(core, name).weight.T, f"{short}_bias": getattr(core, name).bias}
        return peers_torch.evo(arrays).transpose(1, 2).reshape(x.shape)
'''


def test_originals_take_part_where_their_folder_is_given(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="the originals are in torch, which the newest lane leaves out")
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "evo_attn.py").write_text(ORIGINAL)
    row = measure.measure(suites.case("evo", SMALL, True, [tmp_path]), QUICK, {})
    assert row["contenders"]["original evo-attn"]["status"] == "ok", row["contenders"]
    case = suites.case("sparse_layer", SMALL, False, [tmp_path])  # its package is not there: the row says so
    entries = measure.measure(case, QUICK, {})["contenders"]
    assert entries.pop("original complexity")["status"] == "failed"
    assert [entry["status"] for entry in entries.values()] == ["ok"]
    restated = measure.measure(suites.case("sparse_layer", SMALL, False), QUICK, {})["contenders"]
    assert [entry["status"] for entry in restated.values()] == ["ok", "ok"]
    assert set(layers.LAYERS) < set(suites.OPS)


@pytest.mark.parametrize("kind", live_tiles.PATTERNS)
@pytest.mark.parametrize("size", [(64, 64), (128, 32)])
def test_live_tiles_are_those_that_hold_a_visible_pair(kind, size):
    shape, mask = Shape(1, 2, 2048, 16), Mask(live_tiles.PATTERNS[kind])
    seen = np.asarray(allowed(mask, (1, 2, 2048, 2048), 2)[0])
    held = np.broadcast_to(seen, (2, 2048, 2048)).reshape(2, 2048 // size[0], size[0], 2048 // size[1], size[1])
    assert live_tiles.tiles(kind, shape, size) == held.any((2, 4)).sum()


@pytest.mark.parametrize("module", [kernel_times, live_tiles])
def test_what_needs_a_gpu_says_so(module, capsys):
    assert module.main([]) == 1
    assert capsys.readouterr().err == f"{module.__name__.split('.')[-1]}: JAX sees no GPU\n"


def test_other_launches_are_read_from_the_command_line(capsys):
    assert kernel_times._launch("prefix:chunk=64,block=32") == ("prefix", {"chunk": 64, "block": 32})
    with pytest.raises(SystemExit):
        kernel_times.main(["--launch", "prefix:chunk"])
    assert "'prefix:chunk' is not KERNEL:FIELD=N,..." in capsys.readouterr().err


def test_peers_can_be_chosen():
    case = suites.case("prefix_sum", SMALL, False)
    some = suites.Options(peers=("lax.",)).narrowed(case).make
    assert set(some) == {"evo_jax reference", "lax.associative_scan"} < set(case.make)
    assert suites.Options().narrowed(case) == case


@pytest.mark.parametrize(
    "command, message",
    [
        (lambda: main(["--op", "flsh"]), "invalid choice: 'flsh'"),
        (lambda: main(["--rounds", "0"]), "argument --rounds: invalid"),
        (lambda: main(["--originals", "/nowhere"]), "/nowhere is no folder"),
        (lambda: main(["--out", "/"]), "argument --out: / is a folder"),
        (lambda: main(["--out", f"{__file__}/cpu.json"]), "cpu.json is in no folder"),
        (lambda: tables.main(["/nowhere.json"]), "/nowhere.json is no report"),
    ],
)
def test_bad_arguments_are_one_line(capsys, command, message):
    try:
        status = command()
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
