"""Prefix sums along one axis, parallel over its length, in a single pass where sums are float32.

A program sums its chunk, publishes the total in a table, and looks back for the totals before it; every number is read
and written once. Chunks are taken together in spans of `span`, and the last program of a span publishes the span's
total too, so that a program adds the totals of the spans before its own and of the chunks before it in its own.

No program waits forever: the grid's last axis is that of the chunks, a GPU starts programs in the order of the grid
(the first axis fastest), and a program waits only for lower chunks, so that the lowest one that runs waits for none.
Reruns are bitwise equal: which totals are added, and in which order, depends on the chunk alone, not on who came first.
No fences are needed: a table's word is both flag and value, EMPTY until it is a total's bits. EMPTY are the bits of a
NaN, and every NaN is published as another one.

Other dtypes, and sequences of more than SPAN * SPAN chunks, take two passes: chunk totals, a scan of them by XLA, and
the scan itself.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import isqrt, prod

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _pallas as plk
from pallas_kernels import tuned
from pallas_kernels.launch import PrefixLaunch, prefix_launch
from reference.prefix_scan import prefix_sum_chunked

SPAN = 64  # most chunks of a span, and most spans
EMPTY = np.int32(-1)  # a word of the table before a total is published
_NAN = np.int32(0x7FC00000)
_LEAST_SPAN = 16
_LONGEST_RUN = 16


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

    `chunk` positions by `block` lanes make one tile; both are powers of two, so ragged ends are masked. A tile is
    loaded as `run` parts: a run of that many positions, one of each part, is added up by one thread.
    """

    shape: tuple[int, int, int]
    last: bool
    chunk: int
    block: int
    run: int
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
    def span(self) -> int:
        """Chunks of a span: about as many as there are spans."""
        return max(_LEAST_SPAN, _power_of_two(isqrt(self.chunks - 1) + 1))

    @property
    def spans(self) -> int:
        return -(-self.chunks // self.span)

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.lanes // self.block), self.shape[0], self.chunks)

    def table(self, rows: int) -> tuple[int, int, int]:
        return (self.shape[0], rows, self.lanes)


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
    out = jax.ShapeDtypeStruct(x3.shape, x.dtype)
    if view.chunks > 1 and scan.accum_dtype == "float32" and view.span <= SPAN:
        empty = jnp.full(view.table(view.chunks + view.spans), EMPTY)
        outs = (out, jax.ShapeDtypeStruct(empty.shape, empty.dtype))
        return _launch("prefix_single", _single_kernel, (x3, empty), outs, view, scan, [(empty, 1)])[0].reshape(x.shape)
    carry = None
    if view.chunks > 1:
        totals = jax.ShapeDtypeStruct(view.table(view.chunks), jnp.dtype(scan.accum_dtype))
        carry = exclusive_carries(_launch("prefix_totals", _totals_kernel, (x3,), totals, view, scan))
    return _launch("prefix_scan", _scan_kernel, (x3, carry), out, view, scan).reshape(x.shape)


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
    launch = tuned.choose(key, _default_launch(last, scan))
    block = min(launch.block, _power_of_two(lanes))
    chunk = min(launch.chunk, max(16, _power_of_two(length)))
    run = 1 if last else _run_length(chunk, block * x.dtype.itemsize, launch.num_warps)
    return _View((1, outer, length) if last else (outer, length, inner), last, chunk, block, run, launch)


def _default_launch(last: bool, scan: Scan) -> PrefixLaunch:
    """For a single pass tiles are large, so that there are few totals to look back for."""
    if last or scan.accum_dtype != "float32" or scan.mode == "interpret":
        return prefix_launch(last, interpret=scan.mode == "interpret")
    return PrefixLaunch(256, 64, 8, interpret=False)


def _run_length(chunk: int, row_bytes: int, num_warps: int) -> int:
    """How many positions of a chunk each thread adds up alone, where it loads 16 bytes of each."""
    rows = max(32 * num_warps * 16 // row_bytes, 1)
    return max(min(chunk // rows, _LONGEST_RUN), 1)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _launch(name, kernel, args, out_shape, view: _View, scan: Scan, in_place=()):
    return plk.call(
        partial(kernel, view=view, scan=scan),
        *args,
        name=name,
        grid=view.grid,
        in_specs=[plk.per_group(a, 1) for a in args if a is not None],
        out_specs=jax.tree.map(lambda a: plk.per_group(a, 1), out_shape),
        out_shape=out_shape,
        num_warps=view.launch.num_warps,
        interpret=view.launch.interpret,
        in_place=in_place,
    )


def _totals_kernel(x_ref, totals_ref, *, view: _View, scan: Scan) -> None:
    lane, lane_ok = _lanes(view)
    runs = _runs(x_ref, lane, lane_ok, view, scan)
    plk.store(totals_ref, (_chunk(), lane), runs[-1].sum(int(view.last)), lane_ok)


def _scan_kernel(x_ref, carry_ref, out_ref, *, view: _View, scan: Scan) -> None:
    lane, lane_ok = _lanes(view)
    runs = _runs(x_ref, lane, lane_ok, view, scan)
    carry = None if carry_ref is None else plk.load(carry_ref, (_chunk(), lane), lane_ok)
    _store(out_ref, *_scanned(runs, view), carry, lane, lane_ok, view, scan)


def _single_kernel(x_ref, _, out_refs, *, view: _View, scan: Scan) -> None:
    out_ref, table_ref = out_refs
    lane, lane_ok = _lanes(view)
    runs = _runs(x_ref, lane, lane_ok, view, scan)
    total = runs[-1].sum(int(view.last))
    _publish(table_ref, _chunk(), total, lane, lane_ok)
    scanned = _scanned(runs, view)  # while the totals before it arrive
    carry = _look_back(table_ref, total, lane, lane_ok, view)
    _store(out_ref, *scanned, carry, lane, lane_ok, view, scan)


def _publish(table_ref, row, total: jax.Array, lane, mask) -> None:
    bits = jax.lax.bitcast_convert_type(total, jnp.int32)
    plk.store(table_ref, (row, lane), jnp.where(total == total, bits, _NAN), mask)


def _look_back(table_ref, total: jax.Array, lane, lane_ok, view: _View) -> jax.Array:
    """The sum of all totals before this chunk: of the chunks before it in its span, and of the spans before that one.

    The table holds the totals of the chunks, then those of the spans. The last program of a span publishes the span's
    before it waits for those of other spans.
    """
    chunk, span = _chunk(), jnp.int32(view.span)
    place, before = jax.lax.rem(chunk, span), jax.lax.div(chunk, span)

    def awaited(spans) -> jax.Array:
        return _awaited(table_ref, chunk - place, place, spans, lane, lane_ok, view)

    if view.spans > 1:
        publish = lambda: _publish(table_ref, view.chunks + before, awaited(0) + total, lane, lane_ok)  # noqa: E731
        jax.lax.cond(place == span - 1, publish, lambda: None)
    return awaited(before)


def _awaited(table_ref, first, place, spans, lane, lane_ok, view: _View) -> jax.Array:
    """The sum of the totals of `place` chunks from `first` on and of the first `spans` spans, once all are there.

    They are read in tiles shaped as a part of x is, lest the compiler lay out the one as it does the other.
    """
    rows = view.span + (view.spans if view.spans > 1 else 0)
    tile = _power_of_two(rows) if view.last else max(view.chunk // view.run, 16)

    def read(_) -> jax.Array:
        total, empty = jnp.zeros((tile, view.block), jnp.float32), jnp.zeros((tile, view.block), jnp.bool_)
        for start in range(0, rows, tile):
            row = start + plk.arange(tile)
            of_span = row - view.span
            index = jnp.where(of_span < 0, first + row, view.chunks + of_span)
            there = jnp.where(of_span < 0, row < place, of_span < spans)
            mask = there[:, None] & lane_ok[None, :]
            word = plk.load(table_ref, (index[:, None], lane[None, :]), mask, volatile=True)
            total = total + jax.lax.bitcast_convert_type(word, jnp.float32)
            empty = empty | (word == EMPTY)
        return jnp.where(empty, EMPTY, jax.lax.bitcast_convert_type(total, jnp.int32))

    # Words that are missing are EMPTY, not told by a flag: Triton crashes where a loop carries what only it needs.
    missing = lambda words: (words == EMPTY).astype(jnp.int32).max(1).max() > 0  # noqa: E731
    words = jax.lax.while_loop(missing, read, read(None))
    return jax.lax.bitcast_convert_type(words, jnp.float32).sum(0)


def _lanes(view: _View) -> tuple[jax.Array, jax.Array]:
    lane = plk.program_id(0) * view.block + plk.arange(view.block)
    return lane, lane < view.lanes


def _chunk() -> jax.Array:
    return plk.program_id(2)


def _places(part: int, view: _View, scan: Scan) -> jax.Array:
    """Places of a part of this program's chunk in the order they are summed: a reverse scan walks from the end back.

    Chunks are aligned alike in both directions, so places past the end are summed first (as 0) in a reverse scan.
    """
    chunk, step = _chunk(), plk.arange(view.chunk // view.run) * view.run + part
    if scan.reverse:
        return (view.chunks - chunk) * view.chunk - 1 - step
    return chunk * view.chunk + step


def _runs(x_ref, lane, lane_ok, view: _View, scan: Scan) -> list[jax.Array]:
    """The tile's parts, each with the parts before it added; an exclusive sum sums x moved one place along."""
    parts = []
    for part in range(view.run):
        place = _places(part, view, scan)
        if scan.exclusive:
            place = place + (1 if scan.reverse else -1)
        index, mask = _tile(place, (place >= 0) & (place < view.length), lane, lane_ok, view)
        parts.append(plk.load(x_ref, index, mask))
    return list(accumulate(part.astype(scan.accum_dtype) for part in parts))


def _scanned(runs: list[jax.Array], view: _View) -> tuple[list[jax.Array], jax.Array | None]:
    """The runs and what precedes each of them in this tile; the sums themselves and None where a run has one place."""
    if view.run == 1:
        return [jnp.cumsum(runs[0], axis=int(view.last))], None
    totals = runs[-1]
    rows, lanes = totals.shape
    pairs = jnp.stack([jnp.zeros_like(totals), totals], axis=-1).transpose(0, 2, 1).reshape(2 * rows, lanes)
    sums = jnp.cumsum(pairs, axis=0).reshape(rows, 2, lanes).transpose(0, 2, 1)
    return runs, jax.lax.split(sums, (1, 1), axis=2)[0].reshape(rows, lanes)


def _store(out_ref, sums, before, carry, lane, lane_ok, view: _View, scan: Scan) -> None:
    """Write the sums, on top of what precedes them in the tile and the carry from the chunks before it."""
    if carry is not None:
        carry = carry[:, None] if view.last else carry[None, :]
        before = carry if before is None else before + carry
    for part, total in enumerate(sums):
        place = _places(part, view, scan)
        index, mask = _tile(place, place < view.length, lane, lane_ok, view)
        plk.store(out_ref, index, total if before is None else total + before, mask)


def _tile(place, place_ok, lane, lane_ok, view: _View):
    """Index and mask of the tile of these places and lanes."""
    if view.last:
        return (lane[:, None], place[None, :]), lane_ok[:, None] & place_ok[None, :]
    return (place[:, None], lane[None, :]), place_ok[:, None] & lane_ok[None, :]
