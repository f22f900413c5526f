"""CUDA (and its alias Triton): the factory of the complexity package, with its signatures, giving torch modules."""

from typing import Any

from torch import Tensor

from evo_jax.attention import DEFAULT_WINDOWS
from evo_jax.factory import TYPES
from evo_jax.interop.layers import (
    FlashAttention,
    LinearAttention,
    MultiScaleAttention,
    SlidingWindowAttention,
    SparseAttention,
    TorchAttention,
)
from evo_jax.interop.state_dict import NamedAsTheOriginals


class FactoryAttention(NamedAsTheOriginals):
    """A layer of the factory: `attention`, so that its keys begin with "attention." as the original's do."""

    attention: TorchAttention

    def __init__(self, attention: TorchAttention):
        super().__init__()
        self.attention = attention

    def hints(self, state_dict: Any) -> list[str]:
        return []  # those of `attention` come from itself

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """(output, cache), of which the original gives the output alone."""
        return self.attention(*args, **kwargs)


class CUDA:
    """Attention layers by name, with the original's names, arguments and defaults; each gives (output, cache).

    Their state_dict has the factory's prefix "attention.", and loads with it or without. `options` of each are
    num_kv_heads, head_dim, device, dtype and the further keyword arguments of its layer; an unknown one is a TypeError.

    >>> import torch
    >>> from evo_jax.interop import CUDA
    >>> layer = CUDA.create(attn_type="sliding_window", hidden_size=64, num_heads=4, window_size=8)
    >>> layer(torch.randn(2, 10, 64))[0].shape, sorted(layer.state_dict())[0]
    (torch.Size([2, 10, 64]), 'attention.k_proj.weight')
    """

    @classmethod
    def flash(
        cls, hidden_size: int = 768, num_heads: int = 12, num_kv_heads: int | None = None, **options: Any
    ) -> FactoryAttention:
        """Softmax attention over all earlier tokens."""
        return FactoryAttention(FlashAttention(hidden_size, num_heads, num_kv_heads=num_kv_heads, **options))

    @classmethod
    def sliding_window(
        cls,
        hidden_size: int = 768,
        num_heads: int = 12,
        window_size: int = 4096,
        num_kv_heads: int | None = None,
        **options: Any,
    ) -> FactoryAttention:
        """Softmax attention over the last `window_size` tokens."""
        options |= {"window_size": window_size, "num_kv_heads": num_kv_heads}
        return FactoryAttention(SlidingWindowAttention(hidden_size, num_heads, **options))

    @classmethod
    def local(
        cls, hidden_size: int = 768, num_heads: int = 12, window_size: int = 512, **options: Any
    ) -> FactoryAttention:
        """A sliding window of 512 tokens."""
        return cls.sliding_window(hidden_size, num_heads, window_size, **options)

    @classmethod
    def sliding(cls, *args: Any, **options: Any) -> FactoryAttention:
        """sliding_window."""
        return cls.sliding_window(*args, **options)

    @classmethod
    def sparse(
        cls,
        hidden_size: int = 768,
        num_heads: int = 12,
        block_size: int = 64,
        num_global_tokens: int = 1,
        num_random_blocks: int = 3,
        **options: Any,
    ) -> FactoryAttention:
        """A band, global tokens and random blocks."""
        options |= {"block_size": block_size, "num_global_tokens": num_global_tokens}
        return FactoryAttention(SparseAttention(hidden_size, num_heads, num_random_blocks=num_random_blocks, **options))

    @classmethod
    def linear(
        cls, hidden_size: int = 768, num_heads: int = 12, feature_map: str = "elu", **options: Any
    ) -> FactoryAttention:
        """Linear attention: O(L) time, and a state of constant size."""
        return FactoryAttention(LinearAttention(hidden_size, num_heads, feature_map=feature_map, **options))

    @classmethod
    def multiscale(
        cls,
        hidden_size: int = 768,
        num_heads: int = 12,
        local_heads: int | None = None,
        window_sizes: tuple[int, ...] = DEFAULT_WINDOWS,
        **options: Any,
    ) -> FactoryAttention:
        """Heads of different reach."""
        options |= {"local_heads": local_heads, "window_sizes": window_sizes}
        return FactoryAttention(MultiScaleAttention(hidden_size, num_heads, **options))

    @classmethod
    def create(
        cls,
        attn_type: str = "flash",
        hidden_size: int = 768,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        **options: Any,
    ) -> FactoryAttention:
        """The layer that `attn_type` names.

        Raises:
            ValueError: another name than "flash", "flash_attention", "sliding_window", "local", "sparse",
                "block_sparse", "linear", "linear_attention" or "multiscale", and whatever the layer raises.
        """
        if not isinstance(attn_type, str) or attn_type not in TYPES:
            raise ValueError(f"CUDA.create: {attn_type=} must be one of {', '.join(map(repr, TYPES))}")
        make = getattr(cls, TYPES[attn_type])
        return make(hidden_size, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)


Triton = CUDA
