"""reference.prefix_scan: the oracle and the chunked form against the definition; gradients, dtypes, long lengths."""

import itertools
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from reference.prefix_scan import default_accum_dtype, prefix_sum_chunked, prefix_sum_dense


def prefix_sum_looped(x, **options):
    """The chunked form as it is where a sequence is longer than a cache: a loop over chunks, here of eight tokens."""
    with patch("reference.prefix_scan._chunk", lambda before, length, after, itemsize: min(length, 8)):
        return prefix_sum_chunked(x, **options)


FORMS = {"dense": prefix_sum_dense, "chunked": prefix_sum_chunked, "looped": prefix_sum_looped}
DIRECTIONS = list(itertools.product([False, True], [False, True]))  # reverse, exclusive
PLACES = [((6,), 0), ((3, 5), -1), ((2, 9, 3), 1), ((4, 1, 2, 3), 0), ((2, 2, 17), -1)]


def by_hand(x: np.ndarray, axis: int, reverse: bool, exclusive: bool) -> np.ndarray:
    """The definition: out_i is the sum of the entries before i (or after), with or without i itself."""
    rows = np.moveaxis(x, axis, 0)
    out = np.zeros_like(rows)
    for i, j in itertools.product(range(len(rows)), repeat=2):
        before = j > i if reverse else j < i
        if before or (i == j and not exclusive):
            out[i] += rows[j]
    return np.moveaxis(out, 0, axis)


def normal(shape, dtype="float32", seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


@pytest.mark.parametrize(("reverse", "exclusive"), DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_axis_against_the_definition(form, reverse, exclusive, x64):
    for shape, axis in PLACES:
        x = np.random.default_rng(0).normal(size=shape)
        call = partial(FORMS[form], axis=axis, reverse=reverse, exclusive=exclusive)
        out = jax.jit(call)(jnp.asarray(x))
        np.testing.assert_allclose(out, by_hand(x, axis, reverse, exclusive), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("reverse", "exclusive"), DIRECTIONS)
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 63, 64, 65, 100, 257])
@pytest.mark.parametrize("form", [prefix_sum_chunked, prefix_sum_looped])
def test_lengths_around_the_rows_of_the_chunked_form(form, length, reverse, exclusive):
    x = np.random.default_rng(length).integers(-9, 10, (2, length, 3))  # exact in every dtype below
    arrays = [jnp.asarray(x, dtype) for dtype in ("int32", "float32", "float16", "bfloat16")]
    outs = jax.jit(lambda xs: [form(a, axis=1, reverse=reverse, exclusive=exclusive) for a in xs])(arrays)
    assert np.abs(by_hand(x, 1, reverse, exclusive)).max(initial=0) <= 256  # bfloat16 has every integer up to that
    for array, out in zip(arrays, outs, strict=True):
        assert out.dtype == array.dtype
        np.testing.assert_array_equal(out, by_hand(x, 1, reverse, exclusive))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4), (2, 3, 0)])
def test_empty_arrays(form, shape):
    for axis in range(len(shape)):
        assert FORMS[form](jnp.zeros(shape), axis=axis).shape == shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32", "uint32"])
def test_integers_wrap_like_jnp_cumsum(form, dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 50)) % (2 if dtype == "bool" else 100), dtype)
    out, expected = jax.jit(partial(FORMS[form], axis=1))(x), jnp.cumsum(x, axis=1)
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)


def test_int64_is_exact(x64):
    x = jnp.full((100,), 2**40, jnp.int64)
    np.testing.assert_array_equal(prefix_sum_chunked(x, axis=0), 2**40 * np.arange(1, 101))


def test_default_accumulators():
    wanted = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
    wanted |= {"bool": "int32", "int8": "int32", "uint16": "int32", "uint32": "uint32", "int64": "int64"}
    assert {name: default_accum_dtype(name).name for name in wanted} == wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_round_once(form, dtype):
    x = normal((3000,), dtype) + jnp.asarray(1, dtype)
    exact = np.cumsum(np.asarray(x, np.float64))
    out = np.asarray(FORMS[form](x, axis=0), np.float64)
    np.testing.assert_allclose(out, exact, rtol=1.01 * float(jnp.finfo(dtype).eps) / 2, atol=1e-3)


def test_accum_dtype_float64_keeps_what_float32_drops(x64):
    x = jnp.asarray([2.0**30, *[1.0] * 100, -(2.0**30)], jnp.float32)
    for accum_dtype, keeps in (("float64", True), (None, False)):
        out = jax.jit(partial(prefix_sum_chunked, axis=0, accum_dtype=accum_dtype))(x)
        assert bool(out[-1] == 100) == keeps


@pytest.mark.parametrize("form", FORMS)
def test_no_direction_subtracts(form):
    """Small values beyond a large one stay exact: "total minus prefix" would lose them."""
    ones = jnp.ones(100, jnp.float32)
    reverse = FORMS[form](jnp.concatenate([jnp.asarray([2.0**30]), ones]), axis=0, reverse=True)
    np.testing.assert_array_equal(reverse[1:], np.arange(100, 0, -1))
    exclusive = FORMS[form](jnp.concatenate([ones, jnp.asarray([2.0**30])]), axis=0, exclusive=True)
    np.testing.assert_array_equal(exclusive, np.arange(101))


@pytest.mark.parametrize(("reverse", "exclusive"), DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_nan_reaches_only_what_includes_it(form, reverse, exclusive):
    call = partial(FORMS[form], axis=0, reverse=reverse, exclusive=exclusive)
    out = jax.jit(call)(jnp.ones(60).at[29].set(jnp.nan))
    reached = np.isnan(by_hand(np.where(np.arange(60) == 29, np.nan, 1.0), 0, reverse, exclusive))
    assert reached.any() and not reached.all()
    np.testing.assert_array_equal(np.isnan(out), reached)


@pytest.mark.parametrize(("reverse", "exclusive"), DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_against_finite_differences(form, reverse, exclusive, x64):
    @jax.jit
    def scaled(x):
        return jnp.sin(FORMS[form](x, axis=1, reverse=reverse, exclusive=exclusive))

    check_grads(scaled, (jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 2))),), order=1, modes=["rev"])


@pytest.mark.parametrize(("reverse", "exclusive"), DIRECTIONS)
def test_gradient_is_the_sum_from_the_other_end_in_float32(reverse, exclusive):
    x, cotangent = normal((1, 20), "bfloat16"), jnp.ones((1, 20), "bfloat16").at[0, 0 if exclusive else 1].set(200)

    def call(x):
        return prefix_sum_chunked(x, axis=1, reverse=reverse, exclusive=exclusive)

    (grad,) = jax.jit(lambda x, ct: jax.vjp(call, x)[1](ct))(x, cotangent)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad, prefix_sum_dense(cotangent, axis=1, reverse=not reverse, exclusive=exclusive))


@pytest.mark.parametrize("form", [prefix_sum_chunked, prefix_sum_looped])
def test_second_derivatives_exist(form, x64):
    x = jnp.linspace(0.5, 1.0, 160).reshape(20, 8)
    check_grads(jax.jit(lambda x: form(x**3, axis=0)), (x,), order=2, modes=["rev"])


def test_second_derivatives_of_bfloat16_looped():
    """Its loop writes bits, whose own derivative is 0."""
    x = jnp.ones((20, 8), jnp.bfloat16)
    loss = lambda x: (prefix_sum_looped(x, axis=0).astype(jnp.float32) ** 2).sum()  # noqa: E731
    second = jax.grad(lambda x: jax.grad(loss)(x)[0].astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(second, np.broadcast_to(40 - 2 * np.arange(20.0)[:, None], (20, 8)))


@pytest.mark.parametrize("form", [prefix_sum_chunked, prefix_sum_looped])
def test_transforms(form):
    x = normal((3, 4, 30))

    def call(x):
        return form(x, axis=-1, reverse=True)

    expected = prefix_sum_dense(x, axis=-1, reverse=True)
    for transformed in (call, jax.vmap(call), jax.vmap(call, in_axes=1, out_axes=1), jax.checkpoint(call)):
        np.testing.assert_allclose(jax.jit(transformed)(x), expected, rtol=1e-5, atol=1e-5)
    grad = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(call(x) ** 2))))(x)
    np.testing.assert_allclose(grad, 2 * prefix_sum_dense(expected, axis=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("reverse", "exclusive"), DIRECTIONS)
def test_millions_of_terms(reverse, exclusive):
    x = normal((1_000_003,))
    exact = np.cumsum(np.asarray(x, np.float64)[:: -1 if reverse else 1])[:: -1 if reverse else 1]
    exact = exact - np.asarray(x, np.float64) if exclusive else exact
    out = jax.jit(lambda x: prefix_sum_chunked(x, axis=0, reverse=reverse, exclusive=exclusive))(x)
    assert np.abs(out - exact).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize(("reverse", "exclusive"), DIRECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_than_a_cache_holds(dtype, reverse, exclusive):
    """Long enough for the loop as it ships, with a last chunk that is not whole."""
    x = normal((2, 1, 40_003, 16), dtype)
    out = jax.jit(lambda x: prefix_sum_chunked(x, reverse=reverse, exclusive=exclusive))(x)
    exact = np.cumsum(np.asarray(x, np.float64)[:, :, :: -1 if reverse else 1], 2)[:, :, :: -1 if reverse else 1]
    exact = exact - np.asarray(x, np.float64) if exclusive else exact
    bound = 1e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2
    assert np.abs(np.asarray(out, np.float64) - exact).max() <= bound * np.abs(exact).max()
    text = jax.jit(lambda x: prefix_sum_chunked(x)).lower(x).as_text()
    assert "stablehlo.while" in text


def test_extra_memory_is_a_fraction_of_the_array():
    x = jax.ShapeDtypeStruct((1, 8, 8192, 64), jnp.float32)
    for reverse in (False, True):
        compiled = jax.jit(lambda x, r=reverse: prefix_sum_chunked(x, axis=2, reverse=r)).lower(x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None and memory.temp_size_in_bytes <= x.size * 4 / 4
