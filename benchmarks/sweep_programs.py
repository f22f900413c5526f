"""The program that benchmarks.sweep compiles for each kernel: as little beside the kernel as can be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import evo_jax
from evo_jax import EvoParams
from pallas_kernels import attend_bwd, tuned
from pallas_kernels.attend_fwd import Plan
from reference.dense import AttendInputs
from reference.logits import AttendSpec
from reference.mask import Mask

LENGTH = 8192
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def program(kernel: str, dtype: str, width: int, launch: dict[str, Any]) -> Program:
    """(function, its arguments as jax.ShapeDtypeStruct), causal, of LENGTH tokens."""
    if kernel in ("attend_d_query", "attend_d_key_value"):
        return _softmax_gradient(kernel, dtype, width)
    # A chunk of evo's forward is one of its backward too, which must not spill either.
    gradient = "backward" in kernel or (kernel == "evo_forward" and launch.get("block_m", 64) != 64)
    of = {"attend_forward": _flash, "attend_decode": _decode, "prefix": _prefix}
    fn, args = of.get(kernel, _evo if kernel.startswith("evo") else _linear)(dtype, width)
    return (_with_gradient(fn), args) if gradient else (fn, args)


def default(kernel: str, dtype: str, width: int) -> dict[str, Any]:
    """The launch that this program's kernel has by the default rule."""
    fn, args = program(kernel, dtype, width, {})
    with tuned.override(stored=False), tuned.recording() as launches:
        jax.eval_shape(fn, *args)
    key, chosen = next((key, chosen) for key, chosen in launches.items() if key.kernel == kernel)
    return tuned.fields_of(key, chosen.launch)


def _struct(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _with_gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    """All gradients, with the output as the cotangent."""

    def both(*args: Any) -> Any:
        out, vjp = jax.vjp(fn, *args)
        return vjp(out)

    return both


def _flash(dtype: str, width: int) -> Program:
    x = _struct((1, LENGTH, 32, width), dtype)
    return lambda q, k, v: evo_jax.flash_attention(q, k, v, implementation="triton"), (x, x, x)


def _softmax_gradient(kernel: str, dtype: str, width: int) -> Program:
    """One of the two kernels by itself, from a given output and lse: the compiler drops the other."""
    x, lse = _struct((1, LENGTH, 32, width), dtype), _struct((1, 32, LENGTH), "float32")

    def fn(q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
        inputs = AttendInputs(q, k, v, Mask(), None, None, None)
        cotangents = (out, jnp.zeros((1, LENGTH, 32), jnp.float32))
        grads = attend_bwd.backward(inputs, out, lse, cotangents, Plan(AttendSpec(width**-0.5), False))
        return grads.query if kernel == "attend_d_query" else (grads.key, grads.value)

    return fn, (x, x, x, x, lse)


def _decode(dtype: str, width: int) -> Program:
    query, key = _struct((8, 1, 32, width), dtype), _struct((8, 4 * LENGTH, 8, width), dtype)

    def fn(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return evo_jax.flash_attention(q, k, v, key_value_seq_lengths=lengths, implementation="triton")

    return fn, (query, key, key, _struct((8,), "int32"))


def _evo(dtype: str, width: int) -> Program:
    v, matrix, vector = (_struct(s, dtype) for s in ((1, 8, LENGTH, width), (width, width), (width,)))
    params = EvoParams(*(matrix if name.endswith("kernel") else vector for name in EvoParams._fields))
    return lambda v, params: evo_jax.evo_attention(v, params, implementation="triton"), (v, params)


def _linear(dtype: str, width: int) -> Program:
    x = _struct((1, LENGTH, 32, width), dtype)
    return lambda q, k, v: evo_jax.linear_attention(q, k, v, implementation="triton"), (x, x, x)


def _prefix(dtype: str, width: int) -> Program:
    x = _struct((16, LENGTH, width), dtype)
    return lambda x: evo_jax.prefix_sum(x, axis=1, implementation="triton"), (x,)
