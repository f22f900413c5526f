"""Every kernel configuration that `python -m benchmarks.compile_report` compiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Build = Callable[[str, int], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Config:
    """A family of compilations: `build(dtype, width)` gives (function, its arguments as jax.ShapeDtypeStruct)."""

    name: str
    build: Build
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    widths: tuple[int, ...] = (64, 128)

    def cases(self) -> Iterator[tuple[str, str, int]]:
        """(label, dtype, width) of each member."""
        for dtype in self.dtypes:
            for width in self.widths:
                yield f"{self.name}-{dtype}-D{width}", dtype, width


CONFIGS: list[Config] = []
