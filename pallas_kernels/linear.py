"""Linear attention as one custom_vjp over the Triton kernels: dispatch, residuals, and what the kernels refuse."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import linear_step
from pallas_kernels.linear_pass import Inputs, Plan, backward, forward
from reference.linear import FEATURE_MAPS, LinearSpec, LinearState, linear_chunked, linear_dense

MAX_WIDTH = 256
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Options:
    """Statics of the op: its meaning and launch, where it runs, and whether the last state is wanted."""

    plan: Plan
    mode: str  # "triton", "interpret", or "platform": the kernels when lowered for CUDA, else the reference
    keep_state: bool


class Residuals(NamedTuple):
    """Saved for the backward: the inputs, the output, and 1 / den (B, N, T)."""

    inputs: Inputs
    out: jax.Array
    inverse: jax.Array


def refusal(query: Any, key: Any, value: Any, state: Any, rows: Any, spec: LinearSpec) -> str | None:
    """Why the kernels cannot serve this call, or None; arrays may be shapes with dtypes."""
    arrays = {"query": query, "key": key, "value": value}
    if state is not None:
        arrays |= {"state.kv": state.kv, "state.z": state.z}
    for name, array in arrays.items():
        if jnp.dtype(array.dtype).name not in DTYPES:
            return f"{name}.dtype={jnp.dtype(array.dtype).name}: the kernels take {', '.join(DTYPES)}"
    for name, array in (("key", key), ("value", value)):
        if array.shape[-1] > MAX_WIDTH:
            return f"{name} width {array.shape[-1]}: the kernels take up to {MAX_WIDTH}"
    if spec.feature_map not in FEATURE_MAPS:
        return f"feature_map={spec.feature_map!r}: the kernels know {', '.join(FEATURE_MAPS)}"
    return None


def linear(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: LinearState | None,
    rows: jax.Array | None,
    spec: LinearSpec,
    *,
    mode: str,
    keep_state: bool = True,
    block: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> tuple[jax.Array, LinearState | None]:
    """As reference.linear.linear_chunked. Without `keep_state` the last state is not written, and None returned."""
    if 0 in (query.size, key.size, value.size):
        out, last = linear_dense(query, key, value, state, rows, spec)
        return out, last if keep_state else None
    plan = Plan(spec, mode == "interpret", block, num_warps, num_stages)
    return _linear(query, key, value, state, rows, Options(plan, mode, keep_state))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _linear(query: Any, key: Any, value: Any, state: Any, rows: Any, options: Options) -> tuple[Any, Any]:
    out, _, last = _run(Inputs(query, key, value, state, rows), options, save=False)
    return out, last


def _vjp_forward(
    query: Any, key: Any, value: Any, state: Any, rows: Any, options: Options
) -> tuple[tuple[Any, Any], Residuals]:
    inputs = Inputs(query, key, value, state, rows)
    out, inverse, last = _run(inputs, options, save=True)
    return (out, last), Residuals(inputs, out, inverse)


def _vjp_backward(options: Options, saved: Residuals, cotangents: Any) -> tuple[Any, Any, Any, Any, None]:
    kernel = partial(_kernel_backward, options=options)
    if options.mode == "platform":
        fallback = partial(_reference_backward, options=options)
        grads = jax.lax.platform_dependent(saved, cotangents, cuda=kernel, default=fallback)
    else:
        grads = kernel(saved, cotangents)
    return *grads, None


_linear.defvjp(_vjp_forward, _vjp_backward)


def _run(inputs: Inputs, options: Options, save: bool) -> tuple[Any, Any, Any]:
    """(out, 1 / den or None, last state or None)."""
    kernel = partial(_kernel_forward, options=options, save=save)
    if options.mode != "platform":
        return kernel(inputs)

    def fallback(inputs: Inputs) -> tuple[Any, Any, Any]:
        # The reference's backward starts from the inputs: 1 / den stays empty.
        out, last = linear_chunked(*inputs, options.plan.spec)
        batch, tokens, heads, _ = inputs.query.shape
        inverse = jnp.zeros((batch, heads, tokens), jnp.float32) if save else None
        return out, inverse, last if options.keep_state else None

    return jax.lax.platform_dependent(inputs, cuda=kernel, default=fallback)


def _kernel_forward(inputs: Inputs, options: Options, save: bool) -> tuple[Any, Any, Any]:
    if linear_step.serves(inputs, options.plan):
        return linear_step.forward(inputs, options.plan, save=save, keep_state=options.keep_state)
    out, inverse, last = forward(inputs, options.plan, save=save, keep_state=options.keep_state)
    return out, inverse, None if last is None else LinearState(last.kv[:, :, 0], last.z[:, :, 0])


def _kernel_backward(saved: Residuals, cotangents: Any, options: Options) -> tuple[Any, Any, Any, Any]:
    d_query, d_key, d_value, d_state = backward(saved.inputs, saved.out, saved.inverse, cotangents, options.plan)
    state = saved.inputs.state
    if state is None:
        return d_query, d_key, d_value, None
    d_state = jax.tree.map(lambda grad, given: grad[:, :, 0].astype(given.dtype), d_state, state)
    return d_query, d_key, d_value, d_state


def _reference_backward(saved: Residuals, cotangents: Any, options: Options) -> tuple[Any, Any, Any, Any]:
    *arrays, rows = saved.inputs

    def call(query: Any, key: Any, value: Any, state: Any) -> tuple[Any, Any]:
        out, last = linear_chunked(query, key, value, state, rows, options.plan.spec)
        return out, last if options.keep_state else None

    return jax.vjp(call, *arrays)[1](cotangents)
