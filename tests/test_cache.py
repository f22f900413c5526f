"""Layers with a cache: any way of cutting a sequence equals the whole, rooms, rings, reordering, streams, storage."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checks import assert_close
from flax import nnx
from golden import load
from hypothesis import given, settings
from hypothesis import strategies as st

import evo_jax
import evo_jax.linen
from evo_jax import cache as caches

B, L, E, N, K, D = 3, 20, 32, 4, 2, 8
CAPACITY = 24
KINDS: dict[str, dict[str, Any]] = {
    "FlashAttention": {"logits_soft_cap": 5.0},
    "SlidingWindowAttention": {"window_size": 5, "sinks": True},
    "SparseAttention": {"block_size": 4, "num_global_tokens": 2, "num_random_blocks": 1, "seed": 3},
    "MultiScaleAttention": {"local_heads": 3, "window_sizes": (3, 6), "sinks": True},
    "LinearAttention": {},
    "EvoAttention": {"out_proj": True},
}
SOFTMAX = [kind for kind in KINDS if kind not in ("LinearAttention", "EvoAttention")]
every_kind = pytest.mark.parametrize("kind", KINDS)
X = np.random.default_rng(0).normal(size=(B, L, E)).astype(np.float32)


@cache
def layer_of(kind: str) -> Any:
    with jax.ensure_compile_time_eval():  # whoever asks first may be tracing
        groups = {} if kind == "EvoAttention" else {"num_kv_heads": K}
        layer = getattr(evo_jax, kind)(E, N, rngs=nnx.Rngs(1), **groups, **KINDS[kind])
        if getattr(layer, "sinks", None) is not None:
            layer.sinks[...] = jnp.array([0.0, 1.0, -1.0, 2.0])
    return layer


def call(kind, x, positions, **options):
    """The layer, turned by positions (B, T) where it takes them."""
    if kind != "EvoAttention":
        options["position_embeddings"] = evo_jax.rotary_embedding(positions, D)
    return layer_of(kind)(x, **options)


@cache
def step_of(kind: str) -> Any:
    """Jitted: (x (B, T, E), positions (B, T), mask or None, cache) -> (output, cache)."""
    return jax.jit(lambda x, positions, mask, cache: call(kind, x, positions, attention_mask=mask, cache=cache))


@cache
def whole(kind: str) -> np.ndarray:
    out = jax.jit(lambda x, positions: call(kind, x, positions))(
        X, np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    )
    return np.asarray(out[0] if isinstance(out, tuple) else out)


@every_kind
def test_linen_layers_decode_with_a_cache(kind):
    """With the parameters of the nnx layer, two chunks through the twin equal the whole."""
    groups = {} if kind == "EvoAttention" else {"num_kv_heads": K}
    twin = getattr(evo_jax.linen, kind)(E, N, **groups, **KINDS[kind])
    params = nnx.to_pure_dict(nnx.state(layer_of(kind), nnx.Param))
    cache, outs = evo_jax.linen.init_cache(twin, B, L), []
    assert jax.tree.structure(cache) == jax.tree.structure(layer_of(kind).init_cache(B, L))
    for part in (slice(0, 13), slice(13, L)):
        turned = {} if kind == "EvoAttention" else {
            "position_embeddings": evo_jax.rotary_embedding(jnp.arange(L)[part], D)
        }  # fmt: skip
        out, cache = twin.apply({"params": params}, X[:, part], cache=cache, **turned)
        outs.append(np.asarray(out))
    assert_close("out", np.concatenate(outs, 1), whole(kind), 2e-6)


def test_linen_caches_are_those_of_its_own_layers():
    with pytest.raises(TypeError, match=r"init_cache: layer is a FlashAttention and must be one of evo_jax\.linen"):
        evo_jax.linen.init_cache(layer_of("FlashAttention"), B)
    with pytest.raises(ValueError, match="init_cache needs capacity"):
        evo_jax.linen.init_cache(evo_jax.linen.FlashAttention(E, N), B)


@every_kind
@pytest.mark.parametrize("sizes", [[7, *[1] * 13], [1] * 20, [4, 4, 4, 1, 7], [7, 7, 4, 1, 1]], ids=str)
def test_a_sequence_cut_anywhere_equals_the_whole(kind, sizes):
    """Chunks shorter and longer than the windows, up to the last slot of the cache and around its ring."""
    cache, start, outs = layer_of(kind).init_cache(B, L), 0, []
    for size in sizes:
        positions = np.broadcast_to(np.arange(start, start + size, dtype=np.int32), (B, size))
        out, cache = step_of(kind)(X[:, start : start + size], positions, None, cache)
        outs, start = [*outs, np.asarray(out)], start + size
    assert_close("out", np.concatenate(outs, 1), whole(kind), 2e-6)


@every_kind
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_ragged_sequences_grow_by_any_numbers_of_tokens(kind, data):
    """Each of a batch by its own number, at any places of a chunk; what is masked may hold NaN."""
    cache, done = layer_of(kind).init_cache(B, CAPACITY), np.zeros(B, np.int32)
    for _ in range(data.draw(st.integers(1, 8))):
        size = data.draw(st.sampled_from((1, 7)))
        bits = data.draw(st.lists(st.booleans(), min_size=B * size, max_size=B * size))
        mask = np.array(bits).reshape(B, size)
        mask &= done[:, None] + np.cumsum(mask, 1) <= L
        number = done[:, None] + np.maximum(np.cumsum(mask, 1) - 1, 0)
        x = np.where(mask[..., None], np.take_along_axis(X, np.minimum(number, L - 1)[..., None], 1), np.nan)
        out, cache = step_of(kind)(x, number.astype(np.int32), mask, cache)
        for b in range(B):
            assert_close("out", np.asarray(out)[b, mask[b]], whole(kind)[b, done[b] : done[b] + mask[b].sum()], 2e-6)
        assert not np.asarray(out)[~mask].any()
        done = done + mask.sum(1, dtype=np.int32)


def rows(batch: int, length: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, E)), jnp.float32)


@pytest.mark.parametrize("kind", ["SparseAttention", "MultiScaleAttention"])
def test_a_full_cache_refuses_or_gives_nan_and_keeps_what_it_has(kind):
    layer, step = layer_of(kind), jax.jit(lambda x, mask, cache: layer_of(kind)(x, attention_mask=mask, cache=cache))
    full, cache = layer.init_cache(2, 7), rows(2, 5)
    _, cache = step(rows(2, 5), None, full)
    mask = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    with pytest.raises(ValueError, match="9, and the cache's capacity is 7"):
        layer(rows(2, 5, 2), attention_mask=mask, cache=cache)
    out, after = step(rows(2, 5, 2), mask, cache)
    lost = np.array([[0, 0, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
    assert np.isnan(np.asarray(out)[lost]).all() and np.isfinite(np.asarray(out)[~lost]).all()
    again, still = step(rows(2, 5, 3), mask, after)
    assert np.isnan(np.asarray(again)[1, :4]).all() and np.isfinite(np.asarray(again)[0]).all()
    for before, now in zip(_all_tokens(cache), _all_tokens(after), strict=True):
        np.testing.assert_array_equal(now.key[:, :5], before.key[:, :5])
        np.testing.assert_array_equal(now.lengths, [6, 7])
    for before, now in zip(_all_tokens(after), _all_tokens(still), strict=True):
        np.testing.assert_array_equal(now.value[1], before.value[1])
    fitting = mask & ~lost
    kept, expected = step(rows(2, 5, 2), fitting, cache)
    assert_close("rows that fit", np.asarray(out)[fitting], np.asarray(kept)[fitting], 1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, expected)  # the rings of other heads too


def _all_tokens(cache: Any) -> list[Any]:
    groups = cache.groups if isinstance(cache, evo_jax.MultiScaleCache) else (cache,)
    return [group for group in groups if isinstance(group, evo_jax.KVCache)]


def test_rings_and_states_do_not_grow():
    """50,000 tokens by running, a million by counting."""
    window = evo_jax.SlidingWindowAttention(8, 1, window_size=16, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 50_000, 8)), jnp.float32)
    out, cache = window.stream(x, 1000)
    assert cache.key.shape == (1, 16, 1, 8) and int(cache.lengths[0]) == 50_000
    assert_close("last rows", out[:, -20:], window(x[:, -40:])[0][:, -20:], 1e-6)

    def size_after(layer: Any, length: int) -> int:
        x = jax.ShapeDtypeStruct((1, length, E), jnp.float32)
        caches = jax.eval_shape(lambda x: layer.stream(x, 1000)[1], x)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(caches))

    for kind in ("SlidingWindowAttention", "LinearAttention", "EvoAttention"):
        start = layer_of(kind).init_cache(1, 10)
        assert size_after(layer_of(kind), 1_000_000) == sum(a.nbytes for a in jax.tree.leaves(start)) <= 5_000
    ring = layer_of("SlidingWindowAttention").init_cache(1)
    assert (
        ring.key.shape == (1, 5, K, D) and layer_of("MultiScaleAttention").init_cache(1, 9).groups[0].key.shape[1] == 3
    )


@every_kind
def test_streams_equal_one_call(kind):
    mask = np.arange(L) < np.array([[20], [13], [1]])
    tables = {} if kind == "EvoAttention" else {"position_embeddings": evo_jax.rotary_embedding(jnp.arange(L), D)}

    def both(x):
        out = layer_of(kind)(x, attention_mask=mask, **tables)
        out = out[0] if isinstance(out, tuple) else out
        return out, layer_of(kind).stream(x, 7, attention_mask=mask, **tables)[0]

    def losses(x):
        weights = np.cos(np.arange(L * E, dtype=np.float32)).reshape(L, E)
        return jnp.stack([(out * weights[None]).sum() for out in both(x)])

    expected, actual = jax.jit(both)(X)
    assert_close("out", actual, expected, 2e-6)
    if kind not in ("SlidingWindowAttention", "LinearAttention", "EvoAttention"):
        return  # one of each kind of cache is enough, and the golden cases have gradients into a KVCache
    expected, actual = jax.jit(jax.jacrev(losses))(X)
    assert_close("gradient", actual, expected, 2e-5)


@every_kind
def test_sequences_are_reordered_and_stored(kind, tmp_path):
    first, rest = X[:, :7], X[:, 7:11]
    positions = lambda a, b: np.broadcast_to(np.arange(a, b, dtype=np.int32), (B, b - a))  # noqa: E731
    _, cache = step_of(kind)(first, positions(0, 7), None, layer_of(kind).init_cache(B, L))
    order = np.array([2, 0, 2])
    out, _ = step_of(kind)(rest[order], positions(7, 11), None, cache.take(order))
    np.testing.assert_array_equal(out, step_of(kind)(rest, positions(7, 11), None, cache)[0][order])
    with ocp.StandardCheckpointer() as store:
        store.save(tmp_path / "cache", cache)
        store.wait_until_finished()
        empty = layer_of(kind).init_cache(B, L)
        back = store.restore(tmp_path / "cache", jax.tree.map(ocp.utils.to_shape_dtype_struct, empty))
    assert type(back) is type(cache)
    jax.tree.map(np.testing.assert_array_equal, back, cache)


@every_kind
def test_steps_are_traced_once_and_run_in_place(kind):
    traces = []

    @partial(jax.jit, donate_argnums=1)
    def step(x, cache):
        traces.append(1)
        return layer_of(kind)(x, cache=cache)

    cache = layer_of(kind).init_cache(B, CAPACITY)
    for n in range(5):
        _, cache = step(X[:, n : n + 1], cache)
    assert len(traces) == 1


@pytest.mark.parametrize("kind", SOFTMAX)
def test_a_cache_of_lower_precision(kind):
    layer, cache = layer_of(kind), layer_of(kind).init_cache(B, L, dtype=jnp.bfloat16)
    outs = []
    for start, end in ((0, 7), (7, 8), (8, 15)):
        out, cache = step_of(kind)(
            X[:, start:end], np.broadcast_to(np.arange(start, end, dtype=np.int32), (B, end - start)), None, cache
        )
        outs.append(np.asarray(out))
    assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    assert outs[0].dtype == np.float32 and layer.init_cache(1, 2).take(np.array([0])) is not None
    error = np.linalg.norm(np.concatenate(outs, 1) - whole(kind)[:, :15]) / np.linalg.norm(whole(kind)[:, :15])
    assert 1e-5 < error < 5e-3


@pytest.mark.parametrize(
    "name",
    [
        "027_flash_past_with_explicit_mask",
        "034_sliding_past_fits",
        "035_sliding_past_1tok_truncated",
        "036_sliding_past_1tok_W1",
    ],
)
def test_the_original_with_a_past(name, x64):
    """Output, cache and every gradient, also into the past."""
    record, arrays = load(name)
    wide = {k: a.astype(np.float64) if a.dtype.kind == "f" else a for k, a in arrays.items()}
    make = evo_jax.CUDA.flash if record["op"] == "flash" else evo_jax.CUDA.sliding_window
    layer = make(**record["constructor"], param_dtype=jnp.float64)
    for p in "qkvo":
        getattr(layer, f"{p}_proj").kernel[...] = wide[f"w.{p}_proj.weight"].T
    graph, state = nnx.split(layer)
    past, new = wide["past_k"].shape[1], wide["x"].shape[1]
    options: dict[str, Any] = {"position_embeddings": (wide["cos"], wide["sin"]) if "cos" in wide else None}
    if "mask" in wide:
        options["attention_mask"] = wide["mask"].reshape((1,) * (4 - wide["mask"].ndim) + wide["mask"].shape)

    def run(state, x, past_k, past_v):
        empty = layer.init_cache(x.shape[0], past + new)
        count = jnp.full(x.shape[:1], past, jnp.int32)
        append = caches.turn if record["op"] == "sliding_window" else caches.append
        out, cache = nnx.merge(graph, state)(x, cache=append(empty, past_k, past_v, count), **options)
        kept = caches.unrolled(cache)[:2] if record["op"] == "sliding_window" else (cache.key, cache.value)
        return out, kept

    out, vjp, kept = jax.vjp(run, state, wide["x"], wide["past_k"], wide["past_v"], has_aux=True)
    d_state, d_x, d_k, d_v = vjp(wide["ct"])
    d_state = nnx.to_pure_dict(d_state)
    found = {"out": out, "grad.x": d_x, "grad.past_k": d_k, "grad.past_v": d_v}
    found |= {f"grad.w.{p}_proj.weight": d_state[f"{p}_proj"]["kernel"].T for p in "qkvo"}
    found |= {name: a[:, -wide[name].shape[1] :] for name, a in zip(("new_k", "new_v"), kept, strict=True)}
    for key, actual in found.items():
        assert_close(key, actual, wide[key], 1e-9)


@pytest.mark.parametrize("kind", ["FlashAttention", "SparseAttention"])
def test_masks_of_keys_come_on_top_of_causality_with_a_cache_too(kind):
    layer, x = layer_of(kind), jnp.asarray(X)
    seen = np.arange(L) < np.array([[20], [13], [3]])
    expected = np.asarray(layer(x, attention_mask=seen[:, None, None])[0])
    _, first = layer(x[:, :7], cache=layer.init_cache(B, CAPACITY), attention_mask=np.ones((1, 1, 1, 7), int))
    for mask in (seen, seen.astype(int), np.where(seen, 0, -np.inf).astype(np.float32)):
        out, cache = layer(x[:, 7:], cache=first, attention_mask=mask[:, None, None])
        assert_close("keys", np.asarray(out)[seen[:, 7:]], expected[:, 7:][seen[:, 7:]], 2e-6)
        assert cache.lengths.tolist() == [L] * B
    pairs = np.tril(np.ones((1, 1, L, L), bool))[:, :, 7:]
    assert_close("pairs", layer_of("FlashAttention")(x[:, 7:], cache=first, attention_mask=pairs)[0],
                 layer_of("FlashAttention")(x[:, 7:], cache=first)[0], 2e-6)  # fmt: skip
    column = np.zeros((1, N, 7, 1), np.float32)  # for all keys alike; it takes the place of causality
    expected = layer(x[:, :7], attention_mask=column)[0]
    assert_close("column", layer(x[:, :7], cache=layer.init_cache(B, 7), attention_mask=column)[0], expected, 2e-6)
    alone, cache = layer(x[:, :1], cache=layer.init_cache(B, 3), attention_mask=np.zeros((B, 1, 1, 1), np.float32))
    assert cache.lengths.tolist() == [1] * B
    assert_close("first", alone, layer(x[:, :1])[0], 1e-6)
    with pytest.raises(ValueError, match="holds only 0 and 1"):
        layer(x[:, 7:], cache=first, attention_mask=seen[:, None, None].astype(np.float32))


@pytest.mark.parametrize("kind", ["FlashAttention", "SlidingWindowAttention", "LinearAttention", "EvoAttention"])
def test_a_traced_mask_that_is_none_spoils_the_cache_too(kind):
    step = jax.jit(lambda x, mask, cache: layer_of(kind)(x, attention_mask=mask, cache=cache))
    mask = np.array([[1, 2, 1], [1, 1, 0], [1, 1, 1]], np.float32)
    out, cache = step(X[:, :3], mask, layer_of(kind).init_cache(B, L))
    first = np.asarray(out)[:, 1:]  # EvoAttention's running count is spoilt from the bad token on
    for result in (first, step(X[:, 3:6], np.ones_like(mask), cache)[0]):
        assert np.isnan(np.asarray(result)[0]).all() and np.isfinite(np.asarray(result)[1:]).all()


@every_kind
def test_only_sequences_that_there_are_are_taken(kind):
    _, cache = layer_of(kind)(jnp.asarray(X), cache=layer_of(kind).init_cache(B, CAPACITY))
    for indices, error in (([0, B], ValueError), ([[0]], ValueError), ([True, False], TypeError)):
        with pytest.raises(error, match="take: indices"):
            cache.take(np.array(indices))
    run = jax.jit(lambda indices, cache: layer_of(kind)(X[:2, :1], cache=cache.take(indices))[0])
    out = np.asarray(run(np.array([1, B]), cache))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize("kind", ["LinearAttention", "EvoAttention", "SlidingWindowAttention"])
def test_float64_streams_and_keeps_the_cache_of_any_dtype(kind, x64):
    options = {key: value for key, value in KINDS[kind].items() if key != "sinks"}
    layer = getattr(evo_jax, kind)(E, N, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    x = jnp.asarray(X, jnp.float64)
    out = layer(x)
    actual, cache = layer.stream(x, 7)
    assert_close("out", actual, out if kind == "EvoAttention" else out[0], 1e-13)
    narrow = layer.stream(x, 7, cache=layer.init_cache(B, dtype=jnp.float32))[1]
    assert {a.dtype.name for a in jax.tree.leaves((cache, narrow))} == {"float64", "float32", "int32"} - (
        {"int32"} if kind == "LinearAttention" else set()
    )


def test_what_a_cache_cannot_serve_is_an_error():
    x, flash, window = jnp.asarray(X), layer_of("FlashAttention"), layer_of("SlidingWindowAttention")
    cache = flash.init_cache(B, L)
    with pytest.raises(ValueError, match="needs capacity"):
        flash.init_cache(B)
    with pytest.raises(TypeError, match="int32"):
        flash.init_cache(B, L, dtype=jnp.int32)
    with pytest.raises(TypeError, match="must be what init_cache gives, a RingCache"):
        window(x, cache=cache)
    with pytest.raises(ValueError, match=r"cache.key.shape"):
        flash(x[:1], cache=cache)
    with pytest.raises(ValueError, match="segment_ids cannot"):
        flash(x, cache=cache, segment_ids=np.zeros((B, L), np.int32))
    both_ways = evo_jax.FlashAttention(E, N, is_causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="is_causal=True"):
        both_ways(x, cache=both_ways.init_cache(B, L))
    with pytest.raises(ValueError, match="cache of windows"):
        window(x, cache=window.init_cache(B), attention_mask=np.ones((1, 1, L, L), bool))
    with pytest.raises(ValueError, match="more keys than the cache's 20"):
        flash(x, cache=cache, attention_mask=np.ones((1, 1, L, L + 1), bool))
    short = evo_jax.rotary_embedding(jnp.arange(6), D)
    for error, match, options in (
        (ValueError, "chunk_size=0", {"chunk_size": 0}),
        (ValueError, r"not those of all 20 tokens", {"position_embeddings": short}),
        (ValueError, r"a pair \(cos, sin\)", {"position_embeddings": short[0]}),
        (ValueError, "capacity is 8", {"cache": flash.init_cache(B, 8)}),
        (ValueError, "attention_mask holds 2", {"attention_mask": np.full((B, L), 2)}),
    ):
        with pytest.raises(error, match=match):
            flash.stream(x, **{"chunk_size": 4, **options})
    with pytest.raises(TypeError, match="takes no position_embeddings"):
        layer_of("EvoAttention").stream(x, 4, position_embeddings=short)
