"""prefix_sum: running sums along one axis."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evo_jax import autotune_first, divided_tokens, shapes
from evo_jax.backend import choose
from evo_jax.require_cuda import require_cuda
from evo_jax.sharding import by_shards
from reference.prefix_scan import prefix_sum_chunked

_OP = "prefix_sum"
_DTYPES = "a float of 16 to 64 bits, an integer or bool"


def prefix_sum(
    x: Any,
    *,
    axis: int = -2,
    reverse: bool = False,
    exclusive: bool = False,
    accum_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Running sums of `x` along `axis`, `out[i] = x[0] + ... + x[i]`, in O(L) time and parallel over L.

    The gradient is the same sum in the other direction. Sums are carried from the end where they start and never
    come from a subtraction, so an exclusive or reverse sum is as exact as an inclusive one.

    Args:
        x: array of rank >= 1; float16, bfloat16, float32, float64 (where x64 is on), an integer, or bool.
        axis: where L lies; the default is the length axis of (B, H, L, D), and the only axis of a rank-1 array.
        reverse: sum from the end, `out[i] = x[i] + ... + x[L-1]`.
        exclusive: leave `x[i]` itself out.
        accum_dtype: what the sums are carried in; default float32 for 16-bit floats, int32 for narrow integers and
            bool, else the dtype of `x`. float64 needs x64.
        implementation: None, "triton", "reference" or "interpret".

    Returns:
        Array of the shape and dtype of `x`; int32 for bool.

    Raises:
        ValueError: no such axis, or, while x64 is off, a 64-bit accum_dtype or numbers that need 64 bits. TypeError: a
            dtype that cannot be summed, or reverse or exclusive that are no bools.
        NotImplementedError: implementation="triton" where the kernel cannot run.

    >>> import jax.numpy as jnp, evo_jax
    >>> x = jnp.array([1.0, 2.0, 3.0])
    >>> print(evo_jax.prefix_sum(x), evo_jax.prefix_sum(x, reverse=True, exclusive=True))
    [1. 3. 6.] [5. 3. 0.]
    """
    x = _summable(x)
    axis = shapes.scan_axis(_OP, x, axis)
    reverse, exclusive = shapes.boolean(_OP, "reverse", reverse), shapes.boolean(_OP, "exclusive", exclusive)
    accum_dtype = shapes.accum_dtype(_OP, x, accum_dtype)
    how = choose(_OP, implementation, lambda: _refusal(x), (x,))
    return _run(x, axis, reverse, exclusive, accum_dtype, how)


def _summable(x: Any) -> jax.Array:
    x = shapes.array(_OP, "x", x)
    if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer):
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise TypeError(f"{_OP}: x.dtype={x.dtype.name} must be {_DTYPES}; cast it with astype")
    return x


def _refusal(x: jax.Array) -> str | None:
    from pallas_kernels import prefix_scan  # Pallas is imported only where a kernel may run

    return prefix_scan.refusal(x.dtype)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5), inline=True)
def _run(x: jax.Array, axis: int, reverse: bool, exclusive: bool, accum_dtype: str, how: str) -> jax.Array:
    """Jitted, so that an eager call is one compiled program too."""
    options: Any = {"axis": axis, "reverse": reverse, "exclusive": exclusive, "accum_dtype": accum_dtype}
    axes = "".join("t" if n == axis else chr(ord("A") + n) for n in range(x.ndim))
    return by_shards(_OP, partial(_on_one_device, how=how, options=options), (x,), (axes,), axes)


def _on_one_device(x: jax.Array, over: Any, how: str, options: Any) -> jax.Array:
    if over is not None:
        wide = x.astype(options["accum_dtype"])
        total = wide.sum(options["axis"], keepdims=True, dtype=wide.dtype)
        before, _ = divided_tokens.sums(total, over, options["reverse"])
        out = _on_one_device(wide, None, how, options) + before
        return out.astype(jnp.int32 if x.dtype == bool else x.dtype)
    if how == "reference":
        return prefix_sum_chunked(x, **options)
    from pallas_kernels import prefix_scan

    run = partial(prefix_scan.prefix_scan, mode=how, **options)
    autotune_first.before(run, x)
    return run(require_cuda(x, _OP) if how == "triton" else x)
