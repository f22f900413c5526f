"""EvoAttention as one custom_vjp over the Triton kernels: dispatch, residuals, and what the kernels refuse."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.evo_bwd import backward
from pallas_kernels.evo_fwd import Inputs, Tables, forward
from pallas_kernels.evo_tile import Geometry
from pallas_kernels.launch import evo_launch
from reference.evo import EvoParams, EvoSpec, evo_chunked

MAX_WIDTH = 256
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Options:
    """Statics of the op: its meaning, where it runs, and the caller's own launch choices (None: the defaults)."""

    spec: EvoSpec
    mode: str  # "triton", "interpret", or "platform": the kernels when lowered for CUDA, else the reference
    block_m: int | None
    num_warps: int | None
    num_stages: int | None


class Residuals(NamedTuple):
    """Saved for the backward: the inputs and the carry tables, O(L D / block_m) beyond the inputs."""

    v: jax.Array
    query: jax.Array | None
    params: EvoParams
    rows: jax.Array | None
    tables: Tables


def refusal(v: Any, params_dtype: Any, spec: EvoSpec) -> str | None:
    """Why the kernels cannot serve this call, or None; `v` is any array or shape (B, H, L, D) with a dtype."""
    for name, dtype in (("v", v.dtype), ("params", params_dtype)):
        if jnp.dtype(dtype).name not in DTYPES:
            return f"{name}.dtype={jnp.dtype(dtype).name}: the kernels take {', '.join(DTYPES)}"
    if v.shape[-1] > MAX_WIDTH:
        return f"head width {v.shape[-1]}: the kernels take up to {MAX_WIDTH}"
    return None


def evo(
    v: jax.Array,
    query: jax.Array | None,
    params: EvoParams,
    rows: jax.Array | None,
    spec: EvoSpec,
    *,
    mode: str,
    block_m: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> jax.Array:
    """EvoAttention of v (B, H, L, D), as reference.evo.evo_chunked; `rows` has no gradient."""
    if v.size == 0:
        return v
    return _evo(v, query, params, rows, Options(spec, mode, block_m, num_warps, num_stages))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _evo(v: jax.Array, query: Any, params: EvoParams, rows: Any, options: Options) -> jax.Array:
    return _run(v, query, params, rows, options)[0]


def _vjp_forward(v: jax.Array, query: Any, params: EvoParams, rows: Any, options: Options) -> tuple[Any, Residuals]:
    out, tables = _run(v, query, params, rows, options)
    return out, Residuals(v, query, params, rows, tables)


def _vjp_backward(options: Options, saved: Residuals, d_out: jax.Array) -> tuple[Any, Any, EvoParams, None]:
    kernel = partial(_kernel_backward, options=options)
    if options.mode == "platform":
        fallback = partial(_reference_backward, spec=options.spec)
        d_v, d_query, d_params = jax.lax.platform_dependent(saved, d_out, cuda=kernel, default=fallback)
    else:
        d_v, d_query, d_params = kernel(saved, d_out)
    return d_v, d_query, d_params, None


_evo.defvjp(_vjp_forward, _vjp_backward)


def _run(v: jax.Array, query: Any, params: EvoParams, rows: Any, options: Options) -> tuple[jax.Array, Tables]:
    kernel = partial(_kernel_forward, options=options)
    if options.mode != "platform":
        return kernel(v, query, params, rows)
    types = jax.eval_shape(kernel, v, query, params, rows)[1]

    def fallback(v: jax.Array, query: Any, params: EvoParams, rows: Any) -> tuple[jax.Array, Tables]:
        # The reference keeps no carries: its backward starts from the inputs, and the tables stay empty.
        return evo_chunked(v, query, params, rows, options.spec), Tables(*(jnp.zeros(t.shape, t.dtype) for t in types))

    return jax.lax.platform_dependent(v, query, params, rows, cuda=kernel, default=fallback)


def _kernel_forward(
    v: jax.Array, query: Any, params: EvoParams, rows: Any, options: Options
) -> tuple[jax.Array, Tables]:
    out, tables = forward(_inputs(v, query, params, rows), _geometry(v, query, params, options))
    return out.reshape(v.shape), tables


def _kernel_backward(saved: Residuals, d_out: jax.Array, options: Options) -> tuple[Any, Any, EvoParams]:
    v, query, params, rows, tables = saved
    geo = _geometry(v, query, params, options, backward=True)
    inputs = _inputs(v, query, params, rows)
    d_v, d_query, d_params = backward(inputs, tables, d_out.reshape(inputs.v.shape), geo)
    d_params = jax.tree.map(lambda grad, p: grad.astype(p.dtype), d_params, params)
    return d_v.reshape(v.shape), None if d_query is None else d_query.reshape(v.shape), d_params


def _reference_backward(saved: Residuals, d_out: jax.Array, spec: EvoSpec) -> tuple[Any, Any, EvoParams]:
    v, query, params, rows, _ = saved
    _, vjp = jax.vjp(lambda v, query, params: evo_chunked(v, query, params, rows, spec), v, query, params)
    return vjp(d_out)


def _inputs(v: jax.Array, query: Any, params: EvoParams, rows: Any) -> Inputs:
    """(B, H, L, D) seen as (B * H, L, D), and the rows as (B, L) or (B * H, L)."""
    batch, heads, length, width = v.shape
    flat = (batch * heads, length, width)
    rows = None if rows is None else rows.reshape(-1, length)
    return Inputs(v.reshape(flat), None if query is None else query.reshape(flat), rows, params)


def _geometry(v: jax.Array, query: Any, params: EvoParams, options: Options, backward: bool = False) -> Geometry:
    """Dot products take the operands' own precision: bf16, TF32 (which holds every 16-bit float), or TF32 x 3."""
    dtypes = {jnp.dtype(array.dtype).name for array in jax.tree.leaves((v, query, params))}
    if dtypes == {"bfloat16"}:
        dot_dtype, precision = "bfloat16", "bf16"
    else:
        dot_dtype, precision = "float32", "tf32x3" if "float32" in dtypes else "tf32"
    launch = evo_launch(
        v.shape[-1],
        dot_dtype,
        interpret=options.mode == "interpret",
        backward=backward,
        block_m=options.block_m,
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    spec = options.spec
    return Geometry(v.shape[2], v.shape[3], spec.causal, spec.absent, spec.accum_dtype, dot_dtype, precision, launch)
