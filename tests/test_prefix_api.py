"""prefix_sum at the public door: every axis, direction and dtype against numpy, transforms, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evo_jax

KEY = jax.random.key(0)


def running(x, axis, reverse=False, exclusive=False):
    """The same by numpy, in float64 or int64, one slice after the other."""
    x = np.moveaxis(np.asarray(x, np.int64 if np.asarray(x).dtype.kind in "biu" else np.float64), axis, 0)
    order = range(len(x))[:: -1 if reverse else 1]
    out, total = np.zeros_like(x), np.zeros_like(x[:1].sum(0))
    for i in order:
        out[i] = total if exclusive else total + x[i]
        total = total + x[i]
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"), [((67,), -2), ((67,), 0), ((9, 5), 1), ((2, 3, 65, 4), -2), ((3, 2, 70), 0)]
)
def test_every_axis_and_direction(shape, axis, reverse, exclusive):
    x = jax.random.normal(KEY, shape)
    out = evo_jax.prefix_sum(x, axis=axis, reverse=reverse, exclusive=exclusive)
    assert out.shape == shape and out.dtype == x.dtype
    expected = running(x, 0 if len(shape) == 1 else axis, reverse, exclusive)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 0, 4)])
def test_empty_arrays_keep_their_shape(shape):
    assert evo_jax.prefix_sum(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32", "uint32"])
def test_integers_are_exact_and_wrap_like_jnp_cumsum(dtype):
    x = jax.random.randint(KEY, (90, 2), 0, 2 if dtype == "bool" else 100).astype(dtype)
    out = evo_jax.prefix_sum(x, axis=0)
    assert out.dtype == (jnp.int32 if dtype == "bool" else x.dtype)
    np.testing.assert_array_equal(out, running(x, 0).astype(out.dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_are_carried_in_float32(dtype):
    x = jnp.full((4096, 1), 0.1, dtype)
    expected = running(x, 0)
    out = evo_jax.prefix_sum(x, axis=0)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2 * float(jnp.finfo(dtype).eps))


def test_float16_does_not_overflow_on_the_way():
    x = jnp.concatenate([jnp.full(9000, 10.0, jnp.float16), jnp.full(9000, -10.0, jnp.float16)])
    assert evo_jax.prefix_sum(x)[-1] == 0


def test_float64_carries_need_x64_and_then_keep_the_digits(x64):
    x = jnp.asarray([1.0] + [2.0**-24] * 64, jnp.float32)
    expected = np.cumsum(np.asarray(x, np.float64)).astype(np.float32)
    assert (evo_jax.prefix_sum(x) != expected).any()
    exact = evo_jax.prefix_sum(x, accum_dtype=jnp.float64)
    assert exact.dtype == jnp.float32
    np.testing.assert_array_equal(exact, expected)
    assert evo_jax.prefix_sum(x.astype(jnp.float64)).dtype == jnp.float64


def test_transforms_agree_with_jnp_cumsum():
    x = jax.random.normal(KEY, (4, 33, 3))
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def gradient(fn):
        return jax.grad(lambda x: (fn(x) * weights).sum())(x)

    ours, theirs = gradient(evo_jax.prefix_sum), gradient(lambda x: jnp.cumsum(x, axis=-2))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for transform in (jax.jit, jax.remat, lambda f: jax.vmap(lambda x: f(x))):
        np.testing.assert_allclose(gradient(transform(evo_jax.prefix_sum)), theirs, rtol=1e-5, atol=1e-5)


def test_numpy_and_lists_are_accepted():
    np.testing.assert_array_equal(evo_jax.prefix_sum([1, 2, 3]), [1, 3, 6])
    np.testing.assert_array_equal(evo_jax.prefix_sum(np.ones((2, 2), np.float32), axis=1), [[1, 2], [1, 2]])


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (np.float32(1), {}, ValueError, r"x.shape=\(\) has no axis to sum along; x must have rank >= 1"),
        (np.ones((2, 3)), {"axis": 2}, ValueError, r"axis=2 is out of range for x.shape=\(2, 3\): -2 to 1"),
        (np.ones(3), {"axis": -3}, ValueError, r"axis=-3 is out of range"),
        (np.ones(3), {"axis": 0.0}, TypeError, "axis=0.0 must be an int"),
        (np.ones(3), {"axis": True}, TypeError, "axis=True must be an int"),
        (np.ones(3, np.complex64), {}, TypeError, "x.dtype=complex64 must be a float of 16 to 64 bits, an integer or"),
        (
            np.ones(3),
            {"accum_dtype": jnp.bfloat16},
            TypeError,
            "accum_dtype=bfloat16 cannot carry .* float32 or float64",
        ),
        (np.ones(3), {"accum_dtype": "int32"}, TypeError, "accum_dtype=int32 cannot carry sums of dtype float32"),
        (np.ones(3, int), {"accum_dtype": "float32"}, TypeError, "accum_dtype=float32 cannot carry .* int32 or int64"),
        (np.ones(3), {"accum_dtype": "nonsense"}, TypeError, "accum_dtype='nonsense' is not a dtype"),
        (np.ones(3), {"accum_dtype": jnp.float64}, ValueError, "accum_dtype=float64 needs .*jax_enable_x64"),
        (np.ones(3), {"implementation": "cuda"}, ValueError, "implementation='cuda' is not one of"),
        (np.ones(3), {"reverse": "no"}, TypeError, "reverse='no' must be True or False, known while tracing"),
        (np.ones(3), {"exclusive": None}, TypeError, "exclusive=None must be True or False"),
    ],
)
def test_refusals_name_the_argument_its_value_and_the_way_out(x, options, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda x: evo_jax.prefix_sum(x, **options), jnp.asarray(x))


def test_integers_of_64_bits_are_never_cut():
    small = np.array([2**31 - 1, -5])
    np.testing.assert_array_equal(evo_jax.prefix_sum(small), np.array([2**31 - 1, 2**31 - 6]))
    for x in (np.array([2**31, 1]), np.array([1, 2**32], np.uint64)):
        with pytest.raises(ValueError, match=r"x holds integers that u?int32 does not: they need .*jax_enable_x64"):
            evo_jax.prefix_sum(x)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(evo_jax.prefix_sum(np.array([2**31, 1])), np.array([2**31, 2**31 + 1]))
