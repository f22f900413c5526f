"""The Evo kernels in Pallas' interpreter: forward and every gradient over EVO_CASES, segments, options, platforms."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVO_CASES, EvoCase, evo_inputs
from checks import actual_evo, assert_close, check_evo, evo_params, expected_evo, signed_rows

import evo_jax
from pallas_kernels import evo_bwd, tuned
from pallas_kernels.evo import evo
from pallas_kernels.launch import evo_launch
from reference.evo import EvoSpec, evo_dense


@pytest.mark.parametrize("case", EVO_CASES, ids=str)
def test_kernel_equals_oracle(case):
    check_evo(case, "interpret")


SEGMENTED = (EvoCase(257, 16, mask="interior", own_query=True), EvoCase(200, 12, causal=False, mask="right"))


@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_backward_by_segments(case, monkeypatch):
    """Several segments, the last one ragged: their suffix sums and weight gradients must join up."""
    monkeypatch.setattr(evo_bwd, "SEGMENT_TOKENS", (case.batch * case.heads * 32,) * 2)
    geometry_chunks = evo_bwd.segment_chunks(case.batch * case.heads, 4, _geometry(case.length, block_m=16))
    assert geometry_chunks == 2, "the segments of this test are two chunks of 16 tokens"
    check_evo(case, "interpret", block_m=16)


def _geometry(length, block_m):
    from pallas_kernels.evo_tile import Geometry

    launch = replace(evo_launch(16, "float32", interpret=True), block_m=block_m)
    return Geometry(length, 16, True, True, "float32", "float32", "tf32x3", launch)


REPEATED = (
    EvoCase(257, 16, mask="interior", own_query=True),
    EvoCase(192, 16),
    EvoCase(100, 16, causal=False, mask="left"),
    EvoCase(100, 80),
    EvoCase(200, 128, dtype="bfloat16"),
    EvoCase(320, 64, dtype="bfloat16"),
    EvoCase(70, 136),  # a kernel more
)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_programs_of_several_chunks(case):
    """Each takes three, the last one fewer; they hold their kernels, by blocks where a row has several."""
    with tuned.override({"evo_forward": {"repeats": 3}}), tuned.recording() as launches:
        check_evo(case, "interpret", block_m=64 if case.dtype == "bfloat16" else 16)
    (forward,) = (chosen.launch for key, chosen in launches.items() if key.kernel == "evo_forward")
    assert forward.repeats == 3


def test_reruns_are_bitwise_equal():
    case = EvoCase(100, 16, own_query=True, mask="interior")
    first, second = (jax.tree.leaves(actual_evo(case, "interpret")) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_accumulation(x64):
    """Sums of large values, where float32 carries would lose the small steps: c and S are exact to float64."""
    case = EvoCase(200, 16)
    v = 1e4 + evo_inputs(case)[0]
    params = evo_params(16, "float32")
    out = jax.jit(
        lambda v: evo_jax.evo_attention(v, params, accum_dtype=jnp.float64, implementation="interpret", block_m=16)
    )(v)
    exact = evo_dense(v.astype("float64"), None, jax.tree.map(lambda a: a.astype("float64"), params), None, EvoSpec())
    assert out.dtype == jnp.float32
    assert_close("out", out, exact, 2e-5)


def test_fp16_mean_ten_is_finite_and_right():
    """The original overflows here: its fp16 prefix passes 65504 after some 6,500 tokens."""
    key = jax.random.key(0)
    v = (10 + jax.random.normal(key, (1, 1, 8192, 16))).astype(jnp.float16)
    params = evo_params(16, "float16")
    out = jax.jit(lambda v: evo_jax.evo_attention(v, params, implementation="interpret", block_m=1024))(v)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert_close("out", out, evo_dense(v.astype(jnp.float32), None, wide, None, EvoSpec()), 2e-3)


def test_under_vmap_scan_and_remat():
    """Layers under lax.scan with remat, batches under vmap: the same gradients as one call after the other."""
    case = EvoCase(33, 16, batch=1)
    v = evo_inputs(case)[0]
    layers = [evo_params(16, "float32", seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    weight = jax.random.normal(jax.random.key(9), v.shape)

    def layer(x, params):
        return x + evo_jax.evo_attention(x, params, implementation="interpret"), None

    def scanned(v, stacked):
        return jnp.sum(weight * jax.lax.scan(jax.checkpoint(layer), v, stacked)[0])

    def plain(v, layers):
        for params in layers:
            v = v + evo_dense(v, None, params, None, EvoSpec())
        return jnp.sum(weight * v)

    value, grads = jax.jit(jax.value_and_grad(scanned, (0, 1)))(v, stacked)
    expected_value, expected = jax.value_and_grad(plain, (0, 1))(v, layers)
    assert_close("value", value, expected_value, 1e-4)
    assert_close("v", grads[0], expected[0], 1e-3)
    for name, grad, *each in zip(stacked._fields, grads[1], *expected[1], strict=True):
        assert_close(name, grad, jnp.stack(each), 1e-3)
    batched = jax.jit(jax.vmap(lambda v: evo_jax.evo_attention(v, layers[0], implementation="interpret")))
    expected_out = evo_dense(v, None, layers[0], None, EvoSpec())
    assert_close("vmap", batched(jnp.stack([v, 2 * v]))[0], expected_out, 1e-5)


def _platform_op(case):
    """Output and gradients by the op that chooses when it is lowered."""
    v, query, mask, cotangent = evo_inputs(case)
    spec = EvoSpec(case.causal, case.semantics == "padding")
    rows = signed_rows(mask, case.causal, case.semantics)
    v = v if mask is None else jnp.where(jnp.asarray(mask)[:, None, :, None], v, jnp.nan)

    @jax.jit
    def run(v, query, params, rows, cotangent):
        out, vjp = jax.vjp(lambda v, q, p: evo(v, q, p, rows, spec, mode="platform"), v, query, params)
        return out, vjp(cotangent)

    return run, (v, query, evo_params(case.width, case.dtype), rows, cotangent)


def test_platform_mode_runs_the_reference_on_a_cpu():
    case = EvoCase(100, 16, own_query=True, mask="left")
    run, args = _platform_op(case)
    out, grads = run(*args)
    expected_out, expected = expected_evo(case)
    assert_close("out", out, expected_out, 1e-5)
    for name, grad, want in zip("vq", grads, expected, strict=False):
        assert_close(name, grad, want, 1e-3)


def test_platform_mode_lowers_to_triton_for_cuda():
    run, args = _platform_op(EvoCase(100, 16))
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=_h100())
    with jax.sharding.use_abstract_mesh(mesh):
        text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("evo_output", "evo_bwd_ratio", "evo_bwd_weight"):
        assert kernel in text


def _h100():
    return jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_m": 48}, "block_m=48 must be a power of two"),
        ({"block_m": 8}, "block_m=8 must be a power of two from 16"),
        ({"num_warps": 3}, "num_warps=3"),
    ],
)
def test_bad_launches_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evo_jax.evo_attention(jnp.ones((1, 1, 4, 16)), implementation="interpret", **options)


def test_kernels_refuse_by_name():
    with pytest.raises(NotImplementedError, match="head width 264"):
        evo_jax.evo_attention(jnp.ones((1, 1, 4, 264)), implementation="interpret")
