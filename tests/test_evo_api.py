"""evo_attention at the public door: masks and what they mean, default parameters, dtypes, transforms, refusals."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, evo_params

import evo_jax
from evo_jax import padding

B, H, L, D = 2, 3, 40, 8
V = jax.random.normal(jax.random.key(1), (B, H, L, D))
QUERY = jax.random.normal(jax.random.key(2), V.shape)
COTANGENT = jax.random.normal(jax.random.key(3), V.shape)
PARAMS = evo_params(D, "float32")
VALID = 27  # in every mask below, so that the sequences without their padding have one shape
T = np.arange(L)
MASKS = {
    "right": np.stack([T < VALID, T < VALID]),
    "left": np.stack([T >= L - VALID, T < VALID]),
    "interior": np.stack([(T * 11) % L < VALID, (T * 7 + 3) % L < VALID]),
}

evo = jax.jit(evo_jax.evo_attention, static_argnames=("causal", "mask_semantics", "accum_dtype", "implementation"))


# ---- parameters


def test_default_parameters_are_those_of_key_zero_eagerly_and_traced():
    width = D + 1  # a width drawn for the first time while tracing, then used outside
    wide = jax.random.normal(jax.random.key(1), (1, 1, 5, width))
    params = evo_jax.init_evo_params(jax.random.key(0), width)
    traced = evo(wide)
    assert_close("traced", traced, evo(wide, params), 1e-6)
    eager = evo_jax.evo_attention(wide)
    np.testing.assert_array_equal(eager, evo_jax.evo_attention(wide))
    np.testing.assert_array_equal(eager, evo_jax.evo_attention(wide, params))


def test_init_has_the_shapes_bounds_and_dtype_it_promises():
    params = evo_jax.init_evo_params(jax.random.key(4), 64, jnp.bfloat16)
    assert all(a.dtype == jnp.bfloat16 for a in params)
    for name, array in params._asdict().items():
        assert array.shape == ((64, 64) if name.endswith("kernel") else (64,)), name
        if not name.startswith("norm"):
            assert 0.115 < float(jnp.abs(array).max()) <= 0.125, name
    assert float(params.norm_scale.min()) == 1 and float(jnp.abs(params.norm_bias).max()) == 0
    kernels = [np.asarray(a, np.float32) for name, a in params._asdict().items() if name.endswith("kernel")]
    assert all((kernels[0] != other).any() for other in kernels[1:])


# ---- masks


@pytest.mark.parametrize("semantics", ["padding", "multiply"])
def test_all_forms_of_a_mask_are_one_mask(semantics):
    mask = MASKS["interior"]
    resolve = partial(padding.resolve, "op", semantics=semantics, causal=True)
    expected = resolve(V, mask)

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    for form in (mask, mask[:, None], mask[:, None, :, None]):
        for dtype in ("bool", "int32", "uint8", "float32", "bfloat16"):
            array = jnp.asarray(form).astype(dtype)
            for given in (array, np.asarray(array), form.tolist()):
                assert same(resolve(V, given), expected), (form.shape, dtype)
            assert same(jax.jit(resolve)(V, array), expected), (form.shape, dtype)


def test_the_divisor_counts_valid_tokens_and_its_sign_says_which_are_masked():
    mask = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]])
    v = jnp.ones((2, 1, 5, 1))
    _, rows = padding.resolve("op", v, mask, "padding", causal=True)
    np.testing.assert_array_equal(rows, [[[-1, 1, 2, -2, 3]], [[-1] * 5]])
    _, rows = padding.resolve("op", v, mask, "padding", causal=False)
    np.testing.assert_array_equal(rows, [[[-3, 3, 3, -3, 3]], [[-1] * 5]])
    _, rows = padding.resolve("op", v, mask, "multiply", causal=True)
    np.testing.assert_array_equal(rows, [[[-1, 2, 3, -4, 5]], [[-1, -2, -3, -4, -5]]])
    _, rows = padding.resolve("op", v, mask, "multiply", causal=False)
    np.testing.assert_array_equal(rows, [[[-5, 5, 5, -5, 5]], [[-5] * 5]])
    assert padding.resolve("op", v, None, "padding", causal=True)[1] is None


@partial(jax.jit, static_argnames=("causal",))
def forward_and_gradients(v, query, params, mask, cotangent, causal):
    def fn(v, query, params):
        return evo_jax.evo_attention(v, params, query=query, causal=causal, attention_mask=mask)

    out, vjp = jax.vjp(fn, v, query, params)
    return out, *vjp(cotangent)


@pytest.mark.parametrize("own_query", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_a_masked_token_does_not_exist(causal, own_query):
    """Valid outputs and gradients are those of the sequence without the masked tokens, whose NaN is harmless."""
    query = QUERY if own_query else None
    for kind, mask in MASKS.items():
        poison = jnp.where(mask[:, None, :, None], 0.0, jnp.nan)
        poisoned = None if query is None else query + poison
        out, *grads, dparams = forward_and_gradients(V + poison, poisoned, PARAMS, mask, COTANGENT, causal)

        def without(x, mask=mask):
            return None if x is None else jnp.stack([x[b][:, mask[b]] for b in range(B)])

        short = forward_and_gradients(without(V), without(query), PARAMS, None, without(COTANGENT), causal)
        assert_close(kind, without(out), short[0], 1e-5)
        for name, ours, expected in zip(("v", "query"), grads, short[1:3], strict=True):
            assert (ours is None) == (expected is None)
            if ours is not None:
                assert_close(f"{kind} {name}", without(ours), expected, 1e-3)
                assert not np.asarray(ours).swapaxes(1, 2)[~mask].any()
        for name, ours, expected in zip(evo_jax.EvoParams._fields, dparams, short[-1], strict=True):
            assert_close(f"{kind} {name}", ours, expected, 1e-3)
        assert not np.asarray(out).swapaxes(1, 2)[~mask].any()


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_wholly_masked_is_zero_and_leaves_the_others_alone(causal):
    mask = np.stack([np.zeros(L, bool), np.ones(L, bool)])
    v = V.at[0].set(jnp.nan)
    out, dv, _, dparams = forward_and_gradients(v, None, PARAMS, mask, COTANGENT, causal)
    assert not np.asarray(out[0]).any() and not np.asarray(dv[0]).any()
    alone = forward_and_gradients(V[1:], None, PARAMS, None, COTANGENT[1:], causal)
    assert_close("out", out[1:], alone[0], 1e-5)
    assert_close("v", dv[1:], alone[1], 1e-3)
    for ours, expected in zip(dparams, alone[3], strict=True):
        assert_close("params", ours, expected, 1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_multiply_is_the_arithmetic_of_the_original(causal):
    mask = MASKS["left"].astype(np.float32) * 0.5
    out = evo(V, PARAMS, attention_mask=mask, mask_semantics="multiply", causal=causal)
    halved = V * mask[:, None, :, None]
    np.testing.assert_array_equal(out, evo(halved, PARAMS, mask_semantics="multiply", causal=causal))
    dead = np.broadcast_to((mask == 0)[:, None], (B, H, L))
    np.testing.assert_array_equal(np.asarray(out)[dead], np.broadcast_to(PARAMS.norm_bias, (dead.sum(), D)))
    # Without the rule that a row of zeros is masked it is the plain op: positions divide, and nothing is absent.
    plain = evo(halved, PARAMS, causal=causal)
    assert_close("live rows", np.asarray(out)[~dead], np.asarray(plain)[~dead], 1e-5)


@pytest.mark.parametrize("bad", [0.5, -1e9, float("-inf"), float("nan")])
def test_a_mask_of_other_values_is_refused_or_where_traced_never_silently_wrong(bad):
    mask = np.ones((B, L), np.float32)
    mask[1, 20] = bad
    with pytest.raises(ValueError, match=r"attention_mask holds .* must hold only 0 and 1 .* pass mask == 0"):
        evo_jax.evo_attention(V, PARAMS, attention_mask=mask)
    for causal in (True, False):
        poisoned = np.isnan(evo(V, PARAMS, attention_mask=mask, causal=causal)).all(axis=(1, 3))
        expected = np.zeros((B, L), bool)
        expected[1, 20 if causal else 0 :] = True
        np.testing.assert_array_equal(poisoned, expected)


def test_masks_known_while_tracing_are_checked_there():
    with pytest.raises(ValueError, match="must hold only 0 and 1"):
        jax.eval_shape(lambda v: evo_jax.evo_attention(v, PARAMS, attention_mask=np.full((B, L), 2)), V)


@pytest.mark.parametrize(
    "shape", [(B, 1, 1, L), (B, L, 1), (B, H, L), (L,), (1, L), (B, L + 1), (B, H, L, 1), (B, L, L)]
)
def test_other_shapes_of_a_mask_are_refused_with_the_accepted_ones(shape):
    with pytest.raises(ValueError, match=r"attention_mask.shape=\(.* must be \(B, L\), \(B, 1, L\) or \(B, 1, L, 1\)"):
        evo_jax.evo_attention(V, PARAMS, attention_mask=np.ones(shape, bool))


# ---- dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_output_has_the_dtype_of_v_whatever_the_parameters_have(dtype):
    exact = evo(V.astype(dtype).astype(jnp.float32), PARAMS)
    for params in (PARAMS, jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS), None):
        out = evo(V.astype(dtype), params)
        assert out.dtype == dtype
        if params is PARAMS:
            assert_close("out", out, exact, 1e-5 if dtype == "float32" else 5e-3)


def test_float16_of_mean_ten_stays_finite_and_right_at_65536_tokens():
    v = (10 + jax.random.normal(jax.random.key(0), (1, 1, 65536, D))).astype(jnp.float16)
    for causal in (True, False):
        out = evo(v, PARAMS, causal=causal)
        assert bool(jnp.isfinite(out).all())
        assert_close("out", out, evo(v.astype(jnp.float32), PARAMS, causal=causal), 5e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_float64_sums_keep_the_digits_that_float32_sums_lose(x64, causal):
    v = jax.random.normal(jax.random.key(0), (1, 1, 50_000, D), jnp.float32)
    exact = evo(v.astype(jnp.float64), PARAMS, causal=causal)
    assert exact.dtype == jnp.float64

    def error(accum_dtype):
        out = evo(v, PARAMS, causal=causal, accum_dtype=accum_dtype)
        assert out.dtype == jnp.float32
        return float(jnp.linalg.norm(out.astype(jnp.float64) - exact))

    assert error("float64") < 0.5 * error(None)


def test_numpy_arrays_are_accepted():
    as_numpy = jax.tree.map(np.asarray, PARAMS)
    out = evo_jax.evo_attention(np.asarray(V), as_numpy, query=np.asarray(QUERY))
    np.testing.assert_array_equal(out, evo_jax.evo_attention(V, PARAMS, query=QUERY))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(0, H, L, D), (B, 0, L, D), (B, H, 0, D)])
def test_empty_arrays_keep_their_shape(shape, causal):
    v = jnp.zeros(shape)
    for mask in (None, np.ones((shape[0], shape[2]), bool)):
        for semantics in ("padding", "multiply"):
            out = evo_jax.evo_attention(v, attention_mask=mask, causal=causal, mask_semantics=semantics)
            assert out.shape == shape


# ---- transforms


def test_transforms_change_neither_values_nor_gradients():
    v = jnp.stack([V, QUERY])
    masks = jnp.stack([jnp.asarray(MASKS["left"]), jnp.asarray(MASKS["interior"])]).astype(jnp.int32)

    def single(params, v, mask):
        return evo_jax.evo_attention(v, params, attention_mask=mask)

    def as_one_batch(params, v, masks):
        return single(params, v.reshape(2 * B, H, L, D), masks.reshape(2 * B, L)).reshape(v.shape)

    def gradients(fn):
        def loss(params, v):
            out = fn(params, v, masks)
            return (out * COTANGENT[None]).sum(), out

        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(PARAMS, v)
        return out, *grads[0], grads[1]

    expected = gradients(as_one_batch)
    for fn in (
        jax.vmap(single, in_axes=(None, 0, 0)),
        lambda params, v, masks: jax.lax.map(lambda x: jax.remat(single)(params, *x), (v, masks)),
    ):
        for ours, theirs in zip(gradients(fn), expected, strict=True):
            assert_close("transformed", ours, theirs, 1e-3)


def test_scan_over_layers_is_the_layers_in_turn():
    layers = [evo_params(D, "float32", seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    scanned = jax.jit(lambda v, p: jax.lax.scan(lambda v, p: (evo_jax.evo_attention(v, p), None), v, p)[0])
    v = V
    for params in layers:
        v = evo(v, params)
    assert_close("out", scanned(V, stacked), v, 1e-5)


# ---- refusals

V2 = np.ones((B, H, L, D), np.float32)


@pytest.mark.parametrize(
    ("v", "options", "error", "message"),
    [
        (V2[0], {}, ValueError, r"v.shape=\(3, 40, 8\) must be \(B, H, L, D\)"),
        (V2[..., :0], {}, ValueError, r"v.shape=\(2, 3, 40, 0\) must be .* D >= 1"),
        (V2.astype(int), {}, TypeError, "v.dtype=int32 must be one of float16, bfloat16, float32, float64; cast it"),
        (V2, {"query": V2[:, :1]}, ValueError, r"query.shape=\(2, 1, 40, 8\) must equal v.shape=\(2, 3, 40, 8\)"),
        (V2, {"query": V2.astype("float16")}, TypeError, "query.dtype=float16 must equal v.dtype=float32"),
        (V2, {"params": tuple(PARAMS)}, TypeError, "params is a tuple and must be an EvoParams, as from evo_jax.init"),
        (V2[..., :7], {}, ValueError, r"params.q_kernel.shape=\(8, 8\) must be \(7, 7\) .*init_evo_params\(key, 7\)"),
        (V2, {"params": PARAMS._replace(norm_bias=np.ones(D, int))}, TypeError, "params.norm_bias.dtype=int32"),
        (V2, {"mask_semantics": "absent"}, ValueError, "mask_semantics='absent' must be one of 'padding', 'multiply'"),
        (V2, {"attention_mask": np.ones((B, L), "complex64")}, TypeError, "attention_mask.dtype=complex64"),
        (V2, {"accum_dtype": jnp.float64}, ValueError, "accum_dtype=float64 needs .*'jax_enable_x64', True"),
        (V2, {"accum_dtype": jnp.bfloat16}, TypeError, "accum_dtype=bfloat16 cannot carry"),
        (V2, {"block_m": 48}, ValueError, "block_m=48 must be a power of two from 16 to 1024"),
        (V2, {"num_warps": 3}, ValueError, "num_warps=3 must be a power of two from 1 to 16; leave it out"),
        (V2, {"num_stages": 0}, ValueError, "num_stages=0 must be at least 1"),
        (V2, {"num_stages": 1.5}, TypeError, "num_stages=1.5 must be an int"),
        (V2, {"implementation": "auto"}, ValueError, "implementation='auto' is not one of"),
        (V2, {"causal": "no"}, TypeError, "causal='no' must be True or False"),
        (V2, {"return_state": 1}, TypeError, "return_state=1 must be True or False"),
    ],
)
def test_refusals_name_the_argument_its_value_and_the_way_out(v, options, error, message):
    options = {"params": PARAMS, **options}
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: evo_jax.evo_attention(jnp.asarray(v), **options))


def test_float64_values_refuse_narrower_sums(x64):
    with pytest.raises(TypeError, match="accum_dtype=float32 cannot carry sums of dtype float64"):
        evo_jax.evo_attention(V.astype(jnp.float64), PARAMS, accum_dtype=jnp.float32)


def test_init_refuses_what_it_cannot_draw():
    wrong: list[tuple[Any, type[Exception]]] = [(0, ValueError), (1.5, TypeError)]
    for head_dim, error in wrong:
        with pytest.raises(error, match=f"head_dim={head_dim} must be"):
            evo_jax.init_evo_params(jax.random.key(0), head_dim)
    with pytest.raises(TypeError, match="dtype=int32 must be one of"):
        evo_jax.init_evo_params(jax.random.key(0), 4, jnp.int32)
    with pytest.raises(ValueError, match="dtype=float64 needs"):
        evo_jax.init_evo_params(jax.random.key(0), 4, jnp.float64)
