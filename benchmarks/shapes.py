"""The shapes that the benchmark suites measure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Batch, heads, tokens, width of a head and dtype; as many key/value heads as heads."""

    batch: int
    heads: int
    length: int
    width: int
    dtype: str = "float32"

    @property
    def v(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.length, self.width)

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} L{self.length} D{self.width} {self.dtype}"


CPU = tuple(Shape(1, 8, length, 64) for length in (512, 2048, 8192))
CPU_LONG = tuple(Shape(1, 8, length, 64) for length in (32768, 131072))  # ours alone, where time is to be linear
LINEAR_TIME = ("prefix_sum", "evo", "linear", "sliding_window", "sparse")

_LENGTHS = tuple(Shape(1, 32, length, 128, "bfloat16") for length in (8192, 2048, 32768))
_OTHER = (Shape(4, 16, 4096, 64, "bfloat16"), Shape(1, 16, 4096, 64, "float32"))
_LONG = (
    Shape(2, 8, 65536, 64, "bfloat16"),
    Shape(1, 1, 65536, 64, "bfloat16"),
    Shape(2, 8, 65536, 128, "bfloat16"),
    Shape(2, 8, 8192, 64, "bfloat16"),
    Shape(2, 8, 65536, 80, "bfloat16"),
    Shape(2, 8, 65536, 64, "float32"),
)
GPU: dict[str, tuple[Shape, ...]] = {
    "prefix_sum": (*_LONG, Shape(1, 1, 1048576, 64, "float32")),
    "evo": _LONG,
    "flash": (*_LENGTHS, *_OTHER, Shape(1, 16, 8192, 256, "bfloat16")),
    **dict.fromkeys(("sliding_window", "sparse", "multiscale", "linear"), (*_LENGTHS, *_OTHER)),
}
GPU_DECODE = (
    Shape(8, 32, 131072, 128, "bfloat16"),
    Shape(1, 32, 131072, 128, "bfloat16"),
    Shape(8, 32, 8192, 64, "float32"),
)
