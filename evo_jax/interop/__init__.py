"""torch tensors in and out: dlpack, JAX functions under torch's autograd, and torch.nn.Module twins."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("evo_jax.interop needs PyTorch: pip install 'evo-jax[torch]'") from error

from evo_jax.interop.arrays import from_torch as from_torch
from evo_jax.interop.arrays import to_torch as to_torch
from evo_jax.interop.evo import EvoAttention as EvoAttention
from evo_jax.interop.evo import EvoAttentionCausalTorch as EvoAttentionCausalTorch
from evo_jax.interop.evo import EvoAttentionCausalTriton as EvoAttentionCausalTriton
from evo_jax.interop.evo import EvoAttn as EvoAttn
from evo_jax.interop.evo import evo_attention as evo_attention
from evo_jax.interop.evo import evo_attn as evo_attn
from evo_jax.interop.factory import CUDA as CUDA
from evo_jax.interop.factory import Triton as Triton
from evo_jax.interop.function import to_torch_function as to_torch_function
from evo_jax.interop.layers import FlashAttention as FlashAttention
from evo_jax.interop.layers import LinearAttention as LinearAttention
from evo_jax.interop.layers import MultiScaleAttention as MultiScaleAttention
from evo_jax.interop.layers import SlidingWindowAttention as SlidingWindowAttention
from evo_jax.interop.layers import SparseAttention as SparseAttention
from evo_jax.interop.state_dict import load_torch_state_dict as load_torch_state_dict
from evo_jax.interop.state_dict import save_torch_state_dict as save_torch_state_dict
from evo_jax.interop.state_dict import to_torch_state_dict as to_torch_state_dict
