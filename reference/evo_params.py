"""EvoParams, the ten arrays of an EvoAttention core, and EvoSpec, the static choices of one call."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

_TORCH_NAMES = {"q": "q_proj", "local": "v_proj_local", "gate": "global_stat_gate_proj", "final": "final_gate_proj"}


class EvoParams(NamedTuple):
    """Weights shared by all heads; kernels are (in, out): `lin(a) = a @ kernel + bias`.

    Fields are arrays, or what stands for one in a pytree of the same form: a shape, a block spec, a gradient.
    """

    q_kernel: Any
    q_bias: Any
    local_kernel: Any
    local_bias: Any
    gate_kernel: Any
    gate_bias: Any
    final_kernel: Any
    final_bias: Any
    norm_scale: Any
    norm_bias: Any

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "EvoParams":
        """Parameters from the original's state_dict, whose weights are (out, in), with or without a `core.` prefix."""
        arrays = {key.removeprefix("core."): jnp.asarray(value) for key, value in state.items()}
        fields = {}
        for name, torch_name in _TORCH_NAMES.items():
            fields[f"{name}_kernel"] = arrays[f"{torch_name}.weight"].T
            fields[f"{name}_bias"] = arrays[f"{torch_name}.bias"]
        return cls(**fields, norm_scale=arrays["norm.weight"], norm_bias=arrays["norm.bias"])


@dataclass(frozen=True, slots=True)
class EvoSpec:
    """Static choices: causal or over the whole sequence; dead tokens absent or merely multiplied by zero."""

    causal: bool = True
    absent: bool = True
    accum_dtype: str = "float32"
