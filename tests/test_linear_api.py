"""linear_attention at the public door: masks, segments, feature maps, the state, dtypes, transforms, refusals."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

import evo_jax
from evo_jax import LinearState
from reference.linear import LinearSpec, linear_dense

B, L, N, K, D, V = 2, 40, 4, 2, 8, 6
KEYS = jax.random.split(jax.random.key(0), 6)
Q = jax.random.normal(KEYS[0], (B, L, N, D))
KEY = jax.random.normal(KEYS[1], (B, L, K, D))
VALUE = jax.random.normal(KEYS[2], (B, L, K, V))
COTANGENT = jax.random.normal(KEYS[3], (B, L, N, V))
STATE = LinearState(jax.random.normal(KEYS[4], (B, K, D, V)), jnp.abs(jax.random.normal(KEYS[5], (B, K, D))))
MASK = (np.arange(L) * np.array([[11], [7]]) + 3) % L < 27
SEGMENTS = np.where(np.arange(L) < np.array([[13], [20]]), 5, np.where(np.arange(L) < 31, 2, 5))

linear = jax.jit(
    evo_jax.linear_attention, static_argnames=("feature_map", "is_causal", "return_state", "eps", "implementation")
)


def oracle(arrays, state=None, rows=None, spec=None):
    q, k, v = arrays
    return linear_dense(q, k, v, state, rows, spec or LinearSpec())


def gradients(call, *arrays):
    """The output of `call(*arrays)` and the gradients of all arrays."""
    out, vjp = jax.vjp(call, *arrays)
    return out, *vjp(COTANGENT.astype(out.dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
def test_the_function_is_the_oracle(causal, feature_map):
    spec = LinearSpec(feature_map, causal, 1e-6)
    out, state = linear(
        Q, KEY, VALUE, feature_map=feature_map, is_causal=causal, initial_state=STATE, return_state=True
    )
    expected, expected_state = oracle((Q, KEY, VALUE), STATE, spec=spec)
    assert_close("out", out, expected, 1e-5)
    assert_close("kv", state.kv, expected_state.kv, 1e-5)
    assert_close("z", state.z, expected_state.z, 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_masked_token_does_not_exist(causal):
    """The valid tokens alone, moved together, give the same rows; NaN in the others reaches nothing."""
    poison = jnp.where(jnp.asarray(MASK)[:, :, None, None], 0.0, jnp.nan)

    @jax.jit
    def run(q, k, v):
        return gradients(lambda *a: evo_jax.linear_attention(*a, is_causal=causal, attention_mask=MASK), q, k, v)

    out, *grads = run(Q + poison, KEY + poison, VALUE + poison)
    assert all(not np.asarray(a)[~MASK].any() for a in (out, *grads))
    for b in range(B):
        packed = [a[b : b + 1, MASK[b]] for a in (Q, KEY, VALUE)]
        alone, vjp = jax.vjp(lambda *a: evo_jax.linear_attention(*a, is_causal=causal), *packed)
        assert_close("out", out[b, MASK[b]], alone[0], 1e-5)
        for grad, expected in zip(grads, vjp(COTANGENT[b : b + 1, MASK[b]]), strict=True):
            assert_close("gradient", grad[b, MASK[b]], expected[0], 1e-5)


@pytest.mark.parametrize(
    "form", [MASK[:, None], MASK[:, None, :, None], MASK.astype(int), jnp.asarray(MASK, jnp.float32)]
)
def test_all_forms_of_a_mask_are_one_mask(form):
    expected = linear(Q, KEY, VALUE, attention_mask=MASK)
    np.testing.assert_array_equal(linear(Q, KEY, VALUE, attention_mask=form), expected)
    np.testing.assert_array_equal(evo_jax.linear_attention(Q, KEY, VALUE, attention_mask=form), expected)


def test_a_mask_of_other_values_is_refused_or_where_traced_never_silently_wrong():
    bad = MASK.astype(np.float32)
    bad[1, 4] = 0.5
    with pytest.raises(ValueError, match=r"attention_mask holds 0\.5"):
        evo_jax.linear_attention(Q, KEY, VALUE, attention_mask=bad)
    out = np.asarray(linear(Q, KEY, VALUE, attention_mask=bad))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_segment_is_a_sequence_of_its_own_even_where_its_id_came_before(causal):
    out = linear(Q, KEY, VALUE, is_causal=causal, segment_ids=SEGMENTS)
    for b in range(B):
        cuts = [0, *(1 + np.flatnonzero(np.diff(SEGMENTS[b]))), L]
        for start, end in itertools.pairwise(cuts):
            alone = evo_jax.linear_attention(*(a[b : b + 1, start:end] for a in (Q, KEY, VALUE)), is_causal=causal)
            assert_close("out", out[b, start:end], alone[0], 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_of_a_negative_segment_does_not_exist(causal):
    """As in softmax attention: the rest is as without it, states included; NaN in it is harmless."""
    q, k, v = jax.random.normal(jax.random.key(3), (3, 3, 12, 2, 4))
    state = LinearState(jnp.ones((3, 2, 4, 4)), jnp.ones((3, 2, 4)))
    ids = jnp.array([[0, 0, 0, -1, -1, 0, 0, 1, 1, -2, -2, -2], [-1, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, -1], [-1] * 12])
    run = partial(evo_jax.linear_attention, is_causal=causal, return_state=True)
    here = (ids >= 0)[..., None, None]
    out, last = run(*(jnp.where(here, x, jnp.nan) for x in (q, k, v)), segment_ids=ids, initial_state=state)
    assert not np.any(np.where(here, 0, out))
    for b in range(3):
        real = np.flatnonzero(ids[b] >= 0)
        own = [x[b : b + 1, real] for x in (q, k, v)]
        first = jax.tree.map(lambda x, b=b: x[b : b + 1], state)
        expected, after = run(*own, segment_ids=ids[b : b + 1, real], initial_state=first)
        assert_close("out", out[b, real], expected[0], 1e-6)
        assert_close("kv", last.kv[b], after.kv[0], 1e-6)
        assert_close("z", last.z[b], after.z[0], 1e-6)


def test_the_state_belongs_to_the_first_segment_and_comes_back_from_the_last():
    out, state = linear(Q, KEY, VALUE, segment_ids=SEGMENTS, initial_state=STATE, return_state=True)
    end = 13  # of the first segment of sequence 0
    first, _ = oracle((a[:1, :end] for a in (Q, KEY, VALUE)), jax.tree.map(lambda a: a[:1], STATE))
    assert_close("first", out[:1, :end], first, 1e-5)
    last = [a[:1, 31:] for a in (Q, KEY, VALUE)]
    _, expected = oracle(last)
    assert_close("kv", state.kv[:1], expected.kv, 1e-5)


@pytest.mark.parametrize("cut", [0, 1, 17, 39, 40])
def test_a_sequence_cut_anywhere_has_the_same_outputs_and_gradients(cut):
    def whole(q, k, v, kv, z):
        return evo_jax.linear_attention(q, k, v, initial_state=LinearState(kv, z))

    def parts(q, k, v, kv, z):
        first, state = evo_jax.linear_attention(
            q[:, :cut], k[:, :cut], v[:, :cut], initial_state=LinearState(kv, z), return_state=True
        )
        rest = evo_jax.linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], initial_state=state)
        return jnp.concatenate([first, rest], axis=1)

    arrays = (Q, KEY, VALUE, *STATE)
    for actual, expected in zip(
        jax.jit(lambda *a: gradients(parts, *a))(*arrays),
        jax.jit(lambda *a: gradients(whole, *a))(*arrays),
        strict=True,
    ):
        assert_close("array", actual, expected, 1e-5)


def test_a_function_of_the_callers_is_a_feature_map_and_may_change_the_width():
    def squares(x):
        return jnp.concatenate([x * x, jnp.abs(x)], axis=-1)

    out = linear(Q, KEY, VALUE, feature_map=squares)
    expected, _ = oracle((squares(Q), squares(KEY), VALUE), spec=LinearSpec("identity"))
    assert_close("out", out, expected, 1e-5)
    np.testing.assert_array_equal(
        linear(Q, KEY, VALUE, feature_map=jax.nn.relu), linear(Q, KEY, VALUE, feature_map="relu")
    )


def test_a_function_never_sees_what_a_masked_token_holds():
    poison = jnp.where(jnp.asarray(MASK)[:, :, None, None], 0.0, jnp.inf)

    def call(q, k, v):
        return evo_jax.linear_attention(q, k, v, feature_map=lambda x: jnp.exp(-x), attention_mask=MASK)

    clean, poisoned = (gradients(call, Q + x, KEY + x, VALUE + x) for x in (0.0, poison))
    for actual, expected in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_queries_without_features_give_zero_and_finite_gradients():
    out, *grads = jax.jit(lambda *a: gradients(lambda *b: evo_jax.linear_attention(*b, feature_map="relu"), *a))(
        -jnp.abs(Q), KEY, VALUE
    )
    assert not np.asarray(out).any() and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_is_added_to_the_denominator(eps):
    one = jnp.ones((1, 1, 1, 1))
    assert_close("out", linear(one, one, one, eps=eps), np.full((1, 1, 1, 1), 4 / (4 + eps)), 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_inputs_have_wide_sums(dtype):
    q, k, v = (a.astype(dtype) for a in (Q, KEY, VALUE))
    out, state = linear(q, k, v, return_state=True)
    assert out.dtype == dtype and state.kv.dtype == state.z.dtype == jnp.float32
    expected, _ = oracle(a.astype(jnp.float32) for a in (q, k, v))
    assert_close("out", out, expected, {"float16": 1e-3, "bfloat16": 8e-3}[dtype])


def test_float16_at_3000_tokens_is_finite_and_right():
    """The original: 27,623 of 48,000 outputs are NaN."""
    q, k, v = (10 * jax.random.normal(key, (1, 3000, 2, 8)).astype(jnp.float16) for key in KEYS[:3])
    expected, _ = oracle(a.astype(jnp.float32) for a in (q, k, v))
    assert_close("out", linear(q, k, v), expected, 1e-3)


def test_float64_stays_float64(x64):
    arrays = [a.astype("float64") for a in (Q, KEY, VALUE)]
    out, state = linear(*arrays, return_state=True)
    expected, _ = oracle(arrays)
    assert out.dtype == state.kv.dtype == jnp.float64
    assert_close("out", out, expected, 1e-13)


def test_transforms_change_neither_values_nor_gradients():
    def call(q, k, v):
        return evo_jax.linear_attention(q, k, v)

    expected = jax.jit(lambda *a: gradients(call, *a))(Q, KEY, VALUE)
    mapped = jax.vmap(lambda q, k, v: call(q[None], k[None], v[None])[0])
    for fn in (jax.checkpoint(call), mapped):
        for actual, wanted in zip(jax.jit(lambda *a, f=fn: gradients(f, *a))(Q, KEY, VALUE), expected, strict=True):
            assert_close("array", actual, wanted, 1e-5)


def test_scan_carries_the_state_through_chunks():
    def step(state, chunk):
        out, state = evo_jax.linear_attention(*chunk, initial_state=state, return_state=True)
        return state, out

    chunks = [jnp.moveaxis(a.reshape(B, 5, L // 5, *a.shape[2:]), 1, 0) for a in (Q, KEY, VALUE)]
    start = LinearState(jnp.zeros((B, K, D, V)), jnp.zeros((B, K, D)))
    _, outs = jax.jit(lambda s, c: jax.lax.scan(step, s, c))(start, chunks)
    assert_close("out", jnp.moveaxis(outs, 0, 1).reshape(B, L, N, V), linear(Q, KEY, VALUE), 1e-5)


@pytest.mark.parametrize("shape", [(0, L, N, K), (B, 0, N, K)])
def test_empty_arrays_keep_their_shape_and_state(shape):
    b, length, n, k = shape
    arrays = jnp.ones((b, length, n, D)), jnp.ones((b, length, k, D)), jnp.ones((b, length, k, V))
    state = jax.tree.map(lambda a: a[:b], STATE)
    out, last = linear(*arrays, initial_state=state, return_state=True)
    assert out.shape == (b, length, n, V)
    np.testing.assert_array_equal(last.kv, state.kv)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_every_implementation_gives_the_same_numbers(implementation):
    options = {"attention_mask": MASK, "segment_ids": SEGMENTS, "initial_state": STATE}
    out, state = linear(Q, KEY, VALUE, return_state=True, implementation=implementation, **options)
    runs = 1 + np.cumsum(np.diff(SEGMENTS, axis=1, prepend=SEGMENTS[:, :1]) != 0, axis=1)
    rows = jnp.asarray(np.where(MASK, runs, -runs), jnp.int32)
    expected, last = oracle((Q, KEY, VALUE), STATE, rows)
    assert_close("out", out, expected, 1e-5)
    assert_close("kv", state.kv, last.kv, 1e-5)
    report = evo_jax.explain(evo_jax.linear_attention, Q, KEY, VALUE, implementation=implementation)
    assert [(c.op, c.implementation) for c in report] == [("linear_attention", implementation)]


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((Q[0], KEY, VALUE), {}, ValueError, r"query\.shape=\(40, 4, 8\).*must be \(B, T, N, D\)"),
        ((Q, KEY[:, :, :, :4], VALUE), {}, ValueError, "query and key in D"),
        ((Q, KEY[:1], VALUE[:1]), {}, ValueError, "must agree in B"),
        ((Q[:, :, :3], KEY, VALUE), {}, ValueError, "3 query heads are not a multiple of 2 key/value heads"),
        ((Q[:, :7], KEY, VALUE), {}, ValueError, "is_causal=True needs as many queries as keys"),
        ((Q[:, :7], KEY, VALUE), {"is_causal": False, "attention_mask": MASK}, ValueError, "as many queries as keys"),
        ((Q.astype("bfloat16"), KEY, VALUE), {}, TypeError, "bfloat16, float32, float32"),
        ((Q.astype("bfloat16"), KEY, VALUE), {"is_causal": False}, TypeError, "query, key and value must be of one"),
        ((Q.astype(int), KEY, VALUE), {}, TypeError, r"query\.dtype=int32"),
        ((Q, KEY, VALUE), {"feature_map": "gelu"}, ValueError, "'gelu' must be one of 'elu', 'relu', 'softmax', or a"),
        ((Q, KEY, VALUE), {"feature_map": "identity"}, ValueError, "must be one of"),
        ((Q, KEY, VALUE), {"feature_map": lambda x: x[0]}, ValueError, "only the last axis may change"),
        ((Q, KEY, VALUE), {"feature_map": lambda x: x[..., :0]}, ValueError, "may change, and not to 0"),
        ((np.array(["q"]), KEY, VALUE), {}, TypeError, "query must be an array, not array"),
        ((Q, KEY, VALUE), {"segment_ids": SEGMENTS[:, :5]}, ValueError, r"segment_ids\.shape=\(2, 5\)"),
        ((Q, KEY, VALUE), {"segment_ids": SEGMENTS * 1.0}, TypeError, "must be an integer dtype"),
        ((Q, KEY, VALUE), {"attention_mask": MASK[:, :5]}, ValueError, r"attention_mask\.shape=\(2, 5\)"),
        ((Q, KEY, VALUE), {"initial_state": STATE._replace(z=STATE.kv)}, ValueError, r"initial_state\.z\.shape"),
        ((Q, KEY, VALUE), {"initial_state": tuple(STATE)}, TypeError, "must be an evo_jax.LinearState"),
        ((Q, KEY, VALUE), {"implementation": "cuda"}, ValueError, "implementation='cuda'"),
        ((Q, KEY, VALUE), {"block": 48}, ValueError, "block=48 must be a power of two"),
        ((Q, KEY, VALUE), {"is_causal": "no"}, TypeError, "is_causal='no' must be True or False"),
        ((Q, KEY, VALUE), {"return_state": 1}, TypeError, "return_state=1 must be True or False"),
        ((Q, KEY, VALUE), {"eps": -1.0}, ValueError, r"eps=-1\.0 must be at least 0"),
        ((Q, KEY, VALUE), {"eps": "a"}, TypeError, "eps='a' must be a float"),
        ((Q, KEY, VALUE), {"implementation": ["triton"]}, ValueError, r"implementation=\['triton'\]"),
    ],
)
def test_refusals_name_the_argument_its_value_and_the_way_out(arrays, options, error, message):
    with pytest.raises(error, match=message):
        evo_jax.linear_attention(*arrays, **options)


def test_kernels_refuse_float64(x64):
    arrays = [a.astype("float64") for a in (Q, KEY, VALUE)]
    with pytest.raises(NotImplementedError, match="float64"):
        evo_jax.linear_attention(*arrays, implementation="interpret")
