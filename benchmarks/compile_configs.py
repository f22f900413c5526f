"""Every kernel configuration that `python -m benchmarks.compile_report` compiles, with its memory budget."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

import evo_jax
from evo_jax import EvoParams

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


WIDTHS = (64, 80, 128)

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
]
