"""The softmax kernels in Pallas' interpreter: ATTEND_CASES, shapes of a bias, dead tiles, reruns, platforms."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_checks import check_attend, compiled, with_gradients
from cases import ATTEND_CASES, AttendCase, attend_inputs
from checks import assert_close

from pallas_kernels.attend import attend, refusal
from pallas_kernels.launch import AttendLaunch, attend_launch
from pallas_kernels.tile import parts_of
from reference.dense import AttendInputs, AttendSpec, attend_dense
from reference.mask import Mask, Pattern
from reference.visit import Tiling, Visits, key_visits, query_visits

small = partial(attend, mode="interpret", block_q=32, block_k=16)


@pytest.mark.parametrize("case", ATTEND_CASES, ids=str)
def test_kernel_equals_oracle(case):
    """In tiles so small that most sequences are several, some of them visited with the mask, some without, some not."""
    check_attend(small, case)


DEFAULTS = (
    AttendCase(130, keys=100, width=80, heads=(2, 1), dtype="bfloat16", windows=((70, 3),), causal=False, batch=1),
    AttendCase(70, width=160, value_width=24, dtype="float16", segments="few", batch=1),
)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_default_launch_equals_oracle(case):
    check_attend(partial(attend, mode="interpret"), case)


WHOLE_TILES = (  # random blocks of one number per tile: of queries and keys, of keys alone, of neither
    AttendCase(250, sparse=(1, 32, 2), windows=((16, 16),), heads=(4, 2)),
    AttendCase(160, keys=256, sparse=(0, 64, 3), windows=((32, 32),), causal=False, lengths="both"),
    AttendCase(150, keys=200, sparse=(2, 16, 2), windows=((8, 8),), dtype="bfloat16"),
    AttendCase(150, keys=190, sparse=(1, 24, 2), windows=((12, 12),), causal=False, offset=-8),
)


@pytest.mark.parametrize("case", WHOLE_TILES, ids=str)
def test_random_blocks_of_whole_tiles(case):
    check_attend(small, case)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-38, 3.0])
def test_any_scale(scale):
    """Also one that cannot be left to the exponent's multiplication, where hidden scores are -inf already."""
    inputs, spec, cotangents = attend_inputs(AttendCase(100, windows=((20, 0),), heads=(2, 1)))
    actual, expected = (compiled(op, inputs, replace(spec, scale=scale), cotangents) for op in (small, attend_dense))
    for name, array in actual.items():
        assert_close(name, array, expected[name], 3e-6)


SHAPES_OF_BIAS = [(50, (1, 1, 1, 40)), (50, (2, 4, 1, 1)), (50, (1, 4, 50, 1)), (50, (2, 1, 50, 1))]
SHAPES_OF_BIAS += [(1, (2, 4, 1, 1)), (1, (1, 1, 1, 1)), (1, (2, 1, 1, 40))]


@pytest.mark.parametrize(("queries", "shape"), SHAPES_OF_BIAS, ids=str)
def test_gradient_of_a_broadcast_bias(queries, shape):
    """Where a sink, dropout and the cotangent of lse make even the gradient of a constant bias differ from 0."""
    case = AttendCase(queries, keys=40, heads=(4, 2), windows=((20, 0),), lengths="kv", sinks=True, dropout_rate=0.2)
    inputs, spec, cotangents = attend_inputs(case)
    inputs = inputs._replace(bias=jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32))
    actual, expected = (compiled(op, inputs, spec, cotangents) for op in (small, attend_dense))
    for name in ("out", "bias", "query"):
        assert_close(name, actual[name], expected[name], 5e-6)


POISONED = (
    AttendCase(256, batch=1, heads=(2, 1), windows=((15, 0),), bias="11TS"),
    AttendCase(256, batch=1, windows=((8, 8),), sparse=(0, 16, 1), bias="11TS"),
)


def visited(visits: Visits, tile: int) -> set[int]:
    """Tiles that `tile` visits, of any head."""
    spans = [range(first, end) for first, *_, end in np.asarray(visits.bounds)[0, :, tile]]
    far = (row[:count] for row, count in zip(visits.extras[:, tile], visits.counts[:, tile], strict=True))
    return {int(n) for tiles in (*spans, *far) for n in tiles}


@pytest.mark.parametrize("case", POISONED, ids=str)
def test_dead_tiles_are_never_read(case):
    """NaN in every tile that a tile does not visit leaves the tile's own outputs and gradients as they are."""
    inputs, spec, (d_out, d_lse) = attend_inputs(case)
    op, tiling = (
        partial(attend, mode="interpret", block_q=32, block_k=32),
        Tiling(1, 2, case.heads[1], 256, 256, 32, 32),
    )
    clean = compiled(op, inputs, spec, (d_out, d_lse))
    of_keys, of_queries = (
        _with_nan_in_dead_tiles(key_visits(inputs.mask, tiling), 5),
        _with_nan_in_dead_tiles(query_visits(inputs.mask, tiling), 1),
    )
    poisoned = inputs._replace(key=of_keys(inputs.key), value=of_keys(inputs.value))
    got = compiled(op, poisoned, spec, (d_out, d_lse))
    for name in ("out", "lse", "query"):
        np.testing.assert_array_equal(got[name][:, 160:192], clean[name][:, 160:192], name)
    np.testing.assert_array_equal(got["bias"][:, :, 160:192], clean["bias"][:, :, 160:192])
    got = compiled(op, inputs._replace(query=of_queries(inputs.query)), spec, (of_queries(d_out), of_queries(d_lse)))
    for name in ("key", "value"):
        np.testing.assert_array_equal(got[name][:, 32:64], clean[name][:, 32:64], name)


def _with_nan_in_dead_tiles(visits: Visits, tile: int) -> Any:
    """x (1, 256, ...) -> the same with NaN in all tiles that `tile` does not visit."""
    dead = np.array([other not in visited(visits, tile) for other in range(8)])
    assert 0 < dead.sum() < 8
    return lambda x: jnp.where(
        np.repeat(dead, 32).reshape(1, 256, *(1,) * (x.ndim - 2)), jnp.asarray(jnp.nan, x.dtype), x
    )


def test_reruns_are_bitwise_equal():
    case = next(case for case in ATTEND_CASES if case.bias == "BNTS")
    first, second = (compiled(small, *attend_inputs(case)) for _ in range(2))
    assert all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)


def test_under_vmap_scan_and_remat():
    """Layers under lax.scan with remat, batches under vmap: the same gradients as one call after the other."""
    rng = np.random.default_rng(0)
    x, weights, target = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 33, 2, 16), (2, 16, 16), (1, 33, 2, 16))
    )
    spec, mask = AttendSpec(0.25), Mask(Pattern(windows=((9, 0),)))

    def layer(op: Any, x: Any, weight: Any) -> Any:
        y = jnp.einsum("btnd,de->btne", x, weight / 4, precision="highest")
        return x + op(AttendInputs(y, x, x, mask), spec)[0], None

    def scanned(x: Any, weights: Any) -> Any:
        return jnp.sum(target * jax.lax.scan(jax.checkpoint(partial(layer, small)), x, weights)[0])

    def plain(x: Any, weights: Any) -> Any:
        for weight in weights:
            x = layer(attend_dense, x, weight)[0]
        return jnp.sum(target * x)

    value, grads = jax.jit(jax.value_and_grad(scanned, (0, 1)))(x, weights)
    expected_value, expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, weights)
    assert_close("value", value, expected_value, 1e-5)
    assert_close("x", grads[0], expected[0], 1e-5)
    assert_close("weights", grads[1], expected[1], 1e-5)
    batched = jax.jit(jax.vmap(lambda x: small(AttendInputs(x, x, x, mask), spec)[0]))(jnp.stack([x, 2 * x]))
    assert_close("vmap", batched[1], attend_dense(AttendInputs(2 * x, 2 * x, 2 * x, mask), spec)[0], 1e-6)


PLATFORM = AttendCase(70, keys=50, bias="B11S", heads=(4, 2), soft_cap=2.0, lengths="kv", sinks=True)
SHARED = AttendCase(40, bias="B11S", heads=(4, 2))  # whose gradient is summed over heads


@pytest.mark.parametrize("case", [next(c for c in ATTEND_CASES if c.keep and c.dropout_rate), SHARED], ids=str)
def test_everything_with_x64_on(case, x64):
    """Indices and hashes stay 32-bit, whatever JAX's default is."""
    check_attend(small, case)


def test_platform_mode_runs_the_reference_on_a_cpu():
    check_attend(partial(attend, mode="platform"), PLATFORM)


def test_platform_mode_lowers_to_triton_for_cuda():
    inputs, spec, cotangents = attend_inputs(PLATFORM)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    run = partial(with_gradients, partial(attend, mode="platform"), spec=spec)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(run).trace(inputs=inputs, cotangents=cotangents)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"attend_{kind}" in text for kind in ("forward", "d_query", "d_key_value", "d_bias"))


def test_what_the_kernels_refuse():
    def why(width: int = 16, value_width: int = 16, dtype: str = "float32", **others: Any) -> str:
        query, value = (jax.ShapeDtypeStruct((1, 8, 2, n), dtype) for n in (width, value_width))
        mask = Mask(keep=others.pop("keep", None))
        return refusal(AttendInputs(query, query, value, mask, **others), AttendSpec(1.0)) or ""

    assert why() == why(256, 256, "bfloat16") == ""
    assert "key width 257" in why(width=257)
    assert "value width 300" in why(value_width=300)
    assert "query.dtype=float64" in why(dtype="float64")
    assert "bias.dtype=float64" in why(bias=jax.ShapeDtypeStruct((1, 1, 8, 8), "float64"))
    assert f"{2**31} elements" in why(keep=jax.ShapeDtypeStruct((2, 1, 2**15, 2**15), "bool"))


@pytest.mark.parametrize("width, widest", [(1, 256), (24, 256), (80, 256), (100, 256), (255, 256), (256, 64), (80, 64)])
def test_parts_cover_a_row_once(width, widest):
    parts = parts_of(width, widest)
    assert [start for start, _ in parts] == [sum(size for _, size in parts[:n]) for n in range(len(parts))]
    assert all(16 <= size <= widest and size & (size - 1) == 0 for _, size in parts)
    assert width <= sum(size for _, size in parts) < width + 16


def test_bad_launches_are_named():
    with pytest.raises(ValueError, match="block_k=48"):
        replace(attend_launch("d_query", 128, "bf16", interpret=False), block_k=48)
    with pytest.raises(ValueError, match="num_warps=3"):
        AttendLaunch(64, 64, 3, 1, False)
