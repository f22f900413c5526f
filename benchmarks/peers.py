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


def torch_linear_layer(x: torch.Tensor, weights: Weights, heads: int) -> torch.Tensor:
    """The causal linear-attention layer with elu + 1, (B, L, E) -> (B, L, E), one token after the other."""

    def split(name: str) -> torch.Tensor:
        y = functional.linear(x, weights[name])
        return y.view(*x.shape[:2], heads, -1).transpose(1, 2)

    query, key, value = functional.elu(split("q_proj")) + 1, functional.elu(split("k_proj")) + 1, split("v_proj")
    kv = torch.zeros(*query.shape[:2], query.shape[3], value.shape[3], dtype=x.dtype, device=x.device)
    z = torch.zeros_like(query[:, :, 0])
    outs = []
    for t in range(x.shape[1]):
        k, q = key[:, :, t], query[:, :, t]
        kv = kv + k.unsqueeze(-1) * value[:, :, t].unsqueeze(-2)
        z = z + k
        numerator = torch.matmul(q.unsqueeze(-2), kv).squeeze(-2)
        outs.append(numerator / ((q * z).sum(-1, keepdim=True) + 1e-6))
    out = torch.stack(outs, dim=2).transpose(1, 2).reshape(x.shape)
    return functional.linear(out, weights["o_proj"])


def two_threads(function: Callable[[], object]) -> Callable[[], object]:
    """The function with torch held to two threads."""

    def run() -> object:
        torch.set_num_threads(2)
        return function()

    return run
