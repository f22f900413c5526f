"""The original systems' mathematics in eager torch, as they run it on a CPU: what our timings are compared with."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn import functional

from reference.evo_params import EvoParams

Weights = Mapping[str, torch.Tensor]


def torch_weights(params: EvoParams) -> dict[str, torch.Tensor]:
    """The same parameters in torch's layout (out, in), ready for gradients."""
    arrays = {name: np.array(value) for name, value in params._asdict().items()}
    layout = {name: a.T.copy() if name.endswith("kernel") else a for name, a in arrays.items()}
    return {name: torch.from_numpy(a).requires_grad_() for name, a in layout.items()}


def torch_prefix_sum(x: torch.Tensor) -> torch.Tensor:
    """torch.cumsum along the tokens of (B, H, L, D)."""
    return torch.cumsum(x, dim=2)


def torch_evo(v: torch.Tensor, weights: Weights, causal: bool = True) -> torch.Tensor:
    """EvoAttention without a mask, (B, H, L, D) -> (B, H, L, D); formulas of SEMANTICS section 1."""

    def lin(name: str, a: torch.Tensor) -> torch.Tensor:
        return functional.linear(a, weights[f"{name}_kernel"], weights[f"{name}_bias"])

    alive = (v.abs().sum(dim=-1, keepdim=True) > 0).to(v.dtype)
    length = v.shape[2]
    if causal:
        c = torch.cumsum(v, dim=2)
        count = torch.arange(1, length + 1, dtype=v.dtype, device=v.device).view(1, 1, length, 1)
        s = torch.cumsum(torch.sigmoid(lin("gate", c / count)) * v, dim=2)
    else:
        c = v.sum(dim=2, keepdim=True)
        s = torch.sigmoid(lin("gate", c / length)) * c
    denominator = s.abs() + lin("local", v).abs() + 1e-8
    gate = functional.silu(lin("q", v) / denominator) * v
    y = torch.sigmoid(lin("final", gate)) * c * alive
    return functional.layer_norm(y, y.shape[-1:], weights["norm_scale"], weights["norm_bias"], 1e-5)


def torch_evo_gradients(
    v: torch.Tensor, weights: Weights, cotangent: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward of torch_evo: the gradients of v and of every weight."""
    v = v.detach().requires_grad_()
    names = list(weights)
    grads = torch.autograd.grad(torch_evo(v, weights), [v, *weights.values()], cotangent)
    return grads[0], dict(zip(names, grads[1:], strict=True))


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of (B, H, L, D) arrays


def torch_layer(x: torch.Tensor, weights: Weights, heads: int, attention: Attention) -> torch.Tensor:
    """Projections of (B, L, E), attention, output projection."""

    def split(name: str) -> torch.Tensor:
        return functional.linear(x, weights[name]).view(*x.shape[:2], heads, -1).transpose(1, 2)

    out = attention(split("q_proj"), split("k_proj"), split("v_proj"))
    return functional.linear(out.transpose(1, 2).reshape(x.shape), weights["o_proj"])


def torch_linear(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal linear attention with elu + 1, one token after the other."""
    query, key = functional.elu(query) + 1, functional.elu(key) + 1
    kv = torch.zeros(*query.shape[:2], query.shape[3], value.shape[3], dtype=value.dtype, device=value.device)
    z = torch.zeros_like(query[:, :, 0])
    outs = []
    for t in range(query.shape[2]):
        k, q = key[:, :, t], query[:, :, t]
        kv = kv + k.unsqueeze(-1) * value[:, :, t].unsqueeze(-2)
        z = z + k
        numerator = torch.matmul(q.unsqueeze(-2), kv).squeeze(-2)
        outs.append(numerator / ((q * z).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(outs, dim=2)


def torch_masked(visible: torch.Tensor) -> Attention:
    """Softmax over all L x L scores under a mask (heads or 1, L, L), which the original makes anew in every call."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        return torch.matmul(torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1), value)

    return attention


def torch_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's own causal attention."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def torch_flex(window: int, length: int) -> Attention:
    """torch's compiled FlexAttention over a causal window; on a CPU it has no backward, and needs a C++ compiler."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(_b: torch.Tensor, _h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i >= j) & (i - j < window)

    mask = create_block_mask(sees, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return compiled(query, key, value, block_mask=mask)  # type: ignore[return-value]

    return attention


def two_threads(function: Callable[[], object]) -> Callable[[], object]:
    """The function with torch held to two threads."""

    def run() -> object:
        torch.set_num_threads(2)
        return function()

    return run
