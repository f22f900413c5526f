"""torch tensors in and out: dlpack, JAX functions under torch's autograd, and torch.nn.Module twins."""

try:
    import torch as torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("evo_jax.interop needs PyTorch: pip install 'evo-jax[torch]'") from error

from evo_jax.interop.arrays import from_torch as from_torch
from evo_jax.interop.arrays import to_torch as to_torch
from evo_jax.interop.function import to_torch_function as to_torch_function
