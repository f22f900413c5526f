"""The one table of cases: shapes, masks and dtypes that every implementation is tested on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


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
