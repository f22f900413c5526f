"""Program: one operation at one shape as a function and its arguments, to be lowered, compiled and reported on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import evo_jax
from evo_jax import EvoParams, LinearState
from evo_jax.attention import DEFAULT_WINDOWS, head_windows, sparse_pattern
from reference.evo_params import EvoState
from reference.mask import Pattern

Built = tuple[Callable[..., Any], tuple[Any, ...]]  # function, and its arguments as jax.ShapeDtypeStruct
SOFTMAX = {
    "flash": evo_jax.flash_attention,
    "sliding_window": evo_jax.sliding_window_attention,
    "sparse": evo_jax.sparse_attention,
    "multiscale": evo_jax.multiscale_attention,
}
OPS = ("prefix_sum", "evo", *SOFTMAX, "linear")
PHASES = ("forward", "backward", "decode")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "tf32x3"}  # and how their products are taken
_SCORES = ("bias", "key_bias", "mask", "segments", "dropout")  # of softmax attention; none of these is decoded here
EXTRAS = {  # what may be asked for besides the plain operation
    "prefix_sum": ("last_axis",),
    "evo": ("query", "mask", "state"),
    "linear": ("mask", "state", "relu", "softmax"),
    **dict.fromkeys(SOFTMAX, (*_SCORES, "sinks", "lengths", "soft_cap")),
}


@dataclass(frozen=True, slots=True)
class Program:
    """What to compile. `backward` is the output and every gradient; `decode` reads `length` tokens and adds a few.

    Decoding is `tokens` queries over a cache of `length` keys for softmax attention, and one token from a state for
    evo and linear attention. Raises ValueError where such a program does not exist.
    """

    op: str
    phase: str = "forward"
    dtype: str = "bfloat16"
    batch: int = 1
    length: int = 8192
    heads: int = 32
    kv_heads: int = 32
    width: int = 128
    window: int = 512  # of sliding_window
    causal: bool = True
    extras: tuple[str, ...] = ()
    tokens: int = 1

    def __post_init__(self) -> None:
        for name, known in (("op", OPS), ("phase", PHASES), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        for name in ("batch", "length", "heads", "kv_heads", "width", "window", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.grouped and self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if unknown := [extra for extra in self.extras if extra not in EXTRAS[self.op]]:
            raise ValueError(f"{self.op} has no {', '.join(unknown)}; it has {', '.join(EXTRAS[self.op])}")
        if self.phase == "decode" and (self.op == "prefix_sum" or not self.causal):
            raise ValueError(f"there is no decoding of {self.op}{'' if self.causal else ' that is not causal'}")
        refused = [extra for extra in self.extras if self.op in SOFTMAX and extra in _SCORES]
        if self.phase == "decode" and refused:
            raise ValueError(f"there is no decoding with {', '.join(refused)}")

    @property
    def grouped(self) -> bool:
        """Whether there are key/value heads."""
        return self.op not in ("prefix_sum", "evo")

    @property
    def kind(self) -> str:
        """Everything but dtype, head width and sizes."""
        name = f"{self.op}{'' if self.causal else ' full'} {self.phase}"
        return name + "".join(f" +{extra}" for extra in self.extras)

    @property
    def label(self) -> str:
        """All of it."""
        heads = f"N{self.heads} K{self.kv_heads}" if self.grouped else f"H{self.heads}"
        window = f" W{self.window}" if self.op == "sliding_window" else ""
        tokens = f" T{self.tokens}" if self.tokens > 1 else ""
        return f"{self.kind} {self.dtype} B{self.batch} L{self.length} {heads} D{self.width}{window}{tokens}"

    @property
    def pattern(self) -> Pattern | None:
        """Which keys a query of softmax attention sees, besides what `extras` hide."""
        if self.op not in SOFTMAX:
            return None
        pattern = Pattern()
        if self.op == "sliding_window":
            pattern = Pattern(windows=((self.window - 1, self.window - 1),))
        elif self.op == "sparse":
            pattern = sparse_pattern("sparse_attention", 64, 1, 3, 0)
        elif self.op == "multiscale":
            pattern = Pattern(windows=head_windows("multiscale_attention", self.heads, None, DEFAULT_WINDOWS))
        return replace(pattern, causal=self.causal, offset=self.length - self.queries)

    @property
    def queries(self) -> int:
        return self.tokens if self.phase == "decode" else self.length

    def build(self) -> Built:
        """The function and its arguments."""
        forward, free, fixed, cotangent = _builder(self)(self)
        if self.phase != "backward":
            return lambda free, fixed: forward(free, fixed)[0], (free, fixed)

        def both(free: Any, fixed: Any, cotangent: Any) -> Any:
            out, vjp, rest = jax.vjp(lambda free: forward(free, fixed), free, has_aux=True)
            return out, rest, vjp(cotangent)

        return both, (free, fixed, cotangent)


# Each of these gives (function of what is differentiated and of what is not, both as pytrees of shapes, and the shapes
# of the output); the function returns the output, and besides what of it has no gradient.


def _builder(program: Program) -> Any:
    softmax = _decode if program.phase == "decode" else _attend
    return {"prefix_sum": _prefix_sum, "evo": _evo, "linear": _linear}.get(program.op, softmax)


def _prefix_sum(p: Program) -> Any:
    last = "last_axis" in p.extras
    x = jax.ShapeDtypeStruct((p.batch, p.heads, *((p.width, p.length) if last else (p.length, p.width))), p.dtype)

    def forward(x: Any, _: Any) -> Any:
        return evo_jax.prefix_sum(x, axis=-1 if last else -2, implementation="triton"), None

    return forward, x, (), x


def _evo(p: Program) -> Any:
    length = 1 if p.phase == "decode" else p.length
    v = jax.ShapeDtypeStruct((p.batch, p.heads, length, p.width), p.dtype)
    matrix, vector = (jax.ShapeDtypeStruct((p.width,) * n, p.dtype) for n in (2, 1))
    params = EvoParams(*(matrix if name.endswith("kernel") else vector for name in EvoParams._fields))
    resumed = "state" in p.extras or p.phase == "decode"
    sums = jax.ShapeDtypeStruct((p.batch, p.heads, p.width), "float32")
    count = jax.ShapeDtypeStruct((p.batch,), "int32")
    valid = jax.ShapeDtypeStruct((p.batch, length), "bool") if "mask" in p.extras else None

    def forward(free: Any, fixed: Any) -> Any:
        (v, params, query, sums), (count, valid) = free, fixed
        state = EvoState(sums[0], sums[1], count) if resumed else None
        run = partial(evo_jax.evo_attention, query=query, causal=p.causal, attention_mask=valid)
        out = run(v, params, initial_state=state, return_state=resumed, implementation="triton")
        return ((out[0], out[1][:2]), out[1].count) if resumed else (out, None)

    free = (v, params, v if "query" in p.extras else None, (sums, sums) if resumed else None)
    return forward, free, (count if resumed else None, valid), (v, (sums, sums)) if resumed else v


def _linear(p: Program) -> Any:
    decode, state = p.phase == "decode", "state" in p.extras or p.phase == "decode"
    length = 1 if decode else p.length
    query, key = (jax.ShapeDtypeStruct((p.batch, length, n, p.width), p.dtype) for n in (p.heads, p.kv_heads))
    dims = (p.batch, p.kv_heads, p.width)
    kv, z = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((*dims, p.width), dims))
    linear_state: Any = LinearState  # of shapes, not arrays
    given = linear_state(kv, z) if state else None
    valid = jax.ShapeDtypeStruct((p.batch, length), "bool") if decode or "mask" in p.extras else None
    feature_map = next((name for name in ("relu", "softmax") if name in p.extras), "elu")

    def forward(free: Any, valid: Any) -> Any:
        query, key, value, given = free
        options = {"feature_map": feature_map, "is_causal": p.causal, "attention_mask": valid}
        options |= {"initial_state": given, "return_state": state, "implementation": "triton"}
        return evo_jax.linear_attention(query, key, value, **options), None

    return forward, (query, key, key, given), valid, (query, given) if state else query


def _attend(p: Program) -> Any:
    query, key = (jax.ShapeDtypeStruct((p.batch, p.length, n, p.width), p.dtype) for n in (p.heads, p.kv_heads))
    arrays = {name: jax.ShapeDtypeStruct(*array) for extra in p.extras for name, array in _arrays(p, extra).items()}
    free = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    fixed = {name: x for name, x in arrays.items() if name not in free}

    def forward(free: Any, fixed: Any) -> Any:
        query, key, value, free = free
        return SOFTMAX[p.op](query, key, value, is_causal=p.causal, **free, **fixed, **_options(p)), None

    return forward, (query, key, key, free), fixed, query


def _decode(p: Program) -> Any:
    query = jax.ShapeDtypeStruct((p.batch, p.tokens, p.heads, p.width), p.dtype)
    key = jax.ShapeDtypeStruct((p.batch, p.length, p.kv_heads, p.width), p.dtype)
    arrays = {"key_value_seq_lengths": jax.ShapeDtypeStruct((p.batch,), "int32")}
    arrays |= {"sinks": jax.ShapeDtypeStruct((p.heads,), "float32")} if "sinks" in p.extras else {}

    def forward(free: Any, arrays: Any) -> Any:
        return SOFTMAX[p.op](*free, **arrays, **_options(p)), None

    return forward, (query, key, key), arrays, query


def _arrays(p: Program, extra: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """The option of softmax attention that is an array, with its shape and dtype."""
    length = p.length
    return {
        "bias": {"bias": ((1, p.heads, length, length), p.dtype)},
        "key_bias": {"bias": ((1, 1, 1, length), p.dtype)},
        "mask": {"mask": ((1, 1, length, length), "bool")},
        "segments": {"segment_ids": ((p.batch, length), "int32")},
        "lengths": {"key_value_seq_lengths": ((p.batch,), "int32")},
        "sinks": {"sinks": ((p.heads,), "float32")},
        "dropout": {"dropout_seed": ((), "uint32")},
    }.get(extra, {})


def _options(p: Program) -> Any:
    """Those that are no arrays."""
    options: dict[str, Any] = {"implementation": "triton"}
    if p.op == "sliding_window":
        options["window_size"] = p.window
    if "soft_cap" in p.extras:
        options["logits_soft_cap"] = 30.0
    if "dropout" in p.extras:
        options["dropout_rate"] = 0.1
    return options
