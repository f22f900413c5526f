"""Contenders for the attention layers and the softmax operations: evo_jax, and what the originals do in torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import evo_jax
from benchmarks.contenders import torch_tensor, wait
from benchmarks.shapes import EvoShape
from benchmarks.timing import Contender
from evo_jax.attention import head_windows, sparse_pattern
from reference.mask import Mask, Pattern, allowed

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TOLERANCES: dict[str, float] = {"out": 1e-4, "x": 1e-4, **dict.fromkeys(_PROJECTIONS, 1e-4)}
OP_TOLERANCES = {
    dtype: dict.fromkeys([*("out", "query", "key", "value")], tolerance)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2))
}
WINDOW = 256


@dataclass(frozen=True, slots=True)
class Kind:
    """A layer of the CUDA factory: its options, and the pattern that torch computes densely (None: its own way)."""

    options: dict[str, Any] = field(default_factory=dict)
    pattern: Callable[[EvoShape], Pattern] | None = None


KINDS = {
    "linear": Kind(),
    "sliding_window": Kind({"window_size": WINDOW}, lambda _: Pattern(windows=((WINDOW - 1, 0),))),
    "sparse": Kind({"block_size": 64}, lambda _: sparse_pattern("sparse", 64, 1, 3, 0)),
    "multiscale": Kind({}, lambda s: Pattern(windows=head_windows("multiscale", s.heads, None, (256, 512, 1024)))),
}


def layer_of(name: str, shape: EvoShape) -> tuple[Any, jax.Array, jax.Array]:
    """A causal layer of H heads of width D, hidden states (B, L, H D) and a cotangent."""
    width = shape.heads * shape.width
    layer = evo_jax.CUDA.create(name, width, shape.heads, **KINDS[name].options)
    keys = jax.random.split(jax.random.key(1), 2)
    x, cotangent = (jax.random.normal(key, (shape.batch, shape.length, width)) for key in keys)
    return layer, x, cotangent


def jax_call(name: str, shape: EvoShape, gradient: bool, implementation: str | None) -> tuple[Any, tuple[Any, ...]]:
    """(function, arguments) of the whole layer: {name: array} of the output, or of it and every gradient."""
    layer, x, cotangent = layer_of(name, shape)
    graph, state = nnx.split(layer)

    def forward(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x, implementation=implementation)[0]

    def both(state: Any, x: jax.Array, cotangent: jax.Array) -> dict[str, jax.Array]:
        if not gradient:
            return {"out": forward(state, x)}
        out, vjp = jax.vjp(forward, state, x)
        d_state, d_x = vjp(cotangent)
        return {"out": out, "x": d_x, **{name: a["kernel"] for name, a in nnx.to_pure_dict(d_state).items()}}

    return jax.jit(both), (state, x, cotangent)


def jax_layer(name: str, shape: EvoShape, gradient: bool, implementation: str | None) -> Contender:
    """The whole layer, jitted."""
    fn, args = jax_call(name, shape, gradient, implementation)
    run = partial(wait, fn, *args)
    return Contender(f"evo_jax {implementation or 'auto'}", run, lambda: {k: np.asarray(a) for k, a in run().items()})


def torch_layer(name: str, shape: EvoShape, gradient: bool) -> Contender:
    """The original's layer in eager torch, two threads."""
    import torch

    from benchmarks import peers

    layer, x, cotangent = layer_of(name, shape)
    values, weight = (torch_tensor(a, dtype=None, device="cpu") for a in (x, cotangent))
    weights = {
        name: torch.from_numpy(np.array(getattr(layer, name).kernel[...]).T.copy()).requires_grad_()
        for name in _PROJECTIONS
    }
    pattern = KINDS[name].pattern
    attention = peers.torch_linear if pattern is None else peers.torch_masked(_visible(pattern(shape), shape))

    def compute() -> dict[str, Any]:
        if not gradient:
            with torch.no_grad():
                return {"out": peers.torch_layer(values, weights, shape.heads, attention)}
        leaf = values.detach().requires_grad_()
        out = peers.torch_layer(leaf, weights, shape.heads, attention)
        grads = torch.autograd.grad(out, [leaf, *weights.values()], weight)
        return {"out": out, **dict(zip(("x", *weights), grads, strict=True))}

    def result() -> dict[str, np.ndarray]:
        return {k: (a.T if k in weights else a).detach().numpy() for k, a in compute().items()}

    return Contender("torch", peers.two_threads(compute), result)


def _visible(pattern: Pattern, shape: EvoShape) -> Any:
    """(heads or 1, L, L) bool tensor: which pairs the pattern allows, with as many key/value heads as heads."""
    import torch

    size = (1, shape.heads, shape.length, shape.length)
    seen = jax.jit(lambda: allowed(Mask(pattern), size, shape.heads))()
    return torch.from_numpy(np.array(seen[0]))


def op_arrays(shape: EvoShape) -> tuple[jax.Array, ...]:
    """query, key, value and a cotangent, (B, L, H, D)."""
    keys = jax.random.split(jax.random.key(2), 4)
    size = (shape.batch, shape.length, shape.heads, shape.width)
    return tuple(jax.random.normal(key, size, jnp.float32).astype(shape.dtype) for key in keys)


def jax_op(name: str, shape: EvoShape, gradient: bool, function: Callable[..., jax.Array]) -> Contender:
    """function(query, key, value), jitted: the output, or output and every gradient."""

    def both(query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array) -> dict[str, jax.Array]:
        out, vjp = jax.vjp(function, query, key, value)
        return {"out": out, **dict(zip(("query", "key", "value"), vjp(cotangent), strict=True))}

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, _: jax.Array) -> dict[str, jax.Array]:
        return {"out": function(query, key, value)}

    run = partial(wait, jax.jit(both if gradient else forward), *op_arrays(shape))
    return Contender(name, run, lambda: {k: np.asarray(a, np.float32) for k, a in run().items()})


def torch_op(name: str, shape: EvoShape, gradient: bool, attention: Any, device: str = "cpu") -> Contender:
    """attention(query, key, value) of (B, H, L, D) in torch, with two threads on a CPU."""
    import torch

    from benchmarks import peers

    dtype = getattr(torch, shape.dtype)
    arrays = [torch_tensor(a, dtype=dtype, device=device).transpose(1, 2).contiguous() for a in op_arrays(shape)]

    def compute() -> dict[str, Any]:
        if not gradient:
            with torch.no_grad():
                return {"out": attention(*arrays[:3])}
        leaves = [a.detach().requires_grad_() for a in arrays[:3]]
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, arrays[3])
        return {"out": out, **dict(zip(("query", "key", "value"), grads, strict=True))}

    def run() -> dict[str, Any]:
        done = compute()
        if device != "cpu":
            torch.cuda.synchronize()
        return done

    def result() -> dict[str, np.ndarray]:
        return {k: a.detach().transpose(1, 2).float().cpu().numpy() for k, a in compute().items()}

    return Contender(name, peers.two_threads(run) if device == "cpu" else run, result)
