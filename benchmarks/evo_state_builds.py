"""What `benchmarks.compile_configs` compiles of EvoAttention with a state: one token, and a cut sequence's gradient."""

from collections.abc import Callable
from typing import Any

import jax

import evo_jax
from evo_jax import EvoParams
from reference.evo_params import EvoState


def evo_resumed(batch: int, heads: int, length: int, *, gradient: bool, mask: bool = False) -> Any:
    """A build of evo_attention from a state to a state: the forward alone, or output and every gradient."""

    def build(dtype: str, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        v = jax.ShapeDtypeStruct((batch, heads, length, width), dtype)
        matrix, vector = jax.ShapeDtypeStruct((width, width), dtype), jax.ShapeDtypeStruct((width,), dtype)
        params = EvoParams(*(matrix if name.endswith("kernel") else vector for name in EvoParams._fields))
        sums, count = jax.ShapeDtypeStruct((batch, heads, width), "float32"), jax.ShapeDtypeStruct((batch,), "int32")
        valid = jax.ShapeDtypeStruct((batch, length), "bool") if mask else None

        def forward(v: Any, params: Any, sums: Any, count: Any, valid: Any) -> Any:
            options = {"attention_mask": valid, "return_state": True, "implementation": "triton"}
            return evo_jax.evo_attention(v, params, initial_state=EvoState(sums[0], sums[1], count), **options)

        def both(v: Any, params: Any, sums: Any, count: Any, valid: Any, cotangents: Any) -> Any:
            def differentiable(v: Any, params: Any, sums: Any) -> Any:
                out, state = forward(v, params, sums, count, valid)
                return (out, (state.sum, state.gated_sum)), state.count

            out, vjp, after = jax.vjp(differentiable, v, params, sums, has_aux=True)
            return out, after, vjp(cotangents)

        args = (v, params, (sums, sums), count, valid)
        return (both, (*args, (v, (sums, sums)))) if gradient else (forward, args)

    return build
