"""The cases of `python -m evo_jax check`: what each operation is called with, and the same by whole-array formulas.

B batch, L tokens, N query heads, K key/value heads, D head width. Every case has odd lengths, grouped heads and tokens
that are masked, which hold NaN where the operation promises that it does not matter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.attention import (
    flash_attention,
    head_windows,
    multiscale_attention,
    sliding_window_attention,
    sparse_attention,
    sparse_pattern,
)
from evo_jax.evo import evo_attention, init_evo_params
from evo_jax.linear import linear_attention
from evo_jax.scan import prefix_sum
from reference.dense import AttendInputs, AttendSpec, attend_dense
from reference.evo import evo_dense_from
from reference.evo_params import EvoParams, EvoSpec, EvoState
from reference.linear import LinearSpec, LinearState, linear_dense
from reference.mask import Mask, Pattern
from reference.prefix_scan import prefix_sum_dense

Arrays = Mapping[str, Any]
B, L, N, K, D = 2, 299, 4, 2, 64
WINDOW, BLOCK, WINDOWS = 70, 32, (32, 100)
CUT = 211  # tokens of the second sequence, and where its second document begins


@dataclass(frozen=True, slots=True)
class Case:
    """One way to use an operation; `call` and `exact` map the same named arrays to the same named results.

    Args:
        draw: float32 values by name; those in `wide` stay float32, the others are rounded to the dtype in question.
        call: (arrays, implementation) -> results, through the public function.
        exact: arrays -> results, by formulas on whole arrays, in whatever precision the arrays have.
        gradient: whether the gradients of all arrays are results too.
    """

    op: str
    name: str
    draw: Callable[[np.random.Generator], dict[str, np.ndarray]]
    call: Callable[[Arrays, str | None], dict[str, Any]]
    exact: Callable[[Arrays], dict[str, Any]]
    gradient: bool = True
    wide: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


def _live() -> np.ndarray:
    """(B, L) bool: the second sequence has fewer tokens."""
    return np.arange(L) < np.array([[L], [CUT]])


def _normal(**shapes: tuple[int, ...]) -> Callable[[np.random.Generator], dict[str, np.ndarray]]:
    return lambda rng: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# Prefix sums


def _sums(sum_of: Any, x: Any) -> dict[str, Any]:
    return {"out": sum_of(x), "reverse": sum_of(x, reverse=True, exclusive=True)}


PREFIX = Case(
    "prefix_sum",
    "both ways",
    _normal(x=(B, L, 24)),
    lambda a, how: _sums(partial(prefix_sum, implementation=how), a["x"]),
    lambda a: _sums(prefix_sum_dense, a["x"]),
)


# Evo: values of mean 1, so that no denominator nears 0, where the operation itself is ill-conditioned


def _draw_evo(tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    params = init_evo_params(jax.random.key(1), D)._asdict()
    moved = {name: np.asarray(a) + 0.1 * rng.normal(size=a.shape).astype(np.float32) for name, a in params.items()}
    return {"v": 1 + 0.5 * rng.normal(size=(B, 2, tokens, D)).astype(np.float32), **moved}


def _draw_evo_step(rng: np.random.Generator) -> dict[str, np.ndarray]:
    sums = (100 + rng.normal(size=(2, B, 2, D))).astype(np.float32)
    return {**_draw_evo(1, rng), "sum": sums[0], "gated_sum": 0.5 * sums[1]}


def _params(arrays: Arrays) -> EvoParams:
    return EvoParams(**{name: arrays[name] for name in EvoParams._fields})


def _evo(causal: bool, arrays: Arrays, how: str | None) -> dict[str, Any]:
    live = jnp.asarray(_live())
    v = jnp.where(live[:, None, :, None], arrays["v"], jnp.asarray(jnp.nan, arrays["v"].dtype))
    return {"out": evo_attention(v, _params(arrays), causal=causal, attention_mask=live, implementation=how)}


def _evo_exact(causal: bool, arrays: Arrays) -> dict[str, Any]:
    live = _live()
    count = np.maximum(np.cumsum(live, 1) if causal else live.sum(1, keepdims=True), 1)
    rows = jnp.asarray(np.where(live, count, -count), jnp.float32)[:, None]
    spec = EvoSpec(causal, accum_dtype=arrays["v"].dtype.name)
    return {"out": evo_dense_from(arrays["v"], None, _params(arrays), rows, spec, None)[0]}


def _evo_step(arrays: Arrays, how: str | None) -> dict[str, Any]:
    state = EvoState(arrays["sum"], arrays["gated_sum"], jnp.full(B, L, jnp.int32))
    v, params = arrays["v"], _params(arrays)
    out, state = evo_attention(v, params, initial_state=state, return_state=True, implementation=how)
    return {"out": out, "sum": state.sum, "gated_sum": state.gated_sum}


def _evo_step_exact(arrays: Arrays) -> dict[str, Any]:
    rows, carry = jnp.full((B, 1, 1), L + 1, jnp.float32), (arrays["sum"], arrays["gated_sum"])
    spec = EvoSpec(accum_dtype=arrays["v"].dtype.name)
    out, (total, gated) = evo_dense_from(arrays["v"], None, _params(arrays), rows, spec, carry)  # type: ignore[misc]
    return {"out": out, "sum": total, "gated_sum": gated}


EVO = (
    Case("evo", "causal", partial(_draw_evo, L), partial(_evo, True), partial(_evo_exact, True)),
    Case("evo", "whole", partial(_draw_evo, L), partial(_evo, False), partial(_evo_exact, False)),
    Case("evo", "step", _draw_evo_step, _evo_step, _evo_step_exact, False, ("sum", "gated_sum")),
)


# The softmax family: two documents in the second sequence


def _documents() -> np.ndarray:
    return np.where(_live(), 0, 1).astype(np.int32)


def _attend(function: Any, arrays: Arrays, how: str | None) -> dict[str, Any]:
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    options = {"segment_ids": jnp.asarray(_documents()), "return_residuals": True}
    return dict(zip(("out", "lse"), function(query, key, value, implementation=how, **options), strict=True))


def _attend_exact(mask: Mask, arrays: Arrays) -> dict[str, Any]:
    inputs = AttendInputs(arrays["query"], arrays["key"], arrays["value"], jax.tree.map(jnp.asarray, mask))
    return dict(zip(("out", "lse"), attend_dense(inputs, AttendSpec(D**-0.5, None, 0.0)), strict=True))


def _softmax(op: str, function: Any, pattern: Pattern) -> Case:
    draw = _normal(query=(B, L, N, D), key=(B, L, K, D), value=(B, L, K, D))
    mask = Mask(pattern, q_segments=_documents(), kv_segments=_documents())
    return Case(op, "documents", draw, partial(_attend, function), partial(_attend_exact, mask))


SOFTMAX = (
    _softmax("flash", flash_attention, Pattern()),
    _softmax(
        "sliding_window", partial(sliding_window_attention, window_size=WINDOW), Pattern(windows=((WINDOW - 1, 0),))
    ),
    _softmax("sparse", partial(sparse_attention, block_size=BLOCK), sparse_pattern("sparse", BLOCK, 1, 3, 0)),
    _softmax(
        "multiscale",
        partial(multiscale_attention, window_sizes=WINDOWS),
        Pattern(windows=head_windows("multiscale", N, None, WINDOWS)),
    ),
)


def _decode(arrays: Arrays, how: str | None) -> dict[str, Any]:
    beyond = jnp.logical_not(jnp.asarray(_live()))[:, :, None, None]
    key, value = (jnp.where(beyond, jnp.asarray(jnp.nan, a.dtype), a) for a in (arrays["key"], arrays["value"]))
    lengths = jnp.asarray([L, CUT], jnp.int32)
    return {"out": flash_attention(arrays["query"], key, value, key_value_seq_lengths=lengths, implementation=how)}


def _decode_exact(arrays: Arrays) -> dict[str, Any]:
    lengths = np.array([L, CUT], np.int32)
    return {"out": _attend_exact(Mask(offset=lengths - 1, kv_lengths=lengths), arrays)["out"]}


DECODE = Case(
    "flash",
    "decode",
    _normal(query=(B, 1, N, D), key=(B, L, K, D), value=(B, L, K, D)),
    _decode,
    _decode_exact,
    False,
)


# Linear attention


def _linear(causal: bool, masked: bool, arrays: Arrays, how: str | None) -> dict[str, Any]:
    query, key, value, mask = arrays["query"], arrays["key"], arrays["value"], None
    if masked:
        mask = jnp.asarray(_live())
        fill = lambda a: jnp.where(mask[:, :, None, None], a, jnp.asarray(jnp.nan, a.dtype))  # noqa: E731
        query, key, value = fill(query), fill(key), fill(value)
    options = {"attention_mask": mask, "is_causal": causal, "return_state": True, "implementation": how}
    out, state = linear_attention(query, key, value, initial_state=LinearState(arrays["kv"], arrays["z"]), **options)
    return {"out": out, "kv": state.kv, "z": state.z}


def _linear_exact(causal: bool, masked: bool, arrays: Arrays) -> dict[str, Any]:
    rows = jnp.asarray(np.where(_live(), 1, -1), jnp.int32) if masked else None
    values = (arrays["query"], arrays["key"], arrays["value"], LinearState(arrays["kv"], arrays["z"]))
    out, state = linear_dense(*values, rows, LinearSpec(causal=causal))
    return {"out": out, "kv": state.kv, "z": state.z}


def _draw_linear(tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    given = _normal(query=(B, tokens, N, D), key=(B, tokens, K, D), value=(B, tokens, K, D), kv=(B, K, D, D))(rng)
    return given | {"z": 20 + rng.random((B, K, D)).astype(np.float32)}


def _linear_case(name: str, tokens: int, causal: bool, masked: bool, gradient: bool) -> Case:
    call, exact = partial(_linear, causal, masked), partial(_linear_exact, causal, masked)
    return Case("linear", name, partial(_draw_linear, tokens), call, exact, gradient, ("kv", "z"))


LINEAR = (
    _linear_case("causal", L, True, True, True),
    _linear_case("whole", L, False, True, True),
    _linear_case("step", 1, True, False, False),
)

CASES = (PREFIX, *EVO, *SOFTMAX, DECODE, *LINEAR)
OPS = tuple(dict.fromkeys(case.op for case in CASES))
