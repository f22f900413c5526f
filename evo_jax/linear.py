"""linear_attention: kernel attention by running sums, in O(L) time and memory, with its state in and out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evo_jax import autotune_first, divided_tokens, padding, shapes
from evo_jax.backend import choose
from evo_jax.require_cuda import require_cuda
from evo_jax.sharding import by_shards
from reference.linear import LinearSpec, LinearState, linear_chunked

_OP = "linear_attention"


def linear_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    feature_map: str | Callable[[jax.Array], jax.Array] = "elu",
    is_causal: bool = True,
    attention_mask: Any = None,
    segment_ids: Any = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    eps: float = 1e-6,
    block: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Attention with a kernel feature map phi instead of softmax: running sums, no (T, S) scores.

    `out_i = phi(q_i)^T S_i / (phi(q_i) . z_i + eps)` with `S_i = S_0 + sum_j phi(k_j) v_j^T` and `z_i = z_0 + sum_j
    phi(k_j)`, over j <= i where causal and over all j otherwise; (S_0, z_0) is `initial_state`, or zero. The query is
    not scaled. Sums are float32 (float64 for float64 arrays), whatever the inputs are. Source: "Transformers are RNNs"
    (Katharopoulos et al., 2020) and the complexity package. First derivatives only, in reverse mode; without
    kernels second ones too, but in bfloat16.

    Args:
        query: (B, T, N, D), float16, bfloat16, float32, or float64 where x64 is on.
        key: (B, S, K, D) with N a multiple of K (grouped queries); query head n reads key/value head n // (N // K).
        value: (B, S, K, V). All three of one dtype.
        feature_map: "elu" (elu(x) + 1), "relu", "softmax" (over D), or a function of (..., D) arrays that returns
            positive ones; a function is applied outside the kernels, and may change D.
        is_causal: token i sees tokens up to i, which needs T == S; False: every query sees all keys.
        attention_mask: (B, L), (B, 1, L) or (B, 1, L, 1) where T == S == L; bool, int or float, 1 for a valid token.
            A masked token does not exist: it adds nothing, its output is exactly 0, its NaN is harmless.
        segment_ids: (B, L) integers where T == S == L; the sums start anew wherever the id changes, and a token sees
            its own run of equal ids alone (but NaN and inf may show in neighbouring runs). A negative id is no token,
            as where masked, and cuts no run. `initial_state` belongs to the first run, the returned state to the last.
        initial_state: LinearState(kv (B, K, D, V), z (B, K, D)), float; what an earlier call returned.
        return_state: also return the LinearState after the last token, so that a sequence can be cut anywhere.
        eps: added to the denominator; a query whose features are all 0 gives exactly 0.
        block, num_warps, num_stages: tokens of a kernel's chunk and its Triton launch; the reference ignores them.
        implementation: None, "triton", "reference" or "interpret".

    Returns:
        (B, T, N, V) in the dtype of `query`; with return_state, (that, LinearState in float32 or float64).

    Raises:
        ValueError: shapes that do not fit, an unknown feature map, is_causal with T != S, eps that is negative or not
            finite, or a known mask with values other than 0 and 1 (a traced one gives NaN in its sequence), or known
            segment ids that int32 does not hold, or arrays over Explicit axes of a mesh that cannot be divided so among
            devices. TypeError: dtypes, or eps, is_causal or return_state of another type.
        NotImplementedError: implementation="triton" or "interpret" where the kernel cannot do this case.

    >>> import jax, jax.numpy as jnp, evo_jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 16))
    >>> whole = evo_jax.linear_attention(q, k, v)
    >>> first, state = evo_jax.linear_attention(q[:, :60], k[:, :60], v[:, :60], return_state=True)
    >>> rest = evo_jax.linear_attention(q[:, 60:], k[:, 60:], v[:, 60:], initial_state=state)
    >>> bool(jnp.allclose(jnp.concatenate([first, rest], axis=1), whole, atol=1e-5))
    True
    """
    is_causal, return_state = (
        shapes.boolean(_OP, name, x) for name, x in (("is_causal", is_causal), ("return_state", return_state))
    )
    query, key, value = shapes.attention_arrays(_OP, query, key, value, same_length=is_causal, same_dtype=True)
    rows, bad = _rows(query, key, attention_mask, segment_ids)
    shapes.feature_map(_OP, feature_map)
    if callable(feature_map):
        query, key = _mapped("query", query, feature_map, rows), _mapped("key", key, feature_map, rows)
        feature_map = "identity"
    spec = LinearSpec(feature_map, is_causal, shapes.not_negative(_OP, "eps", eps))
    state = _state(initial_state, key, value)
    launch = shapes.launch(_OP, block=block, num_warps=num_warps, num_stages=num_stages)
    how = choose(_OP, implementation, lambda: _refusal(query, key, value, state, rows, spec), (query, key, value))
    out, last = _run(query, key, value, state, rows, spec, how, launch, return_state)
    if bad is not None:
        poison = lambda x: jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(jnp.nan, x.dtype), x)  # noqa: E731
        out, last = poison(out), jax.tree.map(poison, last)
    return (out, last) if return_state else out


def _rows(query: jax.Array, key: jax.Array, mask: Any, segment_ids: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """(the `rows` of reference.linear, or None; which sequences have a mask that is neither 0 nor 1, or None)."""
    batch, length = query.shape[:2]
    if (mask is not None or segment_ids is not None) and length != key.shape[1]:
        raise ValueError(
            f"{_OP}: attention_mask and segment_ids need as many queries as keys, not {query.shape=} and {key.shape=}; "
            "to leave out keys of a cross-attention, drop them from key and value"
        )
    if mask is None and segment_ids is None:
        return None, None
    rows, bad = jnp.ones((batch, length), jnp.int32), None
    if segment_ids is not None:
        ids = shapes.segment_ids(_OP, segment_ids, batch, length)
        place = jnp.where(ids < 0, -1, jnp.arange(length, dtype=jnp.int32))
        last = jax.lax.cummax(place, axis=1)[:, :-1]  # the last token that there was before each one
        before = jnp.take_along_axis(ids, jnp.maximum(last, 0), axis=1)
        changes = (ids[:, 1:] >= 0) & (last >= 0) & (ids[:, 1:] != before)
        changes = jnp.pad(changes, [(0, 0), (1, 0)])[:, :length]
        rows = 1 + jnp.cumsum(changes, axis=1, dtype=jnp.int32)
        rows = jnp.where(ids < 0, -rows, rows)
    if mask is not None:
        valid, wrong = padding.valid(_OP, mask, batch, length)
        rows, bad = jnp.where(valid, 1, -1) * jnp.abs(rows), None if wrong is None else wrong.any(axis=1)
    return rows, bad


def _mapped(name: str, x: jax.Array, feature_map: Callable[[jax.Array], jax.Array], rows: Any) -> jax.Array:
    """phi(x) by the caller's function, which never sees what a masked token holds."""
    if rows is not None:
        x = jnp.where((rows > 0)[..., None, None], x, jnp.zeros((), x.dtype))
    y = feature_map(x)
    fits = isinstance(y, jax.Array) and y.shape[:-1] == x.shape[:-1] and y.shape[-1] > 0
    if not fits or not jnp.issubdtype(y.dtype, jnp.floating):
        got = f"{y.shape} {y.dtype}" if isinstance(y, jax.Array) else type(y).__name__
        raise ValueError(
            f"{_OP}: feature_map({name} of shape {x.shape}) gave {got}; only the last axis may change, and not to 0"
        )
    return y.astype(x.dtype)


def _state(state: Any, key: jax.Array, value: jax.Array) -> LinearState | None:
    """The initial state, checked, in the dtype of the sums."""
    if state is None:
        return None
    if not isinstance(state, LinearState):
        raise TypeError(f"{_OP}: initial_state is a {type(state).__name__} and must be an evo_jax.LinearState")
    kv, z = (shapes.float_array(_OP, f"initial_state.{name}", a) for name, a in state._asdict().items())
    (batch, _, heads, width), columns = key.shape, value.shape[3]
    for name, array, expected in (("kv", kv, (batch, heads, width, columns)), ("z", z, (batch, heads, width))):
        if array.shape != expected:
            raise ValueError(
                f"{_OP}: initial_state.{name}.shape={array.shape} must be {expected} for {key.shape=}, {value.shape=}"
            )
    dtype = shapes.widest(jnp.float32, value.dtype)
    return LinearState(kv.astype(dtype), z.astype(dtype))


def _refusal(query: Any, key: Any, value: Any, state: Any, rows: Any, spec: LinearSpec) -> str | None:
    from pallas_kernels import linear  # Pallas is imported only where a kernel may run

    return linear.refusal(query, key, value, state, rows, spec)


@partial(jax.jit, static_argnums=(5, 6, 7, 8), inline=True)
def _run(query, key, value, state, rows, spec: LinearSpec, how: str, launch: Any, keep_state: bool) -> Any:
    """(out, last state or None). Jitted, so that an eager call is one compiled program too."""
    run = partial(_on_one_device, spec=spec, how=how, launch=launch, keep_state=keep_state)
    q = "t" if spec.causal or rows is not None else "q"  # else queries and keys are divided each for itself
    arrays, axes = (query, key, value, state, rows), (f"b{q}h", "btk", "btk", "bk", "bt")
    return by_shards(_OP, run, arrays, axes, (f"b{q}h", "bk"))


def _on_one_device(
    query, key, value, state, rows, over: Any, spec: LinearSpec, how: str, launch: Any, keep_state: bool
) -> Any:
    if over is not None:
        if not spec.causal and rows is not None:
            raise ValueError(f"{_OP}: tokens can be divided among devices with is_causal, or without mask and segments")
        state, last = divided_tokens.linear_states(key, value, state, rows, spec, over)
        out, _ = _on_one_device(query, key, value, state, rows, None, spec, how, launch, False)
        return out, last if keep_state else None
    if how == "reference":
        out, last = linear_chunked(query, key, value, state, rows, spec)
        return out, last if keep_state else None
    from pallas_kernels import linear

    query = require_cuda(query, _OP) if how == "triton" else query
    run = partial(linear.linear, spec=spec, mode=how, keep_state=keep_state, **dict(launch))
    autotune_first.before(run, query, key, value, None, rows)
    return run(query, key, value, state, rows)
