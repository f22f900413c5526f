"""EvoAttention for torch: evo_attention, the module and its core, with the names and keys of the evo-attn package."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor, nn

from evo_jax import evo, modules, shapes
from evo_jax.interop.function import to_torch_function
from evo_jax.interop.state_dict import EVO_NAMES, NamedAsTheOriginals, Spec, assembled, plain
from reference.evo_params import EvoParams, EvoState

_LINEAR = ("q_proj", "v_proj_local", "global_stat_gate_proj", "final_gate_proj")
_evo_attention = to_torch_function(evo.evo_attention)


def evo_attention(v: Tensor, params: EvoParams | Mapping[str, Tensor] | nn.Module | None = None, **options: Any) -> Any:
    """evo_jax.evo_attention on torch tensors: the gated prefix sum of v (B, H, L, D), differentiable.

    Args:
        v: values, float16, bfloat16, float32, or float64 where JAX's x64 is on.
        params: EvoParams of tensors, the state_dict of an original core or module, or an EvoAttention or its core.
            None: fixed ones that never change, where the original draws new ones at each call.
        options: those of evo_jax.evo_attention as tensors: query, causal, attention_mask, mask_semantics, accum_dtype
            (a torch.dtype), initial_state, return_state, block_m, num_warps, num_stages and implementation.

    Raises:
        ValueError, TypeError: whatever evo_jax.evo_attention raises; names that are missing from `params`.

    >>> import torch
    >>> from evo_jax.interop import EvoAttention, evo_attention
    >>> v = torch.randn(2, 4, 10, 16, requires_grad=True)
    >>> evo_attention(v, EvoAttention(64, 4), causal=True).sum().backward()
    >>> v.grad.shape
    torch.Size([2, 4, 10, 16])
    """
    if isinstance(params, nn.Module):
        params = params.state_dict(keep_vars=True)
    if isinstance(params, Mapping):
        params = _evo_params(params)
    return _evo_attention(v, params, **_prepared(options))


class EvoAttentionCore(NamedAsTheOriginals):
    """The original's EvoAttentionCausalTorch and EvoAttentionCausalTriton: (B, H, L, D) -> (B, H, L, D), with weights.

    Args:
        head_dim: D.
        bias: have the four biases, as the original always does; False leaves them out.
        device, dtype: of the parameters.
    """

    def __init__(self, head_dim: int, *, bias: bool = True, device: Any = None, dtype: Any = None):
        super().__init__()
        head_dim = shapes.at_least(type(self).__name__, "head_dim", head_dim, 1)
        for name in _LINEAR:
            setattr(self, name, nn.Linear(head_dim, head_dim, bias=bias, device=device, dtype=dtype))
        self.norm = nn.LayerNorm(head_dim, device=device, dtype=dtype)

    def weights(self, prefix: str = "") -> dict[str, Tensor | None]:
        """The parameters by their names, the biases that are left out as None."""
        layers = {**{name: getattr(self, name) for name in _LINEAR}, "norm": self.norm}
        for name, layer in layers.items():
            plain(type(self).__name__, name, layer, nn.LayerNorm if name == "norm" else nn.Linear)
        return {f"{prefix}{n}.{kind}": getattr(m, kind) for n, m in layers.items() for kind in ("weight", "bias")}

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any) -> Any:
        """Of values alone, core(v), or with other queries, core(q, k, v), of which k plays no part, as it never did."""
        v, query_or_none = (query, None) if value is None else (value, query)
        return _core(self.weights(), v, query_or_none, _prepared(options))


class EvoAttention(NamedAsTheOriginals):
    """EvoAttention over (B, L, E), the torch twin of evo_jax.EvoAttention: one JAX program forward, one backward.

    Parameters are made here, under the original's names ("core.q_proj.weight", ...) and drawn as it draws them; an
    original's state_dict loads with its "core." or without.

    Args:
        embed_dim: E.
        num_heads: H; H * head_dim must be E.
        head_dim: D; None for E / H.
        bias: have the four biases. None does, as the original does whatever it is told.
        out_proj: add a linear (E, E) output projection. None does not, as the original does not whatever it is told.
        device, dtype: of the parameters.

    Raises:
        ValueError: num_heads * head_dim is not embed_dim.

    >>> import torch
    >>> from evo_jax.interop import EvoAttention
    >>> layer = EvoAttention(embed_dim=64, num_heads=4)
    >>> layer(torch.randn(2, 10, 64), causal=True).shape, sorted(layer.state_dict())[0]
    (torch.Size([2, 10, 64]), 'core.final_gate_proj.bias')
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool | None = None,
        out_proj: bool | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.head_dim = shapes.head_width("EvoAttention", embed_dim, num_heads, head_dim)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.core = EvoAttentionCore(self.head_dim, bias=bias is not False, device=device, dtype=dtype)
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "out_proj": bool(out_proj)}
        self.spec = Spec(modules.EvoAttention, tuple(sizes.items()))
        self.out_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype) if out_proj else None

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def init_cache(self, batch_size: int, dtype: torch.dtype | None = None) -> EvoState:
        """The state before the first token: tensors on the parameters' device, of their dtype or float32 if wider."""
        like = self.core.norm.weight
        dtype = torch.promote_types(like.dtype, torch.float32) if dtype is None else dtype
        sums = torch.zeros(2, batch_size, self.num_heads, self.head_dim, dtype=dtype, device=like.device)
        return EvoState(sums[0], sums[1], torch.zeros(batch_size, dtype=torch.int32, device=sums.device))

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        causal: bool = True,
        cache: EvoState | None = None,
        **options: Any,
    ) -> Any:
        """(B, L, E) -> (B, L, E); with a cache, ((B, L, E), the cache after these tokens).

        Args:
            x: hidden states; with a cache, of the new tokens.
            attention_mask: (B, L), (B, 1, L) or (B, 1, L, 1), 1 for a valid token; masked rows of the output are 0.
            causal: token t sees tokens up to t; False: every token sees all, and there can be no cache.
            cache: what the tokens before left, from init_cache or an earlier call.
            options: mask_semantics, accum_dtype (a torch.dtype), block_m, num_warps, num_stages and implementation.

        Raises:
            ValueError: shapes that do not fit, a mask with other values than 0 and 1. TypeError: dtypes.
            NotImplementedError: a projection or norm with hooks or a forward of its own.
        """
        weights = self.core.weights("core.")
        if self.out_proj is not None:
            plain("EvoAttention", "out_proj", self.out_proj, nn.Linear)
            weights |= {"out_proj.weight": self.out_proj.weight, "out_proj.bias": self.out_proj.bias}
        given = _prepared({"attention_mask": attention_mask, "causal": causal, "cache": cache, **options})
        return _module(self.spec, weights, x, given)


def _with_biases(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights with zeros for the biases that are left out."""
    return {
        name: jax.numpy.zeros_like(weights[name.replace("bias", "weight")][0]) if array is None else array
        for name, array in weights.items()
    }


def _evo_params(weights: Mapping[str, Any]) -> EvoParams:
    """The ten arrays by the originals' names, with or without prefix, as EvoParams."""
    plain = {name.removeprefix("attention.").removeprefix("core."): array for name, array in weights.items()}
    names = {ours: name.removeprefix("core.") for name, ours in EVO_NAMES.items()}
    if missing := [name for name in names.values() if name not in plain]:
        raise ValueError(f"evo_attention: params have no {', '.join(missing)}")
    return EvoParams(**{n: plain[name].T if n.endswith("kernel") else plain[name] for n, name in names.items()})


@to_torch_function
def _core(weights: dict[str, Any], v: Any, query: Any, options: dict[str, Any]) -> Any:
    return evo.evo_attention(v, _evo_params(_with_biases(weights)), query=query, **options)


@to_torch_function
def _module(spec: Spec, weights: dict[str, Any], x: Any, options: dict[str, Any]) -> Any:
    return assembled(spec, _with_biases(weights))(x, **options)


def _prepared(options: dict[str, Any]) -> dict[str, Any]:
    """The options as JAX takes them: the mask's dtype, and the name of the accumulation dtype."""
    dtype, mask = options.get("accum_dtype"), options.get("attention_mask")
    if isinstance(dtype, torch.dtype):
        options = options | {"accum_dtype": str(dtype).removeprefix("torch.")}
    if isinstance(mask, Tensor) and options.get("mask_semantics", "padding") == "padding":
        options = options | {"attention_mask": as_bool("EvoAttention", mask)}
    elif isinstance(mask, Tensor) and not mask.is_floating_point():
        options = options | {"attention_mask": mask.to(torch.int32)}
    return options


def as_bool(op: str, mask: Tensor) -> Tensor:
    """A mask of tokens as bool; ValueError unless its values are 0 and 1."""
    if mask.dtype == torch.bool:
        return mask
    valid = mask != 0
    if not bool(torch.where(valid, mask == 1, True).all()):
        shapes.zeros_and_ones(op, np.asarray(mask.detach().float().cpu()))
    return valid


EvoAttn = EvoAttention
evo_attn = evo_attention
EvoAttentionCausalTorch = EvoAttentionCausalTriton = EvoAttentionCore
