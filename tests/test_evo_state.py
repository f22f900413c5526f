"""EvoState: a causal EvoAttention cut anywhere equals the whole, forward and every gradient; the module's cache."""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import steady_values
from checks import STEADY, assert_close, assert_rows_close, evo_params, signed_rows
from flax import nnx

import evo_jax
from benchmarks.programs import Program
from benchmarks.ttir import ttir
from benchmarks.ttir_audit import unsafe
from evo_jax.evo import evo_attention
from evo_jax.linen import EvoAttention as LinenEvoAttention
from reference.evo import EvoSpec, evo_dense_from
from reference.evo_params import EvoParams, EvoState

T = np.arange(40)
RAGGED = np.stack([T >= 19, (T * 11) % 40 < 27])  # padded on the left beyond the first cuts; holes
# Lengths of the pieces: none, one token first, within a chunk, across chunks of 16, single tokens last.
PIECES = (0, 1, 6, 0, 9, 21, 1, 1, 1)


def draw(shape, seed, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def by_pieces(v, query, params, mask, pieces, **options):
    """Outputs side by side, and the state after the last piece."""
    ends, outs, state = np.cumsum(pieces), [], cast(EvoState, None)
    for start, end in zip(ends - pieces, ends, strict=True):
        out, state = evo_attention(
            v[:, :, start:end],
            params,
            query=None if query is None else query[:, :, start:end],
            attention_mask=None if mask is None else mask[:, start:end],
            initial_state=state,
            return_state=True,
            **options,
        )
        outs.append(out)
    return jnp.concatenate(outs, axis=2), state


def check(shape, dtype, tolerances, own_query=False, mask=None, pieces=PIECES, steady=False, **options):
    """By pieces against the dense oracle of the whole: output, state, and gradients from cotangents of both.

    `steady` values are well-conditioned: then each row of the output and of the gradient of v is judged by itself, too.
    """
    v, query, cotangent = (draw(shape, seed, dtype) for seed in range(3))
    v = steady_values(v, mask) if steady else v
    query = query if own_query else None
    semantics = options.get("mask_semantics", "padding")
    wide = "float64" if dtype == "float64" else "float32"
    params, rows = evo_params(shape[3], dtype), signed_rows(mask, True, semantics)
    d_carry = tuple(draw((*shape[:2], shape[3]), seed, options.get("accum_dtype", wide)) for seed in (4, 5))
    poison = 0.0 if mask is None else np.where(mask, 0.0, np.nan if semantics == "padding" else 1.0)[:, None, :, None]

    @jax.jit
    def run(v, query, params, cotangent, d_carry):
        def call(v, query, params):
            v, query = (None if x is None else x + jnp.asarray(poison, x.dtype) for x in (v, query))
            out, state = by_pieces(v, query, params, mask, pieces, **options)
            return (out, state[:2]), state.count

        (out, carry), vjp, count = jax.vjp(call, v, query, params, has_aux=True)
        return out, carry, vjp((cotangent, d_carry)), count

    @jax.jit
    def oracle(v, query, params, cotangent, d_carry):
        factor = 1.0 if mask is None else mask[:, None, :, None].astype(v.dtype)
        spec = EvoSpec(True, semantics == "padding", str(v.dtype))
        call = lambda v, query, params: evo_dense_from(v * factor, query, params, rows, spec, None)  # noqa: E731
        (out, carry), vjp = jax.vjp(call, v, query, params)
        return out, carry, vjp((cotangent, d_carry))

    out, carry, grads, count = run(v, query, params, cotangent, d_carry)
    whole = jax.tree.map(lambda a: a.astype(wide), (v, query, params, cotangent, d_carry))
    expected = oracle(*whole)
    assert out.dtype == jnp.dtype(dtype) and {a.dtype.name for a in carry} == {d_carry[0].dtype.name}
    valid = np.ones((shape[0], shape[2]), bool) if mask is None else mask
    np.testing.assert_array_equal(count, valid.sum(1) if semantics == "padding" else [shape[2]] * shape[0])
    if semantics == "padding":
        absent = ~np.broadcast_to(valid[:, None], shape[:3])
        assert not np.asarray(out, np.float32)[absent].any() and not np.asarray(grads[0], np.float32)[absent].any()
    for name, actual, right, tolerance in (
        ("out", out, expected[0], tolerances[0]),
        ("sum", carry[0], expected[1][0], tolerances[0]),
        ("gated_sum", carry[1], expected[1][1], tolerances[0]),
        ("v", grads[0], expected[2][0], tolerances[1]),
        *(() if query is None else (("query", grads[1], expected[2][1], tolerances[1]),)),
        *(
            (name, *pair, tolerances[1])
            for name, *pair in zip(EvoParams._fields, grads[2], expected[2][2], strict=True)
        ),
    ):
        assert_close(name, actual, right, tolerance)
        if steady and name in ("out", "v"):
            assert_rows_close(name, actual, right, STEADY)


@pytest.mark.parametrize("semantics", ["padding", "multiply"])
def test_pieces_equal_the_whole_in_float64(semantics, x64):
    options = {"mask": RAGGED, "mask_semantics": semantics, "own_query": semantics == "padding"}
    check((2, 2, 40, 5), "float64", (1e-12, 1e-10), implementation="reference", **options)


KERNELS = (
    ((2, 2, 19, 40), "float32", {"own_query": True, "mask": RAGGED[:, 10:29], "pieces": (18, 1)}, (1e-5, 1e-3)),
    ((2, 9, 2, 8), "bfloat16", {"mask": np.eye(2) == 0, "mask_semantics": "multiply", "pieces": (1, 1)}, (5e-3, 5e-2)),
)


@pytest.mark.parametrize("shape, dtype, options, tolerances", KERNELS)
def test_kernels_by_pieces_equal_the_whole(shape, dtype, options, tolerances):
    """Two chunks, then a masked and a valid token; a step after a step of 18 rows: two tiles, the second ragged."""
    check(shape, dtype, tolerances, implementation="interpret", block_m=16, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width, dtype", [(64, "bfloat16"), (128, "bfloat16"), (80, "float32"), (256, "float32")])
def test_compiled_kernels_by_pieces_equal_the_whole(width, dtype):
    """On the device: a step, many chunks, and steps of 24 rows; TF32 x 3 for float32, steady values for bfloat16."""
    mask = (np.arange(600) * 7) % 10 < np.array([[9], [5]])
    steady, pieces = dtype == "bfloat16", (1, 300, 297, 1, 1)
    tolerances = (5e-3, STEADY) if steady else (5e-5, 3e-3)
    check((2, 12, 600, width), dtype, tolerances, True, mask, pieces, steady, implementation="triton")


@pytest.mark.parametrize("width, dtype", [(7, "float32"), (80, "float32"), (256, "bfloat16")])
def test_no_access_can_leave_its_array(width, dtype):
    """Of the step, for 18 rows of two tiles; a state gives the other kernels no new accesses."""
    modules = ttir(*Program("evo", "decode", dtype, 2, heads=9, width=width, extras=("mask",)).build())
    assert [name for name, _ in modules] == ["evo_step"]
    assert {name: found for name, text in modules if (found := unsafe(text))} == {}


def test_wide_float32_takes_the_kernels_of_many_tokens():
    """There the step would spill registers."""
    modules = ttir(*Program("evo", "decode", "float32", heads=2, width=256).build())
    assert [name for name, _ in modules] == ["evo_sums", "evo_gated_sums", "evo_gate", "evo_final", "evo_norm"]


def test_sums_in_float64_of_float32_values(x64):
    """Small steps at large sums, where float32 would lose them, in the state as in a chunk."""
    v, params = 1e4 + draw((1, 1, 40, 8), 0), evo_params(8, "float32")
    wide = jax.tree.map(lambda a: a.astype("float64"), params)
    exact = by_pieces(v.astype("float64"), None, wide, None, (40,))[1]
    for how in ("reference", "interpret"):
        run = jax.jit(partial(by_pieces, pieces=PIECES, accum_dtype=jnp.float64, implementation=how, mask=None))
        _, state = run(v, None, params)
        np.testing.assert_allclose(state.sum, exact.sum, rtol=1e-13)
        _, later = evo_attention(v[:, :, :0], params, initial_state=state, return_state=True)
        assert later.sum.dtype == "float64", "the state says what sums are carried in"


@pytest.mark.parametrize("how", ["reference", "interpret"])
def test_a_state_of_zeros_is_none(how):
    """Bitwise, output and state, where XLA does not know the zeros: they are one program of the same arguments."""
    v, params = draw((2, 2, 40, 8), 0), evo_params(8, "float32")
    zeros = EvoState(np.zeros((2, 2, 8), "float32"), np.zeros((2, 2, 8), "float32"), np.zeros(2, "int32"))
    run = partial(evo_attention, return_state=True, block_m=16, implementation=how)
    pairs = zip(jax.tree.leaves(run(v, params)), jax.tree.leaves(run(v, params, initial_state=zeros)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_one_trace_steps_through_a_sequence_of_any_length():
    """Single tokens under lax.scan, as in decoding, are the whole sequence; the state is of one size."""
    v, params = draw((2, 2, 300, 4), 0), evo_params(4, "float32")

    def step(state, token):
        out, state = evo_attention(token[:, :, None], params, initial_state=state, return_state=True)
        return state, out[:, :, 0]

    @jax.jit
    def both(v):
        whole, after = evo_attention(v, params, return_state=True)
        start = jax.tree.map(jnp.zeros_like, after)
        state, outs = jax.lax.scan(step, start, jnp.moveaxis(v, 2, 0))
        return (whole, after), (jnp.moveaxis(outs, 0, 2), state)

    (whole, after), (outs, state) = both(v)
    assert_close("out", outs, whole, 1e-5)
    assert_close("gated_sum", state.gated_sum, after.gated_sum, 1e-5)
    assert state.count.tolist() == [300, 300] and state.count.dtype == jnp.int32


# ---- the module


def test_ragged_prompts_of_a_module_decode_together():
    """Prompts padded on the right, then tokens one by one: each sequence is as if it were alone and whole."""
    layer = evo_jax.EvoAttention(embed_dim=12, num_heads=3, out_proj=True, rngs=nnx.Rngs(0))
    lengths, x = np.array([5, 2]), draw((2, 8, 12), 0)
    mask = np.arange(5) < lengths[:, None]
    prompt = np.where(mask[..., None], x[:, :5], np.nan)
    call, cache = (
        nnx.jit(lambda layer, x, cache, mask=None: layer(x, cache=cache, attention_mask=mask)),
        layer.init_cache(2),
    )
    out, cache = call(layer, prompt, cache, mask)
    steps = []
    for i in range(3):
        token = x[np.arange(2), lengths + i][:, None]
        step, cache = call(layer, token, cache)
        steps.append(step)
    assert cache.count.tolist() == [8, 5]
    whole = nnx.jit(lambda layer, x: layer(x))(layer, x)
    for row, n in enumerate(lengths):
        together = np.concatenate([out[row, :n], *(s[row] for s in steps)])
        np.testing.assert_allclose(together, whole[row, : n + 3], rtol=1e-4, atol=1e-5)
        assert not np.asarray(out[row, n:]).any()
    again = call(layer, x[:, :1], cache.take(jnp.array([1, 0])))[0]
    assert_close("taken", again[::-1], call(layer, x[::-1, :1], cache)[0], 1e-6)


def test_the_linen_twin_has_the_cache_too():
    layer, x = LinenEvoAttention(embed_dim=8, num_heads=2), draw((1, 5, 8), 0)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    apply = jax.jit(layer.apply)
    cache = evo_jax.EvoAttention(8, 2, rngs=nnx.Rngs(0)).init_cache(1)
    first, cache = apply(variables, x[:, :3], cache=cache)
    rest, cache = apply(variables, x[:, 3:], cache=cache)
    assert_close("out", jnp.concatenate([first, rest], axis=1), apply(variables, x), 1e-5)


# ---- errors


STATE = EvoState(np.zeros((1, 2, 4), "float32"), np.zeros((1, 2, 4), "float32"), np.zeros(1, "int32"))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"initial_state": STATE, "causal": False}, ValueError, "need causal=True"),
        ({"return_state": True, "causal": False}, ValueError, "need causal=True"),
        ({"initial_state": tuple(STATE)}, TypeError, "tuple and must be an evo_jax.EvoState"),
        (
            {"initial_state": STATE._replace(sum=STATE.sum[:, :1])},
            ValueError,
            r"sum.shape=\(1, 1, 4\) must be \(1, 2, 4\)",
        ),
        ({"initial_state": STATE._replace(gated_sum=STATE.sum.astype(int))}, TypeError, "gated_sum.dtype=int"),
        ({"initial_state": STATE._replace(count=np.zeros(2, int))}, ValueError, r"count.shape=\(2,\)"),
        ({"initial_state": STATE._replace(count=np.zeros(1))}, TypeError, "count.dtype=float"),
        ({"initial_state": STATE._replace(count=None)}, TypeError, "count.dtype=object must be an integer"),
        ({"initial_state": STATE._replace(count=np.array([-1]))}, ValueError, r"count=\[-1\] must be at least 0"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        evo_attention(np.zeros((1, 2, 3, 4), "float32"), **options)
