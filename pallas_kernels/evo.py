"""EvoAttention as one custom_vjp over the Triton kernels: dispatch, residuals, and what the kernels refuse."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import evo_step, tuned
from pallas_kernels.evo_bwd import backward
from pallas_kernels.evo_fwd import Inputs, Tables, forward
from pallas_kernels.evo_tile import Geometry
from pallas_kernels.launch import evo_launch
from reference.evo import Carry, EvoParams, EvoSpec, evo_chunked, evo_chunked_from

MAX_WIDTH = 256
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Options:
    """Statics of the op: its meaning, where it runs, and the caller's own launch choices (None: the defaults)."""

    spec: EvoSpec
    mode: str  # "triton", "interpret", or "platform": the kernels when lowered for CUDA, else the reference
    block_m: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    chunk: int | None = None  # the block_m chosen, for the forward and for the backward, which reads its carry tables

    @property
    def own(self) -> dict[str, int | None]:
        """What the caller chose."""
        return {name: getattr(self, name) for name in ("block_m", "num_warps", "num_stages")}


class Residuals(NamedTuple):
    """Saved for the backward: the inputs and the carry tables, O(L D / block_m) beyond the inputs."""

    v: jax.Array
    query: jax.Array | None
    params: EvoParams
    rows: jax.Array | None
    carry: Carry | None
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
    return evo_from(v, query, params, rows, None, Options(spec, mode, block_m, num_warps, num_stages))[0]


def evo_from(
    v: jax.Array, query: jax.Array | None, params: EvoParams, rows: jax.Array | None, carry: Carry | None, how: Options
) -> tuple[jax.Array, Carry | None]:
    """The same after tokens that left `carry`, as reference.evo.evo_chunked_from; without one, (output, None)."""
    if v.size == 0:
        return v, carry
    how = replace(how, chunk=_geometry(v, query, params, rows, how).chunk)
    return _evo(v, query, params, rows, carry, how)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _evo(v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Any, options: Options) -> tuple[Any, Any]:
    out, _, last = _run(v, query, params, rows, carry, options)
    return out, last


def _vjp_forward(
    v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Any, options: Options
) -> tuple[tuple[Any, Any], Residuals]:
    out, tables, last = _run(v, query, params, rows, carry, options)
    return (out, last), Residuals(v, query, params, rows, carry, tables)


def _vjp_backward(options: Options, saved: Residuals, cotangents: Any) -> tuple[Any, Any, EvoParams, None, Any]:
    kernel = partial(_kernel_backward, options=options)
    if options.mode == "platform":
        fallback = partial(_reference_backward, spec=options.spec)
        grads = jax.lax.platform_dependent(saved, cotangents, cuda=kernel, default=fallback)
    else:
        grads = kernel(saved, cotangents)
    d_v, d_query, d_params, d_carry = grads
    return d_v, d_query, d_params, None, d_carry


_evo.defvjp(_vjp_forward, _vjp_backward)


def _run(
    v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Any, options: Options
) -> tuple[jax.Array, Tables, Any]:
    """(output, carry tables, the carry after the last token or None)."""
    kernel = partial(_kernel_forward, options=options)
    if options.mode != "platform":
        return kernel(v, query, params, rows, carry)
    types = jax.eval_shape(kernel, v, query, params, rows, carry)[1]

    def fallback(v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Any) -> tuple[jax.Array, Tables, Any]:
        # The reference keeps no carries: its backward starts from the inputs, and the tables stay empty.
        out, last = _reference(v, query, params, rows, carry, options.spec)
        return out, Tables(*(jnp.zeros(t.shape, t.dtype) for t in types)), last

    return jax.lax.platform_dependent(v, query, params, rows, carry, cuda=kernel, default=fallback)


def _kernel_forward(
    v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Any, options: Options
) -> tuple[jax.Array, Tables, Any]:
    inputs, geo = _inputs(v, query, params, rows), _geometry(v, query, params, rows, options)
    before = None if carry is None else _tables(carry)
    if before is not None and evo_step.serves(geo):
        out, last = evo_step.forward(inputs, before, geo)
        tables = Tables(before.context[:, None], before.gated[:, None])
    else:
        out, tables, last = forward(inputs, before, geo)
    return out.reshape(v.shape), tables, None if last is None else _carry(last, carry)


def _kernel_backward(saved: Residuals, cotangents: Any, options: Options) -> tuple[Any, Any, EvoParams, Any]:
    v, query, params, rows, carry, tables = saved
    d_out, d_last = cotangents
    geo = _geometry(v, query, params, rows, options, backward=True)
    inputs = _inputs(v, query, params, rows)
    after = None if carry is None else _tables(d_last)
    grads = backward(inputs, tables, d_out.reshape(inputs.v.shape), after, geo)
    d_params = jax.tree.map(lambda grad, p: grad.astype(p.dtype), grads.params, params)
    d_query = None if grads.query is None else grads.query.reshape(v.shape)
    d_carry = None if carry is None else _carry(Tables(grads.context, grads.gated), carry)
    return grads.v.reshape(v.shape), d_query, d_params, d_carry


def _reference(v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Any, spec: EvoSpec) -> tuple[Any, Any]:
    if carry is None:
        return evo_chunked(v, query, params, rows, spec), None
    return evo_chunked_from(v, query, params, rows, spec, carry)


def _reference_backward(saved: Residuals, cotangents: Any, spec: EvoSpec) -> tuple[Any, Any, EvoParams, Any]:
    v, query, params, rows, carry, _ = saved

    def run(v: jax.Array, query: Any, params: EvoParams, carry: Any) -> tuple[Any, Any]:
        return _reference(v, query, params, rows, carry, spec)

    return jax.vjp(run, v, query, params, carry)[1](cotangents)


def _tables(carry: Carry) -> Tables:
    """(B, H, D) seen as (B * H, D)."""
    return Tables(*(a.reshape(-1, a.shape[-1]) for a in carry))


def _carry(tables: Tables, like: Any) -> Carry:
    """(B * H, D) as (B, H, D), the shape and dtype of `like`."""
    context, gated = (a.reshape(b.shape).astype(b.dtype) for a, b in zip(tables, like, strict=True))
    return context, gated


def _inputs(v: jax.Array, query: Any, params: EvoParams, rows: Any) -> Inputs:
    """(B, H, L, D) seen as (B * H, L, D), and the rows as (B, L) or (B * H, L)."""
    batch, heads, length, width = v.shape
    flat = (batch * heads, length, width)
    rows = None if rows is None else rows.reshape(-1, length)
    return Inputs(v.reshape(flat), None if query is None else query.reshape(flat), rows, params)


def _geometry(
    v: jax.Array, query: Any, params: EvoParams, rows: Any, options: Options, backward: bool = False
) -> Geometry:
    """Dot products take the operands' own precision: bf16, TF32 (which holds every 16-bit float), or TF32 x 3."""
    dtypes = {jnp.dtype(array.dtype).name for array in jax.tree.leaves((v, query, params))}
    if dtypes == {"bfloat16"}:
        dot_dtype, precision = "bfloat16", "bf16"
    else:
        dot_dtype, precision = "float32", "tf32x3" if "float32" in dtypes else "tf32"
    interpret, hopper = options.mode == "interpret", tuned.for_hopper()
    tokens, several = v.size // v.shape[-1], v.shape[0] * v.shape[1] > 1
    plain = query is None and rows is None and several and v.shape[2] % 64 == 0
    default = evo_launch(
        v.shape[-1], dot_dtype, interpret=interpret, backward=backward, hopper=hopper, tokens=tokens, plain=plain
    )
    kernel, mask = "evo_backward" if backward else "evo_forward", "causal" if options.spec.causal else "full"
    launch = tuned.choose(tuned.Key.of(kernel, precision, v.shape[3], v.shape[2], mask), default, options.own)
    launch = launch if options.chunk is None else replace(launch, block_m=options.chunk)
    spec = options.spec
    return Geometry(v.shape[2], v.shape[3], spec.causal, spec.absent, spec.accum_dtype, dot_dtype, precision, launch)
