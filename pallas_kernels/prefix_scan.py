"""Prefix sums along one axis, parallel over its length: chunk totals, a scan of the totals, then the scan itself."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import tuned
from pallas_kernels.launch import PrefixLaunch, prefix_launch
from reference.prefix_scan import prefix_sum_chunked


@dataclass(frozen=True, slots=True)
class Scan:
    """What to sum (statics of the op) and how: `mode` is "triton", "interpret" or "platform"."""

    axis: int
    reverse: bool
    exclusive: bool
    accum_dtype: str
    mode: str


@dataclass(frozen=True, slots=True)
class _View:
    """x seen as (groups, positions, lanes), or (1, lanes, positions) where the scanned axis is the last.

    `chunk` positions by `block` lanes make one tile; both are powers of two, so ragged ends are masked.
    """

    shape: tuple[int, int, int]
    last: bool
    chunk: int
    block: int
    launch: PrefixLaunch

    @property
    def length(self) -> int:
        return self.shape[2] if self.last else self.shape[1]

    @property
    def lanes(self) -> int:
        return self.shape[1] if self.last else self.shape[2]

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.lanes // self.block), self.chunks, self.shape[0])

    @property
    def table(self) -> tuple[int, int, int]:
        return (self.shape[0], self.chunks, self.lanes)


def refusal(dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot sum this dtype, or None."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return f"x.dtype={jnp.dtype(dtype).name}: the kernel sums real numbers"
    return None


def prefix_scan(x: jax.Array, *, axis: int, reverse: bool, exclusive: bool, accum_dtype: str, mode: str) -> jax.Array:
    """Prefix sums of `x` along `axis`, accumulated in `accum_dtype`, in x's dtype (booleans are counted in int32)."""
    x = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    if x.dtype.itemsize == 1 and x.size > 2**31 - 1:  # Pallas gives 64-bit offsets by bytes, not by elements
        wide = jnp.int16 if jnp.issubdtype(x.dtype, jnp.signedinteger) else jnp.uint16
        options = {"reverse": reverse, "exclusive": exclusive, "accum_dtype": accum_dtype, "mode": mode}
        return prefix_scan(x.astype(wide), axis=axis, **options).astype(x.dtype)
    scan = Scan(axis % x.ndim, reverse, exclusive, str(jnp.dtype(accum_dtype)), mode)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _forward(x, scan)  # integers have no gradient
    return _prefix_scan(x, scan)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _prefix_scan(x: jax.Array, scan: Scan) -> jax.Array:
    return _forward(x, scan)


def _vjp_forward(x: jax.Array, scan: Scan) -> tuple[jax.Array, None]:
    return _prefix_scan(x, scan), None


def _vjp_backward(scan: Scan, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    """The transpose of a prefix sum is the suffix sum, carried from the end by the same kernel."""
    return (_prefix_scan(cotangent, replace(scan, reverse=not scan.reverse)),)


_prefix_scan.defvjp(_vjp_forward, _vjp_backward)


def _forward(x: jax.Array, scan: Scan) -> jax.Array:
    if x.size == 0:
        return x
    if scan.mode != "platform":
        return _run(x, scan)
    fallback = partial(
        prefix_sum_chunked,
        axis=scan.axis,
        reverse=scan.reverse,
        exclusive=scan.exclusive,
        accum_dtype=jnp.dtype(scan.accum_dtype),
    )
    return jax.lax.platform_dependent(x, cuda=lambda x: _run(x, scan), default=fallback)


def _run(x: jax.Array, scan: Scan) -> jax.Array:
    view = _view(x, scan)
    x3 = x.reshape(view.shape)
    accum = jnp.dtype(scan.accum_dtype)
    carry = None
    if view.chunks > 1:
        totals = _launch("prefix_totals", _totals_kernel, (x3,), jax.ShapeDtypeStruct(view.table, accum), view, scan)
        carry = exclusive_carries(totals)
    out = _launch("prefix_scan", _scan_kernel, (x3, carry), jax.ShapeDtypeStruct(x3.shape, x.dtype), view, scan)
    return out.reshape(x.shape)


def exclusive_carries(totals: jax.Array) -> jax.Array:
    """What precedes each chunk, along axis 1: the sum of the totals before it, never a total minus a prefix."""
    return jnp.cumsum(jnp.pad(totals[:, :-1], ((0, 0), (1, 0), (0, 0))), axis=1)


def _view(x: jax.Array, scan: Scan) -> _View:
    shape, axis = x.shape, scan.axis
    outer, length, inner = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    last = inner == 1
    lanes = outer if last else inner
    width = min(_power_of_two(lanes), 64)
    key = tuned.Key.of("prefix", jnp.dtype(x.dtype).name, width, length, "last" if last else "inner")
    launch = tuned.choose(key, prefix_launch(last, interpret=scan.mode == "interpret"))
    block = min(launch.block, _power_of_two(lanes))
    chunk = min(launch.chunk, max(16, _power_of_two(length)))
    return _View((1, outer, length) if last else (outer, length, inner), last, chunk, block, launch)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _launch(name, kernel, args, out_shape, view: _View, scan: Scan) -> jax.Array:
    return plk.call(
        partial(kernel, view=view, scan=scan),
        *args,
        name=name,
        grid=view.grid,
        in_specs=[plk.per_group(a, 2) for a in args if a is not None],
        out_specs=plk.per_group(out_shape, 2),
        out_shape=out_shape,
        num_warps=view.launch.num_warps,
        interpret=view.launch.interpret,
    )


def _totals_kernel(x_ref, totals_ref, *, view: _View, scan: Scan) -> None:
    lane, lane_ok = _lanes(view)
    x = _load_tile(x_ref, lane, lane_ok, view, scan)
    plk.store(totals_ref, (plk.program_id(1), lane), x.sum(int(view.last)), lane_ok)


def _scan_kernel(x_ref, carry_ref, out_ref, *, view: _View, scan: Scan) -> None:
    lane, lane_ok = _lanes(view)
    total = jnp.cumsum(_load_tile(x_ref, lane, lane_ok, view, scan), axis=int(view.last))
    if carry_ref is not None:
        total = total + _across(plk.load(carry_ref, (plk.program_id(1), lane), lane_ok), view)
    place = _places(view, scan)
    index, mask = _tile(place, place < view.length, lane, lane_ok, view)
    plk.store(out_ref, index, total, mask)


def _lanes(view: _View) -> tuple[jax.Array, jax.Array]:
    lane = plk.program_id(0) * view.block + plk.arange(view.block)
    return lane, lane < view.lanes


def _places(view: _View, scan: Scan) -> jax.Array:
    """Places of this program's chunk in the order they are summed: a reverse scan walks from the last chunk back.

    Chunks are aligned alike in both directions, so places past the end are summed first (as 0) in a reverse scan.
    """
    chunk, step = plk.program_id(1), plk.arange(view.chunk)
    if scan.reverse:
        return (view.chunks - chunk) * view.chunk - 1 - step
    return chunk * view.chunk + step


def _load_tile(x_ref, lane, lane_ok, view: _View, scan: Scan) -> jax.Array:
    """The tile to sum; an exclusive sum is the inclusive sum of x moved one place along."""
    place = _places(view, scan)
    if scan.exclusive:
        place = place + (1 if scan.reverse else -1)
    index, mask = _tile(place, (place >= 0) & (place < view.length), lane, lane_ok, view)
    return plk.load(x_ref, index, mask).astype(scan.accum_dtype)


def _tile(place, place_ok, lane, lane_ok, view: _View):
    """Index and mask of the tile of these places and lanes."""
    if view.last:
        return (lane[:, None], place[None, :]), lane_ok[:, None] & place_ok[None, :]
    return (place[:, None], lane[None, :]), place_ok[:, None] & lane_ok[None, :]


def _across(carry: jax.Array, view: _View) -> jax.Array:
    return carry[:, None] if view.last else carry[None, :]
