"""The decode kernel and the step of linear attention in Pallas' interpreter: masks, splits, mixed dtypes, dead keys."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_checks import FORWARD, check_attend, compiled
from cases import AttendCase, LinearCase, attend_inputs
from checks import assert_close
from linear_checks import check_linear

from pallas_kernels import decode
from pallas_kernels.attend import attend
from pallas_kernels.attend_fwd import Plan
from pallas_kernels.launch import decode_launch, decode_rows, decode_splits
from reference.dense import AttendInputs, AttendSpec, attend_dense
from reference.mask import FAR, Mask, Pattern, allowed
from reference.online_softmax import SoftmaxState, finish, merge

small = partial(attend, mode="interpret", block_k=16)
PLAN = Plan(AttendSpec(0.25), True, block_k=16)

# Forward and gradients: the backward kernels take up where this forward leaves off.
CASES = (
    AttendCase(1, keys=150, heads=(4, 2), lengths="none", sinks=True, dtype="bfloat16"),
    AttendCase(5, keys=200, width=24, value_width=40, heads=(6, 2), offset="each", soft_cap=2.0, segments="interior"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_equals_oracle(case):
    assert decode.serves(attend_inputs(case)[0], PLAN)
    check_attend(small, case)


def test_decode_under_vmap():
    """With more axes XLA's CPU compiler corrupted memory where the splits are merged, and ended the process."""
    inputs = _cache(3, 5, 700, (2, 1), ("bfloat16", "bfloat16"), width=128)
    queries, run = (
        jnp.stack([inputs.query, inputs.query[::-1]]),
        partial(attend, spec=AttendSpec(0.25), mode="interpret"),
    )
    out = jax.jit(jax.vmap(lambda query: run(inputs._replace(query=query))[0]))(queries)
    for one, query in zip(out, queries, strict=True):
        assert_close("out", one, attend_dense(inputs._replace(query=query), AttendSpec(0.25))[0], 5e-3)


def _cache(
    batch: int, queries: int, keys: int, heads: tuple[int, int], dtypes: Any = ("float32",) * 2, width: int = 16
) -> AttendInputs:
    """Standard normal arrays without a mask; dtypes of queries, and of keys and values."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    sizes = (queries, heads[0]), (keys, heads[1]), (keys, heads[1])
    query, key, value = (draw(batch, n, h, width) for n, h in sizes)
    return AttendInputs(query.astype(dtypes[0]), key.astype(dtypes[1]), value.astype(dtypes[1]), Mask())


def _poisoned(inputs: AttendInputs, live: np.ndarray) -> AttendInputs:
    """NaN in keys and values (B, S, K) that are not live."""
    bad = jnp.asarray(~live)[..., None]
    return inputs._replace(**{n: jnp.where(bad, jnp.nan, getattr(inputs, n)) for n in ("key", "value")})


LENGTHS = np.array([0, 1, 130, 288], np.int32)
PATTERNS = {
    "full": (1, Pattern()),
    "window": (5, Pattern(windows=((150, 0),))),
    "sparse": (3, Pattern(windows=((8, 8),), num_global=3, block_size=16, num_random=2, seed=3)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_ragged_cache(name):
    """Empty, of one token, and full; queries are the last tokens of each. Tiles that are not seen are never read."""
    queries, pattern = PATTERNS[name]
    keys = 288
    mask = Mask(pattern, offset=jnp.asarray(LENGTHS - queries), kv_lengths=jnp.asarray(LENGTHS))
    inputs = _cache(4, queries, keys, (4, 2))._replace(mask=mask)
    shape = (4, 4, queries, keys)
    seen = np.broadcast_to(jax.jit(lambda: allowed(mask, shape, 2))(), shape)
    tiles = seen.reshape(4, 2, 2 * queries, -1, 16).any((2, 4)).repeat(16, -1).swapaxes(1, 2)  # (B, S, K)
    live = tiles & (np.arange(keys) < LENGTHS[:, None])[:, :, None]
    assert decode.serves(inputs, PLAN) and live[3].all() == (name == "full")
    out, lse = jax.jit(partial(small, spec=PLAN.spec))(_poisoned(inputs, live))
    expected, expected_lse = jax.jit(partial(attend_dense, spec=PLAN.spec))(inputs)
    assert_close("out", out, expected, FORWARD)
    alive = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.isfinite(lse), alive)
    assert_close("lse", np.where(alive, lse, 0), np.where(alive, expected_lse, 0), FORWARD)
    assert not np.asarray(out)[~alive].any()


def test_scattered_keys_at_a_known_offset():
    """Tiles of global tokens and random blocks are shared among the programs too; not causal here, with segments."""
    case = AttendCase(
        9, keys=300, windows=((12, 12),), sparse=(2, 8, 2), heads=(4, 2), segments="few", causal=False, offset=150
    )
    inputs, spec, _ = attend_inputs(case)
    assert decode.serves(inputs, PLAN)
    actual, expected = (jax.jit(partial(op, spec=spec))(inputs) for op in (small, attend_dense))
    assert_close("out", actual[0], expected[0], FORWARD)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_mixed_dtypes_are_computed_in_the_wider(dtypes):
    """The result is the query's, each gradient its input's; in a decode and, by `block_q`, in the other forward."""
    inputs = _cache(1, 2, 140, (2, 1), dtypes)
    wide = inputs._replace(**{name: getattr(inputs, name).astype("float32") for name in ("query", "key", "value")})
    cotangents = (jnp.ones((1, 2, 2, 16), dtypes[0]), jnp.ones((1, 2, 2), "float32"))
    expected = compiled(attend_dense, wide, PLAN.spec, (cotangents[0].astype("float32"), cotangents[1]))
    for tile in (None, 16):
        actual = compiled(partial(small, block_q=tile), inputs, PLAN.spec, cotangents)
        for name, of in (("out", 0), ("query", 0), ("key", 1), ("value", 1)):
            assert actual[name].dtype == jnp.dtype(dtypes[of])
            rounding = 1e-2 if "bfloat16" in (dtypes[of], dtypes[0]) else 3e-6
            assert_close(name, actual[name], expected[name], rounding)


def test_what_it_serves():
    def served(queries: int = 1, keys: int = 150, heads: Any = (4, 2), plan: Plan = PLAN, **changes: Any) -> bool:
        mask = Mask(changes.pop("pattern", Pattern()), keep=changes.pop("keep", None))
        shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
        query, key, value = (jax.ShapeDtypeStruct((1, n, h, 16), "float32") for n, h in shapes)
        return decode.serves(AttendInputs(query, key, value, mask, **changes), plan)

    assert served() and served(32) and served(pattern=Pattern(windows=((200, 0),)))
    assert not served(33), "more rows than a tile has"
    assert not served(keys=112), "too short for two splits"
    assert not served(keys=10_000, pattern=Pattern(windows=((60, 0),))), "a window too short for two splits"
    assert not served(pattern=Pattern(windows=((FAR, FAR), (9, 0), (9, 0), (9, 0))))
    assert not served(bias=jnp.zeros((1, 1, 1, 1))) and not served(keep=jnp.ones((1, 1, 1, 150), bool))
    assert not served(plan=replace(PLAN, spec=AttendSpec(1.0, dropout_rate=0.1)))
    assert not served(plan=replace(PLAN, block_q=16)), "the caller wants tiles of queries"


def test_splits_and_launch():
    assert [decode_splits(64, n) for n in (0, 7, 8, 2048)] == [1, 1, 2, 16]
    assert decode_splits(5000, 4096) == 1 and decode_splits(1, 1 << 20) == 1024
    chosen = [decode_launch(80, "bf16", rows, interpret=False) for rows in (1, 17, 64)]
    assert [launch.block_q for launch in chosen] == [16, 32, 64]
    assert [decode_rows(width, p) for width, p in ((256, "bf16"), (128, "tf32"), (129, "tf32x3"))] == [64, 64, 16]


def test_merged_states_are_the_state_of_all_keys():
    scores = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32)
    scores[1], scores[:, 2], scores[0, 3] = -np.inf, -np.inf, -np.inf  # an empty set, a row without keys
    top, values = scores.max(-1), np.arange(7, dtype=np.float32)[:, None] + 1
    weights = np.exp2(scores - np.where(top == -np.inf, 0, top)[..., None])
    states = SoftmaxState(jnp.asarray(top), jnp.asarray(weights.sum(-1)), (jnp.asarray(weights @ values),))
    (out,), lse = finish(merge(states, 0))
    flat = np.exp2(scores.astype(np.float64))
    total = flat.sum((0, 2))
    wanted = np.where(total > 0, (flat @ values)[..., 0].sum(0) / np.where(total > 0, total, 1), 0)
    np.testing.assert_allclose(out[:, 0], wanted, rtol=1e-6)
    np.testing.assert_allclose(lse, np.log2(total, where=total > 0, out=np.full(4, -np.inf)), rtol=1e-6)


STEPS = (
    LinearCase(1, 24, heads=(6, 2), value_width=40, mask="sequence", state=True),
    LinearCase(1, 80, dtype="bfloat16", feature_map="softmax", heads=(4, 4), state=True),
)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_linear_step_equals_oracle(case):
    """A masked token's output is 0 and its state as it was."""
    check_linear(case, "interpret")
