"""Softmax attention as one custom_vjp over the Triton kernels: dispatch, residuals, and what the kernels refuse."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import decode
from pallas_kernels.attend_bwd import Gradients, backward
from pallas_kernels.attend_fwd import Plan, forward
from pallas_kernels.tile import LN_2
from reference.blocked import attend_blocked
from reference.dense import AttendInputs, attend_dense
from reference.logits import AttendSpec
from reference.mask import Mask
from reference.online_softmax import LOG2_E

MAX_WIDTH = 256
DTYPES = ("bfloat16", "float16", "float32")
INT32_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Options:
    """Statics of the op: its meaning and launch, and where it runs."""

    plan: Plan
    mode: str  # "triton", "interpret", or "platform": the kernels when lowered for CUDA, else the reference


class Residuals(NamedTuple):
    """Saved for the backward: the inputs, the output, and lse (B, N, T) in base 2."""

    inputs: AttendInputs
    out: jax.Array
    lse: jax.Array


def refusal(inputs: AttendInputs, spec: AttendSpec) -> str | None:
    """Why the kernels cannot serve this call, or None; arrays may be shapes with dtypes."""
    arrays = {name: getattr(inputs, name) for name in ("query", "key", "value", "bias", "sinks")}
    for name, array in arrays.items():
        if array is not None and jnp.dtype(array.dtype).name not in DTYPES:
            return f"{name}.dtype={jnp.dtype(array.dtype).name}: the kernels take {', '.join(DTYPES)}"
    for name, array in (("key", inputs.key), ("value", inputs.value)):
        if array.shape[-1] > MAX_WIDTH:
            return f"{name} width {array.shape[-1]}: the kernels take up to {MAX_WIDTH}"
    if inputs.mask.keep is not None and inputs.mask.keep.size >= INT32_LIMIT:
        return f"a mask of {inputs.mask.keep.size} elements: the kernels take less than {INT32_LIMIT}"
    return None


def attend(
    inputs: AttendInputs,
    spec: AttendSpec,
    *,
    mode: str,
    block_q: int | None = None,
    block_k: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As reference.dense.attend_dense: (out (B, T, N, V), lse (B, T, N))."""
    if 0 in (inputs.query.size, inputs.key.size, inputs.value.size):
        return attend_dense(inputs, spec)
    plan = Plan(spec, mode == "interpret", block_q, block_k, num_warps, num_stages)
    query, key, value, mask, bias, sinks, seeds = inputs
    return _attend(query, key, value, bias, sinks, (mask, seeds), Options(plan, mode))


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    query: Any, key: Any, value: Any, bias: Any, sinks: Any, fixed: tuple[Mask, Any], options: Options
) -> tuple[jax.Array, jax.Array]:
    return _vjp_forward(query, key, value, bias, sinks, fixed, options)[0]


def _vjp_forward(
    query: Any, key: Any, value: Any, bias: Any, sinks: Any, fixed: tuple[Mask, Any], options: Options
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    mask, seeds = fixed
    inputs = AttendInputs(query, key, value, mask, bias, sinks, seeds)
    kernel = partial(decode.forward if decode.serves(inputs, options.plan) else forward, plan=options.plan)
    if options.mode == "platform":
        fallback = partial(_reference_forward, spec=options.plan.spec)
        out, lse = jax.lax.platform_dependent(inputs, cuda=kernel, default=fallback)
    else:
        out, lse = kernel(inputs)
    return (out, lse.transpose(0, 2, 1) * LN_2), Residuals(inputs, out, lse)


def _vjp_backward(options: Options, saved: Residuals, cotangents: Any) -> tuple[Any, ...]:
    kernel = partial(_kernel_backward, plan=options.plan)
    if options.mode == "platform":
        fallback = partial(_reference_backward, spec=options.plan.spec)
        return *jax.lax.platform_dependent(saved, cotangents, cuda=kernel, default=fallback), None
    return *kernel(saved, cotangents), None


_attend.defvjp(_vjp_forward, _vjp_backward)


def _kernel_backward(saved: Residuals, cotangents: Any, plan: Plan) -> Gradients:
    return backward(saved.inputs, saved.out, saved.lse, cotangents, plan)


def _reference_forward(inputs: AttendInputs, spec: AttendSpec) -> tuple[jax.Array, jax.Array]:
    out, lse = attend_blocked(inputs, spec)
    return out, lse.transpose(0, 2, 1) * LOG2_E


def _reference_backward(saved: Residuals, cotangents: Any, spec: AttendSpec) -> Gradients:
    """The reference starts from the inputs again."""
    query, key, value, mask, bias, sinks, seeds = saved.inputs

    def call(query: Any, key: Any, value: Any, bias: Any, sinks: Any) -> tuple[jax.Array, jax.Array]:
        return attend_blocked(AttendInputs(query, key, value, mask, bias, sinks, seeds), spec)

    return Gradients(*jax.vjp(call, query, key, value, bias, sinks)[1](cotangents))
