"""A program of tests/test_sharding.py: on four CPU devices, differences between shards and the whole, as JSON."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import evo_jax

B, L, N, K, D = 4, 24, 4, 2, 16
BATCH, HEADS = P("data"), P("data", None, "model")
OPS: dict[str, tuple[Callable[..., jax.Array], P]] = {
    "flash_attention": (evo_jax.flash_attention, HEADS),
    "sliding_window_attention": (lambda *a, **o: evo_jax.sliding_window_attention(*a, window_size=7, **o), HEADS),
    "sparse_attention": (lambda *a, **o: evo_jax.sparse_attention(*a, block_size=8, num_random_blocks=1, **o), BATCH),
    "multiscale_attention": (evo_jax.multiscale_attention, BATCH),
    "linear_attention": (evo_jax.linear_attention, HEADS),
    "evo_attention": (lambda q, k, v, **o: evo(v, k, **o), HEADS),
    "prefix_sum": (lambda q, k, v, **o: evo_jax.prefix_sum(v, axis=1, **o), HEADS),
}


def evo(v: jax.Array, query: jax.Array, **options: Any) -> jax.Array:
    params = evo_jax.init_evo_params(jax.random.key(0), D)
    return evo_jax.evo_attention(v.swapaxes(1, 2), params, query=query.swapaxes(1, 2), **options).swapaxes(1, 2)


def difference(op: Callable[..., jax.Array], spec: P, implementation: str, mesh: jax.sharding.Mesh) -> float:
    """The largest, of outputs and gradients."""
    keys = jax.random.split(jax.random.key(1), 4)
    arrays = tuple(jax.random.normal(key, (B, L, heads, D)) for key, heads in zip(keys, (N, K, K), strict=False))

    def run(*arrays: jax.Array) -> jax.Array:
        return op(*arrays, implementation=implementation)

    def results(run: Callable[..., jax.Array]) -> Any:
        out, pull = jax.vjp(run, *arrays)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    shards = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    pairs = zip(*(jax.tree.leaves(jax.jit(results, static_argnums=0)(f)) for f in (shards, run)), strict=True)
    return float(np.max([np.max(np.abs(np.asarray(a) - np.asarray(b))) for a, b in pairs]))  # NaN stays NaN


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kinds = ("reference", "interpret")
    print(json.dumps({f"{name} {kind}": difference(*OPS[name], kind, mesh) for name in OPS for kind in kinds}))
