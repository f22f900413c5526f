"""What this machine's own device can do, measured: bytes per second of a large copy, flops of a large product."""

import statistics
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contenders import compiled_contender, torch_calls
from benchmarks.timing import Contender, interleave


def ceilings(dtypes: Iterable[str], seconds: float) -> dict[str, Any]:
    """{"copy_bytes_per_s", "flops_per_s": {dtype: ...}}: the best of JAX and, on the same device, torch."""
    cpu = jax.default_backend() == "cpu"
    copied = _random((2**25 if cpu else 2**29,), "float32")  # 128 MB or 2 GB
    copy = compiled_contender("copy", lambda x: {"out": -x}, copied)
    rate = 2.0 * copied.nbytes / _fastest([copy], seconds)
    del copied, copy
    return {"copy_bytes_per_s": rate, "flops_per_s": {dtype: _product(dtype, cpu, seconds) for dtype in dtypes}}


def _product(dtype: str, cpu: bool, seconds: float) -> float:
    n = 1536 if cpu else 8192
    a = _random((n, n), dtype)  # of ones a GPU multiplies faster: they take less power
    found = [compiled_contender("jax", lambda a: {"out": a @ a}, a), *_torch_product(dtype, n, cpu)]
    return 2.0 * n**3 / _fastest(found, seconds)


def _random(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)


def _torch_product(dtype: str, n: int, cpu: bool) -> list[Contender]:
    from benchmarks.peers import present

    if not present("torch"):
        return []
    import torch

    if not cpu and not torch.cuda.is_available():
        return []
    device = "cpu" if cpu else "cuda"
    a = torch.randn(n, n, dtype=getattr(torch, dtype), device=device)
    return [torch_calls("torch", lambda: {"out": a @ a}, lambda x: x, device)]


def _fastest(found: list[Contender], seconds: float) -> float:
    samples = interleave(found, 5, 1, seconds)
    return min(statistics.median(times) for times in samples.values())
