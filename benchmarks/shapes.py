"""The shapes that the benchmark suites measure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EvoShape:
    """v is (batch, heads, length, width)."""

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


CPU_EVO = tuple(EvoShape(1, 8, length, 64) for length in (512, 2048, 8192))
CPU_LENGTHS = tuple(EvoShape(1, 8, length, 64) for length in (8192, 32768, 131072))
CPU_LAYERS = tuple(EvoShape(1, 8, length, 64) for length in (512, 2048, 8192))
GPU_EVO = (
    EvoShape(2, 8, 8192, 64, "bfloat16"),
    EvoShape(2, 8, 65536, 64, "bfloat16"),
    EvoShape(2, 8, 65536, 80, "bfloat16"),
    EvoShape(2, 8, 65536, 128, "bfloat16"),
    EvoShape(1, 1, 65536, 64, "bfloat16"),
    EvoShape(2, 8, 65536, 64, "float32"),
    EvoShape(2, 8, 65536, 128, "float32"),
)
GPU_PREFIX = (
    EvoShape(2, 8, 65536, 64, "bfloat16"),
    EvoShape(1, 1, 1048576, 64, "float32"),
    EvoShape(2, 8, 65536, 128, "float32"),
)
GPU_ATTENTION = (
    EvoShape(1, 32, 8192, 128, "bfloat16"),
    EvoShape(4, 16, 2048, 64, "bfloat16"),
    EvoShape(1, 8, 32768, 64, "bfloat16"),
    EvoShape(1, 16, 4096, 64, "float32"),
)
GPU_DECODE = (
    EvoShape(8, 32, 131072, 128, "bfloat16"),
    EvoShape(1, 32, 131072, 128, "bfloat16"),
    EvoShape(8, 32, 8192, 64, "float32"),
)
