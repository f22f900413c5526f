"""Contenders in JAX and in torch from a problem and a function of its arrays."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import Arrays, Problem, results
from benchmarks.timing import Contender


def wait(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(fn(*args))


def jax_contender(name: str, given: Problem, function: Callable[..., jax.Array], *fixed: jax.Array) -> Contender:
    """function(arrays, *fixed), or it and the gradients of the arrays, compiled."""

    def call(arrays: Arrays, cotangent: jax.Array, *fixed: jax.Array) -> Arrays:
        return results(lambda a: function(a, *fixed), given.gradient, arrays, cotangent)

    return compiled_contender(name, call, given.arrays, given.cotangent, *fixed)


def compiled_contender(name: str, function: Callable[..., Mapping[str, jax.Array]], *args: Any) -> Contender:
    """Any function of these arguments that returns named arrays."""
    compiled = jax.jit(function).lower(*args).compile()
    run = partial(wait, compiled, *args)
    memory: Any = compiled.memory_analysis()

    def repeat(calls: int) -> None:
        for _ in range(calls - 1):
            compiled(*args)  # dropped at once: the outputs of a whole sample may be more than the device holds
        run()

    return Contender(
        name,
        run,
        run,
        None if jax.default_backend() == "cpu" else repeat,  # a CPU would run several at once
        None if memory is None else memory.temp_size_in_bytes,
    )


def torch_tensor(array: jax.Array, dtype: Any = None, device: str = "cpu") -> Any:
    import torch

    tensor = torch.from_numpy(np.array(array.astype(jnp.float32)))
    return tensor.to(device, tensor.dtype if dtype is None else dtype)


def torch_contender(
    name: str,
    given: Problem,
    function: Callable[[dict[str, Any]], Any],
    backward: bool = True,
    heads_first: bool = True,
) -> Contender:
    """A function of the arrays as contiguous tensors on the device that JAX uses.

    Those of attention are (B, H, L, D), or (B, L, H, D) as JAX has them where not `heads_first`.

    Raises:
        NotImplementedError: gradients are wanted, and it has no `backward`.
    """
    import torch

    if given.gradient and not backward:
        raise NotImplementedError("it has no backward here")
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    turned = heads_first and not given.heads_first
    turn = (lambda a: a.transpose(1, 2) if a.ndim == 4 else a) if turned else (lambda a: a)
    tensor = partial(torch_tensor, dtype=getattr(torch, given.shape.dtype), device=device)
    tensors = {key: turn(tensor(a)).contiguous() for key, a in given.arrays.items()}
    cotangent = turn(tensor(given.cotangent)).contiguous()

    def compute() -> dict[str, Any]:
        if not given.gradient:
            with torch.no_grad():
                return {"out": function(tensors)}
        leaves = {key: a.detach().requires_grad_() for key, a in tensors.items()}
        out = function(leaves)
        return {"out": out} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True))

    return torch_calls(name, compute, lambda a: turn(a).detach().float().contiguous().cpu().numpy(), device)


def torch_calls(name: str, compute: Callable[[], dict[str, Any]], to_numpy: Any, device: str) -> Contender:
    """`compute` as a contender: with as many threads as JAX has on a CPU, waited for on a GPU."""
    import torch

    def run() -> dict[str, Any]:
        if device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
            return compute()
        done = compute()
        torch.cuda.synchronize()
        return done

    def repeat(calls: int) -> None:
        for _ in range(calls):
            compute()
        torch.cuda.synchronize()

    def result() -> dict[str, np.ndarray]:
        return {key: to_numpy(a) for key, a in run().items()}

    return Contender(name, run, result, None if device == "cpu" else repeat)
