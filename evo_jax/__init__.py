"""Attention layers for JAX of O(L) memory: EvoAttention, softmax family, linear; Pallas kernels with references."""

from evo_jax import _siblings as _siblings  # first: refuses to go on with another project's `reference`
from evo_jax._version import __version__ as __version__
from evo_jax.attention import flash_attention as flash_attention
from evo_jax.attention import multiscale_attention as multiscale_attention
from evo_jax.attention import sliding_window_attention as sliding_window_attention
from evo_jax.attention import sparse_attention as sparse_attention
from evo_jax.autotune import autotune as autotune
from evo_jax.backend import backend as backend
from evo_jax.backend import explain as explain
from evo_jax.cache import KVCache as KVCache
from evo_jax.cache import MultiScaleCache as MultiScaleCache
from evo_jax.cache import RingCache as RingCache
from evo_jax.evo import evo_attention as evo_attention
from evo_jax.evo import init_evo_params as init_evo_params
from evo_jax.factory import CUDA as CUDA
from evo_jax.factory import Triton as Triton
from evo_jax.generate import Generated as Generated
from evo_jax.generate import generate as generate
from evo_jax.linear import linear_attention as linear_attention
from evo_jax.modules import EvoAttention as EvoAttention
from evo_jax.modules import LinearAttention as LinearAttention
from evo_jax.rotary import rotary_embedding as rotary_embedding
from evo_jax.scan import prefix_sum as prefix_sum
from evo_jax.softmax_modules import FlashAttention as FlashAttention
from evo_jax.softmax_modules import MultiScaleAttention as MultiScaleAttention
from evo_jax.softmax_modules import SlidingWindowAttention as SlidingWindowAttention
from evo_jax.softmax_modules import SparseAttention as SparseAttention
from reference.evo_params import EvoParams as EvoParams
from reference.evo_params import EvoState as EvoState
from reference.linear_maps import LinearState as LinearState
