"""How a kernel is launched: block sizes and warps, chosen from the head width and the dtype of its dot products."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """Statics of one launch; every default below compiles without register spills (tests/test_compile.py)."""

    block_m: int  # rows (tokens) of one chunk: the step of the carry tables
    block_d: int  # columns of one program's tile; dot products loop over the width in these steps
    num_warps: int
    num_stages: int
    interpret: bool

    def __post_init__(self) -> None:
        for name in ("block_m", "block_d"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two and at least 16 (a tensor-core tile)")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps={self.num_warps} must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be at least 1")


def evo_launch(
    width: int,
    dot_dtype: str,
    *,
    interpret: bool,
    backward: bool = False,
    block_m: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Launch:
    """The default launch for head width `width`, with the caller's own choices over it.

    Wider tiles read each row fewer times, until they spill registers. The forward holds 64 columns of bfloat16: then a
    width of 64 is one block, and is fused into three reads and one write. Everything else takes 32 columns where that
    divides the width, else 16, so that at most 15 columns are computed in vain. Eight warps give the backward's
    bfloat16 tiles room in registers (with four, one of them spilled on A100 with JAX 0.12's compiler).
    """
    widest = 64 if dot_dtype == "bfloat16" and not backward else 32
    block_d = next(block for block in (widest, 32, 16) if width % block == 0 or block == 16)
    warps = 8 if dot_dtype == "bfloat16" and backward and block_d == 32 else 4
    return Launch(
        block_m=64 if block_m is None else block_m,
        block_d=block_d,
        num_warps=warps if num_warps is None else num_warps,
        num_stages=1 if num_stages is None else num_stages,
        interpret=interpret,
    )
