"""Softmax attention's references: the oracle against loops over queries and finite differences, the blocked form
against the oracle; what neither may touch, and what it costs."""

from functools import partial
from typing import Any

import attend_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_checks import check_attend, compiled, visible, with_gradients
from cases import ATTEND_CASES, DROPOUT_SEED, AttendCase, attend_inputs
from checks import assert_close
from numpy.testing import assert_array_equal

from reference.blocked import attend_blocked
from reference.counter_hash import mixed
from reference.dense import AttendInputs, AttendSpec, attend_dense
from reference.exp2 import exp2
from reference.logits import dropout_seeds, kept
from reference.mask import FAR, Mask, Pattern

SMALL_TILES: Any = partial(attend_blocked, block_q=32, block_k=16, width=48)
FORMS = {
    "dense": attend_dense,
    "blocked": partial(attend_blocked, block_q=4, block_k=2, width=4),
    "unrolled": attend_blocked,
}
OPTIONS = ("offset", "lengths", "segments", "bias", "keep", "soft_cap", "sinks", "dropout_rate")
SIZES_ALONE = [case for case in ATTEND_CASES if case.causal and case.windows == ((FAR, FAR),)
               and not any(getattr(case, option) for option in OPTIONS)]  # fmt: skip
# Sizes and 16-bit dtypes are the kernels' trouble: here a few stand for all.
BLOCKED_CASES = [case for case in ATTEND_CASES if case not in SIZES_ALONE or case.length in (0, 1, 33, 48)]
ORACLE_CASES = (
    AttendCase(9, keys=13, heads=(4, 2), value_width=3, width=5, lengths="both", sinks=True, soft_cap=1.0),
    AttendCase(9, keys=7, heads=(2, 1), width=5, bias="BNTS", hiding=True, dropout_rate=0.3),
    AttendCase(40, width=5, windows=((4, 4),), sparse=(2, 4, 2), heads=(4, 2), bias="B11S", segments="few", sinks=True),
    AttendCase(12, width=5, windows=((2, 1), (FAR, FAR)), causal=False, keep=True, segments="left", bias="1NTS"),
)


def in_float64(tree: Any) -> Any:
    wide = lambda a: np.asarray(a).astype("float64") if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    return jax.tree.map(lambda a: jnp.asarray(wide(a)), tree)


def one_query_at_a_time(inputs: AttendInputs, spec: AttendSpec) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64 numpy; which keys are seen is tests/test_mask.py's matter."""
    q, k, v = (np.asarray(x, np.float64) for x in inputs[:3])
    (batch, queries, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    out, lse = np.zeros((batch, queries, heads, v.shape[3])), np.full((batch, queries, heads), -np.inf)
    seen, shape = visible(inputs), (batch, heads, queries, k.shape[1])
    bias = None if inputs.bias is None else np.broadcast_to(np.asarray(inputs.bias, np.float64), shape)
    for b, i, n in np.ndindex(batch, queries, heads):
        js = np.flatnonzero(seen[b, n, i])
        if not len(js):
            continue
        scores = k[b, js, n // group] @ q[b, i, n] * spec.scale
        scores = scores if spec.soft_cap is None else spec.soft_cap * np.tanh(scores / spec.soft_cap)
        scores = scores if bias is None else scores + bias[b, n, i, js]
        sink = 0.0 if inputs.sinks is None else np.exp(float(inputs.sinks[n]))
        total = np.exp(scores).sum() + sink
        weights = np.exp(scores) / total
        if spec.dropout_rate:
            row = np.zeros(1, np.uint32)
            for part in (DROPOUT_SEED + b, n, i):
                row = mixed(row + np.uint32(part))
            draw = mixed(row ^ (js.astype(np.uint64) * 0x9E3779B9 & 0xFFFFFFFF).astype(np.uint32))
            weights = np.where(draw / 2**32 >= spec.dropout_rate, weights / (1 - spec.dropout_rate), 0)
        out[b, i, n], lse[b, i, n] = weights @ v[b, js, n // group], np.log(total)
    return out, lse


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ORACLE_CASES, ids=str)
def test_loops_and_finite_differences(case, form, x64):
    """Output and lse by a loop; gradients along a random direction of each array; in float64."""
    inputs, spec, cotangents = (
        in_float64(attend_inputs(case)[0]),
        attend_inputs(case)[1],
        in_float64(attend_inputs(case)[2]),
    )
    found = compiled(FORMS[form], inputs, spec, cotangents)
    out, lse = one_query_at_a_time(inputs, spec)
    np.testing.assert_allclose(found["out"], out, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found["lse"], lse, rtol=1e-11, atol=1e-11)
    d_out, d_lse = (np.asarray(x) for x in cotangents)

    @jax.jit
    def loss(arrays):
        out, lse = attend_dense(inputs._replace(**arrays), spec)
        return (out * d_out).sum() + jnp.where(lse > -jnp.inf, lse * d_lse, 0).sum()

    arrays = {name: getattr(inputs, name) for name in found if name not in ("out", "lse")}
    for i, (name, array) in enumerate(arrays.items()):
        direction = np.random.default_rng(i).normal(size=array.shape)
        ahead, behind = (loss(arrays | {name: array + step * direction}) for step in (1e-6, -1e-6))
        slope = np.vdot(found[name], direction)
        assert abs((ahead - behind) / 2e-6 - slope) <= 1e-7 * max(1.0, abs(slope)), name


@pytest.mark.parametrize("form", [SMALL_TILES, attend_blocked], ids=["loops", "unrolled"])
@pytest.mark.parametrize("case", BLOCKED_CASES, ids=str)
def test_blocked_against_the_oracle(case, form):
    """In tiles of 32 queries and slabs of 48 keys, or of its own choice; NaN and infinity in what does not exist."""
    check_attend(form, case)


@pytest.mark.parametrize("length", [300, 512, 1100])  # the first two without loops
@pytest.mark.parametrize(
    "pattern",
    [Pattern(), Pattern(False), Pattern(False, ((255, 255),)), Pattern(True, ((60, 60),)),
     Pattern(True, ((32, 32),), 1, 64, 3), Pattern(False, ((32, 32),), 1, 64, 1),
     Pattern(True, ((255, 0), (FAR, FAR)))],
    ids=["flash", "both sides", "window", "narrow window", "sparse", "sparse, both sides", "multiscale"],
)  # fmt: skip
def test_blocked_in_tiles_of_its_own_choice(pattern, length):
    inputs, spec, cotangents = attend_inputs(AttendCase(length, width=4, batch=1 if length > 300 else 2))
    inputs = inputs._replace(mask=Mask(pattern))
    actual, expected = (compiled(form, inputs, spec, cotangents) for form in (attend_blocked, attend_dense))
    for name, array in actual.items():
        assert_close(
            name, array, expected[name], attend_checks.FORWARD if name in ("out", "lse") else attend_checks.GRADIENT
        )


def test_blocked_does_not_look_at_keys_in_dead_tiles():
    """NaN in keys 0 to 199 reaches no query whose slab starts later, bit by bit, nor its gradients."""
    inputs, spec, cotangents = attend_inputs(AttendCase(800, width=4, windows=((40, 0),), heads=(1, 1), batch=1))
    run = jax.jit(partial(with_gradients, partial(attend_blocked, block_q=64, block_k=16), spec=spec))
    poison = lambda x: x.at[:, :200].set(jnp.nan)  # noqa: E731
    clean = run(inputs=inputs, cotangents=cotangents)
    dirty = run(inputs=inputs._replace(key=poison(inputs.key), value=poison(inputs.value)), cotangents=cotangents)
    assert np.isnan(dirty["out"][:, :200]).all()
    for name, array in clean.items():
        np.testing.assert_array_equal(array[:, 400:], dirty[name][:, 400:])


def test_dropout_keeps_its_share_and_differs_by_all_that_it_is_drawn_by():
    i = jnp.arange(64, dtype=jnp.int32)[None, None, :, None]
    j = i.swapaxes(2, 3)

    def draw(rate, seed):
        return np.asarray(kept(rate, dropout_seeds(jnp.uint32(seed), 2, 3)[:, :, None, None], i, j))

    drawn = draw(0.3, 5)
    assert abs(drawn.mean() - 0.7) <= 4 * (0.21 / drawn.size) ** 0.5
    others = [draw(0.3, 6), *(np.roll(drawn, 1, axis) for axis in range(4))]
    for other in others:
        assert abs((drawn == other).mean() - 0.58) <= 5 * (0.25 / drawn.size) ** 0.5
    assert draw(0.0, 5).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_have_the_dtypes_of_their_arrays(form):
    inputs, spec, (d_out, d_lse) = attend_inputs(AttendCase(20, width=4, bias="1NTS", sinks=True))
    inputs = inputs._replace(query=inputs.query.astype("bfloat16"), value=inputs.value.astype("float16"))
    run = partial(with_gradients, FORMS[form], spec=spec)
    found = jax.eval_shape(run, inputs=inputs, cotangents=(d_out.astype("bfloat16"), d_lse))
    narrow = {"out": "bfloat16", "query": "bfloat16", "value": "float16"}
    assert {name: a.dtype.name for name, a in found.items()} == {name: narrow.get(name, "float32") for name in found}


# ---- memory


def temporaries(pattern: Pattern, length: int) -> tuple[int, int]:
    """Bytes of the forward and of forward and backward, 8 heads of width 64 in float32."""
    x, spec = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32), AttendSpec(0.125)

    def forward(q, k, v):
        return attend_blocked(AttendInputs(q, k, v, Mask(pattern)), spec)[0]

    def both(q, k, v, d_out):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, vjp(d_out)

    analyses = (jax.jit(f).lower(*[x] * n).compile().memory_analysis() for f, n in ((forward, 3), (both, 4)))
    sizes = [analysis.temp_size_in_bytes for analysis in analyses if analysis is not None]
    return sizes[0], sizes[1]


@pytest.mark.parametrize(
    "pattern",
    [Pattern(), Pattern(windows=((255, 0),)), Pattern(True, ((32, 32),), 1, 64, 3),
     Pattern(windows=((255, 0),) * 4 + ((FAR, FAR),) * 4)],
    ids=["flash", "window", "sparse", "multiscale"],
)  # fmt: skip
def test_memory_at_16384_tokens(pattern):
    """Each array is 34 MB; scores of one head alone would be 1074."""
    forward, both = temporaries(pattern, 16384)
    assert forward <= 150e6 and both <= 250e6


def test_powers_of_two_to_three_ulp_and_past_the_ends():
    x = np.concatenate([np.linspace(-126, 0, 400_001), np.linspace(-2, 127, 50_001)]).astype(np.float32)
    halves = np.arange(-126, 127, 0.5, dtype=np.float32)  # where rounding is a tie
    for f in (exp2, jax.jit(exp2)):  # XLA may fold what is not jitted otherwise
        for points in (x, halves, np.nextafter(halves, np.float32(200))):
            wanted = np.exp2(points.astype(np.float64))
            error = np.abs(np.asarray(f(jnp.asarray(points)), np.float64) - wanted)
            assert (error <= 3 * np.spacing(wanted.astype(np.float32))).all()
        far = jnp.array([-jnp.inf, -1e30, -127, -126.75, 127.75, 300, 1e30, jnp.inf, jnp.nan], jnp.float32)
        assert_array_equal(f(far), np.array([0, 0, 0, 0, *4 * [np.inf], np.nan]))


def test_residuals_are_the_inputs_the_output_and_lse():
    x = jax.ShapeDtypeStruct((1, 1000, 2, 16), jnp.bfloat16)

    def residuals(q, k, v):
        return jax.vjp(lambda q, k, v: attend_blocked(AttendInputs(q, k, v, Mask()), AttendSpec(0.25)), q, k, v)[1]

    saved = jax.tree.leaves(jax.eval_shape(residuals, x, x, x))
    assert sum(a.size * a.dtype.itemsize for a in saved) <= 3 * x.size * 2 + x.size * 4 + 2 * 1000 * 2 * 4
