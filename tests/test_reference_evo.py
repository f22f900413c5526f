"""reference.evo: the oracle against loops over tokens and finite differences, the chunked form against the oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVO_CASES, evo_inputs, padding_mask
from checks import TOLERANCE, assert_close, evo_params, signed_rows

from reference import evo
from reference.chunk_loop import Step, chunk_loop
from reference.evo import EvoParams, EvoSpec, chunk_length, evo_chunked, evo_dense

FORMS = {"dense": evo_dense, "chunked": evo_chunked}
OPTIONS = [  # causal, mask, query given, semantics
    (True, None, False, "padding"),
    (True, "interior", True, "padding"),
    (True, "left", False, "multiply"),
    (True, "sequence", False, "padding"),
    (False, None, True, "padding"),
    (False, "left", True, "padding"),
    (False, "interior", False, "multiply"),
]


def draw(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def float64_params(width):
    """Parameters with all float64 bits in use."""
    noise = iter(range(100, 200))
    return jax.tree.map(
        lambda a: a.astype("float64") + 0.1 * draw(a.shape, next(noise), "float64"), evo_params(width, "float32")
    )


def one_token_at_a_time(v, query, params, mask, causal, semantics):
    """SEMANTICS section 1 in float64 numpy, for one (L, D) head; a masked token is skipped, or is a token of zeros."""
    w = {name: np.asarray(a, np.float64) for name, a in params._asdict().items()}

    def lin(name, a):
        return a @ w[f"{name}_kernel"] + w[f"{name}_bias"]

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    absent = semantics == "padding"
    seen = [t for t in range(len(v)) if mask[t] or not absent]
    total = sum((v[t] * mask[t] for t in seen), np.zeros(v.shape[1]))
    out, c, s = np.zeros_like(v), 0.0, 0.0
    for n, t in enumerate(seen, start=1):
        token = v[t] * mask[t]
        if causal:
            c = c + token
            s = s + sigmoid(lin("gate", c / n)) * token
        else:
            c = total
            s = sigmoid(lin("gate", total / len(seen))) * total
        r = lin("q", query[t]) / (np.abs(s) + np.abs(lin("local", token)) + 1e-8)
        y = sigmoid(lin("final", r * sigmoid(r) * token)) * c * mask[t]
        out[t] = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * w["norm_scale"] + w["norm_bias"]
    return out


def call_of(form, mask, causal, semantics, accum_dtype="float32"):
    """A form of ours as a function of (v, query, params)."""
    spec = EvoSpec(causal, semantics == "padding", accum_dtype)
    rows = signed_rows(mask, causal, semantics)
    factor = None if mask is None or spec.absent else mask[:, None, :, None]

    def call(v, query, params):
        v = v if factor is None else v * factor.astype(v.dtype)
        return FORMS[form](v, query, params, rows, spec)

    return call


# ---- the oracle


@pytest.mark.parametrize(("causal", "kind", "own_query", "semantics"), OPTIONS)
def test_oracle_against_one_token_at_a_time(causal, kind, own_query, semantics, x64):
    shape = (2, 2, 41, 5)
    v, query, params = draw(shape, 0, "float64"), draw(shape, 1, "float64"), float64_params(5)
    mask = padding_mask(kind, 2, 41)
    out = jax.jit(call_of("dense", mask, causal, semantics))(v, query if own_query else None, params)
    mask = np.ones((2, 41), bool) if mask is None else mask
    for b, h in np.ndindex(2, 2):
        value = np.asarray(v[b, h])
        # Without a query of its own a token asks with its value, which `multiply` has set to 0 where masked.
        asks = np.asarray(query[b, h]) if own_query else value * (mask[b, :, None] if semantics == "multiply" else 1)
        expected = one_token_at_a_time(value, asks, params, mask[b], causal, semantics)
        np.testing.assert_allclose(out[b, h], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("causal", "kind", "own_query", "semantics"), OPTIONS)
def test_oracle_gradients_against_finite_differences(causal, kind, own_query, semantics, x64):
    """Along a random direction of each array; generic data stay clear of the kinks of |x|."""
    shape = (2, 1, 12, 3)
    call = call_of("dense", padding_mask(kind, 2, 12), causal, semantics)
    cotangent = draw(shape, 2, "float64")
    arrays = draw(shape, 0, "float64"), draw(shape, 1, "float64") if own_query else None, float64_params(3)
    leaves, tree = jax.tree.flatten(arrays)

    @jax.jit
    def loss(*leaves):
        return jnp.vdot(call(*tree.unflatten(leaves)), cotangent)

    grads, step = jax.jit(jax.grad(loss, argnums=tuple(range(len(leaves)))))(*leaves), 1e-6
    for i, grad in enumerate(grads):
        direction = draw(leaves[i].shape, 10 + i, "float64")
        ahead, behind = (loss(*leaves[:i], leaves[i] + s * direction, *leaves[i + 1 :]) for s in (step, -step))
        slope = jnp.vdot(grad, direction)
        assert abs((ahead - behind) / (2 * step) - slope) <= 2e-7 * max(1.0, abs(slope)), f"array {i}"


def test_zero_is_where_an_absolute_value_has_slope_zero(x64):
    """SEMANTICS: d|a|/da = sign(a), 0 at 0; so a first token of zeros leaves finite gradients."""
    params = float64_params(3)._replace(local_bias=jnp.zeros(3))
    for form in FORMS:
        call = call_of(form, None, True, "padding")
        grads = jax.jit(jax.grad(lambda v, p, f=call: f(v, None, p).sum(), argnums=(0, 1)))(
            draw((1, 1, 4, 3), 0, "float64").at[:, :, 0].set(0), params
        )
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


# ---- the chunked form


# Chunks know nothing of widths: wide cases are the kernels'.
@pytest.mark.parametrize("case", [c for c in EVO_CASES if c.width <= 16 or c.dtype != "float32"], ids=str)
def test_chunked_against_the_oracle(case):
    """Forward and every gradient, the oracle in float32; NaN in every masked token of the chunked form."""
    v, query, mask, cotangent = evo_inputs(case)
    params = evo_params(case.width, case.dtype)
    poison = jnp.zeros((), v.dtype)
    if mask is not None and case.semantics == "padding":
        poison = jnp.where(jnp.asarray(mask)[:, None, :, None], poison, jnp.asarray(jnp.nan, v.dtype))

    def run(form, arrays):
        *arrays, cotangent = arrays
        out, vjp = jax.vjp(call_of(form, mask, case.causal, case.semantics), *arrays)
        return [out, *jax.tree.leaves(vjp(cotangent))]

    @jax.jit
    def run_both(v, query, params, cotangent):
        in_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (v, query, params, cotangent))
        poisoned = v + poison, None if query is None else query + poison, params, cotangent
        return run("chunked", poisoned), run("dense", in_float32)

    forward, inputs, weights = TOLERANCE[case.dtype]
    limits = [forward, inputs, *[inputs] * case.own_query, *[weights] * len(params)]
    for i, (actual, expected, limit) in enumerate(zip(*run_both(v, query, params, cotangent), limits, strict=True)):
        assert actual.dtype == v.dtype
        assert_close(f"array {i}", actual, expected, limit)
        if mask is not None and case.semantics == "padding" and actual.shape == v.shape:
            assert not np.asarray(actual, np.float32)[~np.broadcast_to(mask[:, None], v.shape[:3])].any(), (
                f"array {i} is not 0 where masked"
            )


def both(shape, options, accum_dtype="float64", dtype="float64"):
    """(output and gradients of the chunked form, those of the oracle) in float64."""
    causal, kind, own_query, semantics = options
    v, query, cotangent = (draw(shape, seed, dtype) for seed in range(3))
    arrays = v, query if own_query else None, float64_params(shape[3])

    def run(form):
        call = call_of(form, padding_mask(kind, shape[0], shape[2]), causal, semantics, accum_dtype)

        def with_gradients(arrays, cotangent):
            out, vjp = jax.vjp(call, *arrays)
            return [out, *jax.tree.leaves(vjp(cotangent))]

        return jax.jit(with_gradients)(arrays, cotangent)

    return run("chunked"), run("dense")


@pytest.mark.parametrize(
    ("length", "options"),
    [*((n, OPTIONS[1]) for n in (255, 256, 257, 512, 600)), (600, OPTIONS[0]), (600, OPTIONS[5])],
    ids=str,
)
def test_lengths_around_the_chunk(length, options, x64, monkeypatch):
    monkeypatch.setattr(evo, "_WHOLE_VALUES", -1)
    shape = (2, 1, length, 4)
    assert chunk_length(shape) == 256
    for actual, expected in zip(*both(shape, options), strict=True):
        assert_close("array", actual, expected, 1e-9)


@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[6]], ids=str)
def test_many_heads_have_shorter_chunks(options, x64):
    shape = (4, 16, 130, 33)
    assert chunk_length(shape) == 64
    for actual, expected in zip(*both(shape, options), strict=True):
        assert_close("array", actual, expected, 1e-9)


@pytest.mark.parametrize(
    "shape", [(1, 1, 10, 1), (1, 8, 10, 64), (8, 64, 10, 128), (8, 64, 4, 128), (1, 0, 10, 3), (3, 5, 10, 7)]
)
def test_a_small_v_is_one_chunk_and_others_are_powers_of_two_that_fit(shape, monkeypatch):
    if np.prod(shape) <= 2**18:
        assert chunk_length(shape) == shape[2]
    monkeypatch.setattr(evo, "_WHOLE_VALUES", -1)
    length = chunk_length(shape)
    assert length in (64, 128, 256)
    assert length == 64 or length * shape[0] * shape[1] * shape[3] <= 2**17


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(form):
    """NaN and infinity in a token reach no earlier output, not even in its own chunk."""
    v, params = draw((1, 2, 300, 8), 0), evo_params(8, "float32")
    run = jax.jit(call_of(form, None, True, "padding"))
    clean = run(v, None, params)
    for bad in (jnp.nan, jnp.inf):
        out = run(v.at[0, 0, 270].set(bad), None, params)
        np.testing.assert_array_equal(out[:, :, :270], clean[:, :, :270])
        np.testing.assert_array_equal(out[:, 1], clean[:, 1])
        assert bool(jnp.isnan(out[0, 0, 270:]).all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_nan_poison_what_depends_on_them(form, causal):
    v, params = draw((2, 1, 20, 4), 0), evo_params(4, "float32")
    count = jnp.arange(1, 21.0) if causal else jnp.full(20, 20.0)
    rows = jnp.broadcast_to(count, (2, 1, 20)).at[1, 0, 15:].set(jnp.nan)
    out = jax.jit(lambda v: FORMS[form](v, None, params, rows, EvoSpec(causal)))(v)
    assert bool(jnp.isfinite(out[0]).all()) and bool(jnp.isnan(out[1, 0, 15:]).all())
    assert not causal or bool(jnp.isfinite(out[1, 0, :15]).all())


@pytest.mark.parametrize("form", FORMS)
def test_rows_may_differ_by_head_and_have_no_gradient(form):
    v, params = draw((1, 2, 9, 4), 0), evo_params(4, "float32")
    rows = jnp.asarray([[[1, 2, -2, 3, 4, 5, 6, 7, 8], [-1, 1, 2, 3, 4, 5, 6, 7, -7]]], jnp.float32)

    @jax.jit
    def run(v, rows):
        return FORMS[form](v, None, params, rows, EvoSpec())

    out = run(v, rows)
    for h in range(2):
        assert_close("head", out[:, h : h + 1], run(v[:, h : h + 1], rows[:, h : h + 1]), 1e-6)
    if form == "chunked":
        assert not jax.jit(jax.grad(lambda rows: run(v, rows).sum()))(rows).any()


def test_gradients_have_the_dtypes_of_their_arrays():
    v, query = draw((1, 2, 40, 8), 0, "bfloat16"), draw((1, 2, 40, 8), 1, "float32")
    params = evo_params(8, "float32")._replace(norm_scale=jnp.ones(8, "float16"))
    for form in FORMS:
        call = call_of(form, None, True, "padding")
        out, grads = jax.jit(lambda *a, f=call: (f(*a), jax.vjp(f, *a)[1](jnp.ones_like(a[0]))))(v, query, params)
        assert out.dtype == v.dtype
        assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda a: a.dtype, (v, query, params))


@pytest.mark.parametrize("causal", [True, False])
def test_float16_of_mean_ten_at_65536_tokens_has_right_gradients(causal, x64):
    v = (10 + draw((1, 1, 65536, 4), 0)).astype("float16")
    cotangent, params = draw(v.shape, 1, "float16"), evo_params(4, "float32")

    def run(form, dtype):
        call = call_of(form, None, causal, "padding", "float64" if dtype == "float64" else "float32")

        @jax.jit
        def with_gradients(v, params, cotangent):
            out, vjp = jax.vjp(lambda v, p: call(v, None, p), v, params)
            return [out, *jax.tree.leaves(vjp(cotangent))]

        return with_gradients(v.astype(dtype), params, cotangent.astype(dtype))

    for actual, exact in zip(run("chunked", "float16"), run("dense", "float64"), strict=True):
        assert bool(jnp.isfinite(actual).all())
        assert_close("array", actual, exact, 1e-2)


def test_state_dict_of_the_original_transposes_the_weights():
    names = ("q_proj", "v_proj_local", "global_stat_gate_proj", "final_gate_proj")
    state = {f"{name}.weight": np.arange(9.0).reshape(3, 3) + i for i, name in enumerate(names)}
    state |= {f"{name}.bias": np.full(3, float(i)) for i, name in enumerate(names)}
    state |= {"norm.weight": np.ones(3), "norm.bias": np.zeros(3)}
    for prefix in ("", "core."):
        params = EvoParams.from_state_dict({prefix + name: a for name, a in state.items()})
        np.testing.assert_array_equal(params.gate_kernel, state["global_stat_gate_proj.weight"].T)
        np.testing.assert_array_equal(params.local_bias, state["v_proj_local.bias"])
        np.testing.assert_array_equal(params.norm_scale, state["norm.weight"])


# ---- memory


def test_memory_at_8192_tokens_is_at_most_20_mb():
    v, params = jax.ShapeDtypeStruct((1, 8, 8192, 64), jnp.float32), evo_params(64, "float32")
    call = call_of("chunked", None, True, "padding")

    def backward(v, params, cotangent):
        return jax.vjp(lambda v, p: call(v, None, p), v, params)[1](cotangent)

    for fn, arrays in ((partial(call, query=None), {"v": v, "params": params}), (backward, (v, params, v))):
        lowered = jax.jit(fn).lower(**arrays) if isinstance(arrays, dict) else jax.jit(fn).lower(*arrays)
        memory = lowered.compile().memory_analysis()
        assert memory is not None and memory.temp_size_in_bytes <= 20e6


def test_residuals_besides_the_inputs_are_two_carries_a_chunk():
    v, params = jax.ShapeDtypeStruct((1, 8, 2600, 16), jnp.bfloat16), evo_params(16, "bfloat16")
    call = call_of("chunked", None, True, "padding")
    saved = jax.tree.leaves(jax.eval_shape(lambda v, p: jax.vjp(lambda v: call(v, None, p), v)[1], v, params))
    extra = sum(a.size * a.dtype.itemsize for a in saved if a.shape != v.shape)
    weights = sum(a.size for a in params) * 4
    assert extra - weights <= 2 * (2600 // 256 + 1) * 8 * 16 * 4 + 64


# ---- chunk_loop


@pytest.mark.parametrize("length", [1, 3, 4, 8, 11])
def test_chunk_loop_carries_and_differentiates_a_linear_recurrence(length):
    """carry' = carry + sum(x), out = w * (carry + cumsum(x)) + start: everything has a closed form."""

    def step(static, w, carry, x, aux, start):
        running = carry[:, :, None] + jnp.cumsum(x, axis=2)
        assert static == "static"
        return running[:, :, -1], w * running * aux + start

    x, aux = draw((2, 1, length, 3), 0), draw((2, 1, length, 1), 1)
    carry, w = draw((2, 1, 3), 2), jnp.float32(1.5)
    starts = (np.arange(length) // 4 * 4).astype(np.float32)[None, None, :, None]

    def chunked(w, carry, x):
        return chunk_loop(Step(step, "static", 4), w, carry, x, aux)

    def closed(w, carry, x):
        running = carry[:, :, None] + jnp.cumsum(x, axis=2)
        return running[:, :, -1], w * running * aux + starts

    def with_gradients(fn):
        out, vjp = jax.vjp(fn, w, carry, x)
        return jax.tree.leaves((out, vjp((draw((2, 1, 3), 3), draw((2, 1, length, 3), 4)))))

    for actual, expected in zip(with_gradients(jax.jit(chunked)), with_gradients(jax.jit(closed)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
