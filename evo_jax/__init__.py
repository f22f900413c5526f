"""Attention layers for JAX of O(N) memory: EvoAttention and linear attention, Pallas kernels with references."""

from evo_jax import _siblings as _siblings  # first: refuses to go on with another project's `reference`
from evo_jax._version import __version__ as __version__
from evo_jax.backend import backend as backend
from evo_jax.backend import explain as explain
from evo_jax.evo import evo_attention as evo_attention
from evo_jax.evo import init_evo_params as init_evo_params
from evo_jax.factory import CUDA as CUDA
from evo_jax.factory import Triton as Triton
from evo_jax.linear import linear_attention as linear_attention
from evo_jax.modules import EvoAttention as EvoAttention
from evo_jax.modules import LinearAttention as LinearAttention
from evo_jax.scan import prefix_sum as prefix_sum
from reference.evo_params import EvoParams as EvoParams
from reference.linear_maps import LinearState as LinearState
