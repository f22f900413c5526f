"""The torch twins: the originals' recorded layers through them, training beside nnx and optax, and torch's rules."""

import copy
import io
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden import errors, load, names

torch = pytest.importorskip("torch", reason="the newest lane leaves torch out (gigabytes of CUDA)")
import evo_jax  # noqa: E402
from evo_jax.interop.arrays import to_torch  # noqa: E402
from evo_jax.interop.evo import EvoAttention, EvoAttentionCore, evo_attention  # noqa: E402
from evo_jax.interop.factory import CUDA  # noqa: E402
from evo_jax.interop.layers import (  # noqa: E402
    FlashAttention,
    LinearAttention,
    MultiScaleAttention,
    SlidingWindowAttention,
    SparseAttention,
)
from evo_jax.interop.state_dict import load_torch_state_dict, to_torch_state_dict  # noqa: E402

KINDS: dict[str, Any] = {
    "flash": FlashAttention,
    "sliding_window": SlidingWindowAttention,
    "sparse": SparseAttention,
    "linear": LinearAttention,
    "multiscale": MultiScaleAttention,
}
NAMES = names(58)
X = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32))


def recorded(name: str) -> tuple[dict, dict[str, Any]]:
    """(record, the arrays as tensors, floats in float64)."""
    record, arrays = load(name)
    tensors = {key: torch.from_numpy(a) for key, a in arrays.items() if a.dtype.kind in "fbiu"}
    return record, {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}


def twin_of(record: dict, z: dict[str, Any]) -> Any:
    """The layer with its weights: half of those of the five from the factory, loaded from names without its prefix."""
    if record["op"].startswith("evo.core"):
        layer: Any = EvoAttentionCore(record["shape"]["D"])
    elif record["op"] == "evo.module":
        layer = EvoAttention(**record["constructor"])
    elif int(record["id"][:3]) % 2:
        layer = CUDA.create(record["op"], **record["constructor"])
    else:
        layer = KINDS[record["op"]](**record["constructor"])
    layer.double().load_state_dict({key.removeprefix("w."): w for key, w in z.items() if key.startswith("w.")})
    return layer


def run(record: dict, z: dict[str, Any], layer: Any) -> dict[str, Any]:
    """Output and new cache, under the record's names."""
    if record["op"].startswith("evo."):
        given = [z[key] for key in ("q", "q", "v") if key in z] if "q" in z else [z["v"] if "v" in z else z["x"]]
        given += [z["v"]] if "q" in z and len(given) == 2 else []
        return {"out": layer(*given, causal=record["call"]["causal"], attention_mask=z.get("mask"))}
    past = next(((z[a], z[b]) for a, b in (("past_k", "past_v"), ("state_kv", "state_k")) if a in z), None)
    mask = z["mask"].reshape((1,) * (4 - z["mask"].ndim) + z["mask"].shape) if "mask" in z else None
    keep = record["call"].get("use_cache", False)
    rotary = (z["cos"], z["sin"]) if "cos" in z else None
    first = record["call"].get("decode_prefill", z["x"].shape[1])
    out, cache = layer(z["x"][:, :first], mask, rotary, past_key_value=past, use_cache=keep)
    outs = [out]
    for t in range(first, z["x"].shape[1]):
        out, cache = layer(z["x"][:, t : t + 1], past_key_value=cache, use_cache=True)
        outs.append(out)
    found = {"out": torch.cat(outs, dim=1)}
    keys = ("new_state_kv", "new_state_k") if record["op"] == "linear" else ("new_k", "new_v")
    return found if cache is None else found | dict(zip(keys, cache, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_golden_in_float64(name, x64):
    record, z = recorded(name)
    layer = twin_of(record, z)
    inputs = {key: z[key].requires_grad_() for key in record["inputs"]}
    found = run(record, z, layer)
    (found["out"] * z["ct"]).sum().backward()
    found |= {f"grad.{key}": tensor.grad for key, tensor in inputs.items()}
    known = {key.removeprefix("w.") for key in z if key.startswith("w.")}
    for key, weight in layer.named_parameters():
        key = key if key in known else key.removeprefix("attention.")
        found[f"grad.w.{key}"] = weight.grad
    if "mask" in z and record["op"] == "evo.module":
        # The original's masked rows are norm.bias and send their cotangents there; absent tokens have no such rows.
        masked = z["mask"].reshape(*z["ct"].shape[:2], 1) == 0
        bias = (z["ct"] * masked).reshape(-1, record["shape"]["D"]).sum(0)
        found["grad.w.core.norm.bias"] = found["grad.w.core.norm.bias"] + bias
    assert max(error := errors(name, {key: t.detach() for key, t in found.items()}).values()) <= 1e-10, error


@pytest.mark.parametrize(
    "name", ["000_evo_causal_left_pad", "003_evo_masked_rows_norm_bias", "004_evo_fractional_mask"]
)
def test_the_originals_own_masks_on_request(name, golden_dir, x64):
    with np.load(golden_dir.with_name("golden_quirks") / f"{name}.npz") as arrays:
        z = {key: torch.from_numpy(a).double() for key, a in arrays.items() if a.dtype.kind == "f"}
    layer = EvoAttention(z["x"].shape[-1], 2).double()
    layer.load_state_dict({key.removeprefix("w.core."): w for key, w in z.items() if key.startswith("w.")})
    out = layer(z["x"], attention_mask=z["mask"], mask_semantics="multiply", accum_dtype=torch.float64)
    torch.testing.assert_close(out, z["out"], rtol=0, atol=1e-10)


class Torch(torch.nn.Module):
    """Two layers in a small model."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = torch.nn.Linear(6, 16), torch.nn.Linear(16, 6)
        self.flash, self.evo = CUDA.flash(16, 4, num_kv_heads=2), EvoAttention(16, 2)

    def forward(self, x):
        x = self.inward(x)
        x = x + self.flash(x)[0]
        return self.outward(x + self.evo(x))


class Jax(nnx.Module):
    """The same of nnx modules."""

    def __init__(self, weights: dict[str, Any]):
        rngs = nnx.Rngs(0)
        self.inward, self.outward = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 6, rngs=rngs)
        self.flash = evo_jax.FlashAttention(16, 4, num_kv_heads=2, rngs=rngs)
        self.evo = evo_jax.EvoAttention(16, 2, rngs=rngs)
        self.load(weights)

    def load(self, weights: dict[str, Any]):
        for name in ("inward", "outward"):
            layer = getattr(self, name)
            layer.kernel[...] = jnp.asarray(weights[f"{name}.weight"].T.numpy())
            layer.bias[...] = jnp.asarray(weights[f"{name}.bias"].numpy())
        load_torch_state_dict(self.flash, weights, prefix="flash.")
        load_torch_state_dict(self.evo, weights, prefix="evo.")

    def __call__(self, x):
        x = self.inward(x)
        x = x + self.flash(x)[0]
        return self.outward(x + self.evo(x))


def test_a_torch_loop_follows_optax_and_each_continues_the_other():
    torch.manual_seed(0)
    model, (x, y) = Torch(), torch.randn(2, 4, 12, 6)
    twin = Jax(model.state_dict())
    start = copy.deepcopy(model.state_dict())

    @nnx.jit
    def jax_step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            optimizer.update(model, grads)
        return loss

    def trained_in_torch(steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            optimizer.step()
            yield loss.item()

    def trained_in_jax(steps):
        optimizer = nnx.Optimizer(twin, optax.adamw(1e-3, weight_decay=0.01), wrt=nnx.Param)
        for _ in range(steps):
            yield float(jax_step(twin, optimizer, jnp.asarray(x.numpy()), jnp.asarray(y.numpy())))

    ours, theirs = list(trained_in_torch(50)), list(trained_in_jax(50))
    assert theirs[-1] < 0.9 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for name, weight in model.state_dict().items():
        assert not torch.equal(weight, start[name]), name
    twin.load(model.state_dict())
    np.testing.assert_allclose(list(trained_in_jax(5)), list(trained_in_torch(5)), rtol=1e-4)
    model.evo.load_state_dict(to_torch_state_dict(twin.evo))
    model.flash.load_state_dict(to_torch_state_dict(twin.flash))
    hidden = twin.inward(jnp.asarray(x.numpy()))
    with torch.no_grad():
        (flash, _), evo = model.flash(to_torch(hidden)), model.evo(to_torch(hidden))
    np.testing.assert_allclose(flash.numpy(), twin.flash(hidden)[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(evo.numpy(), twin.evo(hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_with_the_cache_give_what_one_call_gives(kind):
    torch.manual_seed(1)
    options = {
        "sliding_window": {"window_size": 4},
        "sparse": {"block_size": 4},
        "multiscale": {"window_sizes": [3, 5]},
    }
    layer = CUDA.create(kind, 32, 4, num_kv_heads=2, **options.get(kind, {})).requires_grad_(False)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = mask[1, 5] = 0
    for given in (None, mask) if kind == "flash" else (mask,):
        whole, none = layer(X, given)
        out, cache = layer(X[:, :5], given if given is None else given[:, :5], use_cache=True)
        outs = [out]
        for a, b in ((5, 6), (6, 9)):
            out, cache = layer(X[:, a:b], given if given is None else given[:, :b], None, cache, True)
            outs.append(out)
        assert none is None
        torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=1e-6)
    assert not whole[mask == 0].any()
    kept = {"linear": (2, 4, 8, 8), "sliding_window": (2, 4, 2, 8)}.get(kind, (2, 9, 2, 8))
    assert tuple(cache[0].shape) == kept


def test_the_evo_twin_streams_and_its_function_takes_every_form_of_its_weights():
    layer = EvoAttention(32, 4).requires_grad_(False)
    first, cache = layer(X[:, :4], cache=layer.init_cache(2))
    rest, cache = layer(X[:, 4:], cache=cache)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), layer(X), rtol=0, atol=1e-5)
    assert cache.count.tolist() == [9, 9]
    v = X.reshape(2, 9, 4, 8).transpose(1, 2)
    expected = layer(X).reshape(2, 9, 4, 8).transpose(1, 2)
    for params in (layer, layer.core, layer.state_dict()):
        torch.testing.assert_close(evo_attention(v, params), expected, rtol=0, atol=1e-6)
    assert torch.equal(evo_attention(v), evo_attention(v))
    with pytest.raises(ValueError, match=r"no .*norm\.bias"):
        evo_attention(v, {key: w for key, w in layer.state_dict().items() if "norm" not in key})


def test_bias_and_out_proj_do_what_they_say():
    plain, full = EvoAttention(32, 4, bias=False), EvoAttention(32, 4, out_proj=True)
    assert not [key for key in plain.state_dict() if key.endswith("proj.bias")]
    assert full.state_dict()["out_proj.weight"].shape == (32, 32)
    assert len(EvoAttention(32, 4).state_dict()) == 10
    zeros = EvoAttention(32, 4)
    weights = {key: torch.zeros_like(w) for key, w in zeros.state_dict().items() if key.endswith("bias")}
    zeros.load_state_dict(weights | plain.state_dict())
    assert torch.equal(plain(X), zeros(X))
    with pytest.raises(RuntimeError, match=r"core\.q_proj\.bias"):
        plain.load_state_dict(zeros.state_dict())
    with pytest.raises(RuntimeError, match=r"out_proj\.weight"):
        full.load_state_dict(zeros.state_dict())
    assert len(plain.load_state_dict(zeros.state_dict(), strict=False).unexpected_keys) == 4
    assert len(full.load_state_dict(zeros.state_dict(), strict=False).missing_keys) == 2


def test_what_would_not_be_called_is_refused():
    class LowRank(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight = inner.weight

    x = torch.randn(1, 4, 16)
    for change in (
        lambda layer: setattr(layer, "q_proj", LowRank(layer.q_proj)),
        lambda layer: setattr(layer, "k_proj", torch.nn.Linear(16, 16)),
        lambda layer: layer.v_proj.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.o_proj.register_forward_hook(lambda *_: None),
        lambda layer: setattr(layer.o_proj, "forward", lambda x: x),
    ):
        layer = FlashAttention(16, 2)
        change(layer)
        with pytest.raises(NotImplementedError, match=r"FlashAttention: [qkvo]_proj"):
            layer(x)
    evo = EvoAttention(16, 2)
    evo.core.norm = torch.nn.RMSNorm(8)
    with pytest.raises(NotImplementedError, match="EvoAttentionCore: norm is a RMSNorm"):
        evo(x)
    layer = FlashAttention(16, 2)
    before = layer(x)[0]
    torch.nn.utils.parametrizations.weight_norm(layer.q_proj)
    torch.testing.assert_close(layer(x)[0], before)
    next(p for name, p in layer.named_parameters() if name.endswith("original0")).data.mul_(3)
    assert not torch.allclose(layer(x)[0], before), "the weight is what parametrize makes of it"


def test_the_cache_of_evo_attention_has_the_layers_dtype(x64):
    layer, x = EvoAttention(16, 2, dtype=torch.float64), torch.randn(1, 9, 16, dtype=torch.float64)
    assert EvoAttention(16, 2, dtype=torch.bfloat16).init_cache(1).sum.dtype is torch.float32
    first, cache = layer(x[:, :5], cache=layer.init_cache(1))
    rest, _ = layer(x[:, 5:], cache=cache)
    torch.testing.assert_close(torch.cat([first, rest], 1), layer(x), rtol=1e-13, atol=1e-13)


def test_torch_treats_a_twin_as_any_module():
    torch.manual_seed(2)
    layer: Any = CUDA.flash(32, 4)
    bound = 32**-0.5
    assert 0.9 * bound < float(layer.attention.q_proj.weight.detach().abs().max()) <= bound
    expected = layer(X)[0]
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(X)[0], expected)
        assert same.attention.q_proj.weight is not layer.attention.q_proj.weight
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    FlashAttention(32, 4).load_state_dict(torch.load(file))
    with torch.no_grad():
        out = layer(X)[0]
    assert expected.requires_grad and not out.requires_grad and torch.equal(out, expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)(X.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=2e-2)
    assert layer.eval().training is False and torch.equal(layer(X)[0], expected)


def test_dropout_is_of_training_and_of_torchs_generator():
    layer = CUDA.flash(32, 4, dropout_rate=0.5).requires_grad_(False)
    torch.manual_seed(3)
    first, second = layer(X)[0], layer(X)[0]
    torch.manual_seed(3)
    assert torch.equal(first, layer(X)[0]) and not torch.equal(first, second)
    assert torch.equal(layer.eval()(X)[0], layer(X)[0]) and not torch.equal(layer(X)[0], first)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch looks itself
def test_torch_compile_breaks_its_graph_at_a_twin():
    layer: Any = torch.nn.Sequential(torch.nn.Linear(32, 32), EvoAttention(32, 4), torch.nn.Linear(32, 32))
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(X), layer(X), rtol=0, atol=1e-6)
    compiled(X).sum().backward()
    assert layer[0].weight.grad is not None


class Config:
    """What of the original's AttentionConfig is read."""

    hidden_size, num_attention_heads, num_key_value_heads, head_dim, scale = 32, 4, 2, None, 0.5


def test_constructors_have_the_names_order_and_defaults_of_the_original():
    layer: Any = FlashAttention(Config())
    same = FlashAttention(32, 4, num_kv_heads=2, scale=0.5)
    same.load_state_dict(layer.state_dict())
    assert layer.k_proj.weight.shape == (16, 32) and torch.equal(layer(X)[0], same(X)[0])
    assert CUDA.sliding_window(32, 4, 7).attention.window == CUDA.sliding(32, 4, 7).attention.window == 7
    assert CUDA.local(32, 4).attention.window == 512 and CUDA.sliding_window(32, 4).attention.window == 4096
    assert CUDA.create(hidden_size=32, num_heads=4, num_kv_heads=0).attention.num_kv_heads == 4
    defaults = dict(CUDA.sparse().attention.spec.options)
    wanted = {"hidden_size": 768, "num_heads": 12, "block_size": 64, "num_global_tokens": 1, "num_random_blocks": 3}
    assert {key: defaults[key] for key in wanted} == wanted


@pytest.mark.parametrize("width", [11, 13, 16, 17])
@pytest.mark.parametrize("make", [CUDA.flash, lambda *sizes: CUDA.sliding_window(*sizes, window_size=20)])
def test_a_mask_of_pairs_is_as_wide_as_there_are_tokens(make, width):
    """Also where it is as wide as the cache is padded to; a window's may know tokens that left the cache."""
    layer, x = make(32, 4), torch.randn(2, 12, 32)
    _, past = layer(x[:, :10], use_cache=True)
    mask = torch.arange(4 * width).reshape(2, 1, 2, width) % 3 > 0
    with pytest.raises(ValueError, match=rf"\(2, 1, 12, {width}\) must broadcast to \(B, N, n, S\) = \(2, 4, 12, 12\)"):
        layer(x, mask.repeat(1, 1, 6, 1))
    if layer.attention.window is None or width < 12:
        with pytest.raises(ValueError, match=r"= \(2, 4, 2, 12\)"):
            layer(x[:, 10:], mask, past_key_value=past)
    else:
        out, _ = layer(x[:, 10:], mask, past_key_value=past)
        torch.testing.assert_close(out, layer(x[:, 10:], mask[..., -12:], past_key_value=past)[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CUDA.flash(32, 5), ValueError, "multiple of num_heads=5"),
        (lambda: CUDA.flash(32, 4, dropout=0.1), TypeError, "dropout"),
        (lambda: CUDA.flash(32, 4, param_dtype="float32"), TypeError, "param_dtype"),
        (lambda: CUDA.linear(32, 4, feature_map="cosine"), ValueError, "feature_map='cosine'"),
        (lambda: CUDA.create("strided", 32, 4), ValueError, "attn_type='strided' must be one of 'flash'"),
        (lambda: EvoAttention(32, 5), ValueError, "embed_dim=32"),
        (lambda: CUDA.flash(32, 4)(X, strange=1), TypeError, "strange"),
        (lambda: CUDA.flash(32, 4)(X[0]), ValueError, r"must be \(B, L, 32\)"),
        (lambda: CUDA.flash(32, 4)(X, torch.ones(9, 9)), ValueError, r"mask\[None, None\]"),
        (lambda: CUDA.flash(32, 4)(X, torch.full((2, 9), 0.5)), ValueError, "must hold only 0 and 1"),
        (lambda: CUDA.flash(32, 4)(X, torch.ones(9, 9).tril()[None, None]), ValueError, "holds only 0 and 1"),
        (lambda: EvoAttention(32, 4)(X, attention_mask=-torch.ones(2, 9)), ValueError, "must hold only 0 and 1"),
        (lambda: CUDA.flash(32, 4)(X, past_key_value=(X, X)), ValueError, r"\(2, S, 4, 8\)"),
        (lambda: CUDA.flash(32, 4)(X, segment_ids=torch.ones(2, 9)), TypeError, "segment_ids.dtype=torch.float32"),
        (
            lambda: CUDA.flash(32, 4)(X, segment_ids=torch.full((2, 9), 2**31)),
            ValueError,
            "segment_ids hold 2147483648",
        ),
        (lambda: CUDA.flash(32, 4).double()(X), TypeError, "jax_enable_x64"),
        (lambda: EvoAttention(32, 4)(X, accum_dtype=torch.float64), ValueError, "jax_enable_x64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
