"""Softmax attention in O(T + S) memory: flash, sliding-window, block-sparse and multi-scale, one family of masks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from evo_jax import attention_masks, autotune_first, divided_tokens, shapes
from evo_jax.backend import choose
from evo_jax.require_cuda import require_cuda
from evo_jax.sharding import by_shards
from evo_jax.signatures import spelled_out
from reference.blocked import attend_blocked
from reference.dense import AttendInputs
from reference.logits import AttendSpec, dropout_seeds
from reference.mask import FAR, Mask, Pattern

DEFAULT_WINDOWS = (256, 512, 1024)


class AttentionOptions(TypedDict, total=False):
    """What flash, sliding-window, sparse and multi-scale attention take besides their pattern.

    is_causal: token i sees tokens up to i (True, the default); False: the pattern alone decides.
    q_offset: position of query 0 among the keys, an integer of at most 2**29 either way or (B,) of them; None: the last
        query is on the last key.
    bias: float, broadcastable to (B, N, T, S), added to the scores after soft cap; exact gradient; -inf hides a key, as
        does what is under -2.3e38, finfo(float32).min with it.
    mask: bool, broadcastable to (B, N, T, S), False hides a key, besides causality and pattern.
    attention_mask: (B, S), (B, 1, S) or (B, 1, S, 1), 1 for a valid key; where T < S the queries are the last T tokens.
        A masked token does not exist: no query sees it, its output row is 0, its NaN is harmless. NaN and inf of one
        that exists may show in all rows of its sequence, for 0 * NaN is NaN, as in a product of matrices.
    segment_ids: (B, L) integers below 2**31 where T == S == L, or a pair ((B, T), (B, S)); tokens see their own segment
        alone, and a negative id means that there is no token.
    query_seq_lengths, key_value_seq_lengths: (B,) integers; tokens from there on do not exist; cut to 0..T and 0..S.
    scale: factor of the scores; None for 1 / sqrt(D).
    logits_soft_cap: c bends scores to c * tanh(score / c).
    sinks: (N,) floats, one more score per head that takes part in the softmax and has no value; exact gradient.
    dropout_rate, dropout_seed: weights are dropped, and the others divided by 1 - rate, by a hash of (seed, b, n, i,
        j), the same in every implementation; only where a seed (int or integer scalar array) is given.
    return_residuals: return (out, lse): the log-sum-exp of the scores, sink included, (B, T, N) float32.
    block_q, block_k, num_warps, num_stages: tiles and launch of the kernels, forward and backward alike; the reference
        ignores them.
    implementation: None, "triton", "reference" or "interpret".
    """

    is_causal: bool
    q_offset: Any
    bias: Any
    mask: Any
    attention_mask: Any
    segment_ids: Any
    query_seq_lengths: Any
    key_value_seq_lengths: Any
    scale: float | None
    logits_soft_cap: float | None
    sinks: Any
    dropout_rate: float
    dropout_seed: Any
    return_residuals: bool
    block_q: int | None
    block_k: int | None
    num_warps: int | None
    num_stages: int | None
    implementation: str | None


_spelled_out = spelled_out(AttentionOptions, is_causal=True, dropout_rate=0.0, return_residuals=False)


@_spelled_out
def flash_attention(query: Any, key: Any, value: Any, **options: Unpack[AttentionOptions]) -> Any:
    """Softmax attention over all keys, or all up to the query's own position; O(T + S) memory, exact.

    `out_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j`. Scores, softmax and sums are float32 (float64 for
    float64 arrays). A query that may see no key gives exactly 0, and nothing flows back through it. First derivatives
    only, in reverse mode; without kernels second ones too, forward over reverse, as `jax.hessian` takes them, and
    reverse over reverse where sequences are so short that no loop is needed (ValueError otherwise). Source:
    "FlashAttention-2" (Dao, 2023).

    Args:
        query: (B, T, N, D), float16, bfloat16, float32, or float64 where x64 is on.
        key: (B, S, K, D) with N a multiple of K (grouped queries); query head n reads key/value head n // (N // K).
        value: (B, S, K, V), of the key's dtype, which may differ from the query's; computed in the wider of both.
        options: those of AttentionOptions.

    Returns:
        (B, T, N, V) in the dtype of `query`; with return_residuals, (that, (B, T, N) float32 or float64).

    Raises:
        ValueError: shapes that do not fit, or values out of range (a traced attention_mask other than 0 and 1, or a
            traced segment id of 2**31 or more, gives NaN in its sequence), or arrays over Explicit axes of a mesh that
            cannot be divided so among devices. TypeError: dtypes, or an option that is
            unknown or of another type.
        NotImplementedError: implementation="triton" or "interpret" where the kernels cannot do this case.

    >>> import jax, evo_jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 16))
    >>> out, lse = evo_jax.flash_attention(q, k[:, :, :2], v[:, :, :2], is_causal=True, return_residuals=True)
    >>> out.shape, lse.shape
    ((2, 100, 4, 16), (2, 100, 4))
    """
    return _attend("flash_attention", query, key, value, lambda *_: Pattern(), options)


@_spelled_out
def sliding_window_attention(
    query: Any, key: Any, value: Any, *, window_size: int, **options: Unpack[AttentionOptions]
) -> Any:
    """Softmax attention over the last `window_size` tokens, the current one included: 0 <= i - j < window_size.

    With is_causal=False over both sides: |i - j| < window_size. O(T * window_size) time, O(T + S) memory. Arrays,
    options, result and errors are those of flash_attention. Source: "Longformer" (Beltagy et al., 2020).

    >>> import jax, evo_jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 16))
    >>> evo_jax.sliding_window_attention(q, k, v, window_size=32).shape
    (2, 100, 4, 16)
    """
    op = "sliding_window_attention"
    reach = min(shapes.at_least(op, "window_size", window_size, 1) - 1, FAR)
    return _attend(op, query, key, value, lambda *_: Pattern(windows=((reach, reach),)), options)


@_spelled_out
def sparse_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    block_size: int = 64,
    num_global_tokens: int = 1,
    num_random_blocks: int = 3,
    seed: int = 0,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Softmax attention over a band, a few global tokens and random blocks of keys; time O(T * live blocks).

    A query sees the keys with |i - j| <= block_size // 2; the first `num_global_tokens` tokens, which themselves see
    everything; and `num_random_blocks` blocks of `block_size` keys, drawn without replacement for each block of queries
    and key/value head among the blocks that neither band nor global tokens touch. Where causal, of all these only keys
    up to its own. `seed` draws, the same in every implementation. Arrays, further options, result and errors are those
    of flash_attention. Source: "Big Bird" (Zaheer et al., 2020).

    >>> import jax, evo_jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 16))
    >>> evo_jax.sparse_attention(q, k, v, block_size=16, num_random_blocks=2).shape
    (2, 100, 4, 16)
    """
    op = "sparse_attention"
    pattern = sparse_pattern(op, block_size, num_global_tokens, num_random_blocks, seed)
    return _attend(op, query, key, value, lambda *_: pattern, options)


@_spelled_out
def multiscale_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    local_heads: int | None = None,
    window_sizes: tuple[int, ...] = DEFAULT_WINDOWS,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Softmax attention whose heads differ in reach: the first `local_heads` have windows, the others see everything.

    The local heads (default N // 2) share the windows in equal runs, in order; the remainder goes to the last window.
    All heads run in one launch. With the default windows and fewer local heads than windows, the largest are used.
    Arrays, further options, result and errors are those of flash_attention.

    Raises:
        ValueError: local_heads out of 0..N, or fewer local heads than windows given.

    >>> import jax, evo_jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 16))
    >>> evo_jax.multiscale_attention(q, k, v, local_heads=2, window_sizes=(8, 32)).shape
    (2, 100, 4, 16)
    """
    op = "multiscale_attention"

    def pattern(heads: int) -> Pattern:
        return Pattern(windows=head_windows(op, heads, local_heads, window_sizes))

    return _attend(op, query, key, value, pattern, options)


def sparse_pattern(op: str, block_size: int, num_global_tokens: int, num_random_blocks: int, seed: int) -> Pattern:
    """The pattern of block-sparse attention."""
    size = min(shapes.at_least(op, "block_size", block_size, 1), FAR)
    return Pattern(
        windows=((size // 2, size // 2),),
        num_global=min(shapes.at_least(op, "num_global_tokens", num_global_tokens, 0), FAR),
        block_size=size,
        num_random=shapes.at_least(op, "num_random_blocks", num_random_blocks, 0),
        seed=shapes.at_least(op, "seed", seed, 0),
    )


def head_windows(op: str, heads: int, local_heads: Any, window_sizes: Any) -> tuple[tuple[int, int], ...]:
    """(left, right) of every head of multi-scale attention."""
    if not isinstance(window_sizes, tuple | list):
        raise TypeError(f"{op}: {window_sizes=} must be a tuple of ints")
    sizes = tuple(shapes.at_least(op, "window_sizes", size, 1) for size in window_sizes)
    local = heads // 2 if local_heads is None else shapes.at_least(op, "local_heads", local_heads, 0)
    if local > heads:
        raise ValueError(f"{op}: {local_heads=} must be at most the {heads} query heads")
    if local < len(sizes):
        if sizes != DEFAULT_WINDOWS:
            raise ValueError(f"{op}: {window_sizes=} are more than the {local} local heads (local_heads={local_heads})")
        sizes = sizes[len(sizes) - local :]
    if not sizes and local:
        raise ValueError(f"{op}: {window_sizes=} is empty and there are {local} local heads; or give local_heads=0")
    share = local // len(sizes) if sizes else 0
    local_windows = [sizes[min(head // share, len(sizes) - 1)] - 1 for head in range(local)]
    reaches = [*local_windows, *[FAR] * (heads - local)] or [FAR]  # without heads, one for all of them
    return tuple((min(reach, FAR), min(reach, FAR)) for reach in reaches)


def _attend(
    op: str, query: Any, key: Any, value: Any, pattern: Callable[[int], Pattern], options: AttentionOptions
) -> Any:
    """Check, build the mask, choose an implementation, run."""
    unknown = [name for name in options if name not in AttentionOptions.__annotations__]
    if unknown:
        choices = ", ".join(AttentionOptions.__annotations__)
        raise TypeError(f"{op}: unknown option {', '.join(map(repr, unknown))}; it takes {choices}")
    residuals = shapes.boolean(op, "return_residuals", options.get("return_residuals", False))
    query, key, value = shapes.attention_arrays(op, query, key, value)
    mask, bias, bad = attention_masks.build(op, query, key, pattern(query.shape[2]), options)
    rate, seed = _dropout(op, options)
    scale, soft_cap = shapes.scale(op, options.get("scale")), shapes.soft_cap(op, options.get("logits_soft_cap"))
    spec = AttendSpec(query.shape[3] ** -0.5 if scale is None else scale, soft_cap, rate)
    inputs = AttendInputs(query, key, value, mask, bias, _sinks(op, query, options))
    names = ("block_q", "block_k", "num_warps", "num_stages")
    launch = shapes.launch(op, **{name: options.get(name) for name in names})
    how = choose(op, options.get("implementation"), lambda: _refusal(inputs, spec), (query, key, value))
    out, lse = _run(inputs, seed, spec, how, launch, op)
    if bad is not None:
        out, lse = (
            jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(jnp.nan, x.dtype), x) for x in (out, lse)
        )
    return (out, lse) if residuals else out


def _sinks(op: str, query: jax.Array, options: AttentionOptions) -> jax.Array | None:
    if options.get("sinks") is None:
        return None
    sinks = shapes.float_array(op, "sinks", options.get("sinks"))
    if sinks.shape != query.shape[2:3]:
        raise ValueError(f"{op}: sinks.shape={sinks.shape} must be (N,) = {query.shape[2:3]} for {query.shape=}")
    return sinks


def _dropout(op: str, options: AttentionOptions) -> tuple[float, jax.Array | None]:
    """(rate, seed as uint32); (0, None) where nothing is dropped."""
    rate, seed = shapes.dropout_rate(op, options.get("dropout_rate", 0.0)), options.get("dropout_seed")
    if seed is None or not rate:
        return 0.0, None
    seed = jnp.asarray(seed & 0xFFFFFFFF, jnp.uint32) if isinstance(seed, int) else jnp.asarray(seed)
    if seed.shape or not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(
            f"{op}: dropout_seed must be an integer or a scalar array of one, not {seed.dtype} {seed.shape}"
        )
    return rate, seed.astype(jnp.uint32)


def _refusal(inputs: AttendInputs, spec: AttendSpec) -> str | None:
    from pallas_kernels import attend  # Pallas is imported only where a kernel may run

    return attend.refusal(inputs, spec)


@partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _run(
    inputs: AttendInputs, seed: Any, spec: AttendSpec, how: str, launch: Any, op: str
) -> tuple[jax.Array, jax.Array]:
    """(out, lse). Jitted, so that an eager call is one compiled program too."""
    if seed is not None:
        inputs = inputs._replace(seeds=dropout_seeds(seed, inputs.query.shape[0], inputs.query.shape[2]))
    pattern = inputs.mask.pattern
    h, k = ("h", "k") if len(pattern.windows) == 1 and not pattern.num_random else (".", ".")  # patterns count heads
    mask = Mask(pattern, "b", "b", "b", "bt", "bs", f"b{h}ts")
    axes = AttendInputs(f"bt{h}", f"bs{k}", f"bs{k}", mask, f"b{h}ts", h, f"b{h}")
    run = partial(_on_one_device, spec=spec, how=how, launch=launch, op=op)
    return by_shards(op, run, (inputs,), (axes,), (f"bt{h}", f"bt{h}"))


def _on_one_device(
    inputs: AttendInputs, over: Any, spec: AttendSpec, how: str, launch: Any, op: str
) -> tuple[jax.Array, jax.Array]:
    if over is not None:
        inputs = divided_tokens.queries_of(inputs, over)
    if how == "reference":
        return attend_blocked(inputs, spec)
    from pallas_kernels import attend

    if how == "triton":
        inputs = inputs._replace(query=require_cuda(inputs.query, op))
    run = partial(attend.attend, spec=spec, mode=how, **dict(launch))
    pattern = inputs.mask.pattern
    if inputs.mask.offset is not None:  # its values are not known: as without lengths, the last query on the last key
        pattern = replace(pattern, offset=inputs.key.shape[1] - inputs.query.shape[1])
    autotune_first.before(run, inputs._replace(mask=Mask(pattern)))
    return run(inputs)
