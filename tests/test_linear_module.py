"""LinearAttention, its linen twin and the CUDA factory: projections, rotary, cache, dtypes, the original's cases."""

import itertools
import json
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import linen, nnx

import evo_jax
import evo_jax.linen
from evo_jax import CUDA, LinearState

B, L, E, N, K = 2, 20, 32, 4, 2
D = E // N
X = jax.random.normal(jax.random.key(0), (B, L, E))
MASK = np.arange(L) < np.array([[20], [13]])


def layer_of(**options):
    return evo_jax.LinearAttention(E, N, num_kv_heads=K, rngs=nnx.Rngs(1), **options)


def rotary_tables(length, width, start=0):
    """(cos, sin), (L, D): the usual frequencies, repeated in both halves."""
    angles = np.arange(start, start + length)[:, None] / 10000 ** (np.arange(0, width, 2) / width)
    angles = np.concatenate([angles, angles], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def test_the_module_is_the_function_between_its_projections():
    layer = layer_of(feature_map="relu", is_causal=False, scale=0.5, eps=1e-3)
    q, k, v = ((X @ project.kernel[...]).reshape(B, L, -1, D) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert q.shape[2] == N and k.shape[2] == v.shape[2] == K
    inner = evo_jax.linear_attention(q * 0.5, k, v, feature_map="relu", is_causal=False, eps=1e-3, attention_mask=MASK)
    out, cache = layer(X, attention_mask=MASK)
    assert_close("out", out, inner.reshape(B, L, E) @ layer.o_proj.kernel[...], 1e-5)
    assert cache is None and not np.asarray(out)[~MASK].any()


def test_parameters_are_four_matrices_within_their_bound():
    layer = evo_jax.LinearAttention(64, 4, num_kv_heads=2, head_dim=24, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    shapes = {name: a["kernel"].shape for name, a in state.items()}
    assert shapes == {"q_proj": (64, 96), "k_proj": (64, 48), "v_proj": (64, 48), "o_proj": (96, 64)}
    assert 0.11 < float(jnp.abs(state["q_proj"]["kernel"]).max()) <= 0.125  # 1 / sqrt(64)
    assert layer(jnp.ones((1, 3, 64)))[0].shape == (1, 3, 64)


@pytest.mark.parametrize("splits", [[0], [1], [7, 8, 9], [19], [20]])
def test_prefill_and_steps_are_the_whole(splits):
    layer, tables = layer_of(), rotary_tables(L, D)
    whole, none = layer(X, position_embeddings=tables, attention_mask=MASK)
    cache, parts, bounds = layer.init_cache(B), [], [0, *splits, L]
    for start, end in itertools.pairwise(bounds):
        part, cache = layer(
            X[:, start:end],
            position_embeddings=[a[start:end] for a in tables],
            attention_mask=MASK[:, start:end],
            cache=cache,
        )
        parts.append(part)
    assert none is None and isinstance(cache, LinearState)
    assert_close("out", jnp.concatenate(parts, axis=1), whole, 1e-5)


def test_steps_of_one_token_are_one_trace_and_the_whole():
    layer, traces = layer_of(), []

    @nnx.jit
    def step(layer, x, cache):
        traces.append(x.shape)
        return layer(x, cache=cache)

    cache, parts = layer.init_cache(B), []
    for t in range(L):
        part, cache = step(layer, X[:, t : t + 1], cache)
        parts.append(part)
    assert traces == [(B, 1, E)]
    assert_close("out", jnp.concatenate(parts, axis=1), layer(X)[0], 1e-5)


def test_rotary_turns_queries_and_keys_in_every_form_of_the_tables():
    layer, (cos, sin) = layer_of(), rotary_tables(L, D)
    out, _ = layer(X, position_embeddings=(cos, sin))
    assert float(jnp.abs(out - layer(X)[0]).max()) > 1e-3

    def turned(x):  # every pair (i, i + D / 2) is a complex number, turned by its angle
        z = np.asarray(x)[..., : D // 2] + 1j * np.asarray(x)[..., D // 2 :]
        z = z * (cos + 1j * sin)[:, None, : D // 2]
        return jnp.asarray(np.concatenate([z.real, z.imag], axis=-1), jnp.float32)

    q, k, v = ((X @ p.kernel[...]).reshape(B, L, -1, D) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    inner = evo_jax.linear_attention(turned(q), turned(k), v)
    assert_close("out", out, inner.reshape(B, L, E) @ layer.o_proj.kernel[...], 1e-5)
    for form in ((1, L, 1, D), (1, L, D), (B, L, D), (B, L, 1, D)):
        tables = [np.broadcast_to(a.reshape(1, L, *(1,) * (len(form) - 3), D), form) for a in (cos, sin)]
        np.testing.assert_array_equal(layer(X, position_embeddings=tables)[0], out)


@pytest.mark.parametrize(
    ("x", "dtype", "param_dtype", "out"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", None, "bfloat16", "bfloat16"),
    ],
)
def test_dtype_rules_are_those_of_flax_under_strict_promotion(x, dtype, param_dtype, out):
    layer = layer_of(dtype=dtype, param_dtype=jnp.dtype(param_dtype))
    assert all(a.dtype == param_dtype for a in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    got, cache = jax.eval_shape(lambda x: layer(x, cache=layer.init_cache(B)), X.astype(x))
    assert got.dtype == out and cache is not None and cache.kv.dtype == jnp.float32


def test_a_function_that_widens_has_a_wider_cache():
    layer = layer_of(feature_map=lambda x: jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1))
    cache = layer.init_cache(B, capacity=100)
    assert cache.kv.shape == (B, K, 2 * D, D) and cache.z.shape == (B, K, 2 * D)
    first, cache = layer(X[:, :5], cache=cache)
    rest, _ = layer(X[:, 5:], cache=cache)
    assert_close("out", jnp.concatenate([first, rest], axis=1), layer(X)[0], 1e-5)


def test_segments_and_training_under_nnx_jit_remat_and_scan():
    ids = np.where(np.arange(L) < 8, 0, 1)[None].repeat(B, 0)
    layer = layer_of()
    whole, _ = layer(X, segment_ids=ids)
    assert_close("second", whole[:, 8:], layer(X[:, 8:])[0], 1e-5)

    def loss(layer, x):
        return (layer(x)[0] * jnp.cos(jnp.arange(E, dtype=jnp.float32))[None, None]).sum()

    value, grads = nnx.jit(nnx.value_and_grad(loss))(layer, X)
    again, remat = nnx.jit(nnx.value_and_grad(nnx.remat(loss)))(layer, X)
    assert_close("loss", again, value, 1e-6)
    for actual, expected in zip(jax.tree.leaves(remat), jax.tree.leaves(grads), strict=True):
        assert np.asarray(expected).any()
        assert_close("gradient", actual, expected, 1e-5)


def test_the_linen_twin_gives_the_same_numbers_from_the_same_parameters():
    layer, twin = layer_of(), evo_jax.linen.LinearAttention(E, N, num_kv_heads=K)
    variables = twin.init(jax.random.key(0), X)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    cache = layer.init_cache(B)
    actual = twin.apply({"params": params}, X, attention_mask=MASK, cache=cache)
    expected = layer(X, attention_mask=MASK, cache=cache)
    assert len(jax.tree.leaves(actual)) == 3
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return evo_jax.linen.LinearAttention(E, N, name="mix")(x)[0]

    assert set(Net().init(jax.random.key(0), X)["params"]["mix"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("name", ["linear", "linear_attention"])
def test_the_factory_makes_the_module_reproducibly(name):
    layer = CUDA.create(attn_type=name, hidden_size=E, num_heads=N, feature_map="softmax")
    assert isinstance(layer, evo_jax.LinearAttention) and layer.feature_map == "softmax"
    same = evo_jax.Triton.linear(E, N, feature_map="softmax", rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(X)[0], same(X)[0])
    other = CUDA.linear(E, N, num_kv_heads=K, rngs=nnx.Rngs(7))
    assert other.num_kv_heads == K and float(jnp.abs(other(X)[0] - same(X)[0]).max()) > 1e-3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: evo_jax.LinearAttention(E, 5, rngs=nnx.Rngs(0)), ValueError, "multiple of num_heads=5"),
        (lambda: evo_jax.LinearAttention(E, 4, num_kv_heads=3, rngs=nnx.Rngs(0)), ValueError, "num_kv_heads=3"),
        (lambda: layer_of(feature_map="gelu"), ValueError, "'gelu' must be one of"),
        (lambda: layer_of(dtype="int32"), TypeError, "dtype=int32"),
        (lambda: layer_of()(X[0]), ValueError, r"must be \(B, L, 32\)"),
        (lambda: layer_of()(X, position_embeddings=rotary_tables(L - 1, D)), ValueError, "position_embeddings cos"),
        (lambda: layer_of()(X, position_embeddings=3), ValueError, r"must be a pair \(cos, sin\)"),
        (lambda: layer_of()(X, cache=layer_of().init_cache(B + 1)), ValueError, r"initial_state\.kv\.shape"),
        (lambda: layer_of().init_cache(B, dtype=jnp.int32), TypeError, "dtype=int32"),
        (lambda: layer_of().init_cache(-1), ValueError, "batch_size=-1"),
        (lambda: layer_of(is_causal=False)(X, cache=layer_of().init_cache(B)), ValueError, "is_causal=True"),
        (lambda: evo_jax.linen.LinearAttention(E, 5), ValueError, "multiple of num_heads=5"),
        (lambda: evo_jax.linen.LinearAttention(E, 4, features="elu"), TypeError, "features"),
        (lambda: CUDA.create("flush", E, N), ValueError, "attn_type='flush' must be one of 'flash', .*'linear'"),
        (lambda: CUDA.linear(E, N, window=3), TypeError, "window"),
        (lambda: CUDA.linear(E, N, is_causal=0), TypeError, "LinearAttention: is_causal=0 must be True or False"),
        (lambda: CUDA.linear(E, N, eps=-1.0), ValueError, r"LinearAttention: eps=-1\.0 must be at least 0"),
        (lambda: CUDA.linear(E, N, scale=float("nan")), ValueError, "LinearAttention: scale=nan must be finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def recorded(folder: Path):
    """(record, arrays) of the original's linear layers."""
    for record in json.loads((folder / "index.json").read_text())["cases"]:
        if record["op"] == "linear":
            with np.load(folder / record["file"]) as arrays:
                yield record, {name: a.astype(np.float64) for name, a in arrays.items() if a.dtype.kind == "f"}


@pytest.mark.skipif(find_spec("torch") is not None, reason="tests/test_interop_state_dict.py has these, with gradients")
def test_the_layers_of_the_original_are_reproduced_in_float64(golden_dir, x64):
    """Prefill, decoding token by token, and a given state, through the nnx module."""
    cases = list(recorded(golden_dir))
    assert len(cases) == 8
    for record, arrays in cases:
        options = {name: record["constructor"][name] for name in ("hidden_size", "num_heads", "feature_map")}
        layer = CUDA.linear(**options, param_dtype=jnp.float64)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer, name).kernel[...] = jnp.asarray(arrays[f"w.{name}.weight"].T)
        x, cache, parts = jnp.asarray(arrays["x"]), layer.init_cache(len(arrays["x"]), dtype=jnp.float64), []
        if "state_kv" in arrays:
            cache = LinearState(jnp.asarray(arrays["state_kv"]), jnp.asarray(arrays["state_k"][:, :, 0]))
        first = record["call"].get("decode_prefill", x.shape[1])
        for start, end in [(0, first), *((t, t + 1) for t in range(first, x.shape[1]))]:
            out, cache = layer(x[:, start:end], cache=cache)
            parts.append(out)
        assert_close(record["id"], jnp.concatenate(parts, axis=1), arrays["out"], 1e-10)
