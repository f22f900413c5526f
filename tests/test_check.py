"""`python -m evo_jax check`: every case passes, planted faults are caught by name, bad arguments are one line."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import attention, check, scan
from evo_jax.__main__ import main
from evo_jax.check_cases import CASES

BY_NAME = {str(case): case for case in CASES}


@pytest.mark.parametrize("number, case", list(enumerate(CASES)), ids=map(str, CASES))
def test_every_case_passes(number, case):
    """One dtype each, all three in turn."""
    row = check.row(case, check.DTYPES[number % 3], "reference")
    assert row.passed, row
    assert row.same_bits and len(row.figures) >= 1
    assert any(figure.name.startswith("d_") for figure in row.figures) == case.gradient


def test_the_kernels_are_checked_in_the_interpreter():
    row = check.row(BY_NAME["linear step"], "bfloat16", "interpret")
    assert row.passed, row


def test_a_report_holds_errors_and_limits(tmp_path, capsys):
    out = tmp_path / "check.json"
    assert main(["check", "--op", "prefix_sum", "--dtype", "float32", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert (row["op"], row["dtype"], row["implementation"], row["passed"]) == (
        "prefix_sum",
        "float32",
        "reference",
        True,
    )
    assert {figure["name"] for figure in row["figures"]} == {"out", "reverse", "d_x"}
    assert all(0 <= figure["error"] <= figure["limit"] < 1e-5 for figure in row["figures"])
    assert report["environment"]["versions"]["jax"] == jax.__version__
    assert "1 of 1 passed" in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "CASES", (BY_NAME["prefix_sum both ways"],))
    path = tmp_path / ("x" * 300)  # longer than any file's name
    assert main(["check", "--op", "prefix_sum", "--dtype", "float32", "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert "1 of 1 passed" in printed.out and printed.err == f"check: --json {path}: File name too long\n"


def _plant(monkeypatch, wrong):
    """Let the softmax family's output be wrong(out)."""
    right = attention._run

    def run(*args):
        out, lse = right(*args)
        return wrong(out), lse

    monkeypatch.setattr(attention, "_run", run)


@pytest.mark.parametrize(
    "dtype, wrong",
    [
        ("float32", lambda out: out * (1 + 1e-5)),
        ("float32", lambda out: out.at[1, 0, 3, 5].set(jnp.nan)),
        ("bfloat16", lambda out: out.at[0, :, 1].multiply(1.1)),
    ],
    ids=["scaled", "nan", "one_head"],
)
def test_a_planted_fault_is_caught_by_name(monkeypatch, tmp_path, capsys, dtype, wrong):
    _plant(monkeypatch, wrong)
    monkeypatch.setattr(check, "CASES", (BY_NAME["flash decode"],))
    out = tmp_path / "check.json"
    assert main(["check", "--op", "flash", "--dtype", dtype, "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "flash decode" in printed and "FAIL out: " in printed and "0 of 1 passed" in printed
    assert [row["passed"] for row in json.loads(out.read_text())["rows"]] == [False]


def test_a_wrong_gradient_is_caught_by_name(monkeypatch):
    """A forward that is right does not hide it."""
    right = scan._run

    @jax.custom_jvp
    def double_tangent(x):
        return x

    double_tangent.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))
    monkeypatch.setattr(scan, "_run", lambda x, *rest: double_tangent(right(x, *rest)))
    row = check.row(BY_NAME["prefix_sum both ways"], "float32", "reference")
    assert [figure.name for figure in row.figures if not figure.passed] == ["d_x"]


def test_a_rerun_of_other_bits_and_an_exception_fail(monkeypatch, capsys):
    calls = iter(range(9))

    def noisy(x):
        return np.asarray(x) * np.float32(1 + 1e-7 * next(calls))

    def with_noise(x):
        return jax.pure_callback(noisy, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    case = BY_NAME["flash decode"]
    monkeypatch.setattr(check, "CASES", (case,))
    with monkeypatch.context() as patch:
        _plant(patch, with_noise)
        row = check.row(case, "float32", "reference")
        assert all(figure.passed for figure in row.figures) and not row.same_bits and not row.passed
    _plant(monkeypatch, lambda out: out[:, 0].at[0].set(1) @ out)
    assert main(["check", "--op", "flash", "--dtype", "float32"]) == 1
    assert "FAIL TypeError" in capsys.readouterr().out


@pytest.mark.parametrize("bits, dtype", [(7, jnp.bfloat16), (23, np.float32), (52, np.float64)])
def test_rounding_of_every_result(x64, bits, dtype):
    """x, an argument, stays; x + 1 and its exponential are each rounded, inside jit and custom rules too."""
    x = np.random.default_rng(0).normal(size=1000)
    rounded = check.rounded(jax.jit(lambda x: jax.nn.relu(jnp.exp(x + 1))), np.int64(bits), x)
    by_hand = np.exp((x + 1).astype(dtype).astype(np.float64)).astype(dtype).astype(np.float64)
    np.testing.assert_allclose(rounded, by_hand, rtol=1e-15)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--backend", "triton"], "check: --backend triton needs a CUDA device"),
        (["--json", "/nowhere/at/all/x.json"], "there is no folder /nowhere/at/all"),
        (["--json", "."], "check: --json .: it is a folder"),
        (["--op", "flsh"], "invalid choice: 'flsh'"),
    ],
    ids=["triton", "no_folder", "folder", "op"],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    status = partial(main, ["check", *arguments])
    try:
        code = status()
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
