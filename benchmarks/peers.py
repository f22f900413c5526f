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


def two_threads(function: Callable[[], object]) -> Callable[[], object]:
    """The function with torch held to two threads."""

    def run() -> object:
        torch.set_num_threads(2)
        return function()

    return run
