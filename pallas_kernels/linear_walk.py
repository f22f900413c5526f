"""The one kernel of linear attention: a walk over chunks of tokens with a state in registers.

A walk computes, for rows a, b (width W) and c (columns in tiles), with j before i in the direction of the walk,
    out_i = sum_j (a_i . b_j + e) c_j = (a_i . b_j + e) within the chunk, a_i^T H + e x before it
    H = sum_j b_j c_j^T     x = sum_j c_j  or  sum_j e_j c_j     y = sum_j b_j  or  sum_j e_j b_j
where e belongs to the row's own token i ("own") or to the other one j ("other"). With d_num = d_out / den and
d_den = -(d_out . out) / den, the output and the three gradients are four such walks, two of them in reverse:
    num     a = phi(q)   b = phi(k)   c = v        den_i = a_i . (y + sum_j b_j) + eps divides it
    d_phi_q a = d_num    b = v        c = phi(k)   e_i = d_den
    d_phi_k a = v        b = d_num    c = phi(q)   e_j = d_den   reverse
    d_v     a = phi(k)   b = phi(q)   c = d_num                  reverse
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import linear_tile as t
from pallas_kernels.dots import Dots
from pallas_kernels.launch import Launch
from pallas_kernels.linear_tile import Operand
from reference.linear import LinearState


@dataclass(frozen=True, slots=True)
class Walk:
    """Statics of one walk."""

    name: str
    kind: str  # "inclusive" or "exclusive" of the token itself; "apply": H is given; "totals": H is the result
    length: int
    width: int  # of a and b
    columns: int  # of c and the output
    maps: tuple[str | None, str | None, str | None]  # feature maps of a, b and c
    heads: int  # heads of a and the output; of the table where there is no output
    share: int  # consecutive heads of a that share one head of b and c
    others: int  # consecutive heads of b and c that one head of a sums over
    segments: int
    reverse: bool
    launch: Launch
    dots: Dots
    extra: str | None = None  # "own" or "other"
    eps: float | None = None  # with it, the output is divided by den
    finish: bool = True  # else the sums are written as they are, for a second walk to add to
    slope: str | None = None  # the feature map whose derivative the output is multiplied by
    transposed: bool = False  # the state in memory is (columns, width)

    @property
    def chunk(self) -> int:
        return self.launch.block_m

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def steps(self) -> int:
        """Chunks of one segment."""
        return -(-self.chunks // self.segments)

    @property
    def tiles(self) -> int:
        return -(-self.columns // self.launch.block_d)

    @property
    def parts(self) -> list[t.Columns]:
        return t.parts_of(self.width, self.launch.block_k)

    @property
    def updates(self) -> bool:
        return self.kind != "apply"


class Refs(NamedTuple):
    """Arrays of one walk. Own ones: (B, L, H, W), vectors (B, H, L); the others' may have other heads."""

    a: Any = None  # Operand
    b: Any = None
    c: Any = None
    extra: Any = None  # e
    rows: Any = None  # (B, L)
    state: Any = None  # LinearState before each segment, (B, K, segments or 1, D, V) and (B, K, segments or 1, D)
    partial: Any = None  # (out, den) of the walk in the other direction
    origin: Any = None  # what phi is taken of, where the output is multiplied by its slope


class Outs(NamedTuple):
    """What a walk writes; None for what is not wanted."""

    out: Any = None  # (B, L, H, columns)
    den: Any = None  # (B, H, L): 1 / den, or den itself where the walk does not finish
    state: Any = None  # at the end of the walk, (B, K, 1, D, V) and (B, K, 1, D), or of each segment of a "totals"


class State(NamedTuple):
    """In registers: H in parts (w, n), x (n,) or None, y in parts (w,) or None."""

    kv: tuple[jax.Array, ...]
    x: Any
    y: Any


def run(walk: Walk, refs: Refs, out_types: Outs) -> Outs:
    """Launch the walk: one program per (column tile, segment, head, sequence)."""
    in_specs, out_specs = _specs(walk, refs, out_types)
    batch = refs.c.array.shape[0] if refs.a is None else refs.a.array.shape[0]
    segments = out_types.state.kv.shape[2] if walk.kind == "totals" else walk.segments
    return plk.call(
        partial(_kernel, walk=walk),
        refs,
        name=walk.name,
        grid=(walk.tiles, segments, walk.heads, batch),
        in_specs=(in_specs,),
        out_specs=out_specs,
        out_shape=out_types,
        num_warps=walk.launch.num_warps,
        num_stages=walk.launch.num_stages,
        interpret=walk.launch.interpret,
    )


def _specs(walk: Walk, refs: Refs, outs: Outs) -> tuple[Refs, Outs]:
    batch, head, shared = plk.Along(3), plk.Along(2), plk.Along(2, walk.share)
    several = plk.Along(2, walk.share, walk.others)
    own = lambda x: plk.block(x, batch, None, head, None)  # noqa: E731
    own_vector = lambda x: plk.block(x, batch, head, None)  # noqa: E731
    other = lambda x: plk.block(x, batch, None, several, None)  # noqa: E731
    other_vector = lambda x: plk.block(x, batch, several, None)  # noqa: E731

    def state(x: Any) -> Any:
        segment = plk.Along(1) if x.shape[2] > 1 else plk.Along(1, walk.segments)
        return plk.block(x, batch, shared, segment, *(None,) * (x.ndim - 3))

    def operand(x: Operand, rows: Callable[[Any], Any], vector: Callable[[Any], Any]) -> Operand:
        return Operand(rows(x.array), None if x.scale is None else vector(x.scale))

    def each(f: Callable[[Any], Any], x: Any) -> Any:
        return None if x is None else f(x)

    own_operand, other_operand = (
        partial(operand, rows=r, vector=v) for r, v in ((own, own_vector), (other, other_vector))
    )
    in_specs = Refs(
        a=each(own_operand, refs.a),
        b=each(other_operand, refs.b),
        c=each(other_operand, refs.c),
        extra=each(own_vector if walk.extra == "own" else other_vector, refs.extra),
        rows=each(lambda x: plk.block(x, batch, None), refs.rows),
        state=jax.tree.map(state, refs.state),
        partial=each(lambda x: (own(x[0]), each(own_vector, x[1])), refs.partial),
        origin=each(own, refs.origin),
    )
    out_specs = Outs(each(own, outs.out), each(own_vector, outs.den), jax.tree.map(state, outs.state))
    return in_specs, out_specs


def _kernel(refs: Refs, outs: Outs, *, walk: Walk) -> None:
    tile, segment = plk.program_id(0), plk.program_id(1)
    columns = t.columns(tile * walk.launch.block_d, walk.launch.block_d, walk.columns)

    def step(i: Any, state: State) -> State:
        chunk = walk.chunks - 1 - i if walk.reverse else i
        tokens = t.tokens_of(refs.rows, chunk, walk.chunk, walk.length, walk.reverse)
        if walk.kind == "totals":
            add = lambda other, state: _add(other, state, tokens, walk)  # noqa: E731
            return _over_others(add, _kept(state, tokens), refs, tokens, columns, walk)
        return _output(refs, outs, state, tokens, columns, walk)

    first = segment * walk.steps
    state = _load_state(refs.state, columns, walk)
    state = jax.lax.fori_loop(first, jnp.minimum(first + walk.steps, walk.chunks), step, state)
    if outs.state is not None:
        _store_state(outs.state, state, columns, walk)


class _Other(NamedTuple):
    """b, c and e of the other tokens of a chunk, for one head of them."""

    b: t.Rows
    c: jax.Array
    e: Any


def _over_others(
    step: Callable[[_Other, Any], Any], init: Any, refs: Refs, tokens: t.Tokens, columns: t.Columns, walk: Walk
) -> Any:
    """Fold `step(other, state)` over the heads of b and c that this program sums over."""

    def fold(head: Any, state: Any) -> Any:
        b = t.rows_of(refs.b, walk.maps[1], tokens, head, walk.width, walk.launch.block_k)
        c = t.rows_of(refs.c, walk.maps[2], tokens, head, walk.columns, walk.launch.block_k)
        e = t.load_vector(refs.extra, tokens, head) if walk.extra == "other" else None
        return step(_Other(b, c.part(columns, walk.dots.dtype), e), state)

    return fold(0, init) if walk.others == 1 else jax.lax.fori_loop(0, walk.others, fold, init)


def _output(refs: Refs, outs: Outs, state: State, tokens: t.Tokens, columns: t.Columns, walk: Walk) -> State:
    """Write the output of one chunk, and return the state after it."""
    a = t.rows_of(refs.a, walk.maps[0], tokens, None, walk.width, walk.launch.block_k)
    e = t.load_vector(refs.extra, tokens, None) if walk.extra == "own" else None
    acc, den = _before(a, e, state, tokens, walk)
    if walk.updates:
        visible = _visible(tokens, walk)

        def step(other: _Other, sums: Any) -> Any:
            acc, den, state = sums
            w = _scores(a, other.b, walk)
            if walk.extra is not None:
                w = w + (other.e[None, :] if e is None else e[:, None])
            w = jnp.where(visible, w, 0.0)
            den = None if den is None else den + w.sum(1)
            return acc + walk.dots(w, other.c), den, _add(other, state, tokens, walk)

        acc, den, state = _over_others(step, (acc, den, _kept(state, tokens)), refs, tokens, columns, walk)
    _finish(refs, outs, acc, den, tokens, columns, walk)
    return state


def _before(a: t.Rows, e: Any, state: State, tokens: t.Tokens, walk: Walk) -> tuple[jax.Array, Any]:
    """What the tokens before the chunk give to the output and to den, where they are of the same run."""
    acc: Any = 0.0
    den: Any = None if walk.eps is None else 0.0
    for n, part in enumerate(walk.parts):
        x = a.part(part, walk.dots.dtype)
        acc = acc + walk.dots(x, state.kv[n])
        den = None if den is None else den + (x.astype(jnp.float32) * state.y[n][None, :]).sum(1)
    if state.x is not None:
        acc = acc + (state.x[None, :] if e is None else e[:, None] * state.x[None, :])
    if tokens.run is not None:
        same = tokens.run == tokens.before
        acc, den = jnp.where(same[:, None], acc, 0.0), None if den is None else jnp.where(same, den, 0.0)
    return acc, den


def _scores(a: t.Rows, b: t.Rows, walk: Walk) -> jax.Array:
    """(C, C) a_i . b_j."""

    def add(part: t.Columns, w: jax.Array) -> jax.Array:
        return w + walk.dots(a.part(part, walk.dots.dtype), b.part(part, walk.dots.dtype), (1, 1))

    return t.over_parts(add, jnp.zeros((walk.chunk, walk.chunk), jnp.float32), walk.width, walk.launch.block_k)


def _visible(tokens: t.Tokens, walk: Walk) -> jax.Array:
    """(C, C): whether row i sees row j of the same chunk."""
    i, j = plk.arange(walk.chunk)[:, None], plk.arange(walk.chunk)[None, :]
    i, j = (j, i) if walk.reverse else (i, j)
    visible = j <= i if walk.kind == "inclusive" else j < i
    return visible if tokens.run is None else visible & (tokens.run[:, None] == tokens.run[None, :])


def _kept(state: State, tokens: t.Tokens) -> State:
    """The state, or zeros where another run has begun by the end of the chunk."""
    if tokens.run is None:
        return state
    return jax.tree.map(lambda x: jnp.where(tokens.before == tokens.last, x, 0.0), state)


def _add(other: _Other, state: State, tokens: t.Tokens, walk: Walk) -> State:
    """The state with the chunk's tokens added, those of its last run alone."""
    b, c, e = other
    if tokens.run is not None:
        c = jnp.where((tokens.run == tokens.last)[:, None], c, jnp.zeros((), c.dtype))
    kv, y = [], []
    for n, part in enumerate(walk.parts):
        x = b.part(part, walk.dots.dtype)
        kv.append(state.kv[n] + walk.dots(x, c, (0, 0)))
        if state.y is not None:
            x = x if tokens.run is None else jnp.where((tokens.run == tokens.last)[:, None], x, jnp.zeros((), x.dtype))
            y.append(state.y[n] + _weighted_sum(x, e))
    x = None if state.x is None else state.x + _weighted_sum(c, e)
    return State(tuple(kv), x, None if state.y is None else tuple(y))


def _weighted_sum(rows: jax.Array, e: Any) -> jax.Array:
    rows = rows.astype(jnp.float32)
    return (rows if e is None else rows * e[:, None]).sum(0)


def _finish(refs: Refs, outs: Outs, acc: jax.Array, den: Any, tokens: t.Tokens, columns: t.Columns, walk: Walk) -> None:
    """Add the other direction's part, divide by den, apply the map's derivative, write."""
    if refs.partial is not None:
        acc = acc + t.load_tile(Operand(refs.partial[0]), tokens, None, columns)
        den = None if den is None else den + t.load_vector(refs.partial[1], tokens, None)
    if walk.finish and walk.eps is not None:
        den = 1.0 / (den + walk.eps)
        acc = acc * den[:, None]
    if walk.slope is not None:
        x = t.load_tile(Operand(refs.origin), tokens, None, columns)
        acc = t.slope(walk.slope, x, acc)
    index, mask = (tokens.index[:, None], columns.index[None, :]), tokens.inside[:, None] & columns.ok[None, :]
    plk.store(outs.out, index, jnp.where(tokens.live[:, None], acc, 0.0), mask)
    if outs.den is not None:
        plk.store(outs.den, (tokens.index,), jnp.where(tokens.live, den, 0.0), tokens.inside & columns.first)


def _load_state(refs: Any, columns: t.Columns, walk: Walk) -> State:
    parts = walk.parts
    has_x, has_y = walk.kind != "totals" and walk.extra is not None, walk.kind == "totals" or walk.eps is not None
    if refs is None:
        kv = tuple(jnp.zeros((p.index.shape[0], columns.index.shape[0]), jnp.float32) for p in parts)
        x, y = jnp.zeros(columns.index.shape, jnp.float32), tuple(jnp.zeros(p.index.shape, jnp.float32) for p in parts)
    else:
        kv = tuple(plk.load(refs.kv, *_place(part, columns, walk)) for part in parts)
        x = plk.load(refs.z, (columns.index,), columns.ok) if has_x else None
        y = tuple(plk.load(refs.z, (p.index,), p.ok) for p in parts) if has_y else None
    return State(kv, x if has_x else None, y if has_y else None)


def _store_state(refs: LinearState, state: State, columns: t.Columns, walk: Walk) -> None:
    """Only the last segment knows the state at the end; one of the heads that share it writes."""
    mine = jnp.bool_(True)
    if walk.kind != "totals":
        mine = plk.program_id(1) == walk.segments - 1
        if walk.share > 1:
            mine = mine & (jax.lax.rem(plk.program_id(2), jnp.int32(walk.share)) == 0)
    parts = walk.parts
    for part, kv in zip(parts, state.kv, strict=True):
        index, mask = _place(part, columns, walk)
        plk.store(refs.kv, index, kv, mask & mine)
    if state.x is not None:
        plk.store(refs.z, (columns.index,), state.x, columns.ok & mine)
    else:
        for part, y in zip(parts, state.y, strict=True):
            plk.store(refs.z, (part.index,), y, part.ok & mine & columns.first)


def _place(part: t.Columns, columns: t.Columns, walk: Walk) -> tuple[Any, jax.Array]:
    """Index and mask, in memory, of the tile (part of a row, columns) of H."""
    index, mask = (part.index[:, None], columns.index[None, :]), part.ok[:, None] & columns.ok[None, :]
    return (index[::-1] if walk.transposed else index), mask
