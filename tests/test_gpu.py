"""On a real GPU, `pytest -m gpu`: numerics of the compiled kernels, bitwise reruns, large arrays, placement.

Nothing here has a CPU counterpart that proves it: TF32 products, races, and 64-bit offsets only show on the device.
"""

from functools import partial

import attend_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    ATTEND_CASES,
    EVO_CASES,
    LENGTHS,
    LINEAR_CASES,
    AttendCase,
    EvoCase,
    LinearCase,
    attend_inputs,
)
from checks import TOLERANCE, actual_evo, assert_close, check_evo, evo_params, expected_evo
from linear_checks import TOLERANCE as LINEAR_TOLERANCE
from linear_checks import actual_linear, check_linear

import evo_jax
from pallas_kernels import decode, tuned
from pallas_kernels.attend import attend
from pallas_kernels.attend_fwd import Plan
from reference.dense import attend_dense

pytestmark = pytest.mark.gpu

# float32 products are TF32 x 3 (some 2^-21 per product, against 2^-24); the fp16 products are TF32, which rounds the
# gate to fp16's own precision.
GPU_TOLERANCE = {**TOLERANCE, "float32": (5e-5, 3e-3, 3e-3), "float16": (3e-3, 3e-2, 5e-2)}
LONG = (
    *(EvoCase(4099, 64), EvoCase(4099, 128), EvoCase(4099, 80, mask="interior")),
    *(EvoCase(4099, width, dtype="bfloat16", steady=True) for width in (64, 80, 128)),
)


@pytest.mark.parametrize("case", (*EVO_CASES, *LONG, EvoCase(300, 256)), ids=str)
def test_evo_equals_oracle(case):
    check_evo(case, "triton", GPU_TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_evo_in_programs_of_several_chunks(width, masked):
    """As long sequences without a mask are launched on Hopper, and with one; the last program has one chunk."""
    case = EvoCase(4099, width, dtype="bfloat16", steady=True, mask="interior" if masked else None, own_query=masked)
    with tuned.override({"evo_forward": {"repeats": 8, "num_stages": 2 if width == 64 else 1}}):
        check_evo(case, "triton", GPU_TOLERANCE)


def test_long_output_of_bfloat16_equals_oracle():
    """Of standard normal values, whose gradient is ill-conditioned at this length (cases.steady_values)."""
    case = EvoCase(4099, 64, dtype="bfloat16")
    assert_close("out", actual_evo(case, "triton")[0], expected_evo(case)[0], GPU_TOLERANCE["bfloat16"][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_reruns_are_bitwise_equal(width, dtype):
    """Many programs at once, several segments: a race or an atomic would show as a changed bit."""
    case = EvoCase(8200, width, dtype=dtype, batch=2, heads=8, own_query=True, mask="interior")
    first = jax.tree.leaves(actual_evo(case, "triton"))
    for _ in range(10):
        again = jax.tree.leaves(actual_evo(case, "triton"))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


# As above: TF32 x 3, and features, sums and gradients of fp16 rounded to TF32's 11 bits.
LINEAR_GPU_TOLERANCE = {**LINEAR_TOLERANCE, "float32": (1e-5, 1e-5, 5e-5), "float16": (2e-3, 2e-3, 1e-2)}
LINEAR_LONG = (
    LinearCase(4099, 64, batch=1, state=True),  # cut into segments
    LinearCase(4099, 128, dtype="bfloat16", heads=(8, 2), mask="interior", state=True),
    LinearCase(1029, 80, dtype="bfloat16", heads=(64, 64), state=True),  # one segment
    LinearCase(2050, 64, causal=False, runs="few", state=True),
    LinearCase(2050, 64, causal=False, feature_map="softmax", dtype="float16"),
)


@pytest.mark.parametrize("case", (*LINEAR_CASES, *LINEAR_LONG), ids=str)
def test_linear_equals_oracle(case):
    check_linear(case, "triton", LINEAR_GPU_TOLERANCE)


@pytest.mark.parametrize("heads", [(4, 2), (128, 64)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_reruns_are_bitwise_equal(dtype, heads):
    """In segments, and in one walk."""
    case = LinearCase(2200, 80, dtype=dtype, heads=heads, runs="few", mask="interior", state=True)
    first = jax.tree.leaves(actual_linear(case, "triton"))
    for _ in range(5):
        again = jax.tree.leaves(actual_linear(case, "triton"))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


ATTEND_LONG = (
    AttendCase(2050, width=128, heads=(8, 2), dtype="bfloat16", batch=1),
    AttendCase(1029, keys=2100, width=80, heads=(4, 2), windows=((300, 0),), dtype="float16", segments="interior"),
    AttendCase(2050, width=64, windows=((32, 32),), sparse=(1, 64, 3), heads=(4, 2), sinks=True, batch=1),
    AttendCase(700, width=256, windows=((100, 0), (1 << 30, 1 << 30)), soft_cap=3.0, bias="1NTS", dropout_rate=0.2),
)


@pytest.mark.parametrize("tiles", [None, 32], ids="tiles_{}".format)
@pytest.mark.parametrize("case", (*ATTEND_CASES, *ATTEND_LONG), ids=str)
def test_attend_equals_oracle(case, tiles, monkeypatch):
    """With the default launch, and in tiles so small that these sequences are several. float32 as above: TF32 x 3."""
    monkeypatch.setattr(attend_checks, "FORWARD", 1e-5)
    monkeypatch.setattr(attend_checks, "GRADIENT", 5e-5)
    attend_checks.check_attend(partial(attend, mode="triton", block_q=tiles, block_k=tiles), case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attend_reruns_are_bitwise_equal(dtype):
    case = AttendCase(2200, width=80, heads=(8, 2), dtype=dtype, segments="few", bias="B11S", sinks=True)
    first, *others = (attend_checks.compiled(partial(attend, mode="triton"), *attend_inputs(case)) for _ in range(5))
    assert all(np.array_equal(first[name], again[name], equal_nan=True) for again in others for name in first)


DECODE = (
    AttendCase(1, keys=20_000, width=128, heads=(8, 2), dtype="bfloat16", lengths="none", sinks=True),
    AttendCase(5, keys=4099, width=80, heads=(4, 2), offset="each", segments="interior", soft_cap=3.0),
    AttendCase(8, keys=9000, width=96, heads=(8, 1), windows=((5000, 0),), dtype="float16", lengths="kv"),
    AttendCase(3, keys=9000, windows=((32, 32),), sparse=(70, 64, 3), heads=(4, 2), causal=False, offset=5000),
    AttendCase(3, keys=4099, width=256, heads=(4, 1), offset=4000),
)


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_equals_oracle(case, monkeypatch):
    """Forward by the split-K kernel, gradients by the others, and reruns to the bit."""
    monkeypatch.setattr(attend_checks, "FORWARD", 1e-5)
    monkeypatch.setattr(attend_checks, "GRADIENT", 5e-5)
    inputs, spec, cotangents = attend_inputs(case)
    assert decode.serves(inputs, Plan(spec, False))
    run = partial(attend, mode="triton")
    attend_checks.check_attend(run, case)
    first, *others = (attend_checks.compiled(run, inputs, spec, cotangents) for _ in range(4))
    assert all(np.array_equal(first[name], again[name], equal_nan=True) for again in others for name in first)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")], ids=str)
@pytest.mark.parametrize("queries", [1, 100])
def test_mixed_dtypes_are_computed_in_the_wider(queries, dtypes):
    """Against the oracle in float32, which knows nothing of the dtypes."""
    inputs, spec, cotangents = attend_inputs(AttendCase(queries, keys=4099, width=64, heads=(4, 2), batch=1))
    given = dict(zip(("query", "key", "value"), (dtypes[0], dtypes[1], dtypes[1]), strict=True))
    mixed = inputs._replace(**{name: getattr(inputs, name).astype(dtype) for name, dtype in given.items()})
    wide = mixed._replace(**{name: getattr(mixed, name).astype("float32") for name in given})
    run = partial(attend, mode="triton")
    actual = attend_checks.compiled(run, mixed, spec, (cotangents[0].astype(dtypes[0]), cotangents[1]))
    expected = attend_checks.compiled(attend_dense, wide, spec, cotangents)
    for name, dtype in (("out", dtypes[0]), *given.items()):
        assert actual[name].dtype == jnp.dtype(dtype)
        assert_close(name, actual[name], expected[name], 1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads, width", [((8, 2), 128), ((4, 4), 100)], ids=str)
def test_linear_step_equals_oracle(heads, width, dtype):
    """Of one token, which some sequences mask."""
    check_linear(LinearCase(1, width, dtype=dtype, heads=heads, mask="sequence", state=True, batch=3), "triton",
                 LINEAR_GPU_TOLERANCE)  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("shape, axis", [*(((2, n, 16), 1) for n in LENGTHS), ((70001,), 0), ((7, 70001), 1)], ids=str)
def test_prefix_sum_is_exact_on_small_integers(shape, axis, exclusive, reverse):
    """Integers below 2^24 in float32: every order of summation gives the same bits."""
    x = np.random.default_rng(0).integers(-9, 10, shape).astype(np.float32)
    out = evo_jax.prefix_sum(x, axis=axis, reverse=reverse, exclusive=exclusive, implementation="triton")
    turned = np.flip(x, axis) if reverse else x
    expected = np.cumsum(turned, axis, dtype=np.float64) - (turned if exclusive else 0)
    np.testing.assert_array_equal(out, np.flip(expected, axis) if reverse else expected)


def test_float64_accumulation(x64):
    v = 1e4 + jax.random.normal(jax.random.key(0), (1, 2, 3000, 16), jnp.float32)
    params = evo_params(16, "float32")
    out = evo_jax.evo_attention(v, params, accum_dtype=jnp.float64, implementation="triton")
    wide = jax.tree.map(lambda a: a.astype("float64"), params)
    exact = evo_jax.evo_attention(v.astype("float64"), wide, implementation="reference")
    assert out.dtype == jnp.float32
    assert_close("out", out, exact, 5e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_more_than_two_billion_elements(dtype):
    """Offsets past 2^31: the last rows count on every row before them."""
    length = 2**25 + 5
    x = jnp.zeros((length, 65), dtype).at[::1_000_000].set(1)
    out = evo_jax.prefix_sum(x, axis=0, implementation="triton")
    np.testing.assert_array_equal(np.asarray(out[-3:].astype(jnp.float32)), -(-length // 1_000_000))


def test_arrays_on_the_host_use_the_reference():
    host = jax.devices("cpu")[0]
    v = jax.device_put(np.ones((1, 2, 40, 16), np.float32), host)
    params = jax.device_put(evo_params(16, "float32"), host)
    for run in (evo_jax.evo_attention, jax.jit(evo_jax.evo_attention)):
        assert run(v, params).devices() == {host}
    on_device = evo_jax.evo_attention(jax.device_put(v, jax.devices("gpu")[0]), evo_params(16, "float32"))
    assert {d.platform for d in on_device.devices()} == {"gpu"}


def test_long_fp16_is_finite():
    """Mean 10 over 65,536 tokens: the original's fp16 prefix is infinite after some 6,500."""
    v = (10 + jax.random.normal(jax.random.key(0), (1, 2, 65536, 64))).astype(jnp.float16)
    out = evo_jax.evo_attention(v, evo_params(64, "float16"), implementation="triton")
    assert bool(jnp.isfinite(out).all())
