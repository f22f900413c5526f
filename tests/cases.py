"""The one table of cases: shapes, masks and dtypes that every implementation is tested on."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reference.linear import LinearState


@dataclass(frozen=True, slots=True)
class EvoCase:
    """One call of evo_attention: `length` L, `width` D, and what is odd about it."""

    length: int
    width: int
    causal: bool = True
    mask: str | None = None  # None | "right" | "left" | "interior" | "sequence" (one sequence wholly masked)
    dtype: str = "float32"
    own_query: bool = False  # query is given and differs from v
    semantics: str = "padding"
    batch: int = 2
    heads: int = 2

    def __str__(self) -> str:
        parts = [f"L{self.length}", f"D{self.width}", "causal" if self.causal else "full", self.dtype]
        parts += [f"mask_{self.mask}"] * (self.mask is not None) + ["query"] * self.own_query
        return "-".join(parts + ["multiply"] * (self.semantics == "multiply"))


LENGTHS = (0, 1, 2, 63, 64, 65, 100, 257)
WIDTHS = (1, 7, 12, 16, 64, 80, 128)

EVO_CASES: tuple[EvoCase, ...] = (
    # Every length and every width, then every option on a ragged length.
    *(EvoCase(length, 16) for length in LENGTHS),
    *(EvoCase(100, width) for width in WIDTHS if width != 16),
    *(EvoCase(length, 12, causal=False) for length in (0, 1, 65)),
    EvoCase(100, 80, causal=False),
    EvoCase(257, 64),
    EvoCase(33, 200, batch=1, heads=1),
    EvoCase(65, 16, own_query=True),
    EvoCase(65, 80, own_query=True, mask="interior"),
    EvoCase(65, 16, own_query=True, causal=False, mask="left"),
    *(EvoCase(100, 16, mask=mask) for mask in ("right", "left", "interior", "sequence")),
    *(EvoCase(100, 7, causal=False, mask=mask) for mask in ("left", "sequence")),
    EvoCase(100, 16, mask="interior", semantics="multiply"),
    EvoCase(65, 12, mask="left", semantics="multiply", causal=False),
    *(EvoCase(100, 64, dtype=dtype) for dtype in ("bfloat16", "float16")),
    EvoCase(100, 80, dtype="bfloat16", mask="interior"),
    EvoCase(65, 128, dtype="bfloat16"),
    EvoCase(65, 16, dtype="bfloat16", causal=False, own_query=True),
)


def padding_mask(kind: str | None, batch: int, length: int) -> np.ndarray | None:
    """(batch, length) bool, True = valid; sequences of the batch differ where the kind allows."""
    if kind is None:
        return None
    t = np.arange(length)
    rows = {
        "right": lambda b: t < max(length - 3 - 5 * b, 1),
        "left": lambda b: t >= min(3 + 5 * b, length - 1),
        "interior": lambda b: (t % 5 != 1 + b) & ((t < 20) | (t >= 30 + b)),
        "sequence": lambda b: np.full(length, b % 2 == 1),
    }[kind]
    return np.stack([rows(b) for b in range(batch)])


def evo_inputs(case: EvoCase, seed: int = 0) -> tuple[jax.Array, jax.Array | None, np.ndarray | None, jax.Array]:
    """(v, query or None, mask or None, cotangent): standard normal values in the case's dtype."""
    shape = (case.batch, case.heads, case.length, case.width)
    keys = jax.random.split(jax.random.key(seed), 3)
    v, query, cotangent = (jax.random.normal(key, shape, jnp.float32).astype(case.dtype) for key in keys)
    return v, query if case.own_query else None, padding_mask(case.mask, case.batch, case.length), cotangent


@dataclass(frozen=True, slots=True)
class LinearCase:
    """One call of linear attention: `length` L (S of keys where `keys` differs), widths D and V, and what is odd."""

    length: int
    width: int
    causal: bool = True
    feature_map: str = "elu"
    mask: str | None = None  # as in EvoCase
    runs: str | None = None  # None: one run | "few", some ending at a multiple of 64 | "many", of 7 tokens
    state: bool = False  # an initial state is given
    dtype: str = "float32"
    value_width: int | None = None  # V, None: D
    keys: int | None = None  # S, None: L
    heads: tuple[int, int] = (2, 2)  # (N, K)
    batch: int = 2

    def __str__(self) -> str:
        parts = [f"L{self.length}"] + [f"S{self.keys}"] * (self.keys is not None) + [f"D{self.width}"]
        parts += [f"V{self.value_width}"] * (self.value_width is not None) + [f"N{self.heads[0]}K{self.heads[1]}"]
        parts += ["causal" if self.causal else "full", self.feature_map, self.dtype]
        parts += [f"mask_{self.mask}"] * (self.mask is not None) + [f"runs_{self.runs}"] * (self.runs is not None)
        return "-".join(parts + ["state"] * self.state)


LINEAR_CASES: tuple[LinearCase, ...] = (
    # Every length with a state and every width, then every option on a ragged length.
    *(LinearCase(length, 16, state=True) for length in LENGTHS),
    *(LinearCase(100, width) for width in (*WIDTHS, 256)),
    LinearCase(100, 16, value_width=48, heads=(4, 2), state=True),
    LinearCase(65, 80, value_width=24, heads=(4, 1), feature_map="softmax"),
    LinearCase(65, 1, value_width=7, state=True),
    LinearCase(130, 16, value_width=256, batch=1),
    *(LinearCase(100, 24, feature_map=name, state=True) for name in ("relu", "softmax", "identity")),
    *(LinearCase(length, 12, causal=False, state=True) for length in (0, 1, 65)),
    LinearCase(100, 80, causal=False, heads=(4, 2), feature_map="softmax", mask="interior"),
    LinearCase(33, 16, keys=70, causal=False, value_width=8, heads=(4, 2), state=True),
    LinearCase(70, 16, keys=0, causal=False, state=True),
    *(LinearCase(100, 16, mask=mask, state=True) for mask in ("right", "left", "interior", "sequence")),
    LinearCase(100, 16, mask="left", causal=False, state=True),
    LinearCase(200, 16, runs="few", state=True),
    LinearCase(130, 16, runs="many", mask="interior", heads=(4, 2), state=True, feature_map="softmax"),
    LinearCase(130, 12, runs="few", causal=False, state=True),
    LinearCase(100, 12, runs="many", causal=False, mask="interior", heads=(4, 2), state=True),
    *(LinearCase(100, 64, dtype=dtype, state=True) for dtype in ("bfloat16", "float16")),
    LinearCase(130, 80, dtype="bfloat16", mask="interior", runs="few", heads=(4, 2)),
    LinearCase(65, 128, dtype="bfloat16", feature_map="softmax", causal=False),
)


class LinearInputs(NamedTuple):
    """The arrays of one call, and the cotangents of its output and of the state it returns."""

    query: Any
    key: Any
    value: Any
    state: LinearState | None
    rows: Any
    d_out: Any
    d_state: LinearState


def run_numbers(kind: str | None, batch: int, length: int) -> np.ndarray:
    """(batch, length) int32 that goes up by one wherever a run of tokens ends; the runs of sequences differ."""
    t = np.arange(length)
    starts = {
        None: lambda b: np.zeros(length, bool),
        "few": lambda b: np.isin(t, (5 + b, 6 + b, 64 + 64 * b, 90)),
        "many": lambda b: (t + b) % 7 == 3,
    }[kind]
    return np.stack([1 + np.cumsum(starts(b)) for b in range(batch)]).astype(np.int32)


def linear_rows(case: LinearCase) -> jax.Array | None:
    """The `rows` of reference.linear: run numbers, negative where masked; None where there is nothing to say."""
    mask = padding_mask(case.mask, case.batch, case.length)
    if mask is None and case.runs is None:
        return None
    runs = run_numbers(case.runs, case.batch, case.length)
    return jnp.asarray(runs if mask is None else np.where(mask, runs, -runs))


def linear_inputs(case: LinearCase, seed: int = 0) -> LinearInputs:
    """Standard normal values in the case's dtype; positive where a denominator must stay clear of 0."""
    (batch, length, width), (heads, kv_heads) = (case.batch, case.length, case.width), case.heads
    value_width = width if case.value_width is None else case.value_width
    tokens = length if case.keys is None else case.keys
    shapes = [(batch, length, heads, width), (batch, tokens, kv_heads, width), (batch, tokens, kv_heads, value_width)]
    states = [(batch, kv_heads, width, value_width), (batch, kv_heads, width)]
    # By numpy: JAX compiles a generator for every shape, which takes longer than the tests.
    rng, shapes = np.random.default_rng(seed), [*shapes, *states, (batch, length, heads, value_width), *states]
    draws = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    query, key, value, d_out = (draws[i].astype(jnp.dtype(case.dtype)) for i in (0, 1, 2, 5))
    if case.feature_map == "identity":
        query, key = np.abs(query), np.abs(key)
    state = LinearState(draws[3], 0.5 + np.abs(draws[4])) if case.state else None
    arrays = LinearInputs(query, key, value, state, linear_rows(case), d_out, LinearState(draws[6], draws[7]))
    return jax.tree.map(jnp.asarray, arrays)
