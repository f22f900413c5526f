"""Tuning without a GPU: the interpreter stands for the device, and clocks are made up (test_gpu_tune.py: not so)."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evo_jax
from evo_jax import autotune_first, tune_command
from evo_jax.__main__ import main
from evo_jax.autotune import candidates, difference, tunable
from evo_jax.backend import on_arrays
from pallas_kernels import evo_fwd, prefix_scan, tuned, tuned_store
from pallas_kernels.tuned import Key

MODULE = sys.modules["evo_jax.autotune"]
X = np.arange(1800, dtype=np.float32).reshape(600, 3)
FAST, SLOW, WRONG, REFUSED = ({"chunk": chunk} for chunk in (16, 32, 128, 256))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if a CUDA device were there, with a cache and candidates of its own."""
    monkeypatch.setenv("EVO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned_store, "device_kind", lambda: "Some GPU")
    monkeypatch.setattr(MODULE, "candidates", lambda key, default, exact=False: [SLOW, FAST])
    tuned_store.forget()
    autotune_first._SEEN.clear()


def clock_by_launch(monkeypatch, seconds):
    """Each candidate's time is what `seconds` says of its chunk; the default's is 1."""
    chunks = {}
    original = MODULE._compiled

    def compiled(call, arrays, launches, pool):
        run = original(call, arrays, launches, pool)
        chunks[run] = next(iter(launches.values()))["chunk"]
        return run

    monkeypatch.setattr(MODULE, "_compiled", compiled)
    monkeypatch.setattr(MODULE, "_seconds", lambda run, calls: seconds.get(chunks[run], 1.0))


def sum_of(x):
    return evo_jax.prefix_sum(x, axis=0, implementation="interpret")


def test_the_fastest_candidate_is_stored_and_used(gpu, monkeypatch):
    clock_by_launch(monkeypatch, {16: 0.5, 32: 2.0})
    report = evo_jax.autotune(sum_of, X)
    (row,) = report.rows
    assert (row.best["chunk"], row.gain, row.tried, row.rejected) == (16, 2.0, 2, ())
    assert "chunk=16" in str(report) and "2.00x" in str(report)
    tuned_store.forget()
    default = tuned.choose(row.key, prefix_scan.prefix_launch(False, interpret=False))
    assert (default.chunk, default.block) == (16, 64)


def test_a_gain_within_noise_leaves_the_default(gpu, monkeypatch):
    clock_by_launch(monkeypatch, {16: 0.99, 32: 2.0})
    (row,) = evo_jax.autotune(sum_of, X).rows
    assert row.best == row.default and row.gain == 1 and tuned_store.has(row.key)


def test_a_wrong_candidate_is_rejected_by_name_however_fast(gpu, monkeypatch):
    clock_by_launch(monkeypatch, {128: 0.1, 256: 0.1, 16: 0.5})
    monkeypatch.setattr(MODULE, "candidates", lambda key, default, exact: [WRONG, REFUSED, FAST])
    original = prefix_scan.exclusive_carries

    def faulty(totals):
        chunks = totals.shape[1]
        if chunks == -(-len(X) // 256):
            raise RuntimeError("RESOURCE_EXHAUSTED: shared memory\nand a long trace")
        return original(totals) * jnp.float32(chunks != -(-len(X) // 128))

    monkeypatch.setattr(prefix_scan, "exclusive_carries", faulty)
    monkeypatch.setattr(prefix_scan, "SPAN", 0)  # two passes, of which only one is wrong
    with pytest.warns(RuntimeWarning, match=r"rejects \{'chunk': 128\} for prefix float32.*off by"):
        (row,) = evo_jax.autotune(sum_of, X).rows
    assert row.best["chunk"] == 16
    assert row.rejected[1] == (REFUSED, "RuntimeError: RESOURCE_EXHAUSTED: shared memory")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda x: x, None),
        (lambda x: x * (1 + 2**-14), None),
        (lambda x: x.at[7].multiply(1.01), "in a row, 9.8e-04 allowed"),
        (lambda x: x.at[7, 3].set(jnp.nan), "not finite"),
        (lambda x: x.at[7, 3].set(-jnp.inf), "not finite"),
    ],
)
def test_a_wrong_row_among_many_is_a_difference(change, fault):
    x = jax.random.normal(jax.random.key(0), (4096, 16)).at[0].set(-jnp.inf)
    found = difference({"a": change(x)}, {"a": x})
    assert found is None if fault is None else fault in found


def test_a_sum_of_half_precision_may_round_otherwise_and_integers_may_not():
    x = jax.random.normal(jax.random.key(0), (64, 16), jnp.bfloat16)
    assert difference(x * jnp.bfloat16(1.004), x) is None
    assert difference(jnp.arange(3) + 1, jnp.arange(3)) == "result 0 differs"


def test_other_keys_keep_what_was_found_before(gpu, monkeypatch):
    """The second kernel is timed under the first one's best launch, and both are stored."""
    seen = []
    original = MODULE._compiled
    monkeypatch.setattr(MODULE, "_compiled", lambda *args: (seen.append(args[2]), original(*args))[1])
    clock_by_launch(monkeypatch, {16: 0.5})
    report = evo_jax.autotune(lambda x: (sum_of(x), sum_of(x.T)), X)
    first, second = report.rows
    assert all(launches[first.key] == first.best for launches in seen if second.key in launches)
    assert len({path for path in tuned_store.folder().rglob("*.json")}) == 2


def test_a_launch_of_the_callers_is_not_tuned():
    q = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    options = {"is_causal": True, "implementation": "interpret"}
    fn = lambda q, **own: evo_jax.flash_attention(q, q, q, **options, **own)  # noqa: E731
    assert len(tunable(*on_arrays(fn, (q,), {}))) == 1
    assert not tunable(*on_arrays(fn, (q,), {"block_q": 32}))


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(RuntimeError, match="no CUDA device"):
        evo_jax.autotune(sum_of, X)
    assert main(["tune", "--op", "flash"]) == 1
    assert capsys.readouterr().err == "tune: kernels are timed on a GPU, and JAX sees no CUDA device\n"


@pytest.mark.parametrize("arguments", [["--op", "sum"], ["--head-dim", "0"], ["--length", "x"]])
def test_bad_arguments_of_the_command_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", *arguments])
    assert "error: argument" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("op", tune_command.OPS)
def test_every_problem_of_the_command_launches_kernels(op):
    call, arrays = tune_command.problem(op, "bfloat16", 64, 4096, heads=2, batch=1)
    with evo_jax.backend("interpret"):
        kernels = {key.kernel for key in tunable(call, arrays)}
    family = {"evo": "evo", "linear": "linear", "prefix_sum": "prefix", "decode": "attend_decode"}.get(op, "attend")
    assert kernels and all(kernel.startswith(family) for kernel in kernels)


def test_the_variable_tunes_under_jit_once_per_key(gpu, monkeypatch):
    tuned_calls = []
    monkeypatch.setattr(autotune_first, "tune", lambda call, types, asked: tuned_calls.append(tunable(call, types)))
    run = jax.jit(lambda x: evo_jax.prefix_sum(x, axis=0, implementation="triton"))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    run.trace(x)
    assert not tuned_calls, "nothing without the variable"
    jax.clear_caches()
    monkeypatch.setenv("EVO_AUTOTUNE", "1")
    run.trace(x)
    jax.jit(lambda x: run(x) + 1).trace(x)
    (keys,) = tuned_calls
    assert {key.kernel for key in keys} == {"prefix"}
    jax.clear_caches()
    with tuned.override({"prefix": {"chunk": 16}}):
        run.trace(jax.ShapeDtypeStruct((9999, 3), jnp.float32))
    assert len(tuned_calls) == 1, "who overrides launches wants no others"


@pytest.mark.parametrize("family", ["attend", "linear", "evo"])
def test_masks_and_states_of_a_call_are_left_out_of_its_tuning(family, gpu, monkeypatch):
    monkeypatch.setenv("EVO_AUTOTUNE", "1")
    seen = []
    monkeypatch.setattr(autotune_first, "tune", lambda call, types, asked: seen.append(tunable(call, types)))
    valid, q = jax.ShapeDtypeStruct((1, 64), bool), jax.ShapeDtypeStruct((1, 64, 4, 16), jnp.bfloat16)
    state = evo_jax.LinearState(jnp.ones((1, 4, 16, 16)), jnp.ones((1, 4, 16)))
    calls = {
        "attend": lambda q, valid, _: evo_jax.sparse_attention(
            *(q, q, q), mask=valid[:, None, None], logits_soft_cap=5.0, implementation="triton"
        ),
        "linear": lambda q, valid, state: evo_jax.linear_attention(
            *(q, q, q), attention_mask=valid, initial_state=state, implementation="triton"
        ),
        "evo": lambda q, valid, _: evo_jax.evo_attention(
            q.swapaxes(1, 2), attention_mask=valid, implementation="triton"
        ),
    }
    jax.jit(calls[family]).trace(q, valid, state)
    (keys,) = seen
    assert len(keys) == (3 if family == "attend" else 2) and all(key.kernel.startswith(family) for key in keys)
    assert {key.mask for key in keys} == {{"attend": "sparse+scores", "linear": "causal+rows", "evo": "causal"}[family]}


def test_tuning_runs_while_the_caller_is_traced(gpu, monkeypatch):
    """On the CPU a program for both platforms is the reference: it runs here, in truth, beside the outer trace."""
    monkeypatch.setenv("EVO_AUTOTUNE", "1")
    clock_by_launch(monkeypatch, {16: 0.5})
    options = {"axis": 0, "reverse": False, "exclusive": False, "accum_dtype": "float32", "mode": "platform"}
    run = partial(prefix_scan.prefix_scan, **options)

    @jax.jit
    def outer(x):
        autotune_first.before(run, x)
        with tuned.recording() as launches:
            out = run(x)
        return out, next(iter(launches.values())).launch.chunk

    out, chunk = outer(X)
    assert chunk == 16, "what was found is launched at once"
    np.testing.assert_allclose(out, np.cumsum(X, axis=0), rtol=1e-6)


def test_an_operation_runs_though_its_tuning_fails(gpu, monkeypatch):
    monkeypatch.setenv("EVO_AUTOTUNE", "1")
    monkeypatch.setattr(autotune_first, "tune", lambda *_, **__: 1 / 0)
    run = partial(prefix_scan.prefix_scan, axis=0, reverse=True, exclusive=False, accum_dtype="float32", mode="triton")
    with pytest.warns(RuntimeWarning, match="prefix_scan is not tuned: division by zero"):
        autotune_first.before(run, X)


def test_a_bad_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("EVO_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="EVO_AUTOTUNE='yes' must be '0' or '1'"):
        autotune_first.wanted()


def test_candidates_are_those_of_rows_as_wide_or_wider(monkeypatch):
    rows = [
        {"arch": "sm_90", "kernel": "prefix", "precision": "bf16", "width": width, "candidates": [{"chunk": width}]}
        for width in (64, 128)
    ]
    monkeypatch.setattr(MODULE, "_shipped", lambda: rows)
    monkeypatch.setattr(MODULE, "_arch", lambda exact: "sm_80")  # not swept here: the other's are better than none
    found = [candidates(Key.of("prefix", "bfloat16", width, 1, "inner"), {"chunk": 64}) for width in (64, 80, 200)]
    assert found == [[], [{"chunk": 128}], []]
    assert not candidates(Key.of("prefix", "bfloat16", 80, 1, "last"), {"chunk": 64}), "tiles of the other axis"


@pytest.mark.parametrize(
    ("key", "near", "exact"),
    [
        (Key.of("attend_forward", "bf16", 128, 1, "causal"), True, True),
        (Key.of("attend_forward", "bf16", 96, 1, "causal"), True, True),
        (Key.of("attend_forward", "fp16", 128, 1, "causal"), True, False),
        (Key.of("attend_forward", "bf16", 128, 1, "causal+scores"), True, False),
        (Key.of("attend_decode", "bf16", 128, 1, "causal+rows16"), True, True),
        (Key.of("attend_decode", "bf16", 128, 1, "causal+rows64"), True, False),
        (Key.of("evo_forward", "tf32", 128, 1, "causal"), False, False),
        (Key.of("prefix", "bfloat16", 64, 1, "inner"), True, True),
        (Key.of("prefix", "float32", 64, 1, "inner"), True, True),
        (Key.of("prefix", "float16", 64, 1, "inner"), True, False),
        (Key.of("prefix", "float32", 64, 1, "last"), False, False),
    ],
    ids=str,
)
def test_unasked_only_what_was_compiled_for_just_this_case_is_tried(key, near, exact, monkeypatch):
    monkeypatch.setattr(MODULE, "_arch", lambda exact: "sm_90")
    default = dict.fromkeys(tuned.KERNELS[key.kernel], 0)
    assert (bool(candidates(key, default)), bool(candidates(key, default, exact=True))) == (near, exact)
    monkeypatch.setattr(MODULE, "_arch", lambda exact: "sm_120" if exact else "sm_90")
    assert not candidates(key, default, exact=True) and bool(candidates(key, default)) == near


def test_unasked_what_has_a_result_stays_and_what_has_no_candidates_is_not_stored(gpu, monkeypatch):
    clock_by_launch(monkeypatch, {16: 0.5})
    (key,) = tunable(call := lambda arrays: sum_of(*arrays), [X])
    with monkeypatch.context() as patched:
        patched.setattr(MODULE, "candidates", lambda key, default, exact: [])
        assert not MODULE.tune(call, [X], asked=False).rows and not tuned_store.has(key)
    tuned_store.save("Some GPU", key, {"chunk": 32}, {})
    assert not MODULE.tune(call, [X], asked=False).rows
    assert tuned_store.find(key) == ({"chunk": 32}, "cache")


def test_all_arrays_are_on_the_device_that_is_tuned_for(gpu, monkeypatch):
    monkeypatch.setattr(tuned_store, "device", lambda: jax.devices("cpu")[0])
    seen = []
    monkeypatch.setattr(MODULE, "_tune_key", lambda *args, exact: (seen.append(args[3]), 1 / 0))
    for x in (X, jnp.asarray(X), jax.ShapeDtypeStruct(X.shape, X.dtype)):
        with pytest.raises(ZeroDivisionError):
            evo_jax.autotune(sum_of, x)
    assert [x.committed for (x,) in seen] == [True] * 3


@pytest.mark.parametrize(("queries", "kernels"), [(1, {"decode"}), (128, {"forward", "d_query", "d_key_value"})])
def test_a_cache_is_tuned_with_its_queries_at_the_end_and_a_step_without_gradients(queries, kernels, gpu, monkeypatch):
    monkeypatch.setenv("EVO_AUTOTUNE", "1")
    seen, masks = [], []
    original = autotune_first.before
    monkeypatch.setattr(autotune_first, "before", lambda run, x: (masks.append(x.mask), original(run, x)))
    monkeypatch.setattr(autotune_first, "tune", lambda call, types, asked: seen.append(tunable(call, types)))
    query, key = (jax.ShapeDtypeStruct((1, length, 4, 16), jnp.bfloat16) for length in (queries, 4096))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    flash = partial(evo_jax.flash_attention, implementation="triton")
    jax.jit(lambda q, k, n: flash(q, k, k, key_value_seq_lengths=n)).trace(query, key, lengths)
    (keys,) = seen
    assert {key.kernel for key in keys} == {f"attend_{name}" for name in kernels}
    assert masks[0].offset is None and masks[0].pattern.offset == 4096 - queries


def test_the_tuning_thread_takes_over_x64(gpu, monkeypatch):
    monkeypatch.setenv("EVO_AUTOTUNE", "1")
    seen = []
    monkeypatch.setattr(autotune_first, "tune", lambda *_, **__: seen.append(jnp.result_type(float).itemsize == 8))
    run = partial(prefix_scan.prefix_scan, axis=0, reverse=False, exclusive=False, accum_dtype="float32", mode="triton")
    for x64 in (True, False):
        with jax.enable_x64(x64):
            autotune_first.before(run, np.ones((9, 1 + x64), np.float32))
    assert seen == [True, False]


def test_squares_of_large_results_do_not_overflow():
    x = jax.random.normal(jax.random.key(0), (4096, 16))
    assert "off by" in str(difference(1e25 * x, x))
    assert difference(1e25 * x, 1e25 * x.at[7, 3].multiply(1 + 1e-6)) is None


def evo_gradient(v, scale):
    """Of a sum of squares that LayerNorm makes constant where `scale` is: then only rounding is left of it."""
    params = evo_jax.init_evo_params(jax.random.key(1), 16)._replace(norm_scale=scale)
    out, pull = jax.vjp(lambda v: evo_jax.evo_attention(v, params, implementation="interpret"), v)
    return v.min(), out, pull(out)


def test_evo_is_judged_on_positive_numbers(gpu, monkeypatch):
    """The caller's may cancel, and then right launches disagree; a carry that is off by a tenth is still seen."""
    right, wrong = {"block_m": 16}, {"block_m": 32}
    monkeypatch.setattr(MODULE, "candidates", lambda key, *_: [right, wrong] if key.kernel == "evo_forward" else [])
    monkeypatch.setattr(MODULE, "timed", lambda runs: dict.fromkeys(runs, 1.0))
    judged, carries, compare = [], evo_fwd.exclusive_carries, MODULE.difference

    def faulty(totals):
        tenth = 1.1 if totals.shape[1] == -(-130 // 32) else 1.0
        return carries(totals).at[:, 2].multiply(tenth)

    def spied(actual, expected):
        judged.append(float(expected[0]))
        return compare(actual, expected)

    monkeypatch.setattr(evo_fwd, "exclusive_carries", faulty)
    monkeypatch.setattr(MODULE, "difference", spied)
    v = jax.random.normal(jax.random.key(0), (1, 2, 130, 16), jnp.float32)
    with pytest.warns(RuntimeWarning, match="rejects {'block_m': 32} for evo_forward.*off by"):
        forward, _ = evo_jax.autotune(evo_gradient, v, jnp.ones(16)).rows
    assert [launch for launch, _ in forward.rejected] == [wrong]
    assert len(judged) == 2 and min(judged) >= 0 > v.min()


def test_a_case_that_fails_costs_no_other(monkeypatch, capsys):
    row = MODULE.Tuned(Key.of("prefix", "float32", 64, 9, "last"), {"chunk": 16}, {"chunk": 32}, 2.0, 1.0, 1, ())
    monkeypatch.setattr(tune_command, "has_cuda_device", lambda: True)
    answers: list = [ValueError("no memory\nand a trace"), MODULE.TuneReport("Some GPU", (row,)), KeyboardInterrupt()]

    def tune(*_):
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(tune_command, "tune", tune)
    sizes = ["--op", "flash", "--length", "64", "--head-dim", "16", "--head-dim", "32"]
    assert main(["tune", *sizes]) == 1
    out, err = capsys.readouterr()
    assert err == "tune: flash bfloat16 16 64: ValueError: no memory\n" and "prefix float32" in out
    answers[:0] = [MODULE.TuneReport("Some GPU", (row,))]
    assert main(["tune", *sizes]) == 130
    assert "prefix float32" in capsys.readouterr().out
