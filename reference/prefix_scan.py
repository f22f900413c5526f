"""Prefix sums along any axis: the explicit oracle, and the fast form that adds within rows of eight and recurses.

A CPU adds faster than it reads what its caches do not hold, so a long sequence is summed chunk by chunk, each from what
the one before it left: every number is read and written once.
"""

from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from reference.chunk_loop import bits_of, from_bits, slice_of, write

_ROW = 8
_CHUNK_BYTES = 2**21  # of a chunk's sums: they stay in a cache
_SHORTEST = 64  # tokens of a chunk, however many sequences there are
_FEWEST_LANES = 8  # sums beside each other: fewer cost more to add than to read


def default_accum_dtype(dtype) -> jnp.dtype:
    """float32 for 16-bit floats, at least int32 for integers and bool, else the array's own dtype."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype
    if dtype == jnp.bool_ or (jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < 4):
        return jnp.dtype(jnp.int32)
    return dtype


def prefix_sum_dense(
    x: Array, *, axis: int = -2, reverse: bool = False, exclusive: bool = False, accum_dtype=None
) -> Array:
    """Prefix sum as L * L masked terms, `out_i = sum_j allowed(i, j) x_j`; differentiated by JAX."""
    accum = jnp.dtype(accum_dtype or default_accum_dtype(x.dtype))
    rows = jnp.moveaxis(x, axis, 0).astype(accum)
    i, j = (lax.broadcasted_iota(jnp.int32, (len(rows), len(rows)), d) for d in (0, 1))
    first, second = (i, j) if reverse else (j, i)
    allowed = first < second if exclusive else first <= second
    allowed = allowed.reshape(allowed.shape + (1,) * (x.ndim - 1))
    out = jnp.sum(jnp.where(allowed, rows[None], jnp.zeros((), accum)), axis=1, dtype=accum)
    return jnp.moveaxis(out, 0, axis).astype(_result_dtype(x))


def prefix_sum_chunked(
    x: Array, *, axis: int = -2, reverse: bool = False, exclusive: bool = False, accum_dtype=None
) -> Array:
    """Prefix sum in O(L) time and O(L / 8) extra memory; its gradient is the same sum in the other direction."""
    accum = jnp.dtype(accum_dtype or default_accum_dtype(x.dtype))
    if axis < 0:
        axis += x.ndim
    scan: Any = _differentiable_scan if jnp.issubdtype(x.dtype, jnp.floating) else _scan
    return scan(x, axis, reverse, exclusive, accum).astype(_result_dtype(x))


def _result_dtype(x: Array) -> jnp.dtype:
    return jnp.dtype(jnp.int32) if x.dtype == jnp.bool_ else x.dtype


def _scan(x: Array, axis: int, reverse: bool, exclusive: bool, accum: jnp.dtype) -> Array:
    before, length, after = prod(x.shape[:axis]), x.shape[axis], prod(x.shape[axis + 1 :])
    if x.size == 0:
        return x
    flat = x.reshape(before, length, after)
    size = _chunk(before, length, after, accum.itemsize)
    if size < length:
        return _scan_chunks(flat, size, reverse, exclusive, accum).reshape(x.shape)
    return scan_rows(flat.astype(accum), reverse, exclusive)[0].astype(_result_dtype(x)).reshape(x.shape)


def _chunk(before: int, length: int, after: int, itemsize: int) -> int:
    """How many of the `length` tokens are summed at a time; all of them where a loop would cost more than it saves."""
    size = max(_CHUNK_BYTES // (before * after * itemsize), _SHORTEST) // _ROW * _ROW
    return length if length <= 2 * size or after < _FEWEST_LANES else size


def _scan_chunks(x: Array, size: int, reverse: bool, exclusive: bool, accum: jnp.dtype) -> Array:
    """The same of (N, L, M), chunk by chunk, from the end where the scan starts."""
    length = x.shape[1]
    count, rest = divmod(length, size)

    def chunk(start: Any, size: int, carry: Any) -> tuple[Array, Array]:
        out, carry = scan_rows(slice_of(x, start, size, 1).astype(accum), reverse, exclusive, carry)
        return out.astype(_result_dtype(x)), carry

    def step(i: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        out, carry = state
        start = length - (i + 1) * size if reverse else i * size
        part, carry = chunk(start, size, carry)
        return write(out, part, start, 1), carry

    # The first chunk gives the loop's state its type, also where that says over which axes of a mesh it varies.
    start = length - size if reverse else 0
    part, carry = chunk(start, size, None)
    part = bits_of(part)
    out = lax.pad(part, jnp.zeros((), part.dtype), ((0, 0, 0), (start, length - size - start, 0), (0, 0, 0)))
    out, carry = lax.fori_loop(1, count, step, (out, carry))
    if rest:
        start = 0 if reverse else count * size
        out = write(out, chunk(start, rest, carry)[0], start, 1)
    return from_bits(out, _result_dtype(x))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _differentiable_scan(x, axis, reverse, exclusive, accum):
    return _scan(x, axis, reverse, exclusive, accum)


def _scan_forward(x, axis, reverse, exclusive, accum):
    return _differentiable_scan(x, axis, reverse, exclusive, accum), None  # its own derivative again, not the loop's


def _scan_backward(axis, reverse, exclusive, accum, _, cotangent):
    return (_differentiable_scan(cotangent, axis, not reverse, exclusive, accum),)


_differentiable_scan.defvjp(_scan_forward, _scan_backward)


def scan_rows(x: Array, reverse: bool, exclusive: bool, carry: Any = None) -> tuple[Array, Array]:
    """Prefix sum of (N, L, M) along L in x's dtype: rows of eight, a tree over their totals, eight unrolled adds.

    It starts from `carry` (N, 1, M) or 0, and gives the sums and the total, which the next chunk starts from. Every
    partial sum is carried from the end where the scan starts; nothing is ever subtracted.
    """
    length = x.shape[1]
    size = min(_ROW, length)
    count = -(-length // size)
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, count * size - length, 0), (0, 0, 0)))
    rows = padded.reshape(x.shape[0], count, size, x.shape[2])
    terms = [rows[:, :, i] for i in range(size)[:: -1 if reverse else 1]]
    # The totals repeat the adds below: XLA then makes one loop of them, which a reduction is not.
    first = _exclusive_tree(list(accumulate(terms))[-1], reverse)
    first = first if carry is None else first + carry
    sums = list(accumulate(terms, initial=first))
    total = sums[-1][:, :1] if reverse else sums[-1][:, -1:]
    sums = sums[:-1] if exclusive else sums[1:]
    return jnp.stack(sums[::-1] if reverse else sums, axis=2).reshape(padded.shape)[:, :length], total


def _exclusive_tree(totals: Array, reverse: bool) -> Array:
    """What each row starts from: its neighbour's inclusive sum, and zero at the end where the scan starts."""
    sums = lax.associative_scan(jnp.add, totals, axis=1, reverse=reverse)
    zero = jnp.zeros_like(sums[:, :1])
    parts = [sums[:, 1:], zero] if reverse else [zero, sums[:, :-1]]
    return jnp.concatenate(parts, axis=1)
