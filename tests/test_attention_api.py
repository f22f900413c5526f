"""The softmax family at the public door: patterns by hand-written loops, options, transforms, refusals."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

import evo_jax
from evo_jax.attention import AttentionOptions, head_windows
from reference.mask import FAR

B, L, N, K, D, V = 2, 40, 4, 2, 8, 6
RNG = np.random.default_rng(0)
Q, KEY, VALUE, COTANGENT = (
    jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for shape in ((B, L, N, D), (B, L, K, D), (B, L, K, V), (B, L, N, V))
)
MASK = (np.arange(L) * np.array([[11], [7]]) + 3) % L < 27
STATIC = ("is_causal", "implementation", "window_size", "local_heads", "window_sizes", "block_size", "scale")
STATIC += ("num_global_tokens", "num_random_blocks", "seed", "logits_soft_cap", "dropout_rate", "return_residuals")
flash, sliding, sparse, multiscale = (
    jax.jit(f, static_argnames=[name for name in STATIC if name in inspect.signature(f).parameters])
    for f in (
        evo_jax.flash_attention,
        evo_jax.sliding_window_attention,
        evo_jax.sparse_attention,
        evo_jax.multiscale_attention,
    )
)


def plain(q, k, v, sees, change=lambda s: s, scale=D**-0.5, sinks=None):
    """(out, lse) in numpy float64, one row after another; `sees(n, i, j)` says which keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for b, i, n in np.ndindex(*q.shape[:3]):
        keys = [j for j in range(k.shape[1]) if sees(n, i, j)]
        if not keys:
            continue
        kv = n // (q.shape[2] // k.shape[2])
        scores = np.array([change(scale * (q[b, i, n] @ k[b, j, kv])) for j in keys])
        total = np.exp(scores).sum() + (0 if sinks is None else np.exp(sinks[n]))
        out[b, i, n], lse[b, i, n] = np.exp(scores) @ v[b, keys, kv] / total, np.log(total)
    return out, lse


def check(actual, expected):
    assert_close("out", actual[0], expected[0], 1e-5)
    seen = np.isfinite(expected[1])
    np.testing.assert_array_equal(np.isfinite(actual[1]), seen)
    assert_close("lse", actual[1][seen], expected[1][seen], 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_and_sliding_window_are_plain_loops(causal):
    options = {"is_causal": causal, "return_residuals": True}
    check(flash(Q, KEY, VALUE, **options), plain(Q, KEY, VALUE, lambda n, i, j: not causal or j <= i))
    for window in (1, 7, 100):
        sees = lambda n, i, j, w=window: abs(i - j) < w and (not causal or j <= i)  # noqa: E731
        check(sliding(Q, KEY, VALUE, window_size=window, **options), plain(Q, KEY, VALUE, sees))


@pytest.mark.parametrize("causal", [True, False])
def test_sparse_attention_without_random_blocks_is_a_plain_loop(causal):
    for size, count in ((8, 1), (1, 2), (5, 0), (4, L)):
        sees = lambda n, i, j, s=size, g=count: (  # noqa: E731
            (abs(i - j) <= s // 2 or j < g or i < g) and (not causal or j <= i)
        )
        options = {"block_size": size, "num_global_tokens": count, "num_random_blocks": 0, "is_causal": causal}
        check(sparse(Q, KEY, VALUE, return_residuals=True, **options), plain(Q, KEY, VALUE, sees))


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("function", [flash, partial(sliding, window_size=3), sparse, multiscale])
def test_no_keys_give_rows_of_zeros(function, implementation):
    options = {"return_residuals": True, "implementation": implementation}
    out, lse = function(Q, KEY[:, :0], VALUE[:, :0], **options)
    assert out.shape == (B, L, N, V) and not out.any() and (lse == -np.inf).all()


def test_signatures_name_every_option_and_its_default():
    parameters = inspect.signature(evo_jax.sparse_attention).parameters
    assert parameters["block_size"].default == 64 and parameters["is_causal"].default is True
    assert set(AttentionOptions.__annotations__) < set(parameters)
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("causal", [True, False])
def test_random_blocks_are_whole_new_blocks_and_follow_the_seed(causal):
    """With values that name their key, and no scores, the output says which keys were seen."""
    options = {"block_size": 4, "num_global_tokens": 1, "is_causal": causal}
    names = jnp.broadcast_to(jnp.eye(L)[None, :, None], (B, L, K, L))
    seen = {}
    for key, count, seed in (("none", 0, 0), ("two", 2, 0), ("again", 2, 0), ("other", 2, 1)):
        out = sparse(0 * Q, KEY, names, num_random_blocks=count, seed=seed, **options)
        seen[key] = np.asarray(out > 0)
    assert (seen["two"] == seen["again"]).all() and (seen["two"] != seen["other"]).any()
    extra = seen["two"] & ~seen["none"]
    assert (seen["none"] <= seen["two"]).all() and not extra[:, :1].any()
    blocks = extra.reshape(B, L // 4, 4, N, L // 4, 4)[:, :, 1:]  # token 0, which is global, sees everything anyway
    assert (blocks == blocks[:, :, :1, :, :, :1]).all(), "all rows of a block of queries see the same whole blocks"
    number = blocks[0, :, 0, :, :, 0].sum(-1)  # (blocks of queries, N)
    candidates = [
        (max(x - 2, 0) if causal else L // 4 - 1 - len({max(x - 1, 1), x, min(x + 1, 9)} - {0})) for x in range(10)
    ]
    assert number.tolist() == [[min(2, c)] * N for c in candidates]
    assert (extra[:, :, 0] == extra[:, :, 1]).all() and (extra[:, :, 0] != extra[:, :, 2]).any()  # by key/value head


def test_heads_of_multiscale_attention_are_sliding_and_flash():
    out = multiscale(Q, KEY, VALUE, local_heads=3, window_sizes=(3, 9))
    for n, window in enumerate((3, 9, 9, 10**6)):
        arrays = Q[:, :, n : n + 1], KEY[:, :, n // 2 : n // 2 + 1], VALUE[:, :, n // 2 : n // 2 + 1]
        assert_close("head", out[:, :, n : n + 1], sliding(*arrays, window_size=window), 1e-6)


@pytest.mark.parametrize(
    ("heads", "local", "windows", "reach"),
    [
        (8, None, (256, 512, 1024), [256, 512, 1024, 1024]),
        (6, 5, (4, 8), [4, 4, 8, 8, 8]),
        (4, None, (256, 512, 1024), [512, 1024]),  # fewer heads than the default windows: the largest of them
        (1, None, (256, 512, 1024), []),
        (4, 0, (256, 512, 1024), []),
        (4, 4, (7,), [7] * 4),
    ],
)
def test_windows_of_heads(heads, local, windows, reach):
    expected = [(w - 1, w - 1) for w in reach] + [(FAR, FAR)] * (heads - len(reach))
    assert head_windows("op", heads, local, windows) == tuple(expected)


def test_queries_are_the_last_tokens_unless_an_offset_says_otherwise():
    tail = Q[:, -7:]
    assert_close("tail", flash(tail, KEY, VALUE), flash(Q, KEY, VALUE)[:, -7:], 1e-6)
    moved = sliding(tail, KEY, VALUE, window_size=5, q_offset=jnp.array([3, 30]))
    each = [sliding(tail, KEY, VALUE, window_size=5, q_offset=n)[b] for b, n in enumerate((3, 30))]
    assert_close("moved", moved, jnp.stack(each), 1e-6)
    check(
        flash(Q, KEY[:, :30], VALUE[:, :30], return_residuals=True),  # the first ten queries see nothing
        plain(Q, KEY[:, :30], VALUE[:, :30], lambda n, i, j: j <= i - 10),
    )


def test_lengths_end_sequences_and_align_the_last_query_with_the_last_key():
    lengths = jnp.array([40, 23])
    out, lse = flash(Q, KEY, VALUE, query_seq_lengths=lengths, key_value_seq_lengths=lengths, return_residuals=True)
    assert_close("whole", out[0], flash(Q, KEY, VALUE)[0], 1e-6)
    assert_close("cut", out[1, :23], flash(Q[1:, :23], KEY[1:, :23], VALUE[1:, :23])[0], 1e-6)
    assert not np.asarray(out[1, 23:]).any() and np.isneginf(lse[1, 23:]).all()
    beyond = flash(Q[:, :5], KEY, VALUE, key_value_seq_lengths=jnp.array([99, -1]))  # cut to 40 and 0
    assert_close("all keys", beyond[0], flash(Q[:1, :5], KEY[:1], VALUE[:1])[0], 1e-6)
    assert not np.asarray(beyond[1]).any()
    step = flash(Q[:, :1], KEY, VALUE, key_value_seq_lengths=lengths)  # one new token each, at the end of a cache
    for b, n in enumerate((40, 23)):
        assert_close("step", step[b], flash(Q[b : b + 1, :1], KEY[b : b + 1, :n], VALUE[b : b + 1, :n])[0], 1e-6)


@pytest.mark.parametrize("call", [flash, sliding, sparse, multiscale])
def test_a_masked_token_does_not_exist_in_any_of_the_four(call):
    """NaN in it reaches nothing, and its rows and gradients are 0; the others see the tokens that are left."""
    options = {sliding: {"window_size": 9}, sparse: {"block_size": 4, "num_random_blocks": 1},
               multiscale: {"window_sizes": (5,), "local_heads": 2}}.get(call, {})  # fmt: skip
    poison = jnp.where(jnp.asarray(MASK)[:, :, None, None], 0.0, jnp.nan)
    out, vjp = jax.vjp(lambda *a: call(*a, attention_mask=MASK, **options), *(x + poison for x in (Q, KEY, VALUE)))
    grads = vjp(COTANGENT + poison)
    assert all(not np.asarray(a)[~MASK].any() for a in (out, *grads))
    pairs = jnp.asarray(MASK)[:, None, :, None] & jnp.asarray(MASK)[:, None, None]
    expected, vjp = jax.vjp(lambda *a: call(*a, mask=pairs, **options), Q, KEY, VALUE)
    assert_close("out", out, expected, 1e-6)
    for actual, wanted in zip(grads, vjp(COTANGENT), strict=True):
        assert_close("gradient", actual, wanted, 1e-5)


def test_masks_of_keys_and_of_pairs_come_on_top_of_causality():
    keys = MASK[:, None, None]
    sees = [
        flash(Q[b : b + 1], KEY[b : b + 1, MASK[b]], VALUE[b : b + 1, MASK[b]], is_causal=False)[0] for b in range(B)
    ]
    assert_close("keys", flash(Q, KEY, VALUE, mask=keys, is_causal=False), jnp.stack(sees), 1e-5)
    pairs = np.tril(np.ones((L, L), bool)) & keys
    assert_close("causal", flash(Q, KEY, VALUE, mask=keys), flash(Q, KEY, VALUE, mask=pairs, is_causal=False), 1e-6)
    tail = flash(Q[:, -5:], KEY, VALUE, attention_mask=MASK)  # the mask of all keys; the queries are the last tokens
    assert_close("tail", tail, flash(Q, KEY, VALUE, attention_mask=MASK)[:, -5:], 1e-6)


def test_segments_are_sequences_of_their_own():
    ids = np.where(np.arange(L) < np.array([[13], [20]]), 5, 2)
    out = flash(Q, KEY, VALUE, segment_ids=ids)
    for b, cut in enumerate((13, 20)):
        for part in (slice(0, cut), slice(cut, L)):
            alone = flash(*(x[b : b + 1, part] for x in (Q, KEY, VALUE)))
            assert_close("segment", out[b, part], alone[0], 1e-6)
    cross = flash(Q[:, :10], KEY, VALUE, segment_ids=(ids[:, :10], ids), is_causal=False)
    assert_close("pair", cross[0], flash(Q[:1, :10], KEY[:1, :13], VALUE[:1, :13], is_causal=False)[0], 1e-6)
    padded = flash(Q, KEY, VALUE, segment_ids=np.where(MASK, 0, -1))
    assert_close("negative", padded, flash(Q, KEY, VALUE, attention_mask=MASK), 1e-6)


def test_scale_soft_cap_bias_and_sinks_in_this_order():
    bias = jnp.asarray(RNG.normal(size=(1, N, L, L)), jnp.float32)
    sinks = jnp.array([-1.0, 0.0, 1.0, 3.0])
    options = {"scale": 0.7, "logits_soft_cap": 1.5, "return_residuals": True}
    capped = lambda s: 1.5 * np.tanh(s / 1.5)  # noqa: E731
    expected = plain(Q, KEY, VALUE, lambda n, i, j: j <= i, capped, 0.7, np.asarray(sinks))
    check(flash(Q, KEY, VALUE, sinks=sinks, **options), expected)
    shifted = flash(Q, KEY, VALUE, bias=bias, **options)[0]
    weights = np.exp(capped(0.7 * np.einsum("btnd,bsnd->bnts", Q, np.repeat(KEY, 2, 2))) + np.asarray(bias))
    weights = np.tril(weights)
    weights /= weights.sum(-1, keepdims=True)
    assert_close("bias", shifted, np.einsum("bnts,bsnv->btnv", weights, np.repeat(VALUE, 2, 2)), 1e-5)


def test_dropout_is_a_function_of_its_seed_and_unbiased():
    call = lambda seed: flash(Q, KEY, VALUE, dropout_rate=0.4, dropout_seed=seed)  # noqa: E731
    first = call(3)
    np.testing.assert_array_equal(first, call(jnp.uint32(3)))
    np.testing.assert_array_equal(flash(Q, KEY, VALUE, dropout_rate=0.4), flash(Q, KEY, VALUE))
    assert float(jnp.abs(first - call(4)).max()) > 0.1
    mean = sum(np.asarray(call(jnp.uint32(seed))) for seed in range(300)) / 300
    assert_close("mean", mean, flash(Q, KEY, VALUE), 0.1)


def test_transforms_and_training():
    def loss(q, k, v, sinks):
        return (evo_jax.sliding_window_attention(q, k, v, window_size=6, sinks=sinks) * COTANGENT[:1, :, :, :V]).sum()

    sinks, arrays = jnp.zeros(N), (Q, KEY, VALUE)
    grads = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays, sinks)
    assert all(np.asarray(g).any() for g in grads)
    remat = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2, 3)))(*arrays, sinks)
    for actual, expected in zip(remat, grads, strict=True):
        assert_close("remat", actual, expected, 1e-6)
    mapped = jax.vmap(lambda q, k, v: flash(q[None], k[None], v[None])[0])(*arrays)
    assert_close("vmap", mapped, flash(*arrays), 1e-6)
    _, steps = jax.lax.scan(lambda c, n: (c, flash(*arrays, q_offset=n[None].repeat(B))), 0, jnp.arange(2))
    assert_close("scan", steps[1], flash(*arrays, q_offset=1), 1e-6)


def test_a_mesh_of_explicit_axes_in_context():
    """The kind jax.make_mesh makes; the arrays are on it, or are not."""
    value_and_grads = jax.jit(jax.value_and_grad(lambda *arrays: (flash(*arrays) * COTANGENT).sum(), (0, 1, 2)))
    expected = value_and_grads(Q, KEY, VALUE)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for arrays in ((Q, KEY, VALUE), jax.device_put((Q, KEY, VALUE), jax.NamedSharding(mesh, jax.P()))):
            jax.tree.map(np.testing.assert_array_equal, value_and_grads(*arrays), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("call", [flash, sliding, sparse, multiscale])
def test_16_bit_arrays_work_in_all_four(call, dtype):
    options = {"window_size": 9} if call is sliding else {}
    arrays = [x.astype(dtype) for x in (Q, KEY, VALUE)]
    out, lse = call(*arrays, return_residuals=True, **options)
    exact = call(*(x.astype(jnp.float32) for x in arrays), **options)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert_close("out", out, exact, {"float16": 1e-3, "bfloat16": 8e-3}[dtype])


def test_float64_is_float64_throughout(x64):
    arrays = [x.astype("float64") for x in (Q, KEY, VALUE)]
    out, lse = evo_jax.flash_attention(*arrays, return_residuals=True)
    expected = plain(Q, KEY, VALUE, lambda n, i, j: j <= i)
    assert out.dtype == lse.dtype == "float64"
    assert_close("out", out, expected[0], 1e-13)
    assert_close("lse", lse, expected[1], 1e-13)
    with pytest.raises(NotImplementedError, match="float64"):
        evo_jax.flash_attention(*arrays, implementation="triton")


def test_a_traced_mask_of_other_values_is_never_silently_wrong():
    bad = MASK.astype(np.float32)
    bad[1, 4] = 0.5
    with pytest.raises(ValueError, match=r"attention_mask holds 0\.5"):
        evo_jax.flash_attention(Q, KEY, VALUE, attention_mask=bad)
    out = np.asarray(flash(Q, KEY, VALUE, attention_mask=bad))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_a_nan_in_a_token_that_is_seen_shows_wherever_it_counts(implementation):
    key = KEY.at[:, 25, 0].set(jnp.nan)
    run = partial(evo_jax.flash_attention, implementation=implementation, block_q=16, block_k=16, return_residuals=True)
    out, vjp = jax.vjp(lambda q: run(q, key, VALUE), Q)
    (grad,) = vjp(out)
    expected = np.zeros((B, L, N), bool)
    expected[:, 25:, :2] = True  # the query heads of key/value head 0
    np.testing.assert_array_equal(np.isnan(out[0]).all(-1), expected)
    np.testing.assert_array_equal(np.isnan(out[1]), expected)
    assert np.isnan(grad).all(-1)[expected].all(), "at least there: earlier queries of the same tile share its products"


def test_explain_names_the_four_and_why():
    def model(q, k, v):
        evo_jax.flash_attention(q, k, v, implementation="reference")
        return evo_jax.multiscale_attention(q, k, v, implementation="interpret")

    report = evo_jax.explain(model, Q, KEY, VALUE)
    assert [(c.op, c.implementation) for c in report] == [
        ("flash_attention", "reference"),
        ("multiscale_attention", "interpret"),
    ]


def test_ids_and_offsets_past_int32_never_wrap_around():
    """Where no error can be raised a segment id gives NaN, and lengths and offsets mean what they say."""
    ids = jnp.where(jnp.arange(L) < 20, 5, jnp.array([[6], [2**31 + 5]], jnp.uint32))
    out = jax.jit(lambda ids: flash(Q, KEY, VALUE, segment_ids=ids))(ids)
    assert np.isnan(out[1]).all()
    assert_close("other sequence", out[0], flash(Q, KEY, VALUE, segment_ids=ids.astype(int))[0], 1e-6)
    for number in (jnp.uint32(2**32 - 1), np.int64(2**32), np.uint64(2**63)):
        far = {name: jnp.full(B, number) for name in ("query_seq_lengths", "key_value_seq_lengths")}
        far = far if isinstance(number, jax.Array) else {name: np.full(B, number) for name in far}
        assert_close("lengths", evo_jax.flash_attention(Q, KEY, VALUE, **far), flash(Q, KEY, VALUE), 1e-6)
    none = evo_jax.flash_attention(Q, KEY, VALUE, key_value_seq_lengths=np.full(B, -(2**32)))
    assert not np.asarray(none).any()
    sliding = partial(evo_jax.sliding_window_attention, Q, KEY, VALUE, window_size=5)
    for offset in (jnp.array(2**31 - 1), np.full(B, 2**32), jnp.array(-(2**31)), np.array(-(2**40))):
        end = 2**29 if (offset > 0).all() else -(2**29)
        moved, beyond = sliding(q_offset=offset), sliding(q_offset=end)
        np.testing.assert_array_equal(moved, beyond)
        assert not np.asarray(moved).any()
    listed = jax.jit(lambda n: evo_jax.flash_attention(Q, KEY, VALUE, key_value_seq_lengths=[n, n + 1]))(jnp.int32(9))
    assert_close("a list of numbers", listed, flash(Q, KEY, VALUE, key_value_seq_lengths=jnp.array([9, 10])), 1e-6)
    every = flash(Q, KEY, VALUE, is_causal=False)
    assert_close("all keys are earlier", flash(Q, KEY, VALUE, q_offset=jnp.array(2**31 - 1)), every, 1e-6)
    np.testing.assert_array_equal(sliding(q_offset=np.int64(3)), sliding(q_offset=3))


@pytest.mark.parametrize("wide", [2**31, 2**32, -(2**32)])
@pytest.mark.parametrize("function", [evo_jax.flash_attention, evo_jax.linear_attention])
def test_known_segment_ids_past_int32_are_refused(function, wide):
    """Numpy's integers have 64 bits, which JAX would cut to 32: 2**32 to 0, the id of the segment before."""
    ids = np.where(np.arange(L) < 20, 0, np.full((B, 1), wide))
    for given in (ids, ids.tolist()):
        with pytest.raises(ValueError, match=f"segment_ids hold {wide} and must be within"):
            function(Q, KEY, VALUE, segment_ids=given)


def test_only_tokens_are_global():
    """Queries before the first key, as lengths and offsets make them, are not among the first G tokens."""
    for how in ("reference", "interpret"):
        options = {"block_size": 2, "num_random_blocks": 0, "is_causal": False, "q_offset": -5, "implementation": how}
        out = np.asarray(sparse(Q, KEY, VALUE, num_global_tokens=3, **options))
        assert not np.asarray(sparse(Q, KEY, VALUE, num_global_tokens=0, **options))[:, :4].any()
        few = np.asarray(flash(Q[:, :4], KEY[:, :3], VALUE[:, :3], is_causal=False))
        assert_close("global keys alone", out[:, :4], few, 1e-5)
        every = np.asarray(flash(Q[:, 5:8], KEY, VALUE, is_causal=False))
        assert_close("global queries", out[:, 5:8], every, 1e-5)


def test_no_heads():
    assert multiscale(Q[:, :, :0], KEY, VALUE).shape == (B, L, 0, V)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 3}, TypeError, "unknown option 'window'; it takes is_causal"),
        ({"is_causal": "no"}, TypeError, "is_causal='no' must be True or False"),
        ({"return_residuals": 1}, TypeError, "return_residuals=1 must be True or False"),
        ({"scale": "big"}, TypeError, "scale='big'"),
        ({"scale": 1e39}, ValueError, r"scale=1e\+39 must be finite, and in the range of float32"),
        ({"logits_soft_cap": -1.0}, ValueError, r"logits_soft_cap=-1\.0"),
        ({"sinks": np.zeros(3, np.float32)}, ValueError, r"sinks\.shape=\(3,\)"),
        ({"bias": np.zeros((L, L), np.int32)}, TypeError, r"bias\.dtype=int32"),
        ({"bias": np.zeros((3, L, L), np.float32)}, ValueError, r"bias\.shape=\(3, 40, 40\) must broadcast"),
        ({"mask": np.zeros((L, L), np.float32)}, TypeError, "must be bool; an additive one is a bias"),
        ({"attention_mask": np.ones((B, L + 1))}, ValueError, r"attention_mask\.shape=\(2, 41\)"),
        ({"segment_ids": np.zeros((B, 3), np.int32)}, ValueError, r"segment_ids\.shape=\(2, 3\)"),
        ({"segment_ids": np.zeros((B, L), np.float32)}, TypeError, r"segment_ids\.dtype=float32"),
        ({"segment_ids": np.full((B, L), 2**31, np.uint32)}, ValueError, "segment_ids hold 2147483648"),
        ({"segment_ids": (np.zeros((B, L), int), None)}, TypeError, r"segment_ids\.dtype=object"),
        ({"bias": np.array(["none"])}, TypeError, "bias must be an array, not array"),
        ({"query_seq_lengths": np.zeros(3, np.int32)}, ValueError, r"query_seq_lengths\.shape=\(3,\)"),
        ({"q_offset": np.zeros(3, np.int32)}, ValueError, r"q_offset\.shape=\(3,\)"),
        ({"q_offset": 2**40}, ValueError, "q_offset=1099511627776 must be within"),
        ({"attention_mask": np.full((B, L), 0.5)}, ValueError, r"pass mask == 0$"),
        ({"dropout_rate": 1.0}, ValueError, r"dropout_rate=1\.0"),
        ({"dropout_rate": 0.5, "dropout_seed": np.zeros(2, np.int32)}, TypeError, "dropout_seed"),
        ({"block_q": 24}, ValueError, "block_q=24 must be a power of two"),
        ({"implementation": "cuda"}, ValueError, "implementation='cuda'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        evo_jax.flash_attention(Q, KEY, VALUE, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: evo_jax.sliding_window_attention(Q, KEY, VALUE, window_size=0), ValueError, "window_size=0"),
        (lambda: evo_jax.sparse_attention(Q, KEY, VALUE, block_size=0), ValueError, "block_size=0"),
        (lambda: evo_jax.sparse_attention(Q, KEY, VALUE, num_global_tokens=-1), ValueError, "num_global_tokens=-1"),
        (lambda: evo_jax.multiscale_attention(Q, KEY, VALUE, local_heads=5), ValueError, "local_heads=5"),
        (lambda: evo_jax.multiscale_attention(Q, KEY, VALUE, window_sizes=(1, 2, 3)), ValueError, "more than the 2"),
        (lambda: evo_jax.multiscale_attention(Q, KEY, VALUE, window_sizes=()), ValueError, "is empty"),
        (
            lambda: multiscale(Q, KEY, VALUE, window_sizes=8),
            TypeError,
            "window_sizes=8 must be a tuple",
        ),
        (lambda: multiscale(Q[:, :, :0], KEY, VALUE, window_sizes=(8,)), ValueError, "more than the 0 local heads"),
        (lambda: evo_jax.flash_attention(Q, KEY[:, :, :1].repeat(3, 2), VALUE), ValueError, "must agree"),
        (lambda: evo_jax.flash_attention(Q, KEY.astype("float16"), VALUE), TypeError, "of one dtype"),
        (lambda: evo_jax.flash_attention(None, KEY, VALUE), TypeError, "query must be an array, not None"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("tokens", [40, 600])
def test_gradients_taken_outside_of_jit_compile_once(tokens, caplog):
    gradient = jax.grad(lambda x: evo_jax.flash_attention(x, x, x).sum())
    x = jnp.ones((1, tokens, 2, 4))
    jax.block_until_ready(gradient(x))
    with jax.log_compiles():
        jax.block_until_ready(gradient(x))
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
