"""generate: tokens one after another from any model with a cache, in one jitted loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from evo_jax import sampling, shapes
from evo_jax.sampling import Sampling
from evo_jax.sharding import placed_as

_OP = "generate"


class Generated(NamedTuple):
    """tokens (B, max_new_tokens) int32; lengths (B,) int32, of each up to its stop token; and the model's cache."""

    tokens: Array
    lengths: Array
    cache: Any


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a trace depends on, besides shapes."""

    max_new_tokens: int
    top_k: int | None
    stop_token: int | None
    prefill_chunk: int | None


class _Loop(NamedTuple):
    """After `step` new tokens, of which `token` (B,) is the last and not yet seen by the model."""

    step: Array
    token: Array
    tokens: Array
    lengths: Array
    cache: Any


def generate(
    model_step: Callable[..., tuple[Array, Any]],
    cache: Any,
    prompt: Any,
    *,
    max_new_tokens: int,
    prompt_lengths: Any = None,
    temperature: Any = 0.0,
    top_k: int | None = None,
    top_p: Any = None,
    stop_token: int | None = None,
    key: Array | None = None,
    prefill_chunk: int | None = None,
) -> Generated:
    """Continue every sequence of `prompt` (B, L), until all have met their stop token or have max_new_tokens more.

    The prompt is one call of the model, or a few of `prefill_chunk` tokens, and every later call takes one token: one
    trace each, however many tokens there are. It works eagerly and under jax.jit; the same key gives a sequence the
    same tokens in the same row of any batch.

    Args:
        model_step: (tokens (B, T) int32, cache) -> (logits (B, T, vocabulary), cache of the same shapes and dtypes).
            Arrays that a function closes over are constants of the trace: give the parameters as in
            `jax.tree_util.Partial(step, params)`, or a module that is a pytree, and pass the same function every time.
        cache: what the model made for no tokens, or for those before the prompt, with room for what is to come.
        prompt: integers, L >= 1.
        max_new_tokens: at least 1.
        prompt_lengths: (B,), for prompts padded on the right. The model is then called with `attention_mask` (B, T)
            bool too, False for a token that does not exist: padding, and whatever follows the end of a sequence.
        temperature: divides the logits; 0 takes the likeliest token. It may be traced.
        top_k: sample among the k likeliest tokens alone, and those as likely as the last of them.
        top_p: then among the fewest likeliest tokens whose probabilities sum to top_p, in (0, 1]; it may be traced.
        stop_token: ends its sequence, which then repeats it.
        key: of jax.random; needed unless the temperature is 0.
        prefill_chunk: tokens of the prompt in one call, the rest last; it bounds the memory of a long prompt.

    Returns:
        The new tokens, how many there are of each sequence, the stop token included, and the cache, which has seen
        all but the last of the tokens (where prompt_lengths are given; else a sequence that has ended is still fed).
        Logits that hold a NaN, as those of a full cache do, or nothing but -inf end their sequence: its tokens are -1
        from there on, and do not count. The same holds for a traced prompt length of 0.

    Raises:
        ValueError: a shape or a value out of range, no key where one is needed, or a model that changes its cache's
            shapes or dtypes. TypeError: a dtype.

    >>> import jax, jax.numpy as jnp
    >>> from evo_jax.generate import generate
    >>> def successor(tokens, cache):
    ...     return jax.nn.one_hot((tokens + 1) % 10, 10), cache + tokens.shape[1]
    >>> new = generate(successor, jnp.zeros(2, jnp.int32), [[1, 2, 3], [5, 6, 7]], max_new_tokens=5, stop_token=0)
    >>> new.tokens.tolist(), new.lengths.tolist(), new.cache.tolist()
    ([[4, 5, 6, 7, 8], [8, 9, 0, 0, 0]], [5, 3], [7, 7])
    """
    prompt = _prompt(prompt)
    plan = _Plan(
        shapes.at_least(_OP, "max_new_tokens", max_new_tokens, 1),
        None if top_k is None else shapes.at_least(_OP, "top_k", top_k, 1),
        None if stop_token is None else shapes.at_least(_OP, "stop_token", stop_token, 0),
        None if prefill_chunk is None else shapes.at_least(_OP, "prefill_chunk", prefill_chunk, 1),
    )
    lengths = _lengths(prompt_lengths, *prompt.shape)
    return _run(_as_pytree(model_step), cache, prompt, lengths, _sampling(temperature, top_p, key), plan)


def _prompt(prompt: Any) -> Array:
    prompt = shapes.integers(_OP, "prompt", prompt)
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(f"{_OP}: {prompt.shape=} must be (B, L) with L >= 1; begin an empty text with some token")
    return shapes.int32(prompt)


def _lengths(lengths: Any, batch: int, length: int) -> Array | None:
    if lengths is None:
        return None
    checked = shapes.lengths(_OP, "prompt_lengths", lengths, batch)
    host = _host(lengths)
    if host is not None and (wrong := host[(host < 1) | (host > length)]).size:
        raise ValueError(f"{_OP}: prompt_lengths holds {wrong[0]} and must hold 1 to prompt.shape[1]={length}")
    return checked


def _sampling(temperature: Any, top_p: Any, key: Any) -> Sampling:
    """The checked options; what is known to be greedy leaves no trace of sampling."""
    warmth = _scalar("temperature", temperature, lambda value: value >= 0, "a finite number, at least 0")
    nucleus = None
    if top_p is not None:
        nucleus = _scalar("top_p", top_p, lambda value: 0 < value <= 1, "greater than 0 and at most 1")
    if (host := _host(temperature)) is not None and host == 0:
        return Sampling(None, None, None)
    if key is None:
        raise ValueError(f"{_OP}: {temperature=} needs key=, as from jax.random.key(0); temperature 0 needs none")
    key = jnp.asarray(key)
    rank = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    if key.ndim != rank or (rank and key.dtype != jnp.uint32):
        raise TypeError(f"{_OP}: {key.shape=} of {key.dtype.name} must be one key, as from jax.random.key(0)")
    return Sampling(warmth, nucleus, key)


def _scalar(name: str, value: Any, within: Callable[[float], bool], meaning: str) -> Array:
    """`value` as a float32 scalar, in its range where that is known."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{_OP}: {name} of dtype {array.dtype.name} must be a float")
    if array.shape:
        raise ValueError(f"{_OP}: {name}.shape={array.shape} must be (), one number for all sequences")
    host = _host(value)
    if host is not None and not (np.isfinite(np.float32(host)) and within(float(host))):
        raise ValueError(f"{_OP}: {name}={value} must be {meaning}")
    return array.astype(jnp.float32)


def _host(value: Any) -> np.ndarray | None:
    """`value` where it can be read here, else None."""
    if value is None or (isinstance(value, Array) and not shapes.known(value)):
        return None
    return np.asarray(value)


def _as_pytree(model_step: Any) -> Any:
    """Something callable that jit takes as an argument: a plain function becomes a tree without leaves."""
    if not callable(model_step):
        raise TypeError(f"{_OP}: model_step is a {type(model_step).__name__} and must be callable")
    return jax.tree_util.Partial(model_step) if jax.tree_util.all_leaves([model_step]) else model_step


@partial(jax.jit, static_argnames="plan")
def _run(step: Any, cache: Any, prompt: Array, lengths: Array | None, options: Sampling, plan: _Plan) -> Generated:
    logits, cache = _prefill(step, cache, prompt, lengths, plan)
    if plan.stop_token is not None and plan.stop_token >= logits.shape[-1]:
        raise ValueError(f"{_OP}: stop_token={plan.stop_token} must be below the vocabulary, {logits.shape=}")
    token = sampling.next_tokens(logits, jnp.int32(0), options, plan.top_k)
    tokens = jnp.pad(token[:, None], [(0, 0), (0, plan.max_new_tokens - 1)])
    first = _Loop(jnp.int32(1), token, tokens, (token >= 0).astype(jnp.int32), cache)

    def goes_on(now: _Loop) -> Array:
        return (now.step < plan.max_new_tokens) & _going(now.token, plan).any()

    def advance(now: _Loop) -> _Loop:
        going = _going(now.token, plan)
        mask = None if lengths is None else going[:, None]
        logits, cache = _call(step, jnp.maximum(now.token, 0)[:, None], now.cache, mask)
        token = sampling.next_tokens(logits[:, 0], now.step, options, plan.top_k)
        token = jnp.where(going, token, now.token)
        tokens = jax.lax.dynamic_update_slice_in_dim(now.tokens, token[:, None], now.step, axis=1)
        counted = now.lengths + (going & (token >= 0)).astype(jnp.int32)
        return _Loop(now.step + 1, token, tokens, counted, cache)

    last = jax.lax.while_loop(goes_on, advance, first)
    written = jnp.arange(plan.max_new_tokens) < last.step
    return Generated(jnp.where(written, last.tokens, last.token[:, None]), last.lengths, last.cache)


def _going(token: Array, plan: _Plan) -> Array:
    """(B,) which sequences a last token has not ended."""
    going = token != sampling.NO_TOKEN
    return going if plan.stop_token is None else going & (token != plan.stop_token)


def _prefill(step: Any, cache: Any, prompt: Array, lengths: Array | None, plan: _Plan) -> tuple[Array, Any]:
    """The logits (B, V) after the last token of each prompt, and the cache."""
    length = prompt.shape[1]
    chunk = min(plan.prefill_chunk or length, length)
    logits, _ = _call.eval_shape(step, prompt[:, :chunk], cache, _exists(lengths, 0, chunk))
    last = jnp.full((prompt.shape[0], logits.shape[-1]), jnp.nan, logits.dtype)

    def whole(carry: tuple[Array, Any], start: Array) -> tuple[tuple[Array, Any], None]:
        tokens = jax.lax.dynamic_slice_in_dim(prompt, start, chunk, axis=1)
        return _extend(step, *carry, tokens, lengths, start), None

    starts, rest = jnp.arange(0, length - length % chunk, chunk), length % chunk
    carry = placed_as((last, cache), jax.eval_shape(lambda carry: whole(carry, starts[0])[0], (last, cache)))
    carry = jax.lax.scan(whole, carry, starts)[0] if len(starts) > 1 else whole(carry, starts[0])[0]
    return _extend(step, *carry, prompt[:, -rest:], lengths, jnp.int32(length - rest)) if rest else carry


def _extend(
    step: Any, last: Array, cache: Any, tokens: Array, lengths: Array | None, start: Array
) -> tuple[Array, Any]:
    """One chunk of the prompts; `last` becomes the logits of those that end in it."""
    size = tokens.shape[1]
    logits, cache = _call(step, tokens, cache, _exists(lengths, start, size))
    if lengths is None:
        return logits[:, -1], cache
    place = lengths - 1 - start
    row = jnp.clip(place, 0, size - 1)[:, None, None]
    here = ((place >= 0) & (place < size))[:, None]
    return jnp.where(here, jnp.take_along_axis(logits, row, axis=1)[:, 0], last), cache


def _exists(lengths: Array | None, start: Any, size: int) -> Array | None:
    return None if lengths is None else start + jnp.arange(size)[None] < lengths[:, None]


@jax.jit  # one trace for each shape, wherever in the loops it is called
def _call(step: Any, tokens: Array, cache: Any, mask: Array | None) -> tuple[Array, Any]:
    """One call of the model, checked."""
    given = step(tokens, cache) if mask is None else step(tokens, cache, attention_mask=mask)
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"{_OP}: model_step gave a {type(given).__name__} and must give a pair (logits, cache)")
    logits = shapes.float_array(_OP, "model_step's logits", given[0])
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"{_OP}: model_step gave {logits.shape=} and must give (B, T, V) with {tokens.shape=}")
    _same_cache(cache, given[1])
    return logits, given[1]


def _same_cache(before: Any, after: Any) -> None:
    """ValueError unless both are of the same structure, shapes and dtypes, as a loop needs."""
    if (was := jax.tree.structure(before)) != (now := jax.tree.structure(after)):
        raise ValueError(f"{_OP}: model_step must keep the cache's structure, but gave {now} for {was}")
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        was, now = ((jnp.shape(x), jnp.result_type(x)) for x in (old, new))
        if was != now:
            name = f"cache{jax.tree_util.keystr(path)}"
            raise ValueError(f"{_OP}: model_step must keep {name} as it was, {was[1]}{was[0]}, not {now[1]}{now[0]}")
