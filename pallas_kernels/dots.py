"""The matrix product of two tiles: which dtype its operands take, and how exactly they are multiplied."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True, slots=True)
class Dots:
    """Operands' own precision: bf16, fp16, TF32 (which holds them both, and is as wide as float32), or TF32 x 3."""

    dtype: str  # "bfloat16", "float16" or "float32"
    precision: str  # "bf16", "fp16", "tf32" or "tf32x3"
    interpret: bool

    @classmethod
    def of(cls, dtypes: set[str], interpret: bool, bounded: bool = False) -> "Dots":
        """For arrays of these dtypes; `bounded` if nothing computed from them passes 65504."""
        if dtypes == {"bfloat16"}:
            return cls("bfloat16", "bf16", interpret)
        if bounded and dtypes == {"float16"}:
            return cls("float16", "fp16", interpret)
        return cls("float32", "tf32x3" if "float32" in dtypes else "tf32", interpret)

    def __call__(self, a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
        """float32 product over axes `contract`.

        The interpreter has neither 16-bit dots nor TF32: there, operands rounded alike are multiplied in float32.
        """
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        precision: Any = None
        if self.interpret:
            a, b, precision = a.astype(jnp.float32), b.astype(jnp.float32), lax.Precision.HIGHEST
        elif self.precision == "tf32":
            precision = lax.DotAlgorithmPreset.TF32_TF32_F32
        elif self.precision == "tf32x3":
            precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        dims = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
