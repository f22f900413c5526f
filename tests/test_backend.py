"""Who decides which implementation runs: argument, context, environment; retracing; explain; the sibling check."""

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import evo_jax
from evo_jax.__main__ import main
from evo_jax._siblings import check
from evo_jax.backend import Choice, choose
from evo_jax.require_cuda import require_cuda
from pallas_kernels import tuned

ROOT = Path(__file__).resolve().parents[1]
MODULE = importlib.import_module("evo_jax.backend")  # the attribute evo_jax.backend is the context manager
X = np.ones((5, 3), np.float32)
V, PARAMS = jax.ShapeDtypeStruct((1, 2, 16, 8), np.float32), evo_jax.init_evo_params(jax.random.key(0), 8)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about the choice, so they say themselves whether there is a CUDA device."""
    monkeypatch.delenv("EVO_BACKEND", raising=False)
    monkeypatch.setattr(MODULE, "has_cuda_device", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(MODULE, "has_cuda_device", lambda: True)


def pick(implementation=None, refusal=None):
    return choose("op", implementation, lambda: refusal, (X,))


def test_auto_without_a_cuda_device_is_the_reference():
    assert pick() == "reference"


def test_auto_with_a_cuda_device_follows_the_platform(gpu):
    assert pick() == "platform"


def test_auto_with_a_refusal_is_the_reference_and_says_so_once(gpu, caplog):
    with caplog.at_level(logging.WARNING, logger="evo_jax"):
        assert [pick(refusal="D=999 is too wide"), pick(refusal="D=999 is too wide")] == ["reference"] * 2
    assert [r.getMessage() for r in caplog.records] == ["op uses the reference implementation: D=999 is too wide"]


def test_auto_without_a_device_says_so_once_at_info_level(caplog):
    with caplog.at_level(logging.INFO, logger="evo_jax"):
        for _ in range(2):
            choose("op for this test alone", None, lambda: None, (X,))
    assert [r.getMessage() for r in caplog.records] == [
        "op for this test alone uses the reference implementation: no CUDA device"
    ]


@pytest.mark.parametrize("name", ["triton", "interpret"])
def test_explicit_kernel_with_a_refusal_names_the_argument_and_the_way_out(name):
    with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot run: too wide; use implementation="):
        pick(name, refusal="too wide")


def test_precedence_is_argument_context_environment(monkeypatch, gpu):
    assert pick() == "platform"
    monkeypatch.setenv("EVO_BACKEND", "reference")
    assert pick() == "reference"
    with evo_jax.backend("auto"):
        assert pick() == "platform"
        with evo_jax.backend("triton"):
            assert pick() == "triton"
            assert pick("interpret") == "interpret"
        assert pick() == "platform"
    assert pick() == "reference"


def test_torch_is_the_old_name_of_reference(monkeypatch, gpu):
    monkeypatch.setenv("EVO_BACKEND", "torch")
    assert pick() == "reference"
    with evo_jax.backend("torch"):
        assert pick() == "reference"


def test_unknown_names_are_refused_with_the_choices(monkeypatch):
    with pytest.raises(ValueError, match=r"implementation='cuda' is not one of 'triton', 'reference', 'interpret' or"):
        pick("cuda")
    with pytest.raises(ValueError, match="'auto', 'triton', 'reference', 'torch', 'interpret'"), evo_jax.backend("gpu"):
        pass
    monkeypatch.setenv("EVO_BACKEND", "interpret")
    with pytest.raises(
        ValueError, match="EVO_BACKEND='interpret' is not one of 'auto', 'triton', 'reference', 'torch'"
    ):
        evo_jax.prefix_sum(X)


def test_environment_is_read_at_trace_time_never_at_import():
    code = (
        "import os, evo_jax, numpy as np\n"  # the bad value is there while importing
        "os.environ['EVO_BACKEND'] = 'reference'\n"
        "print(evo_jax.prefix_sum(np.ones(3, np.float32)))"
    )
    env = {**os.environ, "EVO_BACKEND": "nonsense", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[1.", "2.", "3.]"]


def counted():
    traces = []

    @jax.jit
    def fn(x):
        traces.append(1)
        return evo_jax.prefix_sum(x, axis=0)

    return fn, traces


def test_a_jitted_function_is_traced_again_inside_the_context_and_only_then():
    fn, traces = counted()
    fn(X)
    fn(X)
    assert len(traces) == 1
    for _ in range(2):
        with evo_jax.backend("reference"):
            fn(X)
            fn(X)
    assert len(traces) == 2
    fn(X)
    assert len(traces) == 2


def test_the_context_reaches_inside_jitted_functions(gpu):
    inner = jax.jit(evo_jax.prefix_sum)

    def chosen(*args):
        return [c.implementation for c in evo_jax.explain(inner, *args)]

    assert chosen(X) == ["triton"]
    with evo_jax.backend("reference"):
        assert chosen(X) == ["reference"]
    with evo_jax.backend("interpret"):
        assert chosen(X) == ["interpret"]


def test_arrays_on_the_cpu_of_a_gpu_host_use_the_reference(gpu):
    np.testing.assert_array_equal(jax.jit(evo_jax.prefix_sum)(X), np.cumsum(X, axis=0))
    np.testing.assert_array_equal(jax.grad(lambda x: evo_jax.prefix_sum(x)[-1].sum())(jnp.asarray(X)), np.ones_like(X))


@pytest.mark.gpu
def test_on_a_gpu_host_each_array_runs_where_it_lives(gpu):
    on_cpu, on_gpu = (jax.device_put(X, jax.devices(platform)[0]) for platform in ("cpu", "cuda"))
    for x in (on_cpu, on_gpu):
        out = jax.jit(evo_jax.prefix_sum)(x)
        assert out.devices() == x.devices()
        np.testing.assert_array_equal(out, np.cumsum(X, axis=0))
    with pytest.raises(NotImplementedError, match="implementation='triton' needs a CUDA device"):
        evo_jax.prefix_sum(on_cpu, implementation="triton")
    evo_jax.prefix_sum(on_gpu, implementation="triton").block_until_ready()


def test_explicit_triton_on_the_cpu_fails_clearly_however_it_is_called():
    def fn(x):
        return evo_jax.prefix_sum(x, implementation="triton").sum()

    for call in (fn, jax.jit(fn), jax.grad(fn), jax.vmap(lambda x: evo_jax.prefix_sum(x, implementation="triton"))):
        with pytest.raises(NotImplementedError, match="prefix_sum: implementation='triton' needs a CUDA device"):
            call(jnp.asarray(X))


def test_explicit_triton_can_be_traced_without_a_device():
    out = jax.eval_shape(lambda x: evo_jax.prefix_sum(x, implementation="triton"), X)
    assert out.shape == X.shape
    lowered = jax.jit(jax.grad(lambda x: require_cuda(x * x, "op").sum())).trace(X).lower(lowering_platforms=("cuda",))
    assert "func.func public @main" in lowered.as_text()


def test_explain_reports_shapes_dtypes_and_reasons_without_running():
    def fn(v, mask):
        out = evo_jax.evo_attention(v, attention_mask=mask)
        return evo_jax.prefix_sum(out, implementation="reference"), evo_jax.prefix_sum(out, implementation="reference")

    v = jax.ShapeDtypeStruct((2, 4, 10_000_000, 64), jnp.bfloat16)  # 10 GB, so this can only have been traced
    report = evo_jax.explain(fn, v, jax.ShapeDtypeStruct((2, 10_000_000), jnp.bool_))
    assert list(report) == [
        Choice("evo_attention", (v.shape,), "bfloat16", "reference", "no CUDA device"),
        Choice("prefix_sum", (v.shape,), "bfloat16", "reference", "implementation='reference'"),
    ]
    lines = str(report).splitlines()
    assert lines[0].split() == ["op", "shapes", "dtype", "implementation", "reason"]
    assert lines[1].split() == [
        *("evo_attention", "(2,", "4,", "10000000,", "64)", "bfloat16", "reference", "no", "CUDA", "device")
    ]


def test_explain_is_not_defeated_by_the_cache_of_jit():
    fn = jax.jit(evo_jax.prefix_sum, static_argnames=("axis",))
    fn(X, axis=0)
    assert [len(evo_jax.explain(fn, X, axis=0)) for _ in range(2)] == [1, 1]


def test_explain_reads_modules_gradients_and_scans():
    layer = evo_jax.EvoAttention(8, 2, rngs=nnx.Rngs(0))

    @nnx.jit
    def loss(layer, x):
        return layer(x).sum() + jax.lax.scan(lambda c, _: (evo_jax.prefix_sum(c), None), x, None, length=3)[0].sum()

    report = evo_jax.explain(nnx.grad(loss), layer, jnp.ones((1, 5, 8)))
    assert [c.op for c in report] == ["evo_attention", "prefix_sum"]
    assert str(evo_jax.explain(jnp.sin, X)) == "no evo_jax operation was called"


def test_explain_says_how_kernels_are_launched_and_who_chose_that():
    def report(**launch):
        return evo_jax.explain(lambda x: evo_jax.evo_attention(x, PARAMS, implementation="triton", **launch), V)

    lines = str(report()).split("\n\n")[1].splitlines()
    assert lines[0].split() == ["kernel", "launch", "from"]
    assert lines[1].split()[:5] == ["evo_forward", "tf32x3", "D8", "L16", "causal"]
    assert "block_m=64" in lines[1] and lines[1].endswith(" default")
    assert [chosen.source for chosen in report(block_m=32).launches.values()] == ["caller"]
    with tuned.override({"evo_forward": {"num_warps": 2}}):
        (chosen,) = report().launches.values()
    assert (chosen.source, chosen.launch.num_warps) == ("override", 2)
    assert not evo_jax.explain(evo_jax.prefix_sum, X, implementation="reference").launches


@pytest.mark.parametrize("command", (["demo"], ["check"], ["generate", "--checkpoint", "x", "--prompt", "x"]))
def test_commands_refuse_an_unknown_evo_backend_in_one_line(command, monkeypatch, capsys):
    monkeypatch.setenv("EVO_BACKEND", "fast")
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("error: EVO_BACKEND='fast' is not one of 'auto', 'triton', 'reference', 'torch'")
    )


def test_siblings_of_another_project_are_named(tmp_path, monkeypatch):
    check(ROOT)
    with pytest.raises(ImportError, match=f"'pallas_kernels' from {tmp_path}, but .*__init__.py comes first"):
        check(tmp_path)
    with pytest.raises(ImportError, match=r"'no_such_package_here' in .*: reinstall"):
        check(ROOT, ("no_such_package_here",))
    intruder = tmp_path / "reference.py"
    intruder.write_text("")
    code = "import evo_jax"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"ImportError: evo_jax needs its own package 'reference' from {ROOT}, but {intruder}" in done.stderr
