"""The prefix-sum kernel in Pallas' interpreter: axes, directions, dtypes and gradients against plain numpy."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LENGTHS

import evo_jax
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
