"""The four modules of the softmax family, their linen twins and the factory; the original's layers through them."""

import inspect
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import nnx

import evo_jax
import evo_jax.linen
from evo_jax import CUDA

B, L, E, N, K = 2, 20, 32, 4, 2
D = E // N
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, E)), jnp.float32)
MASK = np.arange(L) < np.array([[20], [13]])
ROTARY = evo_jax.rotary_embedding(jnp.arange(L), D)

KINDS = {  # name of the module: (its options, the function, the function's options)
    "FlashAttention": ({}, evo_jax.flash_attention, {}),
    "SlidingWindowAttention": ({"window_size": 5}, evo_jax.sliding_window_attention, {"window_size": 5}),
    "SparseAttention": (
        {"block_size": 4, "num_random_blocks": 1, "seed": 3},
        evo_jax.sparse_attention,
        {"block_size": 4, "num_global_tokens": 1, "num_random_blocks": 1, "seed": 3},
    ),
    "MultiScaleAttention": (
        {"local_heads": 3, "window_sizes": (3, 6)},
        evo_jax.multiscale_attention,
        {"local_heads": 3, "window_sizes": (3, 6)},
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind, **options) -> Any:
    return getattr(evo_jax, kind)(E, N, num_kv_heads=K, rngs=nnx.Rngs(1), **KINDS[kind][0], **options)


def turned(x, tables):
    """x (B, L, heads, D): every pair (i, i + D / 2) is a complex number, turned by its angle."""
    cos, sin = (np.asarray(a)[:, None, : D // 2] for a in tables)
    z = (np.asarray(x)[..., : D // 2] + 1j * np.asarray(x)[..., D // 2 :]) * (cos + 1j * sin)
    return jnp.asarray(np.concatenate([z.real, z.imag], axis=-1), jnp.float32)


@every_kind
def test_the_module_is_the_function_between_its_projections(kind):
    layer = layer_of(kind, scale=0.4, logits_soft_cap=3.0, sinks=True, dropout_rate=0.2)
    layer.sinks[...] = jnp.array([0.0, 1.0, -1.0, 2.0])
    q, k, v = ((X @ p.kernel[...]).reshape(B, L, -1, D) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert q.shape[2] == N and k.shape[2] == v.shape[2] == K
    _, function, options = KINDS[kind]
    inner = function(
        turned(q, ROTARY),
        turned(k, ROTARY),
        v,
        attention_mask=MASK,
        scale=0.4,
        logits_soft_cap=3.0,
        sinks=layer.sinks[...],
        dropout_rate=0.2,
        dropout_seed=7,
        **options,
    )
    out, cache = layer(X, attention_mask=MASK, position_embeddings=ROTARY, dropout_seed=7)
    assert_close("out", out, inner.reshape(B, L, E) @ layer.o_proj.kernel[...], 1e-5)
    assert cache is None and not np.asarray(out)[~MASK].any()
    quiet = layer(X, attention_mask=MASK)[0]
    np.testing.assert_array_equal(quiet, layer(X, attention_mask=MASK)[0])


def test_parameters_are_four_matrices_within_their_bound_and_sinks():
    layer = evo_jax.FlashAttention(64, 4, num_kv_heads=2, head_dim=24, sinks=True, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert not np.asarray(state.pop("sinks")).any()
    shapes = {name: a["kernel"].shape for name, a in state.items()}
    assert shapes == {"q_proj": (64, 96), "k_proj": (64, 48), "v_proj": (64, 48), "o_proj": (96, 64)}
    assert 0.11 < float(jnp.abs(state["q_proj"]["kernel"]).max()) <= 0.125  # 1 / sqrt(64)


@every_kind
def test_masks_of_tokens_come_on_top_and_masks_of_pairs_replace_causality(kind):
    layer = layer_of(kind)
    expected, _ = layer(X, attention_mask=MASK)
    forms = (
        MASK[:, None],
        MASK[:, None, :, None],
        MASK.astype(int),
        MASK[:, None, None],
        MASK[:, None, None].astype(int),
    )
    for form in forms:
        np.testing.assert_array_equal(layer(X, attention_mask=form)[0], expected)
    padding = np.where(MASK, 0, -np.inf).astype(np.float32)[
        :, None, None
    ]  # added to keys: padded queries still see some
    assert_close("additive", layer(X, attention_mask=padding)[0][MASK], expected[MASK], 1e-5)
    both_ways = layer_of(kind, is_causal=False)
    everything = np.ones((1, 1, L, L), bool)
    assert_close("pairs", layer(X, attention_mask=everything)[0], both_ways(X)[0], 1e-6)
    assert_close("float", layer(X, attention_mask=np.zeros((B, N, L, L), np.float32))[0], both_ways(X)[0], 1e-6)
    assert_close("causal", layer(X, attention_mask=np.tril(everything))[0], layer(X)[0], 1e-6)
    assert float(jnp.abs(both_ways(X)[0] - layer(X)[0]).max()) > 1e-3


@every_kind
@pytest.mark.parametrize(
    ("x", "dtype", "param_dtype", "out"),
    [("bfloat16", None, "bfloat16", "bfloat16"), ("float16", None, "float16", "float16"),
     ("float32", "bfloat16", "float32", "bfloat16"), ("bfloat16", None, "float32", "float32")],
)  # fmt: skip
def test_16_bit_layers_work_under_strict_promotion(kind, x, dtype, param_dtype, out):
    layer = layer_of(kind, dtype=dtype, param_dtype=jnp.dtype(param_dtype))
    got, _ = layer(X.astype(x), position_embeddings=ROTARY)
    assert got.dtype == out and bool(jnp.isfinite(got).all())
    wide = layer_of(kind)
    nnx.update(wide, jax.tree.map(lambda a: a.astype(jnp.float32), nnx.state(layer, nnx.Param)))
    assert_close("out", got, wide(X.astype(x).astype(jnp.float32), position_embeddings=ROTARY)[0], 2e-2)


@every_kind
def test_training_under_nnx_jit_and_remat(kind):
    layer = layer_of(kind, sinks=True)

    def loss(layer, x):
        return (
            layer(x, segment_ids=np.where(MASK, 0, -1))[0] * jnp.cos(jnp.arange(E, dtype=jnp.float32))[None, None]
        ).sum()

    value, grads = nnx.jit(nnx.value_and_grad(loss))(layer, X)
    again, remat = nnx.jit(nnx.value_and_grad(nnx.remat(loss)))(layer, X)
    assert_close("loss", again, value, 1e-6)
    assert len(jax.tree.leaves(grads)) == 5
    for actual, expected in zip(jax.tree.leaves(remat), jax.tree.leaves(grads), strict=True):
        assert np.asarray(expected).any()
        assert_close("gradient", actual, expected, 1e-5)


@every_kind
def test_the_linen_twin_gives_the_same_numbers_from_the_same_parameters(kind):
    layer, twin = (
        layer_of(kind, sinks=True),
        getattr(evo_jax.linen, kind)(E, N, num_kv_heads=K, sinks=True, **KINDS[kind][0]),
    )
    variables = twin.init(jax.random.key(0), X)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    actual = twin.apply({"params": params}, X, attention_mask=MASK)
    np.testing.assert_array_equal(actual[0], layer(X, attention_mask=MASK)[0])


@pytest.mark.parametrize(
    ("names", "kind", "defaults"),
    [
        (("flash", "flash_attention"), evo_jax.FlashAttention, {}),
        (("sliding_window",), evo_jax.SlidingWindowAttention, {"window_size": 4096}),
        (("local",), evo_jax.SlidingWindowAttention, {"window_size": 512}),
        (
            ("sparse", "block_sparse"),
            evo_jax.SparseAttention,
            {"block_size": 64, "num_global_tokens": 1, "num_random_blocks": 3},
        ),
        (("multiscale",), evo_jax.MultiScaleAttention, {"local_heads": None, "window_sizes": (256, 512, 1024)}),
    ],
)
def test_the_factory_has_the_names_and_defaults_of_the_original(names, kind, defaults):
    for name in names:
        layer: Any = CUDA.create(attn_type=name, hidden_size=E, num_heads=N, num_kv_heads=K)
        assert type(layer) is kind and layer.num_kv_heads == K
        assert {key: getattr(layer, key) for key in defaults} == defaults
    same = getattr(evo_jax.Triton, names[0])(E, N, num_kv_heads=K, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(X)[0], same(X)[0])
    assert type(CUDA.sliding(E, N, window_size=3)) is evo_jax.SlidingWindowAttention


def test_the_factory_takes_arguments_in_the_order_of_the_original():
    assert CUDA.sliding_window(E, N, 8, K).window_size == CUDA.local(E, N, 8).window_size == 8
    assert CUDA.sparse(E, N, 16, 2, 1).num_random_blocks == 1 and CUDA.linear(E, N, "relu").feature_map == "relu"
    assert CUDA.multiscale(E, N, 1, (4,)).window_sizes == (4,)
    layer: Any = CUDA.create(num_kv_heads=4)
    assert type(layer) is evo_jax.FlashAttention and (layer.hidden_size, layer.num_heads) == (768, 12)


def test_rotary_tables():
    cos, sin = evo_jax.rotary_embedding(jnp.array([[0, 1], [7, 1000]]), 6, theta=100.0)
    angle = 1000 / 100.0 ** (4 / 6)
    assert cos.shape == sin.shape == (2, 2, 6)
    assert abs(float(cos[1, 1, 2]) - np.cos(angle)) < 1e-4 and abs(float(sin[1, 1, 5]) - np.sin(angle)) < 1e-4
    np.testing.assert_array_equal(cos[..., :3], cos[..., 3:])
    layer = layer_of("FlashAttention")
    out, _ = layer(X, position_embeddings=ROTARY)
    moved, _ = layer(X, position_embeddings=evo_jax.rotary_embedding(jnp.arange(100, 100 + L), D))
    assert_close("only differences of positions count", moved, out, 1e-4)
    for form in ((1, L, 1, D), (1, L, D), (B, L, D)):
        tables = [np.broadcast_to(np.asarray(a).reshape(1, L, *(1,) * (len(form) - 3), D), form) for a in ROTARY]
        np.testing.assert_array_equal(layer(X, position_embeddings=tables)[0], out)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: evo_jax.FlashAttention(E, 5, rngs=nnx.Rngs(0)), ValueError, "multiple of num_heads=5"),
        (lambda: evo_jax.FlashAttention(E, N, num_kv_heads=3, rngs=nnx.Rngs(0)), ValueError, "num_kv_heads=3"),
        (lambda: CUDA.flash(E, N, dropout=0.1), TypeError, "FlashAttention takes no 'dropout', but dropout_rate"),
        (lambda: CUDA.linear(E, N, window=3), TypeError, "LinearAttention takes no 'window', but dtype"),
        (lambda: CUDA.local(E, N, window_size=0), ValueError, "window_size=0"),
        (lambda: CUDA.sparse(E, N, block_size=0), ValueError, "block_size=0"),
        (lambda: CUDA.flash(E, N, is_causal="no"), TypeError, "FlashAttention: is_causal='no' must be True or False"),
        (lambda: CUDA.flash(E, N, scale=float("nan")), ValueError, "FlashAttention: scale=nan must be finite"),
        (lambda: CUDA.flash(E, N, logits_soft_cap=0.0), ValueError, "FlashAttention: logits_soft_cap=0.0 must be gr"),
        (lambda: CUDA.flash(E, N, dropout_rate=1.5), ValueError, "FlashAttention: dropout_rate=1.5"),
        (lambda: CUDA.flash(E, N, rngs=3), TypeError, r"FlashAttention: rngs=3 must be an nnx.Rngs"),
        (lambda: CUDA.create(cast(Any, ["flash"])), ValueError, r"attn_type=\['flash'\] must be one of"),
        (lambda: CUDA.flash(E, N, sinks=1), TypeError, "FlashAttention: sinks=1 must be True or False"),
        (lambda: CUDA.multiscale(E, N, local_heads=5), ValueError, "local_heads=5"),
        (lambda: CUDA.multiscale(E, N, window_sizes=(1, 2, 3)), ValueError, "more than the 2 local heads"),
        (lambda: CUDA.create("strided", E, N), ValueError, "attn_type='strided' must be one of 'flash'"),
        (lambda: evo_jax.linen.FlashAttention(E, N, window=3), TypeError, "window"),
        (lambda: layer_of("FlashAttention")(X[0]), ValueError, r"must be \(B, L, 32\)"),
        (lambda: layer_of("FlashAttention")(X, use_cache=True), TypeError, "use_cache"),
        (lambda: layer_of("FlashAttention")(X, position_embeddings=(ROTARY[0][:3], ROTARY[1])), ValueError, "cos"),
        (lambda: layer_of("FlashAttention")(X, attention_mask=np.ones((1, 1, L, L), int)), TypeError, "bool or float"),
        (lambda: layer_of("FlashAttention")(X, attention_mask=np.ones((1, 3, L, L), bool)), ValueError, "broadcast"),
        (lambda: layer_of("FlashAttention")(X, attention_mask=MASK[:, None, None] * 1.0), ValueError, "only 0 and 1"),
        (lambda: layer_of("FlashAttention")(X, attention_mask=np.tri(L)[None, None]), ValueError, "pass a bool mask"),
        (lambda: evo_jax.rotary_embedding(jnp.arange(3), 5), ValueError, "head_dim=5 must be even"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


_FUNCTIONS = {
    "flash": CUDA.flash,
    "sliding_window": CUDA.sliding_window,
    "sparse": CUDA.sparse,
    "multiscale": CUDA.multiscale,
}


def recorded(folder: Path):
    """(record, arrays in float64) of the original's layers, those called without a cache."""
    for record in json.loads((folder / "index.json").read_text())["cases"]:
        if record["op"] in _FUNCTIONS:
            with np.load(folder / record["file"]) as arrays:
                if "past_k" not in arrays:
                    yield record, {name: jnp.asarray(a) for name, a in arrays.items() if a.dtype.kind in "fb"}


@pytest.mark.skipif(find_spec("torch") is not None, reason="tests/test_interop_state_dict.py has these, with gradients")
def test_the_layers_of_the_original_are_reproduced_in_float64(golden_dir, x64):
    """Through the nnx modules; tests/test_golden_attend.py has the gradients, and calls with a cache."""
    cases = list(recorded(golden_dir))
    assert len(cases) == 30
    for record, arrays in cases:
        layer = _FUNCTIONS[record["op"]](**record["constructor"], param_dtype=jnp.float64)
        wide = {k: a.astype(jnp.float64) if a.dtype == jnp.float32 else a for k, a in arrays.items()}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer, name).kernel[...] = wide[f"w.{name}.weight"].T
        options: dict[str, Any] = {"position_embeddings": (wide["cos"], wide["sin"]) if "cos" in wide else None}
        if "mask" in wide:  # (L, L) here is one for all: as two axes it would be one of tokens
            options["attention_mask"] = wide["mask"].reshape((1,) * (4 - wide["mask"].ndim) + wide["mask"].shape)
        out, _ = nnx.jit(layer)(wide["x"], **options)
        assert_close(record["id"], out, arrays["out"], 1e-10)


@pytest.mark.parametrize("name", ["EvoAttention", "LinearAttention", *KINDS])
def test_the_signature_of_a_layer_is_its_constructors(name):
    kind = getattr(evo_jax, name)
    parameters = inspect.signature(kind).parameters
    assert list(parameters)[1] == "num_heads" and "rngs" in parameters and "self" not in parameters
    layer = kind(16, 2, rngs=nnx.Rngs(0))
    assert "num_heads" not in inspect.signature(layer).parameters, "that of an instance is its call's"
