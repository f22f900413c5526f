"""The benchmark harness: a wrong contender is never timed, rounds interleave, reports say where they were made."""

import json
import time

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.run import main
from benchmarks.timing import Contender, GateError, compare, gate, interleave


def _contender(name, value, calls):
    def run():
        calls.append(name)

    return Contender(name, run, lambda: {"out": np.full(4, value)})


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


def test_rounds_interleave(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0)
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


def test_cpu_suite_writes_a_report(tmp_path, capsys, monkeypatch):
    """Some of the real suite: ours agrees with the original's mathematics in torch, gradients too."""
    monkeypatch.setattr(timing, "SAMPLE", 0)
    pytest.importorskip("torch", reason="the peer is torch, which the newest lane leaves out (gigabytes of CUDA)")
    out = tmp_path / "cpu.json"
    ops = [part for op in ("evo", "generate") for part in ("--op", op)]
    assert main(["--longest", "512", "--rounds", "2", *ops, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    cases = {row["case"]: row for row in report["rows"]}
    gradients = cases["evo forward+backward B1 H8 L512 D64 float32"]
    assert gradients["errors"].keys() >= {"out", "v", "gate_kernel"}
    assert all(len(times) == 2 for times in gradients["samples_s"].values())
    assert cases["generate 256 tokens, flash"]["ns_per_token"] > 0
    assert report["environment"]["versions"]["jax"] and report["gate_failure"] is None
    assert "torch" in capsys.readouterr().out
