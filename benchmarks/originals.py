"""The two original packages as they are, where --originals gives their folders: same weights, called as theirs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import torch_contender
from benchmarks.problems import Problem
from benchmarks.timing import Contender

_EVO_NAMES = {"q": "q_proj", "local": "v_proj_local", "gate": "global_stat_gate_proj", "final": "final_gate_proj"}


def look_in(folders: Sequence[Path]) -> None:
    """Let `import evo_attn` and `import complexity` find them there."""
    sys.path[:0] = [str(folder.resolve()) for folder in folders]


def evo(given: Problem) -> Contender:
    """evo_attn.EvoAttention on (B, L, H D), its parameters ours."""
    from evo_attn import EvoAttention  # type: ignore[import-not-found]

    batch, heads, length, width = given.shape.v
    module = _placed(EvoAttention(embed_dim=heads * width, num_heads=heads), given)
    device = next(iter(module.parameters()), torch.empty(0)).device
    module(torch.zeros(1, 2, heads * width, dtype=getattr(torch, given.shape.dtype), device=device))  # makes the rest

    def call(a: dict[str, Any]) -> Any:
        weights = {f"{theirs}.weight": a[f"{own}_kernel"].T for own, theirs in _EVO_NAMES.items()}
        weights |= {f"{theirs}.bias": a[f"{own}_bias"] for own, theirs in _EVO_NAMES.items()}
        weights |= {"norm.weight": a["norm_scale"], "norm.bias": a["norm_bias"]}
        x = a["v"].transpose(1, 2).reshape(batch, length, heads * width)
        out = _call(module, weights, x, causal=True)
        return out.reshape(batch, length, heads, width).transpose(1, 2)

    return torch_contender("original evo-attn", given, call)


def layer(given: Problem, kind: str, options: dict[str, Any]) -> Contender:
    """complexity.api.CUDA's layer of that kind, its projections ours."""
    from complexity.api import CUDA  # type: ignore[import-not-found]

    shape = given.shape
    made = CUDA.create(kind, hidden_size=shape.heads * shape.width, num_heads=shape.heads, **options)
    module = _placed(made, given)

    def call(a: dict[str, Any]) -> Any:
        weights = {f"{name}.weight": kernel.T for name, kernel in a.items() if name != "x"}
        return _call(module, weights, a["x"])

    return torch_contender("original complexity", given, call)


def _placed(module: Any, given: Problem) -> Any:
    gpu = torch.cuda.is_available()
    return module.to("cuda" if gpu else "cpu", getattr(torch, given.shape.dtype)).train()


def _call(module: Any, weights: dict[str, Any], x: Any, **options: Any) -> Any:
    """module(x) with these values for the parameters whose names end like theirs."""
    named = {
        full: value
        for full, _ in module.named_parameters()
        for name, value in weights.items()
        if full == name or full.endswith(f".{name}")
    }
    if len(named) != len(weights):
        raise LookupError(f"it has no parameters for {sorted(set(weights) - {n for n in named})}")
    out = torch.func.functional_call(module, named, (x,), options)
    return out[0] if isinstance(out, tuple) else out
