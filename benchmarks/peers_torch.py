"""What torch offers, and the original systems' mathematics in eager torch: contenders by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.contenders import torch_contender
from benchmarks.problems import WINDOW, Problem, pattern, visible
from benchmarks.timing import Contender

Tensors = dict[str, Any]
Make = Callable[[], Contender]
ORIGINAL = "original's mathematics (torch)"


def peers(given: Problem, gpu: bool) -> dict[str, Make]:
    """Every peer of the operation that torch brings, by name."""
    functions = {"prefix_sum": _sums, "evo": _evo, "linear": _linear}.get(given.op, _softmax)
    return functions(given, gpu)


def _sums(given: Problem, _: bool) -> dict[str, Make]:
    return {"torch.cumsum": partial(torch_contender, "torch.cumsum", given, lambda a: torch.cumsum(a["x"], dim=2))}


def _evo(given: Problem, _: bool) -> dict[str, Make]:
    return {ORIGINAL: partial(torch_contender, ORIGINAL, given, evo)}


def _linear(given: Problem, gpu: bool) -> dict[str, Make]:
    found: dict[str, Make] = {}
    if gpu:
        found["flash-linear-attention"] = partial(_fla, given)
    if not gpu or given.shape.length <= 2048:  # a call of the loop takes seconds, of which a GPU suite has few
        found[ORIGINAL] = partial(torch_contender, ORIGINAL, given, linear)
    return found


def _softmax(given: Problem, gpu: bool) -> dict[str, Make]:
    found: dict[str, Make] = {}
    names = ("flash_attention", "math") + (("cudnn_attention", "efficient_attention") if gpu else ())
    dense = given.shape.length <= 8192
    if given.op == "flash":
        for name in ("default", *names):
            if name != "math" or dense:
                found[f"torch SDPA {name}"] = partial(_sdpa, name, given)
    elif dense:
        found["torch SDPA, dense mask"] = partial(_sdpa_masked, given)
        found[ORIGINAL] = partial(_masked, given)
    found["torch FlexAttention"] = partial(_flex, given, gpu)
    return found


def _sdpa(backend: str, given: Problem) -> Contender:
    """Causal, by the backend that torch picks or by a given one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(a: Tensors) -> Any:
        return functional.scaled_dot_product_attention(a["query"], a["key"], a["value"], is_causal=True)

    def attend_by(a: Tensors) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend.upper())):
            return attend(a)

    return torch_contender(f"torch SDPA {backend}", given, attend if backend == "default" else attend_by)


def _seen(given: Problem) -> Any:
    import numpy as np

    device = "cuda" if torch.cuda.is_available() and torch.version.cuda else "cpu"
    return torch.from_numpy(np.array(visible(given.op, given.shape))).to(device)


def _sdpa_masked(given: Problem) -> Contender:
    seen = _seen(given)

    def attend(a: Tensors) -> Any:
        return functional.scaled_dot_product_attention(a["query"], a["key"], a["value"], attn_mask=seen[None])

    return torch_contender("torch SDPA, dense mask", given, attend)


def _masked(given: Problem) -> Contender:
    """Softmax over all L x L scores under a mask."""
    hidden = torch.logical_not(_seen(given))
    return torch_contender(ORIGINAL, given, lambda a: masked_softmax(a, hidden))


def _flex(given: Problem, gpu: bool) -> Contender:
    """Compiled FlexAttention with a block mask; on a CPU it has no backward, and needs a C++ compiler."""
    if given.gradient and not gpu:
        raise NotImplementedError("FlexAttention has no backward on a CPU")
    by_head, length = given.op in ("sparse", "multiscale"), given.shape.length
    if by_head and length > 8192:
        raise NotImplementedError(f"a block mask of each head is made of {length} x {length} values a head")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = "cuda" if gpu else "cpu"
    if given.op == "flash":
        sees = lambda b, h, i, j: i >= j  # noqa: E731
    elif given.op == "sliding_window":
        sees = lambda b, h, i, j: (i >= j) & (i - j < WINDOW)  # noqa: E731
    elif given.op == "multiscale":
        sees = partial(_within_reach, [left for left, _ in pattern(given.op, given.shape.heads).windows])
    else:
        seen = _seen(given).to(device).expand(given.shape.heads, -1, -1)
        sees = lambda b, h, i, j: seen[h, i, j]  # noqa: E731
    mask = create_block_mask(sees, None, given.shape.heads if by_head else None, length, length, device=device)
    torch._dynamo.reset()  # it compiles a function only so many times, then calls it as it is
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(a: Tensors) -> Any:
        return compiled(a["query"], a["key"], a["value"], block_mask=mask)

    return torch_contender("torch FlexAttention", given, attend)


def _within_reach(reach: list[int], _b: Any, h: Any, i: Any, j: Any) -> Any:
    """Without a table of the reaches, which FlexAttention's code for a CPU cannot look into."""
    seen = i < j
    for head, left in enumerate(reach):
        seen = seen | ((h == head) & (i >= j) & (i - j <= left))
    return seen & (i >= j)


def _fla(given: Problem) -> Contender:
    """flash-linear-attention's chunked kernel, whose arrays are (B, L, H, D) and would be copied if they were not."""
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]

    def attend(a: Tensors) -> Any:
        query, key = (functional.elu(a[name]) + 1 for name in ("query", "key"))
        out = chunk_linear_attn(query, key, a["value"], scale=1.0, normalize=True)
        return out[0] if isinstance(out, tuple) else out

    return torch_contender("flash-linear-attention", given, attend, heads_first=False)


def evo(a: Tensors) -> Any:
    """EvoAttention, causal and without a mask, on (B, H, L, D); formulas of the README."""
    v, length = a["v"], a["v"].shape[2]

    def lin(name: str, x: Any) -> Any:
        return x @ a[f"{name}_kernel"] + a[f"{name}_bias"]

    alive = (v.abs().sum(dim=-1, keepdim=True) > 0).to(v.dtype)
    c = torch.cumsum(v, dim=2)
    count = torch.arange(1, length + 1, dtype=v.dtype, device=v.device).view(1, 1, length, 1)
    s = torch.cumsum(torch.sigmoid(lin("gate", c / count)) * v, dim=2)
    denominator = s.abs() + lin("local", v).abs() + 1e-8
    gate = functional.silu(lin("q", v) / denominator) * v
    y = torch.sigmoid(lin("final", gate)) * c * alive
    return functional.layer_norm(y, y.shape[-1:], a["norm_scale"], a["norm_bias"], 1e-5)


def masked_softmax(a: Tensors, hidden: Any) -> Any:
    """Over all L x L scores, those of `hidden` (heads or 1, L, L) at -inf."""
    scores = torch.matmul(a["query"], a["key"].transpose(-2, -1)) * a["query"].shape[3] ** -0.5
    return torch.matmul(torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1), a["value"])


def linear(a: Tensors) -> Any:
    """Causal linear attention, token by token, with elu(x) + 1."""
    return linear_of(functional.elu(a["query"]) + 1, functional.elu(a["key"]) + 1, a["value"])


def linear_of(query: Any, key: Any, value: Any) -> Any:
    """The same of features, (B, H, L, D)."""
    kv = torch.zeros(*key.shape[:2], key.shape[3], value.shape[3], dtype=value.dtype, device=value.device)
    z = torch.zeros_like(query[:, :, 0])
    outs = []
    for t in range(query.shape[2]):
        k, q = key[:, :, t], query[:, :, t]
        kv = kv + k.unsqueeze(-1) * value[:, :, t].unsqueeze(-2)
        z = z + k
        numerator = torch.matmul(q.unsqueeze(-2), kv).squeeze(-2)
        outs.append(numerator / ((q * z).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(outs, dim=2)
