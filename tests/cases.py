"""The one table of cases: shapes, masks and dtypes that every implementation is tested on."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reference.dense import AttendInputs, AttendSpec
from reference.linear import LinearState
from reference.logits import dropout_seeds
from reference.mask import FAR, Mask, Pattern


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
    steady: bool = False  # v is of steady_values(): well-conditioned

    def __str__(self) -> str:
        parts = [f"L{self.length}", f"D{self.width}", "causal" if self.causal else "full", self.dtype]
        parts += [f"mask_{self.mask}"] * (self.mask is not None) + ["query"] * self.own_query
        return "-".join(parts + ["multiply"] * (self.semantics == "multiply") + ["steady"] * self.steady)


LENGTHS = (0, 1, 2, 63, 64, 65, 100, 257)

EVO_CASES: tuple[EvoCase, ...] = (
    # Every length and every width, then every option on a ragged length.
    *(EvoCase(length, width) for length, width in zip(LENGTHS, (16, 16, 12, 7, 16, 1, 64, 16), strict=True)),
    EvoCase(100, 80),
    EvoCase(100, 128),
    *(EvoCase(length, 12, causal=False) for length in (0, 1, 65)),
    EvoCase(100, 80, causal=False),
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
    EvoCase(128, 64, dtype="bfloat16"),  # whole chunks of whole rows: no masks
    EvoCase(65, 16, dtype="bfloat16", causal=False, own_query=True),
    EvoCase(257, 64, dtype="bfloat16", mask="interior", own_query=True, batch=1, steady=True),
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
    mask = padding_mask(case.mask, case.batch, case.length)
    if case.steady:
        v = jnp.asarray(steady_values(v, mask))
    return v, query if case.own_query else None, mask, cotangent


def steady_values(noise: Any, mask: np.ndarray | None = None) -> np.ndarray:
    """Values v (B, H, L, D) for which causal Evo is well-conditioned: their running sums do not come back to 0.

    Where the gated sum S crosses 0, Evo's gradient jumps, and where the denominator |S| + |local| is next to 0, it is
    huge. One such token reaches the gradients of all tokens before it, so that of standard normal values the rounding
    of the running mean to bfloat16 moves the gradient of v by a tenth, or more. These values are steps between levels
    of 3 to 9 (`noise` about 6), which the first 20 tokens climb to, lest the mean and the gate swing.
    """
    levels = np.clip(np.asarray(noise, np.float32), -3, 3) + 6
    token = np.arange(levels.shape[2])
    levels *= np.minimum(1, (token + 1) / 20)[:, None]
    valid = np.ones((levels.shape[0], len(token)), bool) if mask is None else mask
    last = np.maximum.accumulate(np.where(valid, token, -1), axis=1)[:, None, :, None]
    held = np.where(last < 0, 0, np.take_along_axis(levels, np.maximum(last, 0), axis=2))
    return np.diff(held, axis=2, prepend=0).astype(noise.dtype)


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
    *(
        LinearCase(length, width, state=length < 100)
        for length, width in zip(LENGTHS, (16, 16, 12, 7, 16, 1, 64, 16), strict=True)
    ),
    *(LinearCase(100, width) for width in (16, 80, 128, 256)),
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


@dataclass(frozen=True, slots=True)
class AttendCase:
    """One call of softmax attention: `length` T (S of keys where `keys` differs), widths D and V, and what is odd."""

    length: int
    keys: int | None = None  # S, None: T
    heads: tuple[int, int] = (2, 2)  # (N, K)
    width: int = 16
    value_width: int | None = None  # V, None: D
    causal: bool = True
    windows: tuple[tuple[int, int], ...] = ((FAR, FAR),)
    sparse: tuple[int, int, int] = (0, 1, 0)  # num_global, block_size, num_random
    offset: int | str | None = None  # None: S - T | "each": an array, one per sequence
    lengths: str | None = None  # "q" | "kv" | "both": shorter for each sequence | "none": the last has no tokens
    segments: str | None = None  # "few" or "many" as in run_numbers, "unsorted", or a padding_mask
    bias: str | None = None  # its shape: "11TS", "B11S", "1NTS", "BNTS"
    hiding: bool = False  # some of the bias is -inf
    keep: bool = False
    soft_cap: float | None = None
    sinks: bool = False
    dropout_rate: float = 0.0
    dtype: str = "float32"
    batch: int = 2

    def __str__(self) -> str:
        parts = [f"T{self.length}"] + [f"S{self.keys}"] * (self.keys is not None) + [f"D{self.width}"]
        parts += [f"V{self.value_width}"] * (self.value_width is not None) + [f"N{self.heads[0]}K{self.heads[1]}"]
        parts += ["causal" if self.causal else "full", self.dtype]
        if self.windows != ((FAR, FAR),):
            parts += ["window_" + "_".join(f"{'far' if n == FAR else n}" for pair in self.windows for n in pair)]
        parts += ["sparse" + "_".join(map(str, self.sparse))] * (self.sparse != (0, 1, 0))
        named = {"offset": self.offset, "lengths": self.lengths, "segments": self.segments, "bias": self.bias}
        parts += [f"{name}_{value}" for name, value in named.items() if value is not None]
        flags = ("hiding", "keep", "soft_cap", "sinks", "dropout_rate")
        return "-".join(parts + [flag for flag in flags if getattr(self, flag)])


DROPOUT_SEED = 11
_LOCAL_AND_GLOBAL = ((10, 0), (10, 0), (40, 0), (FAR, FAR))

ATTEND_CASES: tuple[AttendCase, ...] = (
    # Sizes and widths, then masks, then what changes scores and weights, then dtypes; options meet in each.
    *(AttendCase(length) for length in (0, 1, 64, 100)),
    AttendCase(0, keys=7),
    AttendCase(5, keys=0, sinks=True),
    AttendCase(1, keys=70, heads=(4, 2)),
    AttendCase(33, keys=100, heads=(4, 1), value_width=24),
    AttendCase(100, keys=33, sinks=True),
    AttendCase(70, keys=45, causal=False, heads=(4, 2)),
    AttendCase(48, width=24, value_width=80, heads=(4, 2)),
    AttendCase(48, width=80, value_width=16, causal=False, soft_cap=3.0),
    AttendCase(70, width=64),
    AttendCase(40, width=256, batch=1),
    AttendCase(40, width=16, value_width=256, batch=1, heads=(1, 1)),
    AttendCase(130, windows=((20, 0),), heads=(4, 2)),
    AttendCase(100, windows=((0, 0),)),
    AttendCase(100, keys=130, windows=((15, 15),), causal=False, sinks=True),
    AttendCase(100, keys=60, windows=((10, 4),), causal=False),
    AttendCase(130, windows=_LOCAL_AND_GLOBAL, heads=(4, 2)),
    AttendCase(100, windows=((5, 5), (FAR, FAR)), causal=False, lengths="both"),
    AttendCase(130, windows=((4, 4),), sparse=(1, 8, 2), heads=(4, 2)),
    AttendCase(130, windows=((8, 8),), sparse=(9, 16, 3), causal=False),
    AttendCase(100, windows=((8, 8),), sparse=(0, 16, 1), sinks=True),
    AttendCase(100, windows=((6, 6),), sparse=(1, 12, 0), lengths="kv"),
    AttendCase(33, keys=130, windows=((4, 4),), sparse=(9, 8, 2), soft_cap=2.0),
    AttendCase(130, keys=100, windows=((4, 4),), sparse=(1, 8, 2), causal=False, segments="few"),
    AttendCase(70, windows=((4, 4),), sparse=(2, 8, 2), offset="each"),
    AttendCase(100, lengths="both", heads=(4, 2), sinks=True),
    AttendCase(100, keys=70, lengths="none", causal=False),
    AttendCase(130, lengths="q", windows=((20, 0),)),
    AttendCase(130, segments="few", heads=(4, 2)),
    AttendCase(100, segments="many", causal=False, soft_cap=2.0),
    AttendCase(70, keys=100, segments="unsorted", lengths="kv", windows=((30, 9),), causal=False),
    AttendCase(100, segments="left"),
    AttendCase(100, segments="interior", windows=((25, 25),), causal=False, sinks=True),
    AttendCase(100, segments="sequence", heads=(4, 2)),
    AttendCase(60, keys=70, offset=-3),
    AttendCase(60, keys=70, offset=25, windows=((12, 0),)),
    AttendCase(60, keys=70, offset="each", lengths="kv", heads=(4, 2)),
    AttendCase(70, bias="11TS", hiding=True, causal=False),
    AttendCase(70, keys=50, bias="B11S", heads=(4, 2), soft_cap=2.0, lengths="kv"),
    AttendCase(70, bias="1NTS", windows=((20, 0),), heads=(4, 2), sinks=True),
    AttendCase(70, bias="BNTS", hiding=True, segments="few", sinks=True, dropout_rate=0.2),
    AttendCase(70, keep=True, causal=False, heads=(4, 2), sinks=True),
    AttendCase(70, keep=True, windows=((9, 9),), sparse=(1, 8, 1), bias="11TS", dropout_rate=0.5, soft_cap=2.0),
    AttendCase(100, dropout_rate=0.3, heads=(4, 2)),
    *(AttendCase(100, width=64, heads=(4, 2), dtype=dtype) for dtype in ("bfloat16", "float16")),
    AttendCase(70, width=80, dtype="bfloat16", segments="interior", sinks=True, soft_cap=3.0, bias="B11S"),
    AttendCase(70, keys=100, dtype="float16", windows=((20, 0),), dropout_rate=0.2, bias="1NTS"),
)


def _attend_segments(case: AttendCase) -> tuple[Any, Any]:
    """(B, T) and (B, S) int32: the last T and S of one sequence's segments, negative where padded."""
    if case.segments is None:
        return None, None
    keys = case.length if case.keys is None else case.keys
    most = max(case.length, keys)
    if case.segments == "unsorted":
        numbers = np.random.default_rng(5).integers(-1, 3, size=(case.batch, most)).astype(np.int32)
    elif case.segments in ("few", "many"):
        numbers = run_numbers(case.segments, case.batch, most)
    else:
        mask = padding_mask(case.segments, case.batch, most)
        assert mask is not None
        numbers = np.where(mask, 0, -1).astype(np.int32)
    return numbers[:, most - case.length :], numbers[:, most - keys :]


def attend_mask(case: AttendCase) -> Mask:
    """The case's mask, of NumPy arrays."""
    batch, length, keys = case.batch, case.length, case.length if case.keys is None else case.keys
    offset = keys - length if not isinstance(case.offset, int) else case.offset
    pattern = Pattern(case.causal, case.windows, *case.sparse, seed=7, offset=offset)
    b = np.arange(batch, dtype=np.int32)
    shorter = lambda n: np.where(b == 0, n - n // 7, n // 2 if case.lengths != "none" else 0)  # noqa: E731
    q_segments, kv_segments = _attend_segments(case)
    keep = np.random.default_rng(6).random((batch, 1, length, keys)) < 0.7 if case.keep else None
    return Mask(
        pattern,
        offset=(5 - 9 * b).astype(np.int32) if case.offset == "each" else None,
        q_lengths=shorter(length).astype(np.int32) if case.lengths in ("q", "both", "none") else None,
        kv_lengths=shorter(keys).astype(np.int32) if case.lengths in ("kv", "both", "none") else None,
        q_segments=q_segments,
        kv_segments=kv_segments,
        keep=keep,
    )


def attend_inputs(case: AttendCase, seed: int = 0) -> tuple[AttendInputs, AttendSpec, tuple[Any, Any]]:
    """(inputs, spec, cotangents of out and lse): standard normal values in the case's dtype, lse's in float32."""
    (batch, length, width), (heads, kv_heads) = (case.batch, case.length, case.width), case.heads
    keys = length if case.keys is None else case.keys
    value_width = width if case.value_width is None else case.value_width
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(case.dtype))  # noqa: E731
    query, key = draw(batch, length, heads, width), draw(batch, keys, kv_heads, width)
    value, d_out = draw(batch, keys, kv_heads, value_width), draw(batch, length, heads, value_width)
    d_lse, bias, sinks = draw(batch, length, heads).astype(np.float32), None, None
    if case.bias is not None:
        size = {"B": batch, "N": heads, "T": length, "S": keys, "1": 1}
        bias = draw(*(size[axis] for axis in case.bias))
        bias = np.where(rng.random(bias.shape) < 0.1, np.asarray(-np.inf, bias.dtype), bias) if case.hiding else bias
    if case.sinks:
        sinks = draw(heads).astype(np.float32)
    seeds = dropout_seeds(np.uint32(DROPOUT_SEED), batch, heads) if case.dropout_rate else None
    inputs = AttendInputs(query, key, value, attend_mask(case), bias, sinks, seeds)
    spec = AttendSpec(width**-0.5, case.soft_cap, case.dropout_rate)
    return jax.tree.map(jnp.asarray, inputs), spec, (jnp.asarray(d_out), jnp.asarray(d_lse))
