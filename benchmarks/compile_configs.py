"""Every kernel configuration that `python -m benchmarks.compile_report` compiles, with its memory budget."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

import evo_jax
from benchmarks.evo_state_builds import evo_resumed
from evo_jax import EvoParams, LinearState

Build = Callable[[str, int], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Config:
    """A family of compilations: `build(dtype, width)` gives (function, its arguments as jax.ShapeDtypeStruct)."""

    name: str
    build: Build
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    widths: tuple[int, ...] = (64, 128)
    temp_ratio: float | None = None  # most temporary memory allowed, in bytes per byte of the first argument

    def cases(self) -> Iterator[tuple[str, str, int]]:
        """(label, dtype, width) of each member."""
        for dtype in self.dtypes:
            for width in self.widths:
                yield f"{self.name}-{dtype}-D{width}", dtype, width


def _prefix_sum(shape: Callable[[int], tuple[int, ...]], axis: int) -> Build:
    """The sum, and its gradient: the same kernels in both directions."""

    def build(dtype: str, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        def both(x: jax.Array, cotangent: jax.Array) -> Any:
            out, vjp = jax.vjp(lambda x: evo_jax.prefix_sum(x, axis=axis, implementation="triton"), x)
            return out, vjp(cotangent)

        x = jax.ShapeDtypeStruct(shape(width), dtype)
        return both, (x, x)

    return build


def _evo(
    batch: int = 2, heads: int = 8, *, gradient: bool, causal: bool = True, query: bool = False, mask: bool = False
) -> Build:
    """evo_attention over 65,536 tokens: the forward alone, or output and every gradient."""

    def build(dtype: str, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        v = jax.ShapeDtypeStruct((batch, heads, 65536, width), dtype)
        matrix, vector = jax.ShapeDtypeStruct((width, width), dtype), jax.ShapeDtypeStruct((width,), dtype)
        params = EvoParams(*(matrix if name.endswith("kernel") else vector for name in EvoParams._fields))
        valid = jax.ShapeDtypeStruct((batch, 65536), "bool") if mask else None

        def forward(v: Any, params: Any, query: Any, valid: Any) -> Any:
            return evo_jax.evo_attention(
                v, params, query=query, causal=causal, attention_mask=valid, implementation="triton"
            )

        def both(v: Any, params: Any, query: Any, valid: Any, cotangent: Any) -> Any:
            out, vjp = jax.vjp(lambda v, p, q: forward(v, p, q, valid), v, params, query)
            return out, vjp(cotangent)

        args = (v, params, v if query else None, valid)
        return (both, (*args, v)) if gradient else (forward, args)

    return build


def _linear(
    heads: int = 32, kv_heads: int = 32, *, gradient: bool, mask: bool = False, state: bool = False, **options: Any
) -> Build:
    """linear_attention of one sequence of 8,192 tokens: the forward alone, or output and every gradient."""

    def build(dtype: str, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        query = jax.ShapeDtypeStruct((1, 8192, heads, width), dtype)
        key = jax.ShapeDtypeStruct((1, 8192, kv_heads, width), dtype)
        valid = jax.ShapeDtypeStruct((1, 8192), "bool") if mask else None
        kv, z = (jax.ShapeDtypeStruct((1, kv_heads, *shape), "float32") for shape in ((width, width), (width,)))
        given: Any = (kv, z) if state else None

        def forward(query: Any, key: Any, value: Any, given: Any, valid: Any) -> Any:
            return evo_jax.linear_attention(
                *(query, key, value),
                initial_state=given and LinearState(*given),
                attention_mask=valid,
                return_state=state,
                implementation="triton",
                **options,
            )

        def both(query: Any, key: Any, value: Any, given: Any, valid: Any, cotangent: Any) -> Any:
            out, vjp = jax.vjp(lambda q, k, v, given: forward(q, k, v, given, valid), query, key, value, given)
            return out, vjp(type(out)((cotangent, LinearState(*given))) if state else cotangent)

        args = (query, key, key, given, valid)
        return (both, (*args, query)) if gradient else (forward, args)

    return build


def attention_build(op: str, kv_heads: int = 32, *, gradient: bool = True, arrays: Any = None, **options: Any) -> Build:
    """Softmax attention of one sequence of 8,192 tokens, 32 heads: the forward alone, or output and every gradient.

    `arrays` maps options to shapes and dtypes, None for that of the query; those of floats are differentiated.
    """

    def build(dtype: str, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        query, key = (jax.ShapeDtypeStruct((1, 8192, heads, width), dtype) for heads in (32, kv_heads))
        given = {name: jax.ShapeDtypeStruct(dims, kind or dtype) for name, (dims, kind) in (arrays or {}).items()}
        fixed = {name: x for name, x in given.items() if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating)}
        free = {name: x for name, x in given.items() if name not in fixed}

        def forward(query: Any, key: Any, value: Any, free: Any, fixed: Any) -> Any:
            attention = getattr(evo_jax, op)
            return attention(query, key, value, implementation="triton", **free, **fixed, **options)

        def both(query: Any, key: Any, value: Any, free: Any, fixed: Any, cotangent: Any) -> Any:
            out, vjp = jax.vjp(lambda q, k, v, free: forward(q, k, v, free, fixed), query, key, value, free)
            return out, vjp(cotangent)

        args = (query, key, key, free, fixed)
        return (both, (*args, query)) if gradient else (forward, args)

    return build


def decode_build(
    queries: int, kv_heads: int, keys: int = 32768, cache_dtype: str | None = None, **options: Any
) -> Build:
    """flash_attention of the last few tokens of 8 sequences of their own lengths, 32 heads, over a cache."""

    def build(dtype: str, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        query = jax.ShapeDtypeStruct((8, queries, 32, width), dtype)
        key, lengths = (
            jax.ShapeDtypeStruct((8, keys, kv_heads, width), cache_dtype or dtype),
            jax.ShapeDtypeStruct((8,), "int32"),
        )

        def forward(key: Any, value: Any, query: Any, lengths: Any) -> Any:
            named = {"key_value_seq_lengths": lengths, "implementation": "triton"}
            return evo_jax.flash_attention(query, key, value, **named, **options)

        return forward, (key, key, query, lengths)

    return build


def _linear_step(dtype: str, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """linear_attention of one token of 8 sequences, of which some have none."""
    token = jax.ShapeDtypeStruct((8, 1, 32, width), dtype)
    kv, z = (jax.ShapeDtypeStruct((8, 32, *shape), "float32") for shape in ((width, width), (width,)))

    def step(kv: Any, z: Any, token: Any, valid: Any) -> Any:
        return evo_jax.linear_attention(
            *(token, token, token),
            initial_state=LinearState(kv, z),
            attention_mask=valid,
            return_state=True,
            implementation="triton",
        )

    return step, (kv, z, token, jax.ShapeDtypeStruct((8, 1), "bool"))


WIDTHS = (64, 80, 128)
TOKENS = ((1, 8192), "int32")
EVERYTHING = {"segment_ids": TOKENS, "bias": ((1, 1, 1, 8192), None), "sinks": ((32,), "float32"),
              "key_value_seq_lengths": ((1,), "int32"), "dropout_seed": ((), "uint32")}  # fmt: skip

CONFIGS: list[Config] = [
    Config("prefix_sum", _prefix_sum(lambda width: (16, 65536, width), 1), widths=WIDTHS, temp_ratio=0.07),
    Config("prefix_sum_last_axis", _prefix_sum(lambda width: (width, 65536), 1), widths=(64,), temp_ratio=0.07),
    Config("evo_forward", _evo(gradient=False), widths=WIDTHS, temp_ratio=0.07),
    Config("evo_gradient", _evo(gradient=True), widths=WIDTHS, temp_ratio=1.5),
    # A gate can pass float16's largest number, so that the forward holds it in float32: twice v's bytes.
    Config("evo_gradient_float16", _evo(gradient=True), dtypes=("float16",), widths=(64,), temp_ratio=2.2),
    Config("evo_gradient_one_head", _evo(1, 1, gradient=True), dtypes=("bfloat16",), widths=(64,), temp_ratio=1.5),
    Config("evo_gradient_full", _evo(gradient=True, causal=False), dtypes=("bfloat16",), widths=(64,)),
    Config("evo_gradient_query_mask", _evo(gradient=True, query=True, mask=True), dtypes=("float32",), widths=(80,)),
    Config("evo_gradient_state", evo_resumed(2, 8, 65536, gradient=True), ("bfloat16",), (128,), temp_ratio=1.5),
    Config("evo_step", evo_resumed(8, 32, 1, gradient=False), widths=(80, 128), temp_ratio=0.1),
    # 2 MB and 8 MB for bfloat16 of width 128, where the query is 67 MB.
    Config("linear_forward", _linear(gradient=False), dtypes=("bfloat16",), widths=(128,), temp_ratio=0.03),
    Config("linear_gradient", _linear(gradient=True), temp_ratio=0.12),
    Config(
        "linear_gradient_few_heads_mask",
        _linear(4, 2, gradient=True, mask=True, state=True),
        dtypes=("bfloat16",),
        widths=(80,),
        temp_ratio=0.25,  # states between segments
    ),
    Config(
        "linear_gradient_full_mask",
        _linear(gradient=True, mask=True, is_causal=False),
        dtypes=("float32",),
        widths=(64,),
        temp_ratio=1.2,  # the float32 sums of one direction, which the other one adds to
    ),
    Config(
        "linear_gradient_full_softmax",
        _linear(gradient=True, is_causal=False, feature_map="softmax"),
        dtypes=("float16",),
        widths=(128,),
        temp_ratio=2.2,  # gradients of features, in float32
    ),
    # Softmax attention: 2 MB and 8 MB for bfloat16 of width 128, as above.
    Config("flash_forward", attention_build("flash_attention", gradient=False), ("bfloat16",), (128,), temp_ratio=0.03),
    Config("flash_gradient", attention_build("flash_attention"), temp_ratio=0.12),
    Config(
        "sliding_gradient", attention_build("sliding_window_attention", window_size=512), ("bfloat16",), (128,), 0.12
    ),
    Config("sparse_gradient", attention_build("sparse_attention"), ("bfloat16",), (128,), 0.12),
    Config(
        "sparse_gradient_full_grouped",
        attention_build("sparse_attention", 8, is_causal=False),
        ("float32",),
        (80,),
        0.12,
    ),
    Config("multiscale_gradient", attention_build("multiscale_attention"), ("bfloat16",), (128, 256), 0.12),
    Config(
        "sliding_gradient_everything",
        attention_build(
            "sliding_window_attention", 8, arrays=EVERYTHING, window_size=512, logits_soft_cap=30.0, dropout_rate=0.1
        ),
        ("float16",),
        (96,),
        0.12,
    ),
    Config(
        "flash_gradient_mask",
        attention_build("flash_attention", arrays={"mask": ((1, 1, 8192, 8192), "bool")}),
        ("float32",),
        (256,),
        0.12,
    ),
    # Partial results of the splits: 2 MB for bfloat16 of width 128, where the cache's keys are 537 MB.
    Config("decode", decode_build(1, 8), widths=(80, 128), temp_ratio=0.005),
    Config("decode_grouped_queries", decode_build(8, 4, logits_soft_cap=30.0), ("bfloat16",), (256,), 0.15),
    Config("step_linear", _linear_step, ("bfloat16",), (128,), 0.001),
]
