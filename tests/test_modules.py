"""The Flax modules: parameters, dtypes, transforms, the linen twin, the original's recorded cases, and the doctests."""

import doctest
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import linen, nnx

import evo_jax
import evo_jax.linen

B, L, E, H = 2, 20, 12, 3
X = jax.random.normal(jax.random.key(0), (B, L, E))
MASK = np.arange(L) < np.array([[20], [13]])


def layer_of(**options):
    return evo_jax.EvoAttention(E, H, rngs=nnx.Rngs(1), **options)


def test_the_module_is_the_function_on_its_heads():
    layer = layer_of()
    v = X.reshape(B, L, H, E // H).swapaxes(1, 2)
    expected = evo_jax.evo_attention(v, layer.params, causal=False, attention_mask=MASK)
    out = layer(X, causal=False, attention_mask=MASK)
    np.testing.assert_array_equal(out, expected.swapaxes(1, 2).reshape(X.shape))
    assert not np.asarray(out)[~MASK].any()


def test_parameters_exist_before_the_first_call_and_are_reproducible():
    state = nnx.to_pure_dict(nnx.state(layer_of(), nnx.Param))
    assert sorted(state) == sorted(evo_jax.EvoParams._fields)
    assert all(a.shape == ((4, 4) if name.endswith("kernel") else (4,)) for name, a in state.items())
    again = nnx.to_pure_dict(nnx.state(layer_of(), nnx.Param))
    assert jax.tree.all(jax.tree.map(np.array_equal, state, again))
    assert "out_proj" in nnx.to_pure_dict(nnx.state(layer_of(out_proj=True), nnx.Param))


def test_the_output_projection_is_real_and_leaves_masked_rows_zero():
    layer = layer_of(out_proj=True)
    assert layer.out_proj is not None and layer.out_proj.bias is not None
    layer.out_proj.bias[...] = jnp.ones(E)
    plain = layer_of()
    inner = plain(X, attention_mask=MASK)  # the same rngs draw the same core
    expected = (inner @ layer.out_proj.kernel[...] + 1) * jnp.asarray(MASK, jnp.float32)[..., None]
    assert_close("out", layer(X, attention_mask=MASK), expected, 1e-5)
    multiplied = layer(X, attention_mask=MASK, mask_semantics="multiply")
    assert np.asarray(multiplied)[~MASK].any(axis=-1).all()


@pytest.mark.parametrize("out_proj", [False, True])
@pytest.mark.parametrize(
    ("x", "dtype", "param_dtype", "out"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("float16", None, "bfloat16", "float32"),
    ],
)
def test_dtype_rules_are_those_of_flax_under_strict_promotion(x, dtype, param_dtype, out, out_proj):
    layer = layer_of(dtype=dtype, param_dtype=jnp.dtype(param_dtype), out_proj=out_proj)
    assert all(a.dtype == param_dtype for a in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert jax.eval_shape(layer, X.astype(x)).dtype == out


def test_a_training_step_under_nnx_jit_is_that_of_the_functional_form():
    def loss(layer, x):
        return (layer(x, attention_mask=MASK) * jnp.cos(jnp.arange(E, dtype=jnp.float32))[None, None]).sum()

    layer = layer_of(out_proj=True)
    value, grads = nnx.jit(nnx.value_and_grad(loss))(layer, X)
    graph, state = nnx.split(layer)
    expected = jax.jit(jax.value_and_grad(lambda state, x: loss(nnx.merge(graph, state), x)))(state, X)
    assert_close("loss", value, expected[0], 1e-6)
    leaves, expected_leaves = jax.tree.leaves(grads), jax.tree.leaves(expected[1])
    assert len(leaves) == 12
    for ours, theirs in zip(leaves, expected_leaves, strict=True):
        assert_close("gradient", ours, theirs, 1e-5)
        assert np.asarray(ours).any()


def test_scan_vmap_and_remat_over_layers_are_the_layers_in_turn():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return evo_jax.EvoAttention(E, H, rngs=rngs)

    layers = stack(nnx.Rngs(5))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def scanned(layer, x):
        return layer(x)

    graph, state = nnx.split(layers)
    x = X
    for i in range(3):
        x = nnx.merge(graph, jax.tree.map(lambda a: a[i], state))(x)  # noqa: B023 - used at once
    assert_close("out", nnx.jit(scanned)(layers, X), x, 1e-5)


@pytest.mark.parametrize("out_proj", [False, True])
def test_the_linen_twin_gives_the_same_numbers_from_the_same_parameters(out_proj):
    twin = evo_jax.linen.EvoAttention(E, H, out_proj=out_proj)
    layer = layer_of(out_proj=out_proj)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert isinstance(twin, linen.Module)
    drawn = jax.eval_shape(twin.init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)

    def loss(params, x):
        return twin.apply({"params": params}, x, causal=False, attention_mask=MASK)

    np.testing.assert_array_equal(
        jax.jit(loss)(params, X), jax.jit(lambda x: layer(x, causal=False, attention_mask=MASK))(X)
    )


def test_linen_layers_nest_in_linen_modules():
    class Two(linen.Module):
        @linen.compact
        def __call__(self, x):
            return evo_jax.linen.EvoAttention(E, 4)(evo_jax.linen.EvoAttention(E, H, name="first")(x))

    params = jax.eval_shape(Two().init, jax.random.key(0), X)["params"]
    assert params["first"]["q_kernel"].shape == (4, 4)
    assert len(params) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"embed_dim": 10, "num_heads": 3},
            ValueError,
            "embed_dim=10 must equal num_heads \\* head_dim, and num_heads=3",
        ),
        ({"embed_dim": 12, "num_heads": 3, "head_dim": 8}, ValueError, "num_heads=3 with head_dim=8"),
        ({"embed_dim": 12, "num_heads": 0}, ValueError, "embed_dim=12 and num_heads=0 must be at least 1"),
        ({"embed_dim": 12.0, "num_heads": 3}, TypeError, "embed_dim=12.0 must be an int"),
        ({"embed_dim": 12, "num_heads": 3, "dtype": jnp.int32}, TypeError, "dtype=int32 must be one of float16"),
        ({"embed_dim": 12, "num_heads": 3, "out_proj": "no"}, TypeError, "out_proj='no' must be True or False"),
    ],
)
def test_constructors_refuse_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        evo_jax.EvoAttention(**arguments, rngs=nnx.Rngs(0))
    with pytest.raises(error, match=message):
        evo_jax.linen.EvoAttention(**arguments)


@pytest.mark.parametrize("shape", [(L, E), (B, L, E + 1)])
def test_calls_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match=r"x.shape=.* must be \(B, L, 12\)"):
        layer_of()(jnp.ones(shape))


# ---- the original's recorded cases, through the public names


def recorded(folder):
    """The cases that this layer decides: masks, a query of its own, the arithmetic the original got wrong."""
    cases = [case for case in json.loads((folder / "index.json").read_text())["cases"] if case["op"].startswith("evo")]
    for case in cases:
        if "mask" in case["call_arrays"] or case["op"] == "evo.core_qv":
            with np.load(folder / case["file"]) as arrays:
                yield case, {name: a for name, a in arrays.items() if name != "meta"}


def float64_params(arrays, prefix):
    state = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
    return evo_jax.EvoParams.from_state_dict({name: a.astype(np.float64) for name, a in state.items()})


def run_recorded(case, arrays):
    """(name, ours, expected) of the output and every gradient of one recorded case, in float64."""
    params = float64_params(arrays, "w.")
    options = {**case["call"], "attention_mask": arrays.get("mask"), "mask_semantics": "multiply"}
    inputs = [jnp.asarray(arrays[name].astype(np.float64)) for name in case["inputs"]]
    cotangent = jnp.asarray(arrays["ct"].astype(np.float64))

    def fn(params, *inputs):
        if case["op"] == "evo.core_qv":
            return evo_jax.evo_attention(inputs[1], params, query=inputs[0], **options)
        layer = evo_jax.EvoAttention(**case["constructor"], param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        for name, array in params._asdict().items():
            setattr(layer, name, nnx.Param(array))
        return layer(inputs[0], **options)

    @jax.jit
    def run(params, *inputs):
        out, vjp = jax.vjp(fn, params, *inputs)
        return out, *vjp(cotangent)

    out, dparams, *dinputs = run(params, *inputs)
    yield "out", out, arrays["out"]
    yield from ((name, ours, arrays[f"grad.{name}"]) for name, ours in zip(case["inputs"], dinputs, strict=True))
    yield from zip(evo_jax.EvoParams._fields, dparams, float64_params(arrays, "grad.w."), strict=True)


@pytest.mark.parametrize(("folder", "count"), [("golden", 6), ("golden_quirks", 5)])
def test_the_arithmetic_of_the_original_is_reproduced_in_float64(golden_dir, x64, folder, count):
    cases = list(recorded(golden_dir.parent / folder))
    assert len(cases) == count
    for case, arrays in cases:
        for name, ours, expected in run_recorded(case, arrays):
            assert_close(f"{case['id']} {name}", ours, expected, 1e-10)


# ---- documentation

_DOCUMENTED = (
    *("attention", "backend", "cache", "evo", "factory", "generate", "linear", "linen", "modules", "rotary", "scan"),
    *("softmax_modules", "stream"),
)


@pytest.mark.parametrize("name", _DOCUMENTED)
def test_examples_in_the_docstrings_print_what_they_say(name):
    result = doctest.testmod(importlib.import_module(f"evo_jax.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_every_public_name_is_documented_with_an_example():
    functions = ("backend", "evo_attention", "explain", "generate", "init_evo_params", "linear_attention", "prefix_sum")
    for name in ("CUDA", "EvoAttention", "KVCache", "LinearAttention", *functions):
        documentation = getattr(evo_jax, name).__doc__
        assert ">>> " in documentation and documentation.splitlines()[0].endswith("."), name
