"""reference.linear: the oracle against a loop over tokens and finite differences, the chunked form against the oracle.

Arrays are made by numpy where they can be: JAX would compile an operation for every shape.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LINEAR_CASES, LinearCase, LinearInputs, linear_inputs, padding_mask
from checks import TOLERANCE, assert_close

from reference.linear import FEATURE_MAPS, LinearSpec, chunk_length, linear_chunked, linear_dense
from reference.linear_maps import FEATURE_PULLS

FORMS = {"dense": linear_dense, "chunked": linear_chunked}


def is_plain(case: LinearCase) -> bool:
    """Whether only its sizes set the case apart."""
    return case == LinearCase(case.length, case.width, state=case.state)


# Widths and 16-bit dtypes are the kernels' trouble, and most lengths too: here a few stand for all.
ORACLE_CASES = [case for case in LINEAR_CASES if case.width <= 24 and case.dtype == "float32"]
CHUNKED_CASES = [
    case for case in LINEAR_CASES if not is_plain(case) or case.length in (0, 1, 65, 257) or case.width in (1, 80)
]
GRADIENT_CASES = (
    LinearCase(9, 3, value_width=2, heads=(4, 2), state=True),
    LinearCase(9, 3, feature_map="softmax", mask="interior", state=True),
    LinearCase(9, 3, feature_map="relu", runs="many", state=True),
    LinearCase(9, 3, feature_map="identity", mask="left", runs="many", heads=(2, 1), state=True),
    LinearCase(9, 3, causal=False, runs="many", mask="left", state=True),
    LinearCase(4, 3, keys=7, causal=False, heads=(4, 2), state=True),
)


def spec_of(case: LinearCase) -> LinearSpec:
    return LinearSpec(case.feature_map, case.causal)


def in_dtype(inputs: LinearInputs, dtype: str) -> LinearInputs:
    """All but `rows` in one dtype: that of the case's own values is exact in any wider one."""
    return jax.tree.map(lambda a: jnp.asarray(a if a.dtype == jnp.int32 else np.asarray(a).astype(dtype)), inputs)


def numpy_map(name: str, x: np.ndarray) -> np.ndarray:
    if name == "elu":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    if name == "softmax":
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return np.maximum(x, 0) if name == "relu" else x


def one_token_at_a_time(case: LinearCase, given: LinearInputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, kv, z) by SEMANTICS section 2 in float64 numpy: a state per run, and per token one update and one read."""
    q, k, v = (np.asarray(a, np.float64) for a in given[:3])
    q, k = numpy_map(case.feature_map, q), numpy_map(case.feature_map, k)
    (batch, _, heads, width), group = k.shape, q.shape[2] // k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    last_kv, last_z = np.zeros((batch, heads, width, v.shape[3])), np.zeros((batch, heads, width))
    for b, h in np.ndindex(batch, heads):
        rows = np.ones(max(q.shape[1], k.shape[1], 1), int) if given.rows is None else np.asarray(given.rows[b])
        runs = np.abs(rows) if len(rows) else np.ones(1, int)
        states = {run: [np.zeros((width, v.shape[3])), np.zeros(width)] for run in runs}
        if given.state is not None:
            states[runs[0]] = [np.array(a[b, h], np.float64) for a in given.state]

        def add(j, b=b, h=h, states=states, runs=runs):
            states[runs[j]][0] += np.outer(k[b, j, h], v[b, j, h])
            states[runs[j]][1] += k[b, j, h]

        for j in range(k.shape[1]):
            if not case.causal and rows[j] > 0:
                add(j)
        for i in range(q.shape[1]):
            if rows[i] < 0:
                continue
            if case.causal:
                add(i)
            kv, z = states[runs[i]]
            for n in range(h * group, (h + 1) * group):
                out[b, i, n] = q[b, i, n] @ kv / (q[b, i, n] @ z + 1e-6)
        last_kv[b, h], last_z[b, h] = states[runs[-1]]
    return out, last_kv, last_z


def with_gradients(form: str, spec: LinearSpec, given: LinearInputs) -> dict[str, Any]:
    """Output, state and the gradients of query, key, value and state, by name."""

    def call(query, key, value, state):
        return FORMS[form](query, key, value, state, given.rows, spec)

    (out, state), vjp = jax.vjp(call, *given[:4])
    *grads, d_state = vjp((given.d_out, given.d_state))
    found: dict[str, Any] = {
        "out": out,
        "kv": state.kv,
        "z": state.z,
        **dict(zip(("query", "key", "value"), grads, strict=True)),
    }
    return found if d_state is None else {**found, "d_kv": d_state.kv, "d_z": d_state.z}


# ---- the oracle


@pytest.mark.parametrize("case", ORACLE_CASES, ids=str)
def test_oracle_against_one_token_at_a_time(case, x64):
    given = in_dtype(linear_inputs(case), "float64")
    run = jax.jit(partial(linear_dense, spec=spec_of(case)))
    out, state = run(*given[:5])
    for actual, expected in zip((out, *state), one_token_at_a_time(case, given), strict=True):
        assert actual.dtype == "float64"
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_against_finite_differences(case, form, x64):
    """Along a random direction of each array; generic data stay clear of relu's kink."""
    given = in_dtype(linear_inputs(case, seed=3), "float64")

    def loss(arrays):
        query, key, value, state = arrays
        out, state = FORMS[form](query, key, value, state, given.rows, spec_of(case))
        return sum(jnp.vdot(a, b) for a, b in zip((out, *state), (given.d_out, *given.d_state), strict=True))

    leaves, tree = jax.tree.flatten(tuple(given[:4]))
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(tuple(given[:4])))
    loss, step = jax.jit(loss), 1e-6
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        direction = np.random.default_rng(i).normal(size=leaf.shape)
        ahead, behind = (
            loss(tree.unflatten([*leaves[:i], leaf + s * direction, *leaves[i + 1 :]])) for s in (step, -step)
        )
        slope = jnp.vdot(grad, direction)
        assert abs((ahead - behind) / (2 * step) - slope) <= 1e-7 * max(1.0, abs(slope)), f"array {i}"


def test_maps_and_their_chain_rules(x64):
    """By JAX's differentiation of each map, 0 and far tails included; elu + 1 does not cancel at -30."""
    x = jnp.asarray([[-500.0, -30.0, -1.5, -1e-12, 0.0], [1e-12, 0.5, 2.0, 40.0, 300.0]])
    d_y = jnp.arange(1.0, 11.0).reshape(2, 5)
    for name, phi in FEATURE_MAPS.items():
        y, vjp = jax.vjp(phi, x)
        np.testing.assert_allclose(y, numpy_map(name, np.asarray(x)), rtol=1e-13)
        np.testing.assert_allclose(FEATURE_PULLS[name](y, d_y, 1), vjp(d_y)[0], rtol=1e-13)
    assert set(FEATURE_PULLS) == set(FEATURE_MAPS)


# ---- the chunked form


@pytest.mark.parametrize("case", CHUNKED_CASES, ids=str)
def test_chunked_against_the_oracle(case):
    """Output, state and every gradient, the oracle in float32; NaN or infinity in every masked token of the chunked."""
    given, mask = linear_inputs(case), padding_mask(case.mask, case.batch, case.length)

    @jax.jit
    def run_both(poisoned, exact):
        return with_gradients("chunked", spec_of(case), poisoned), with_gradients("dense", spec_of(case), exact)

    actual, expected = run_both(poison(given, mask), in_dtype(given, "float32"))
    forward, inputs, _ = TOLERANCE[case.dtype]
    limits = {"out": forward, "kv": TOLERANCE["float32"][0], "z": TOLERANCE["float32"][0]}
    floor = float(jnp.linalg.norm(given.d_out.astype(jnp.float32))) if case.width == 1 else 0.0
    for name, array in actual.items():
        assert array.dtype == ("float32" if name in ("kv", "z", "d_kv", "d_z") else case.dtype)
        # With one feature the output hardly depends on the query: what little comes through is judged by its cause.
        assert_close(name, array, expected[name], limits.get(name, inputs), floor if name == "query" else 0.0)
        if mask is not None and array.shape[1] == case.length and name in ("out", "query", "key", "value"):
            assert not np.asarray(array, np.float32)[~mask].any(), f"{name} is not 0 where masked"


def poison(given: LinearInputs, mask: np.ndarray | None) -> LinearInputs:
    """`given` with NaN in every masked token of query and value, infinity in those of key and of the cotangent."""
    if mask is None:
        return given
    bad = {"query": np.nan, "key": np.inf, "value": np.nan, "d_out": -np.inf}
    arrays = {name: np.array(getattr(given, name)) for name in bad}
    for name, array in arrays.items():
        array[~mask] = bad[name]
    return given._replace(**arrays)


@pytest.mark.parametrize(
    ("form", "runs", "split"),
    [("dense", "few", 80), *(("chunked", None, split) for split in (1, 64, 77)), ("chunked", "few", 80)],
)
def test_split_anywhere_and_resumed_is_the_whole(form, runs, split, x64):
    """Outputs, last state and all gradients, into the initial state too; a split within a run where there are some."""
    case = LinearCase(130, 5, value_width=3, heads=(4, 2), runs=runs, state=True)
    given = in_dtype(linear_inputs(case), "float64")

    def whole(q, k, v, state):
        return FORMS[form](q, k, v, state, given.rows, LinearSpec())

    def resumed(q, k, v, state):
        outs = []
        for part in (slice(0, split), slice(split, None)):
            rows = None if given.rows is None else given.rows[:, part]
            out, state = FORMS[form](q[:, part], k[:, part], v[:, part], state, rows, LinearSpec())
            outs.append(out)
        return jnp.concatenate(outs, 1), state

    @jax.jit
    def run_both(given):
        results = []
        for call in (whole, resumed):
            out, vjp = jax.vjp(call, *given[:4])
            results.append(jax.tree.leaves((out, vjp((given.d_out, given.d_state)))))
        return results

    for a, b in zip(*run_both(given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_float16_at_3000_tokens_is_finite_and_right(causal, x64):
    """Its sums pass 65504, where the original gives NaN (SEMANTICS C12e)."""
    case = LinearCase(3000, 8, causal=causal, dtype="float16", batch=1)
    given = linear_inputs(case)
    given = given._replace(key=given.key + jnp.float16(10), value=given.value + jnp.float16(10))
    exact = in_dtype(given, "float64")
    run = jax.jit(partial(with_gradients, "chunked", spec_of(case)))
    actual, wide = run(given), run(exact)
    expected = dict(zip(("out", "kv", "z"), one_token_at_a_time(case, exact), strict=True))
    assert expected["kv"].max() > 65504
    for name, array in actual.items():
        assert bool(jnp.isfinite(array).all())
        assert_close(name, array, expected.get(name, wide[name]), TOLERANCE["float16"][0 if name in expected else 1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_relu_sets_to_zero_give_exactly_zero(form, causal):
    """0 / (0 + eps), with finite gradients: for a query of zeros, and for queries that no key has a feature of."""
    given = linear_inputs(LinearCase(70, 8, feature_map="relu"))
    query = given.query.at[:, 5].set(-jnp.abs(given.query[:, 5]))
    key = given.key.at[1].set(-jnp.abs(given.key[1]))
    spec = LinearSpec("relu", causal)
    run = jax.jit(partial(with_gradients, form, spec))
    found = run(given._replace(query=query, key=key))
    assert not found["out"][:, 5].any() and not found["out"][1].any()
    assert not found["query"][:, 5].any() and not found["key"][1].any()
    assert all(bool(jnp.isfinite(array).all()) for array in found.values())


@pytest.mark.parametrize("form", FORMS)
def test_tokens_see_nothing_later_and_nothing_of_other_runs(form):
    """Bit by bit: what a token holds changes no output before it, and none in another run."""
    given = linear_inputs(LinearCase(200, 8, runs="few", heads=(4, 2), state=True))
    run = jax.jit(partial(FORMS[form], spec=LinearSpec()))
    full = jax.jit(partial(FORMS[form], spec=LinearSpec(causal=False)))
    assert given.rows is not None
    changed = [a.at[0, 70].add(3) for a in given[:3]]
    same_run = np.asarray(given.rows[0] == given.rows[0, 70])
    for call, seen in ((run, same_run & (np.arange(200) >= 70)), (full, same_run)):
        before, after = call(*given[:5])[0], call(*changed, *given[3:5])[0]
        differs = np.asarray((before != after).any((2, 3)))
        np.testing.assert_array_equal(differs, np.stack([seen, np.zeros(200, bool)]))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_have_the_dtypes_of_their_arrays(form):
    given = linear_inputs(LinearCase(70, 8, state=True, runs="few"))
    given = given._replace(query=given.query.astype("bfloat16"), value=given.value.astype("float16"))
    found = jax.eval_shape(
        partial(with_gradients, form, LinearSpec()), given._replace(d_out=given.d_out.astype("bfloat16"))
    )
    dtypes = {name: array.dtype.name for name, array in found.items()}
    states = dict.fromkeys(("kv", "z", "d_kv", "d_z"), "float32")
    assert dtypes == {"out": "bfloat16", "query": "bfloat16", "key": "float32", "value": "float16", **states}


@pytest.mark.parametrize("length", [128, 129, 300])
def test_lengths_of_whole_chunks_and_more(length, x64):
    """With `rows`, and not causal without: one compilation of both."""
    given = in_dtype(linear_inputs(LinearCase(length, 4, runs="many", state=True, batch=1)), "float64")

    def run(form):
        causal = with_gradients(form, LinearSpec(), given)
        return causal, with_gradients(form, LinearSpec(causal=False), given._replace(rows=None))

    actual, expected = (jax.jit(partial(run, form))() for form in FORMS)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-11)


# ---- memory


def memory(spec: LinearSpec, length: int) -> tuple[float, float]:
    """Temporary bytes of the forward and of forward and backward, 8 heads of width 64 in float32."""
    x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)

    def forward(q, k, v):
        return linear_chunked(q, k, v, None, None, spec)[0]

    def both(q, k, v, d_out):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, vjp(d_out)

    analyses = (jax.jit(f).lower(*[x] * n).compile().memory_analysis() for f, n in ((forward, 3), (both, 4)))
    sizes = [analysis.temp_size_in_bytes for analysis in analyses if analysis is not None]
    return sizes[0], sizes[1]


@pytest.mark.parametrize("causal", [True, False])
def test_memory_at_8192_tokens(causal):
    forward, both = memory(LinearSpec(causal=causal), 8192)
    assert forward <= 8e6 and both <= 30e6


def test_residuals_besides_the_inputs_are_one_state_a_chunk():
    q = jax.ShapeDtypeStruct((1, 2600, 8, 16), jnp.bfloat16)

    def residuals(q, k, v):
        return jax.vjp(lambda q, k, v: linear_chunked(q, k, v, None, None, LinearSpec())[0], q, k, v)[1]

    saved = jax.tree.leaves(jax.eval_shape(residuals, q, q, q))
    extra = sum(a.size * a.dtype.itemsize for a in saved if a.shape != q.shape)
    chunks = 2600 // chunk_length(q, q) + 1
    assert extra <= chunks * 8 * 16 * 17 * 4


def test_bfloat16_takes_no_float32_array_of_the_whole_length():
    """XLA on CPUs would turn whole arrays to float32 and back for every chunk: time quadratic in the length."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.bfloat16)

    def both(q, k, v, d_out):
        out, vjp = jax.vjp(lambda q, k, v: linear_chunked(q, k, v, None, None, LinearSpec())[0], q, k, v)
        return out, vjp(d_out)

    text = jax.jit(both).lower(x, x, x, x).compile().as_text()
    assert text is not None and "f32[1,1024," not in text
