"""Contenders for EvoAttention and prefix sums: evo_jax by implementation, and the original's mathematics in torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evo_jax
from benchmarks.shapes import EvoShape
from benchmarks.timing import Contender
from evo_jax import EvoParams

# Relative L2 that two right implementations may differ by: the operation is ill-conditioned where r has denominator 0.
EVO_TOLERANCES = {
    "float32": {"out": 1e-4, "v": 1e-2, **dict.fromkeys(EvoParams._fields, 1e-2)},
    "bfloat16": {"out": 2e-2, "v": 6e-2, **dict.fromkeys(EvoParams._fields, 1e-1)},
}


def evo_arrays(shape: EvoShape) -> tuple[jax.Array, EvoParams, jax.Array]:
    """v, params and a cotangent of standard normal values."""
    keys = jax.random.split(jax.random.key(0), 3)
    v, cotangent = (jax.random.normal(key, shape.v, jnp.float32).astype(shape.dtype) for key in keys[:2])
    return v, evo_jax.init_evo_params(keys[2], shape.width, jnp.dtype(shape.dtype)), cotangent


def jax_evo(shape: EvoShape, gradient: bool, implementation: str | None) -> Contender:
    """evo_attention, jitted: the output, or output and every gradient."""
    v, params, cotangent = evo_arrays(shape)
    forward = partial(evo_jax.evo_attention, implementation=implementation)

    def both(v: jax.Array, params: EvoParams, cotangent: jax.Array) -> Any:
        out, vjp = jax.vjp(forward, v, params)
        return out, *vjp(cotangent)

    fn = jax.jit(both) if gradient else jax.jit(lambda v, params, _: (forward(v, params),))
    run = partial(wait, fn, v, params, cotangent)

    def result() -> dict[str, np.ndarray]:
        out, *grads = run()
        named = {"v": grads[0], **grads[1]._asdict()} if grads else {}
        return {name: np.asarray(a, np.float32) for name, a in {"out": out, **named}.items()}

    return Contender(f"evo_jax {implementation or 'auto'}", run, result)


def torch_evo(shape: EvoShape, gradient: bool, device: str = "cpu") -> Contender:
    """The original's mathematics in eager torch, two threads on a CPU."""
    import torch

    from benchmarks import peers

    v, params, cotangent = evo_arrays(shape)
    dtype = getattr(torch, shape.dtype)
    tensor = partial(torch_tensor, dtype=dtype, device=device)
    values, weight = tensor(v), tensor(cotangent)
    weights = {
        name: a.detach().to(device, dtype).requires_grad_()
        for name, a in peers.torch_weights(EvoParams(*(p.astype(jnp.float32) for p in params))).items()
    }

    def compute() -> Any:
        if gradient:
            return peers.torch_evo_gradients(values, weights, weight)
        with torch.no_grad():
            return peers.torch_evo(values, weights)

    def run() -> Any:
        done = compute()
        if device != "cpu":
            torch.cuda.synchronize()
        return done

    def result() -> dict[str, np.ndarray]:
        def numpy(a: Any) -> np.ndarray:
            return a.detach().float().cpu().numpy()

        with torch.no_grad():
            named = {"out": numpy(peers.torch_evo(values, weights))}
        if gradient:
            d_v, d_weights = run()
            turned = {name: numpy(d).T if name.endswith("kernel") else numpy(d) for name, d in d_weights.items()}
            named |= {"v": numpy(d_v), **turned}
        return named

    return Contender("torch", peers.two_threads(run) if device == "cpu" else run, result)


def jax_prefix(shape: EvoShape, name: str, fn: Callable[[jax.Array], jax.Array]) -> Contender:
    """Any jitted function of x = (B, H, L, D)."""
    run = partial(wait, jax.jit(fn), evo_arrays(shape)[0])
    return Contender(name, run, lambda: {"out": np.asarray(run(), np.float32)})


def torch_prefix(shape: EvoShape) -> Contender:
    """torch.cumsum on a CPU with two threads."""
    from benchmarks import peers

    x = torch_tensor(evo_arrays(shape)[0], dtype=None, device="cpu")
    run = peers.two_threads(lambda: peers.torch_prefix_sum(x))
    return Contender("torch", run, lambda: {"out": peers.torch_prefix_sum(x).numpy()})


def torch_tensor(array: jax.Array, dtype: Any, device: str) -> Any:
    import torch

    tensor = torch.from_numpy(np.array(array.astype(jnp.float32)))
    return tensor if dtype is None else tensor.to(device, dtype)


def wait(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(fn(*args))
