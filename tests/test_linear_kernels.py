"""The linear attention kernels in Pallas' interpreter: LINEAR_CASES, segments, resuming, options, platforms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LINEAR_CASES, LinearCase, linear_inputs
from checks import assert_close
from linear_checks import actual_linear, check_linear, expected_linear, spec_of

from pallas_kernels import launch, tuned
from pallas_kernels.launch import linear_segments
from pallas_kernels.linear import linear, refusal
from reference.linear import LinearSpec, LinearState, linear_dense


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_kernel_equals_oracle(case):
    """With the default launch these short sequences are one segment each, except where chunks are short."""
    check_linear(case, "interpret")


SEGMENTED = (  # and chunks of 16 tokens per segment
    (LinearCase(100, 16, value_width=48, heads=(4, 2), state=True), 2),
    (LinearCase(65, 80, value_width=24, heads=(4, 1), feature_map="softmax"), 1),
    (LinearCase(65, 12, causal=False, state=True), 2),
    (LinearCase(33, 16, keys=70, causal=False, value_width=8, heads=(4, 2), state=True), 1),
    (LinearCase(100, 16, mask="sequence", state=True), 1),
    # 48 tokens each: a run starts where one of them begins in reverse; 64 tokens: and where one begins forwards.
    (LinearCase(200, 16, runs="few", state=True), 2),
    (LinearCase(200, 16, runs="few", state=True), 3),
    (LinearCase(130, 16, runs="many", mask="interior", heads=(4, 2), state=True, feature_map="relu"), 1),
    (LinearCase(130, 12, runs="few", causal=False, state=True), 2),
    (LinearCase(100, 12, runs="many", causal=False, mask="left", heads=(4, 2)), 3),
    (LinearCase(100, 64, dtype="bfloat16", state=True), 2),
)


@pytest.mark.parametrize("case, chunks", SEGMENTED, ids=str)
def test_segments_equal_oracle(case, chunks, monkeypatch):
    """A program for every few chunks, the last segment ragged: their states must join up, run by run."""
    monkeypatch.setattr(launch, "SEGMENT_CHUNKS", chunks)
    assert linear_segments(case.batch * case.heads[0], -(-case.length // 16)) > 1
    check_linear(case, "interpret", block=16)


@pytest.mark.parametrize("case", [case for case, _ in SEGMENTED[::3]], ids=str)
def test_one_segment_equals_oracle(case, monkeypatch):
    """Many chunks in a single walk: the state never leaves the registers."""
    monkeypatch.setattr(launch, "FILLED", 1)
    check_linear(case, "interpret", block=16)


@pytest.mark.parametrize("capability", [None, (9, 0)])
@pytest.mark.parametrize("widths", [(64, 144), (144, 64)], ids=str)
def test_walks_of_rows_of_other_widths_have_one_chunk(widths, capability):
    """Each width by itself would have another one, by default, and segments would not join."""
    case = LinearCase(300, widths[0], value_width=widths[1], heads=(1, 1), batch=1)
    with tuned.override(capability=capability):
        check_linear(case, "interpret")


@pytest.mark.parametrize("filled", [1, 1000], ids="filled_{}".format)
def test_reruns_are_bitwise_equal(filled, monkeypatch):
    monkeypatch.setattr(launch, "FILLED", filled)
    case = LinearCase(200, 16, runs="few", mask="interior", heads=(4, 2), state=True)
    first, second = (jax.tree.leaves(actual_linear(case, "interpret", block=16)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("programs", [1, 7, 64, 127, 128, 4096])
@pytest.mark.parametrize("chunks", [1, 3, 4, 17, 128, 1000])
def test_segments_fill_the_gpu_and_are_never_empty(programs, chunks):
    segments = linear_segments(programs, chunks)
    steps = -(-chunks // segments)
    assert segments >= 1 and (segments - 1) * steps < chunks
    assert segments == 1 or (programs < launch.FILLED and steps >= launch.SEGMENT_CHUNKS)
    if programs >= launch.FILLED:
        assert segments == 1
    elif chunks >= launch.SEGMENT_CHUNKS * launch.FILLED:
        assert segments * programs >= launch.FILLED // 2


@pytest.mark.parametrize("cut", [1, 64, 99])
def test_cut_and_resume_equals_whole(cut):
    """Outputs, the last state, and gradients through the state in between, back into the initial state."""
    case = LinearCase(100, 16, heads=(4, 2), state=True)
    inputs = linear_inputs(case)
    call = partial(linear, rows=None, spec=LinearSpec(), mode="interpret")

    def resumed(query, key, value, state):
        first, state = call(query[:, :cut], key[:, :cut], value[:, :cut], state)
        second, state = call(query[:, cut:], key[:, cut:], value[:, cut:], state)
        return jnp.concatenate([first, second], axis=1), state

    def run(*args):
        out, vjp = jax.vjp(resumed, *args[:4])
        return out, vjp(args[4])

    args = (inputs.query, inputs.key, inputs.value, inputs.state, (inputs.d_out, inputs.d_state))
    actual = jax.jit(run)(*args)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected_linear(case)), strict=True):
        assert_close("resumed", got, want, 3e-6)


def test_without_the_last_state():
    """The same output and gradients, and no state in memory."""
    case = LinearCase(100, 16)
    query, key, value, _, _, d_out, _ = linear_inputs(case)

    def run(keep_state, d_state):
        call = partial(linear, state=None, rows=None, spec=LinearSpec(), mode="interpret", keep_state=keep_state)
        (out, state), vjp = jax.vjp(call, query, key, value)
        return out, state, vjp((d_out, d_state))

    zeros = LinearState(jnp.zeros((2, 2, 16, 16)), jnp.zeros((2, 2, 16)))
    out, state, grads = jax.jit(lambda: run(False, None))()
    expected_out, _, expected = jax.jit(lambda: run(True, zeros))()
    assert state is None
    for got, want in zip((out, *grads), (expected_out, *expected), strict=True):
        np.testing.assert_array_equal(got, want)


def test_fp16_mean_ten_is_finite_and_right():
    """The original's sums pass 65504 here: 27,623 of 48,000 values of its output are NaN."""
    query, key, value = 10 + jax.random.normal(jax.random.key(0), (3, 1, 3000, 1, 16))
    query, key, value = (x.astype(jnp.float16) for x in (query, key, value))
    out, _ = jax.jit(lambda q, k, v: linear(q, k, v, None, None, LinearSpec(), mode="interpret"))(query, key, value)
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    expected, _ = linear_dense(query, key, value, None, None, LinearSpec())
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert_close("out", out, expected, 5e-4)


def test_query_without_features_gives_zero():
    """relu of negative queries: 0 / (0 + eps), with finite gradients, 0 for the query."""
    key, value = jax.random.normal(jax.random.key(0), (2, 1, 70, 2, 16))
    query = -1 - jnp.abs(key)
    call = partial(linear, state=None, rows=None, spec=LinearSpec("relu"), mode="interpret", keep_state=False)
    (out, _), vjp = jax.jit(lambda *x: jax.vjp(call, *x))(query, key, value)
    grads = vjp((jnp.ones_like(out), None))
    assert not np.any(out) and not np.any(grads[0])
    assert all(np.isfinite(grad).all() for grad in grads)


def test_under_vmap_scan_and_remat():
    """Layers under lax.scan with remat, batches under vmap: the same gradients as one call after the other."""
    x = jax.random.normal(jax.random.key(0), (1, 33, 2, 16))
    weights = jax.random.normal(jax.random.key(1), (2, 16, 16)) / 4
    target = jax.random.normal(jax.random.key(9), x.shape)

    def layer(op, x, weight):
        y = jnp.einsum("btnd,de->btne", x, weight, precision="highest")
        return x + op(y, x, x)[0], None

    kernel = lambda q, k, v: linear(q, k, v, None, None, LinearSpec(), mode="interpret")  # noqa: E731
    oracle = lambda q, k, v: linear_dense(q, k, v, None, None, LinearSpec())  # noqa: E731

    def scanned(x, weights):
        return jnp.sum(target * jax.lax.scan(jax.checkpoint(partial(layer, kernel)), x, weights)[0])

    def plain(x, weights):
        for weight in weights:
            x = layer(oracle, x, weight)[0]
        return jnp.sum(target * x)

    value, grads = jax.jit(jax.value_and_grad(scanned, (0, 1)))(x, weights)
    expected_value, expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, weights)
    assert_close("value", value, expected_value, 1e-5)
    assert_close("x", grads[0], expected[0], 1e-5)
    assert_close("weights", grads[1], expected[1], 1e-5)
    batched = jax.jit(jax.vmap(lambda x: kernel(x, x, x)[0]))(jnp.stack([x, 2 * x]))
    assert_close("vmap", batched[1], oracle(2 * x, 2 * x, 2 * x)[0], 1e-6)


def test_runs_with_x64_on(x64):
    check_linear(LinearCase(70, 16, runs="few", heads=(4, 2), state=True), "interpret")


def test_platform_mode_runs_the_reference_on_a_cpu():
    check_linear(LinearCase(100, 16, heads=(4, 2), mask="left", state=True), "platform")


def test_platform_mode_lowers_to_triton_for_cuda():
    case = LinearCase(100, 16, state=True)
    inputs = linear_inputs(case)

    def run(query, key, value, state, cotangents):
        call = partial(linear, rows=None, spec=spec_of(case), mode="platform")
        out, vjp = jax.vjp(call, query, key, value, state)
        return out, vjp(cotangents)

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        args = (*inputs[:4], (inputs.d_out, inputs.d_state))
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"linear_{name}" in text for name in ("num", "d_query", "d_key", "d_value"))


def test_what_the_kernels_refuse():
    def why(width=16, value_width=16, dtype="float32", state_dtype="float32", feature_map="elu"):
        shape = jax.ShapeDtypeStruct((1, 8, 2, width), dtype)
        value = jax.ShapeDtypeStruct((1, 8, 2, value_width), dtype)
        kv = jax.ShapeDtypeStruct((1, 2, width, value_width), state_dtype)
        state: Any = LinearState
        return refusal(shape, shape, value, state(kv, kv), None, LinearSpec(feature_map))

    assert why() is None and why(256, 256, "bfloat16") is None
    assert "key width 257" in (why(width=257) or "")
    assert "value width 300" in (why(value_width=300) or "")
    assert "query.dtype=float64" in (why(dtype="float64") or "")
    assert "state.kv.dtype=float64" in (why(state_dtype="float64") or "")
    assert "feature_map='tanh'" in (why(feature_map="tanh") or "")
