"""evo_attention, the gated prefix sum, and the parameters it takes."""

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import autotune_first, divided_tokens, padding, shapes
from evo_jax.backend import choose
from evo_jax.require_cuda import require_cuda
from evo_jax.sharding import by_shards
from reference.evo import Carry, evo_chunked, evo_chunked_from
from reference.evo_chunk import no_carry
from reference.evo_params import EvoParams, EvoSpec, EvoState

_OP = "evo_attention"


def init_evo_params(key: jax.Array, head_dim: int, dtype: Any = jnp.float32) -> EvoParams:
    """Random parameters for heads of width D = `head_dim`, shared by all heads of a layer; a pytree of ten arrays.

    Kernels (D, D) and biases (D,) are uniform in (-1/sqrt(D), 1/sqrt(D)) as in the original; the LayerNorm is 1 and 0.

    Raises:
        ValueError: head_dim below 1, or float64 while x64 is off. TypeError: a dtype that is not a float.

    >>> import jax, evo_jax
    >>> params = evo_jax.init_evo_params(jax.random.key(0), 64)
    >>> params.q_kernel.shape, params.norm_scale.shape
    ((64, 64), (64,))
    """
    head_dim = shapes.integer("init_evo_params", "head_dim", head_dim)
    if head_dim < 1:
        raise ValueError(f"init_evo_params: {head_dim=} must be at least 1")
    dtype = shapes.float_dtype("init_evo_params", "dtype", dtype)
    draw_dtype, bound = shapes.widest(dtype, jnp.float32), 1 / math.sqrt(head_dim)
    arrays = {"norm_scale": jnp.ones(head_dim, dtype), "norm_bias": jnp.zeros(head_dim, dtype)}
    names = [name for name in EvoParams._fields if name not in arrays]
    for name, leaf_key in zip(names, jax.random.split(key, len(names)), strict=True):
        shape = (head_dim,) * (2 if name.endswith("kernel") else 1)
        arrays[name] = jax.random.uniform(leaf_key, shape, draw_dtype, -bound, bound).astype(dtype)
    return EvoParams(**arrays)


def evo_attention(
    v: Any,
    params: EvoParams | None = None,
    *,
    query: Any = None,
    causal: bool = True,
    attention_mask: Any = None,
    mask_semantics: str = "padding",
    accum_dtype: Any = None,
    initial_state: EvoState | None = None,
    return_state: bool = False,
    block_m: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    implementation: str | None = None,
) -> Any:
    """EvoAttention's gated prefix sum over the tokens of each head, in O(L) time and memory.

    With `lin_n(a) = a @ n_kernel + n_bias`, and c, S running sums over the tokens (causal) or sums over all of them:
    `g = sigmoid(lin_gate(c / t))`, `S = sum(g v)`, `r = lin_q(query) / (|S| + |lin_local(v)| + 1e-8)`,
    `f = sigmoid(lin_final(silu(r) v))`, `out = LayerNorm(f c)`. It is neither softmax nor a function of query-key
    products. Source: the evo-attn package. First derivatives only, in reverse mode; without kernels
    second ones too, reverse over reverse, but in bfloat16.

    Args:
        v: (B, H, L, D) values; float16, bfloat16, float32, or float64 where x64 is on. Any size may be 0 but D.
        params: EvoParams for width D, in any float dtype. None: the parameters that
            `init_evo_params(jax.random.key(0), D)` draws, once, so that two calls agree.
        query: like `v`; None for `v` itself.
        causal: token t sees tokens up to t; False: every token sees all.
        attention_mask: (B, L), (B, 1, L) or (B, 1, L, 1); bool, int or float, 1 for a valid token.
        mask_semantics: "padding": a masked token does not exist (means are over valid tokens, its output is exactly
            0, its NaN is harmless). "multiply": the original's arithmetic (v * mask, means over positions, a row of
            zeros counts as masked and gives norm_bias); the mask may be fractional.
        accum_dtype: what both sums are carried in; default float32, or float64 for float64 `v` or a float64
            `initial_state`. float64 needs x64.
        initial_state: EvoState(sum (B, H, D), gated_sum (B, H, D), count (B,)), what an earlier call returned: the
            tokens come after those that it holds. It has gradients, `count` none. Needs causal=True.
        return_state: also return the EvoState after the last token, so that a sequence can be cut anywhere. Needs
            causal=True.
        block_m, num_warps, num_stages: rows of a kernel's chunk and its Triton launch; the reference ignores them.
        implementation: None, "triton", "reference" or "interpret".

    Returns:
        (B, H, L, D) in the dtype of `v`; elementwise maths and LayerNorm are in float32 (float64 for float64 `v`).
        With return_state, (that, EvoState in the accumulation dtype); after 0 tokens the state is `initial_state`.

    Raises:
        ValueError: shapes that do not fit, a known mask with values other than 0 and 1 under "padding" (a traced one
            gives NaN from there on), a state without causal=True or with a count below 0, a 64-bit accum_dtype while
            x64 is off, or arrays over Explicit axes of a mesh that cannot be divided so among devices.
        TypeError: dtypes, a state that is no EvoState, or causal or return_state that are no bools.
        NotImplementedError: implementation="triton" or "interpret" where the kernel cannot do this case.

    >>> import jax, jax.numpy as jnp, evo_jax
    >>> v = jax.random.normal(jax.random.key(1), (2, 4, 100, 16))
    >>> out = evo_jax.evo_attention(v, evo_jax.init_evo_params(jax.random.key(0), 16))
    >>> out.shape, bool(jnp.array_equal(out, evo_jax.evo_attention(v)))
    ((2, 4, 100, 16), True)
    >>> first, state = evo_jax.evo_attention(v[:, :, :70], return_state=True)
    >>> rest = evo_jax.evo_attention(v[:, :, 70:], initial_state=state)
    >>> bool(jnp.allclose(jnp.concatenate([first, rest], axis=2), evo_jax.evo_attention(v), atol=1e-4))
    True
    """
    v, query = shapes.values(_OP, v, query)
    params = shapes.evo_params(_OP, _default_params(v.shape[3]) if params is None else params, v.shape[3])
    shapes.one_of(_OP, "mask_semantics", mask_semantics, ("padding", "multiply"))
    return_state = shapes.boolean(_OP, "return_state", return_state)
    causal = shapes.boolean(_OP, "causal", causal)
    spec = EvoSpec(causal, mask_semantics == "padding", _accum_dtype(v, initial_state, accum_dtype))
    launch = shapes.launch(_OP, block_m=block_m, num_warps=num_warps, num_stages=num_stages)
    state = _state(initial_state, return_state, v, spec)
    before = None if state is None else state.count
    v, rows = padding.resolve(_OP, v, attention_mask, mask_semantics, spec.causal, before)
    arrays = (v,) if query is None else (v, query)
    how = choose(_OP, implementation, lambda: _refusal(v, params, spec), arrays)
    carry = None if state is None else (state.sum, state.gated_sum)
    out, last = _run(v, query, params, rows, carry, spec, how, launch)
    if state is None or last is None or not return_state:
        return out
    count = padding.count_after(_OP, state.count, attention_mask, mask_semantics, v.shape[2])
    return out, EvoState(last[0], last[1], count)


def init_evo_state(batch_size: int, num_heads: int, head_dim: int, dtype: Any = jnp.float32) -> EvoState:
    """The state before any token: zeros. `dtype` is that of the sums, float32, or float64 where x64 is on."""
    shape = (batch_size, num_heads, head_dim)
    return EvoState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32))


def _accum_dtype(v: jax.Array, state: Any, dtype: Any) -> str:
    """The dtype asked for, else the widest of float32, `v` and the state."""
    sums = [getattr(state, name, None) for name in ("sum", "gated_sum")]
    if dtype is None and any(getattr(a, "dtype", None) == np.float64 for a in sums):
        dtype = np.float64
    return shapes.accum_dtype(_OP, v, dtype)


def _state(state: Any, wanted: bool, v: jax.Array, spec: EvoSpec) -> EvoState | None:
    """The initial state, checked, in the dtype of the sums; zeros for None if one is `wanted` in the end."""
    if state is None and not wanted:
        return None
    if not spec.causal:
        raise ValueError(
            f"{_OP}: initial_state and return_state need causal=True: only then is a sequence cut in order"
        )
    (batch, heads, _, width), dtype = v.shape, jnp.dtype(spec.accum_dtype)
    if state is None:
        return init_evo_state(batch, heads, width, dtype)
    if not isinstance(state, EvoState):
        raise TypeError(f"{_OP}: initial_state is a {type(state).__name__} and must be an evo_jax.EvoState")
    sums = [shapes.float_array(_OP, f"initial_state.{name}", getattr(state, name)) for name in state._fields[:2]]
    for name, array in zip(state._fields, sums, strict=False):
        if array.shape != (batch, heads, width):
            raise ValueError(
                f"{_OP}: initial_state.{name}.shape={array.shape} must be {(batch, heads, width)} for {v.shape=}"
            )
    count = shapes.lengths(_OP, "initial_state.count", state.count, batch)
    if shapes.known(count) and (np.asarray(count) < 0).any():
        raise ValueError(f"{_OP}: initial_state.count={np.asarray(count)} must be at least 0")
    return EvoState(sums[0].astype(dtype), sums[1].astype(dtype), count)


@cache
def _default_params(head_dim: int) -> EvoParams:
    """Drawn while tracing, not by the traced program, so that they are the same numbers eagerly and under jit."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, init_evo_params(jax.random.key(0), head_dim))


def _refusal(v: jax.Array, params: EvoParams, spec: EvoSpec) -> str | None:
    from pallas_kernels import evo  # Pallas is imported only where a kernel may run

    params_dtype = shapes.widest(*(a.dtype for a in params))
    return evo.refusal(jax.ShapeDtypeStruct(v.shape, v.dtype), params_dtype, spec)


@partial(jax.jit, static_argnums=(5, 6, 7), inline=True)
def _run(
    v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Carry | None, spec: EvoSpec, how: str, launch: Any
) -> tuple[jax.Array, Carry | None]:
    """(out, the carry after it or None). Jitted, so that an eager call is one compiled program too."""
    run = partial(_on_one_device, spec=spec, how=how, launch=launch)
    arrays, axes = (v, query, params, rows, carry), ("bht", "bht", "", "bht", "bh")
    return by_shards(_OP, run, arrays, axes, ("bht", "bh"))


def _on_several(
    v: jax.Array, query: Any, params: EvoParams, rows: Any, carry: Carry | None, over: Any, run: Any
) -> tuple[jax.Array, Carry | None]:
    """Of part of the tokens: c of those before comes first, and only then, from the gates, S of those before."""
    spec, (batch, _, tokens, _) = run.keywords["spec"], v.shape
    if not spec.causal:
        raise ValueError(f"{_OP}: tokens can be divided among devices only with causal=True")
    if rows is None:
        number = divided_tokens.first(over, tokens) + jnp.arange(1, tokens + 1, dtype=jnp.int32)
        rows = jnp.broadcast_to(number.astype(jnp.float32), (batch, 1, tokens))
    c, s = no_carry(v, spec) if carry is None else carry
    counted = jnp.where((rows < 0)[..., None], jnp.zeros((), v.dtype), v) if spec.absent else v
    before, total = divided_tokens.sums(counted.sum(2, dtype=c.dtype), over)
    gated = run(v, query, params, rows, (c + before, jnp.zeros_like(s)), None)[1][1]
    gated_before, gated_total = divided_tokens.sums(gated, over)
    out, _ = run(v, query, params, rows, (c + before, s + gated_before), None)
    return out, None if carry is None else (c + total, s + gated_total)


def _on_one_device(
    v: jax.Array,
    query: Any,
    params: EvoParams,
    rows: Any,
    carry: Carry | None,
    over: Any,
    spec: EvoSpec,
    how: str,
    launch: Any,
) -> tuple[jax.Array, Carry | None]:
    if over is not None:
        run = partial(_on_one_device, spec=spec, how=how, launch=launch)
        return _on_several(v, query, params, rows, carry, over, run)
    if how == "reference":
        if carry is not None:
            return evo_chunked_from(v, query, params, rows, spec, carry)
        return evo_chunked(v, query, params, rows, spec), None
    from pallas_kernels import evo

    v = require_cuda(v, _OP) if how == "triton" else v
    if carry is None or v.shape[2] > 1:  # a step of one token is another kernel
        autotune_first.before(partial(evo.evo, spec=spec, mode=how, **dict(launch)), v, query, params, None)
    return evo.evo_from(v, query, params, rows, carry, evo.Options(spec, how, **dict(launch)))
