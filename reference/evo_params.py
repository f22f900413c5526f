"""EvoParams, the ten arrays of an EvoAttention core, EvoState, what a sequence leaves, and EvoSpec, static choices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from reference.states import take_sequences

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


class EvoState(NamedTuple):
    """All that later tokens need of the ones before, however many those are: the cache of a causal EvoAttention.

    Attributes:
        sum: (B, H, D), of v; as `gated_sum` in the accumulation dtype, float32 or float64.
        gated_sum: (B, H, D), of g v.
        count: (B,) int32, how many tokens each sequence has; masked ones are none.

    >>> import jax.numpy as jnp
    >>> state = EvoState(jnp.zeros((2, 1, 4)), jnp.zeros((2, 1, 4)), jnp.array([3, 5], jnp.int32))
    >>> state.take(jnp.array([1, 1, 0])).count.tolist()
    [5, 5, 3]
    """

    sum: Any
    gated_sum: Any
    count: Any

    take = take_sequences


@dataclass(frozen=True, slots=True)
class EvoSpec:
    """Static choices: causal or over the whole sequence; dead tokens absent or merely multiplied by zero."""

    causal: bool = True
    absent: bool = True
    accum_dtype: str = "float32"
