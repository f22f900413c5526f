"""The originals' state_dict in and out of nnx modules: names, prefixes, transposed kernels, safetensors files."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from evo_jax.interop.arrays import from_torch, to_torch
from evo_jax.modules import EvoAttention
from evo_jax.projections import GroupedHeads

Module = TypeVar("Module", bound=nnx.Module)
_OP = "load_torch_state_dict"
EVO_NAMES = {
    "core.q_proj.weight": "q_kernel",
    "core.q_proj.bias": "q_bias",
    "core.v_proj_local.weight": "local_kernel",
    "core.v_proj_local.bias": "local_bias",
    "core.global_stat_gate_proj.weight": "gate_kernel",
    "core.global_stat_gate_proj.bias": "gate_bias",
    "core.final_gate_proj.weight": "final_kernel",
    "core.final_gate_proj.bias": "final_bias",
    "core.norm.weight": "norm_scale",
    "core.norm.bias": "norm_bias",
}
FULL_HEADS = (
    "the originals give sparse, linear and multi-scale attention full-size keys and values and ignore num_kv_heads: "
    "such a checkpoint needs a layer made without num_kv_heads"
)


def load_torch_state_dict(module: Module, state_dict: Mapping[str, Any] | str | Path, prefix: str = "") -> Module:
    """Set the parameters of an nnx module from a state_dict of the original layer or of its torch twin.

    Values are cast to the dtype of the parameters that they take the place of, as torch's own load_state_dict casts,
    and copied to where those are. Nothing is set unless everything fits.

    Args:
        module: an EvoAttention, FlashAttention, SlidingWindowAttention, SparseAttention, LinearAttention or
            MultiScaleAttention of evo_jax; updated in place.
        state_dict: tensors or numpy arrays by the originals' names, weights (out, in); or the path of a safetensors
            file. The factory's "attention." is optional, and so is "core." for EvoAttention.
        prefix: what the layer's names begin with in the state_dict of a whole model, as "layers.0.attn."; all other
            names are then another layer's.

    Returns:
        `module` itself.

    Raises:
        ValueError: names that are missing or unexpected, and arrays of a wrong shape, all of them in one message.
        TypeError: a module that is none of the six.

    >>> import jax.numpy as jnp, torch, evo_jax
    >>> from flax import nnx
    >>> from evo_jax.interop import load_torch_state_dict
    >>> layer = evo_jax.FlashAttention(hidden_size=8, num_heads=2, rngs=nnx.Rngs(0))
    >>> eye = {f"attention.{name}_proj.weight": torch.eye(8) for name in "qkvo"}
    >>> load_torch_state_dict(layer, eye)(jnp.ones((1, 3, 8)))[0].tolist() == [[[1.0] * 8] * 3]
    True
    """
    variables = entries(module)
    given = _read(state_dict) if isinstance(state_dict, str | Path) else dict(state_dict)
    if prefix:
        given = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    given = {plain_name(name, variables): value for name, value in given.items()}
    _check(type(module).__name__, variables, given)
    for name, (variable, transposed) in variables.items():
        variable[...] = _array(given[name], variable[...], transposed)
    return module


def to_torch_state_dict(module: nnx.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """The parameters of an nnx module as the state_dict of the original layer: new tensors, weights (out, in).

    Args:
        module: one of the six of load_torch_state_dict.
        prefix: put before every name; "attention." gives the names of the factory's layers.

    Raises:
        TypeError: a module that is none of the six, or a dtype that torch lacks.

    >>> import evo_jax
    >>> from flax import nnx
    >>> from evo_jax.interop import to_torch_state_dict
    >>> layer = evo_jax.FlashAttention(hidden_size=8, num_heads=2, num_kv_heads=1, rngs=nnx.Rngs(0))
    >>> to_torch_state_dict(layer, "attention.")["attention.k_proj.weight"].shape
    torch.Size([4, 8])
    """
    tensors = {}
    for name, (variable, transposed) in entries(module).items():
        tensor = to_torch(variable[...])
        tensors[prefix + name] = tensor.T.contiguous() if transposed else tensor
    return tensors


def save_torch_state_dict(module: nnx.Module, path: str | Path, prefix: str = "") -> None:
    """Write to_torch_state_dict(module, prefix) to a safetensors file, which load_torch_state_dict reads.

    Raises:
        ImportError: safetensors is not installed. TypeError: whatever to_torch_state_dict raises.
    """
    _safetensors().save_file(to_torch_state_dict(module, prefix), path)


def entries(module: nnx.Module) -> dict[str, tuple[nnx.Variable, bool]]:
    """By the originals' names, the variables of one of the six modules, and which of them are transposed."""
    found: dict[str, tuple[nnx.Variable, bool]] = {}
    if isinstance(module, EvoAttention):
        found = {name: (getattr(module, ours), ours.endswith("kernel")) for name, ours in EVO_NAMES.items()}
        if module.out_proj is not None:
            found["out_proj.weight"] = (module.out_proj.kernel, True)
            assert module.out_proj.bias is not None
            found["out_proj.bias"] = (module.out_proj.bias, False)
    elif isinstance(module, GroupedHeads):
        found = {f"{name}.weight": (getattr(module, name).kernel, True) for name in _PROJECTIONS}
        sinks = getattr(module, "sinks", None)
        if sinks is not None:
            found["sinks"] = (sinks, False)
    else:
        raise TypeError(f"{type(module).__name__} is not one of evo_jax's attention layers, whose names are known here")
    return found


def plain_name(name: str, known: Any) -> str:
    """`name` with or without the prefixes of the factory and of EvoAttention's core, if that is one of `known`."""
    bare = name.removeprefix("attention.").removeprefix("core.")
    return next((form for form in (name, bare, f"core.{bare}", f"attention.{bare}") if form in known), name)


class NamedAsTheOriginals(torch.nn.Module):
    """A module that loads a state_dict of the original's with or without the prefixes "attention." and "core."."""

    def hints(self, state_dict: Mapping[str, torch.Tensor]) -> list[str]:
        """What to tell besides torch's error of sizes that do not fit, which is one whether strict or not."""
        return []

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:  # pyright: ignore
        known = self.state_dict(keep_vars=True).keys()
        for key in [key for key in state_dict if key.startswith(prefix)]:
            renamed = prefix + plain_name(key.removeprefix(prefix), known)
            if renamed != key and renamed not in state_dict:
                state_dict[renamed] = state_dict.pop(key)
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        *_, errors = rest
        errors += self.hints(own)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def plain(op: str, name: str, module: Any, kind: Any) -> None:
    """Raise unless `module` computes as its weight and bias alone say: it is never called."""
    called = isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)
    if not called or module._forward_hooks or module._forward_pre_hooks:
        raise NotImplementedError(
            f"{op}: {name} is a {type(module).__name__} that has hooks or a forward of its own, and this layer would "
            "not call it: merge what wraps it into the weight, or use torch.nn.utils.parametrize"
        )


@dataclass(frozen=True)
class Spec:
    """Which nnx module: one hashable value, so that layers of equal ones share their traces."""

    kind: Any
    options: tuple[tuple[str, Any], ...]


def assembled(spec: Spec, weights: Mapping[str, Any]) -> Any:
    """The nnx module of `spec` with `weights`, by the originals' names, in any dtype; for use in a trace."""
    module = skeleton(spec)
    for name, (variable, transposed) in entries(module).items():
        variable.set_value(weights[name].T if transposed else weights[name])
    return module


def skeleton(spec: Spec) -> Any:
    """The nnx module of `spec`, which checks it all, with shapes for parameters."""
    graph, state = _split(spec)
    return nnx.merge(graph, jax.tree.map(lambda shape: shape, state))  # variables of this trace, not the kept ones


@functools.cache
def _split(spec: Spec) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: spec.kind(**dict(spec.options), rngs=nnx.Rngs(0))))


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _check(kind: str, variables: Mapping[str, tuple[nnx.Variable, bool]], given: Mapping[str, Any]) -> None:
    """ValueError with everything that is wrong."""
    shapes = {n: tuple(v.shape)[:: -1 if transposed else 1] for n, (v, transposed) in variables.items()}
    wrong = [
        f"{name} is {tuple(given[name].shape)} and must be {shape}"
        for name, shape in shapes.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    groups = {
        "missing": [name for name in shapes if name not in given],
        "unexpected": [name for name in given if name not in shapes],
        "wrong shape": wrong,
    }
    told = [f"{title}: {', '.join(names)}" for title, names in groups.items() if names]
    if told:
        hints = [FULL_HEADS] if any(line.startswith(("k_proj", "v_proj")) for line in wrong) else []
        if not any(name in given for name in shapes):
            hints.append("none of the names is known: give prefix=, what this layer's names begin with")
        raise ValueError(f"{_OP}: {kind} does not fit: {'; '.join([*told, *hints])}")


def _array(value: Any, old: Any, transposed: bool) -> jax.Array:
    """`value` as an array of its own, of the dtype and on the device of `old`."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", copy=True)
        wanted = getattr(torch, np.dtype(old.dtype).name)
        value = from_torch(value.to(wanted).contiguous(), copy=True)
    value = np.asarray(value).astype(old.dtype)
    array = jnp.array(value.T if transposed else value)
    return array if isinstance(old, jax.ShapeDtypeStruct) else jax.device_put(array, old.sharding)


def _read(path: str | Path) -> dict[str, torch.Tensor]:
    return _safetensors().load_file(path)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError("safetensors files need the package of that name: pip install safetensors") from error
    return safetensors.torch
