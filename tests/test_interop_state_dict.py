"""state_dicts of the originals in and out of nnx modules: the recorded layers, round trips, prefixes, files, errors."""

import doctest
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import errors, load, names

torch = pytest.importorskip("torch", reason="the newest lane leaves torch out (gigabytes of CUDA)")
import evo_jax  # noqa: E402
from evo_jax.interop.evo import EvoAttention  # noqa: E402
from evo_jax.interop.factory import CUDA  # noqa: E402
from evo_jax.interop.state_dict import (  # noqa: E402
    entries,
    load_torch_state_dict,
    save_torch_state_dict,
    to_torch_state_dict,
)

OPS = ("evo.module", "flash", "sliding_window", "sparse", "linear", "multiscale")
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 32)), jnp.float32)


def layer_of(record: dict, dtype: Any) -> Any:
    if record["op"] == "evo.module":
        return evo_jax.EvoAttention(**record["constructor"], param_dtype=dtype, rngs=nnx.Rngs(1))
    return evo_jax.CUDA.create(record["op"], **record["constructor"], param_dtype=dtype)


def cache_of(layer: Any, record: dict, z: dict[str, Any]) -> Any:
    """The past as the module's own cache; None without."""
    if "state_kv" in z:
        return evo_jax.LinearState(z["state_kv"], z["state_k"][:, :, 0])
    if "decode_prefill" in record["call"]:
        return layer.init_cache(z["x"].shape[0], dtype=jnp.float64)
    if "past_k" not in z:
        return None
    empty = layer.init_cache(z["x"].shape[0], capacity=z["past_k"].shape[1] + z["x"].shape[1])
    slots, count = empty.key.shape[1], z["past_k"].shape[1]
    places = np.arange(max(count - slots, 0), count)
    lengths = jnp.full_like(empty.lengths, count)
    key, value = (
        a.at[:, places % slots].set(z[f"past_{n}"][:, places]) for n, a in (("k", empty.key), ("v", empty.value))
    )
    return empty._replace(key=key, value=value, lengths=lengths)


def run(layer: Any, record: dict, z: dict[str, Any]) -> dict[str, Any]:
    """Output and new cache, under the record's names."""
    mask = z.get("mask")
    if record["op"] == "evo.module":
        return {"out": layer(z["x"], causal=record["call"]["causal"], attention_mask=mask)}
    mask = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    rotary, cache = (z["cos"], z["sin"]) if "cos" in z else None, cache_of(layer, record, z)
    first = record["call"].get("decode_prefill", z["x"].shape[1])
    out, after = layer(z["x"][:, :first], attention_mask=mask, position_embeddings=rotary, cache=cache)
    outs = [out]
    for t in range(first, z["x"].shape[1]):
        out, after = layer(z["x"][:, t : t + 1], cache=after)
        outs.append(out)
    found = {"out": jnp.concatenate(outs, axis=1)}
    if isinstance(after, evo_jax.LinearState):
        return found | {"new_state_kv": after.kv, "new_state_k": after.z[:, :, None]}
    if after is None:
        return found
    total, slots = z["past_k"].shape[1] + z["x"].shape[1], after.key.shape[1]
    places = np.arange(max(total - slots, 0), total) % slots
    return found | {"new_k": after.key[:, places], "new_v": after.value[:, places]}


@pytest.mark.parametrize("name", names(55, *OPS))
def test_golden_in_float64_through_nnx(name, x64):
    record, arrays = load(name)
    z: dict[str, Any] = {n: a.astype("float64") if a.dtype.kind == "f" else a for n, a in arrays.items()}
    weights = {n.removeprefix("w."): a for n, a in z.items() if n.startswith("w.")}
    layer = load_torch_state_dict(layer_of(record, jnp.float64), weights)
    known = {n: z[n] for n in ("cos", "sin", "mask") if n in z}

    @jax.jit
    def both(state, inputs, cotangent):
        def call(state, inputs):
            found = run(nnx.merge(graph, state), record, known | inputs)
            return found["out"], found

        _, vjp, found = jax.vjp(call, state, inputs, has_aux=True)
        return found, vjp(cotangent)

    graph, state = nnx.split(layer)
    found, (d_state, d_inputs) = both(state, {n: z[n] for n in record["inputs"]}, z["ct"])
    gradients = entries(nnx.merge(graph, d_state))
    found |= {f"grad.w.{n}": a[...].T if transposed else a[...] for n, (a, transposed) in gradients.items()}
    found |= {f"grad.{n}": a for n, a in d_inputs.items()}
    if "mask" in z and record["op"] == "evo.module":
        # The original's masked rows are norm.bias and send their cotangents there; absent tokens have no such rows.
        masked = z["mask"].reshape(*z["ct"].shape[:2], 1) == 0
        found["grad.w.core.norm.bias"] += (z["ct"] * masked).reshape(-1, record["shape"]["D"]).sum(0)
    assert max((error := errors(name, found)).values()) <= 1e-10, error


LAYERS = {
    "EvoAttention": {},
    "EvoAttention out_proj": {"out_proj": True},
    "FlashAttention": {"num_kv_heads": 2, "sinks": True},
    "SlidingWindowAttention": {},
    "SparseAttention": {"head_dim": 12},
    "MultiScaleAttention": {"window_sizes": (3, 4)},
    "LinearAttention": {},
}


def made(name: str, seed: int = 0, **more: Any) -> Any:
    return getattr(evo_jax, name.split()[0])(32, 4, **LAYERS[name], **more, rngs=nnx.Rngs(seed))


def same(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()) and x.dtype == y.dtype, a, b)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_round_trips_are_bitwise(name, dtype):
    first, second = (made(name, seed, param_dtype=jnp.dtype(dtype)) for seed in (0, 1))
    weights = to_torch_state_dict(first)
    assert load_torch_state_dict(second, weights) is second
    assert same(nnx.state(first, nnx.Param), nnx.state(second, nnx.Param))
    again = to_torch_state_dict(second)
    assert again.keys() == weights.keys()
    for key, weight in weights.items():
        assert weight.dtype == getattr(torch, dtype) and weight.is_contiguous() and torch.equal(weight, again[key])


@pytest.mark.parametrize("name", LAYERS)
def test_the_twins_state_dict_is_the_same_by_names_and_shapes(name):
    layer = made(name)
    if name.startswith("Evo"):
        twin: Any = EvoAttention(32, 4, **LAYERS[name])
    else:
        kinds = {"Flash": "flash", "Slidi": "sliding", "Spars": "sparse", "Multi": "multiscale", "Linea": "linear"}
        twin = getattr(CUDA, kinds[name[:5]])(32, 4, **LAYERS[name])
    prefix = "" if name.startswith("Evo") else "attention."
    weights = to_torch_state_dict(layer, prefix)
    assert {key: w.shape for key, w in weights.items()} == {key: w.shape for key, w in twin.state_dict().items()}
    twin.load_state_dict(weights)
    load_torch_state_dict(layer, twin.state_dict())


def test_what_was_given_away_is_not_shared():
    layer = made("FlashAttention")
    weights = to_torch_state_dict(layer)
    before = np.array(layer.q_proj.kernel[...])
    load_torch_state_dict(layer, weights)
    for weight in weights.values():
        weight.zero_()
    np.testing.assert_array_equal(layer.q_proj.kernel[...], before)


@pytest.mark.parametrize("prefix", ["", "attention.", "layers.3.attn.", "layers.3.attn.attention."])
def test_prefixes(prefix):
    first, second = made("FlashAttention"), made("FlashAttention", 1)
    weights = to_torch_state_dict(first, prefix) | {"layers.30.attn.q_proj.weight": torch.ones(2)}
    given = "layers.3.attn." if prefix.startswith("layers") else ""
    if not given:
        del weights["layers.30.attn.q_proj.weight"]
    load_torch_state_dict(second, weights, prefix=given)
    assert same(nnx.state(first, nnx.Param), nnx.state(second, nnx.Param))


def test_names_without_core_numpy_arrays_and_other_dtypes():
    first, second = made("EvoAttention"), made("EvoAttention", 1)
    weights = {key.removeprefix("core."): w.double().numpy() for key, w in to_torch_state_dict(first).items()}
    load_torch_state_dict(second, weights)
    assert same(nnx.state(first, nnx.Param), nnx.state(second, nnx.Param))


def test_safetensors_files(tmp_path):
    first, second = (made("EvoAttention", seed, param_dtype=jnp.bfloat16) for seed in (0, 1))
    for path in (tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")):
        save_torch_state_dict(first, path, prefix="model.")
        load_torch_state_dict(second, path, prefix="model.")
        assert same(nnx.state(first, nnx.Param), nnx.state(second, nnx.Param))
        second = made("EvoAttention", 1, param_dtype=jnp.bfloat16)


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_torch_state_dict(made("EvoAttention"), tmp_path / "a.safetensors")


def test_one_error_names_all_that_is_wrong_and_nothing_is_set():
    layer = made("FlashAttention")
    before = jax.tree.map(jnp.copy, nnx.state(layer, nnx.Param))
    weights = to_torch_state_dict(made("FlashAttention", 1))
    del weights["o_proj.weight"], weights["sinks"]
    weights |= {"q_proj.weight": torch.ones(3), "rotary.inv_freq": torch.ones(4)}
    with pytest.raises(ValueError) as error:
        load_torch_state_dict(layer, weights)
    message = str(error.value)
    assert "missing: o_proj.weight, sinks; unexpected: rotary.inv_freq; " in message
    assert "q_proj.weight is (3,) and must be (32, 32)" in message
    assert same(nnx.state(layer, nnx.Param), before)


@pytest.mark.parametrize(
    ("load_it", "error", "message"),
    [
        (
            lambda w: load_torch_state_dict(made("LinearAttention"), {f"x.{n}": a for n, a in w.items()}),
            ValueError,
            "give prefix=",
        ),
        (lambda w: load_torch_state_dict(evo_jax.CUDA.linear(32, 4, num_kv_heads=2), w), ValueError, "made without"),
        (lambda w: CUDA.linear(32, 4, num_kv_heads=2).load_state_dict(w), RuntimeError, "made without num_kv_heads"),
        (lambda w: load_torch_state_dict(nnx.Linear(32, 32, rngs=nnx.Rngs(0)), w), TypeError, "Linear is not one of"),
        (lambda w: to_torch_state_dict(nnx.Linear(32, 32, rngs=nnx.Rngs(0))), TypeError, "Linear is not one of"),
    ],
)
def test_what_does_not_fit_says_what_does(load_it, error, message):
    with pytest.raises(error, match=message):
        load_it(to_torch_state_dict(made("LinearAttention")))


@pytest.mark.parametrize("module", ["state_dict", "evo", "layers", "factory"])
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(f"evo_jax.interop.{module}"))
    assert result.attempted and not result.failed
