"""The prefix-sum kernel in Pallas' interpreter: axes, directions, dtypes and gradients against plain numpy."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LENGTHS

import evo_jax
from pallas_kernels import tuned
from reference.prefix_scan import prefix_sum_dense

CASES = (
    # (shape, axis): every length in the usual layout, then every axis of odd shapes
    *(((2, length, 16), 1) for length in LENGTHS),
    ((257,), 0),
    ((5000,), 0),
    ((7, 300), 1),
    ((7, 300), 0),
    ((3, 2, 1, 4), 2),
    ((2, 3, 130, 70), -2),
    ((2, 3, 130, 70), 0),
    ((0, 3), 0),
)


DIRECTIONS = list(itertools.product((False, True), repeat=2))


def summed(x, axis, reverse, exclusive, accum):
    """numpy's cumsum, turned and shifted."""
    x = np.asarray(x).astype(accum)
    x = np.flip(x, axis) if reverse else x
    total = np.cumsum(x, axis, dtype=accum)
    total = total - x if exclusive else total
    return np.flip(total, axis) if reverse else total


@pytest.mark.parametrize("shape, axis", CASES, ids=str)
def test_kernel_equals_numpy(shape, axis):
    x = jax.random.normal(jax.random.key(0), shape)

    @jax.jit
    def run(x):
        scan = partial(evo_jax.prefix_sum, axis=axis, implementation="interpret")
        return [scan(x, reverse=reverse, exclusive=exclusive) for reverse, exclusive in DIRECTIONS]

    for out, (reverse, exclusive) in zip(run(x), DIRECTIONS, strict=True):
        expected = summed(x, axis, reverse, exclusive, np.float64)
        np.testing.assert_allclose(out, expected, atol=1e-5 * max(x.size, 1) ** 0.5)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "bool"])
def test_integers_are_exact(dtype):
    x = jax.random.randint(jax.random.key(0), (3, 150, 5), 0, 2 if dtype == "bool" else 100).astype(dtype)
    out = jax.jit(lambda x: evo_jax.prefix_sum(x, axis=1, implementation="interpret"))(x)
    expected = prefix_sum_dense(x, axis=1, reverse=False, exclusive=False, accum_dtype=None)
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_carries_float32(dtype):
    x = (10 + jax.random.normal(jax.random.key(0), (1, 5000, 2))).astype(dtype)
    out = jax.jit(lambda x: evo_jax.prefix_sum(x, axis=1, implementation="interpret"))(x)
    exact = summed(x, 1, False, False, np.float64)
    assert out.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=float(jnp.finfo(dtype).eps))


def test_float64(x64):
    x = 1e8 + jax.random.normal(jax.random.key(0), (2, 300, 3), jnp.float64)
    wide = jax.jit(lambda x: evo_jax.prefix_sum(x, axis=1, reverse=True, implementation="interpret"))(x)
    np.testing.assert_allclose(wide, summed(x, 1, True, False, np.float64), rtol=1e-14)
    narrow = x.astype(jnp.float32)
    out = jax.jit(lambda x: evo_jax.prefix_sum(x, axis=1, accum_dtype=jnp.float64, implementation="interpret"))(narrow)
    np.testing.assert_allclose(out, summed(narrow, 1, False, False, np.float64), rtol=6.1e-8)


@pytest.mark.parametrize("reverse, exclusive", DIRECTIONS)
def test_gradient_is_the_scan_from_the_other_end(reverse, exclusive):
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 2, 200, 6))

    def run(x):
        return evo_jax.prefix_sum(x, axis=1, reverse=reverse, exclusive=exclusive, implementation="interpret")

    (grad,) = jax.jit(lambda x, ct: jax.vjp(run, x)[1](ct))(x, cotangent)
    np.testing.assert_allclose(grad, summed(cotangent, 1, not reverse, exclusive, np.float64), atol=1e-4)


def test_small_suffixes_survive_large_totals():
    """total - prefix would return rounding noise here: the true suffix is 1e-6 of the total."""
    x = jnp.concatenate([jnp.full((4096, 1), 1e4), jnp.full((1000, 1), 1e-3)])
    out = jax.jit(lambda x: evo_jax.prefix_sum(x, axis=0, reverse=True, implementation="interpret"))(x)
    np.testing.assert_allclose(out[4096:, 0], summed(x, 0, True, False, np.float64)[4096:, 0], rtol=1e-5)


def test_nothing_past_the_end_is_read_or_written():
    """NaN beyond the scanned slice stays where it is and is not summed."""
    x = jnp.ones((2, 70, 5)).at[1].set(jnp.nan)
    out = jax.jit(lambda x: evo_jax.prefix_sum(x, axis=1, implementation="interpret"))(x)
    np.testing.assert_array_equal(out[0], np.arange(1.0, 71)[:, None] * np.ones(5))


def in_chunks(chunk, axis=1, **how):
    """The kernel with short chunks, so that there are many."""

    def run(x):
        with tuned.override({"prefix": {"chunk": chunk, "block": 4}}):
            return evo_jax.prefix_sum(x, axis=axis, implementation="interpret", **how)

    return jax.jit(run)


def kernels(run, x):
    """The names of the Pallas kernels in the trace."""
    return [
        name
        for name in ("prefix_single", "prefix_totals", "prefix_scan")
        if f"name={name}\n" in str(run.trace(x).jaxpr)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float32_sums_take_a_single_pass(dtype):
    assert kernels(in_chunks(16), jnp.ones((2, 100, 3), dtype)) == ["prefix_single"]
    assert kernels(in_chunks(64), jnp.ones((2, 10, 3), dtype)) == ["prefix_scan"]


def test_other_sums_and_very_many_chunks_take_two_passes(x64):
    two = ["prefix_totals", "prefix_scan"]
    assert kernels(in_chunks(16), jnp.ones((2, 100, 3), jnp.int32)) == two
    assert kernels(in_chunks(16), jnp.ones((2, 100, 3), jnp.float64)) == two
    assert kernels(in_chunks(1), jax.ShapeDtypeStruct((2, 64 * 64 + 1, 3), "float32")) == two
    assert kernels(in_chunks(1), jax.ShapeDtypeStruct((2, 64 * 64, 3), "float32")) == ["prefix_single"]


@pytest.mark.parametrize("reverse, exclusive", DIRECTIONS)
@pytest.mark.parametrize(
    ("shape", "axis", "chunk"),
    [((2, 1999, 6), 1, 4), ((5, 1201), 1, 4), ((300, 5), 0, 16), ((1, 3000, 3), 1, 64)],
    ids=str,
)
def test_many_chunks_and_spans_are_exact_on_small_integers(shape, axis, chunk, reverse, exclusive):
    x = jax.random.randint(jax.random.key(0), shape, -9, 10).astype(jnp.float32)
    out = in_chunks(chunk, axis, reverse=reverse, exclusive=exclusive)(x)
    np.testing.assert_array_equal(out, summed(x, axis, reverse, exclusive, np.float64))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spreads_from_its_place_on_in_its_lane(value, exclusive):
    x = jnp.ones((1, 700, 3)).at[0, 333, 1].set(value)
    out = np.asarray(in_chunks(4, exclusive=exclusive)(x))[0]
    first = 333 + exclusive
    np.testing.assert_array_equal(out[first:, 1], np.full(700 - first, value))
    expected = np.arange(700.0)[:, None] + np.full(3, not exclusive)
    np.testing.assert_array_equal(out[:, [0, 2]], expected[:, [0, 2]])
    np.testing.assert_array_equal(out[:first, 1], expected[:first, 1])


def test_a_nan_with_the_bits_of_an_empty_word_is_not_waited_for():
    x = jax.lax.bitcast_convert_type(jnp.full((1, 100, 2), -1, jnp.int32), jnp.float32)
    assert np.isnan(in_chunks(4)(x)).all()


def test_opposite_infinities_are_nan():
    x = jnp.ones((1, 300, 1)).at[0, 50].set(jnp.inf).at[0, 200].set(-jnp.inf)
    out = np.asarray(in_chunks(4)(x))[0, :, 0]
    assert np.isfinite(out[:50]).all() and (out[50:200] == np.inf).all() and np.isnan(out[200:]).all()


def test_many_chunks_vmapped_and_differentiated():
    x = jax.random.randint(jax.random.key(0), (3, 150, 2, 2), -9, 10).astype(jnp.float32)
    run = in_chunks(2, axis=0)
    out = jax.jit(jax.vmap(jax.vmap(run, 2, 2)))(x)
    np.testing.assert_array_equal(out, summed(x, 1, False, False, np.float64))
    (grad,) = jax.jit(lambda x: jax.vjp(in_chunks(2), x)[1](x))(x)
    np.testing.assert_array_equal(grad, summed(x, 1, True, False, np.float64))
