"""Backward of EvoAttention: recompute from the carry tables, segment by segment, from the end of the sequence.

With s' the gradient of s, and suffix sums written D: z_f, z_q, z_l, z_g are the gradients before the four linears,
    c' = y' f + (z_g W_g^T) / t,  S' = den' sign(S),  D_S = suffix(S'),  D_c = suffix(c')
    v' = gate' silu(r) + z_q W_q^T + z_l W_l^T + D_S g + D_c,  z_g = D_S v g (1 - g)
Both suffix sums are carried from the end, across chunks and segments. Sums over tokens run in a fixed order, without
atomics, so a rerun gives the same bits: each program of a segment adds to parts of its own, which are summed at the
end. Segments bound the temporaries: a sixteenth of the tokens, or the few that fill a GPU, are at work.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import evo_bwd_kernels as k
from pallas_kernels.evo_fwd import Inputs, Tables, totals_to_tables
from pallas_kernels.evo_tile import Geometry
from pallas_kernels.launch import FILLED
from pallas_kernels.prefix_scan import exclusive_carries
from reference.evo import EvoParams

SEGMENT_TOKENS = (16384, 65536)  # fewest (at 64 columns, 256 programs fill a GPU) and most (temporaries), in all groups
ROW_TILE = 4096  # elements of a tile of whole rows
WEIGHT_CHUNKS = (4, 16)  # chunks that one program of a weight gradient sums: fewest and most


class State(NamedTuple):
    """What a segment hands to the one before it."""

    gated: jax.Array  # (G, D) sum of S' over the tokens after the segment
    context: jax.Array  # (G, D) sum of c' over them
    v: jax.Array  # (G, L, D) gradient, written in place
    query: jax.Array | None
    params: EvoParams  # float32 parts, (G, programs, *p.shape): of each program, over all segments so far


def backward(inputs: Inputs, tables: Tables, d_out: jax.Array, d_last: Tables | None, geo: Geometry) -> State:
    """Gradients of v, of query (None where query is), of params (float32), and of the carry before the first token.

    `d_last` is that of the carry after the last token: the reverse sums start from it, and what they arrive at is the
    gradient of the first carry.
    """
    groups, _, width = inputs.v.shape
    chunks = segment_chunks(groups, inputs.v.dtype.itemsize, geo)
    segments = -(-geo.chunks // chunks)

    def segment(i: Any) -> _Segment:
        first = jnp.full((1,), (segments - 1 - i) * chunks, jnp.int32)
        return _Segment(first, chunks, inputs, tables, d_out, geo)

    zeros = jnp.zeros((groups, width), geo.accum)
    state = State(
        zeros if d_last is None else d_last.gated,
        zeros if d_last is None else d_last.context,
        jnp.zeros_like(inputs.v),
        None if inputs.query is None else jnp.zeros_like(inputs.query),
        segment(0).no_params(),
    )
    step = lambda i, state: segment(i).run(state)  # noqa: E731
    state = step(0, state) if segments == 1 else jax.lax.fori_loop(0, segments, step, state)
    state = state._replace(params=EvoParams(*(parts.sum((0, 1)) for parts in state.params)))
    if not geo.causal:
        state = _through_totals(state, inputs, tables, geo)
    return state


def segment_chunks(groups: int, itemsize: int, geo: Geometry) -> int:
    """Chunks of one segment: a sixteenth of all tokens, within SEGMENT_TOKENS.

    Temporaries grow with the dtype of the dot products, so 16-bit inputs multiplied in float32 get half of that.
    """
    fewest, most = SEGMENT_TOKENS
    share = groups * geo.length * itemsize // (16 * jnp.dtype(geo.dot_dtype).itemsize)
    tokens = min(max(share, fewest), most)
    return max(1, min(geo.chunks, -(-tokens // (groups * geo.chunk))))


def weight_chunks(chunks: int, programs: int) -> int:
    """How many of `chunks` one program sums, where `programs` blocks of weights and groups have one each: few enough
    that all of them fill a GPU twice, within WEIGHT_CHUNKS."""
    fewest, most = WEIGHT_CHUNKS
    return min(max(chunks * programs // (2 * FILLED), fewest), most)


class _Segment(NamedTuple):
    """One segment of the sequence: `chunks` chunks from chunk number `first`, and the passes over them."""

    first: jax.Array
    chunks: int
    inputs: Inputs
    tables: Tables
    d_out: jax.Array
    geo: Geometry

    def run(self, state: State) -> State:
        """The passes, from the output back to v."""
        geo, query, old = self.geo, state.query, state.params
        g_type = self._rows("float32") if geo.causal else None
        gate_types = k.Gate(self._rows(geo.dot_dtype), g_type, self._rows("float32"))
        gate = self._launch("gate", k.gate_kernel, None, gate_types)
        final = self._launch("final", k.final_kernel, gate.gate, self._rows("float32"))
        norm = self._norm(final, gate.context, old)
        warps = 8 if geo.block == 64 else None  # with four it spills
        extras, in_place = (norm.z_final, gate.g, old.q_bias, old.local_bias), [(old.q_bias, 5), (old.local_bias, 6)]
        ratio = self._launch("ratio", k.ratio_kernel, extras, self._ratio_types(), in_place, warps)
        d_v, after, gated = ratio.d_v, state.gated + ratio.gated_sums.sum(1), None
        if geo.causal:
            carries = _suffix_carries(ratio.gated_sums, state.gated)
            gated_types = k.Gated(self._rows(geo.dot_dtype), self._rows("float32"), self._sums())
            extras, in_place = (carries, ratio.d_gated, d_v, gate.g, old.gate_bias), [(d_v, 1), (old.gate_bias, 2)]
            gated = self._launch("gated", k.gated_kernel, extras, gated_types, in_place)
            d_v = gated.d_v
        linear = self._linear(ratio, gated, norm.d_context, d_v, query)
        carries = _suffix_carries(linear.context_sums, state.context)
        new_v = self._launch(
            "v", k.v_kernel, (carries, linear.d_context, linear.d_v, state.v), _type(state.v), in_place=[(state.v, 0)]
        )
        params = self._params(old, gate, norm, ratio, gated)
        return State(after, state.context + linear.context_sums.sum(1), new_v, linear.d_query, params)

    def no_params(self) -> EvoParams:
        """The parts of every program before the first segment, zeros."""
        shapes = EvoParams(*(self._weight_shape() if p.ndim == 2 else self._sums().shape for p in self.inputs.params))
        of_norm = self._finer()._sums().shape
        shapes = shapes._replace(final_bias=of_norm, norm_scale=of_norm, norm_bias=of_norm)
        if not self.geo.causal:  # the gate's come from _through_totals alone
            width = self.geo.width
            shapes = shapes._replace(gate_kernel=(1, 1, width, width), gate_bias=(1, 1, width))
        return EvoParams(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    def _linear(self, ratio: k.Ratio, gated: k.Gated | None, d_context: Any, d_v: Any, query: Any) -> k.Linear:
        types = k.Linear(self._rows("float32"), self._rows("float32"), self._sums(self.geo.accum), _type(query))
        in_place = [(d_context, 0), (d_v, 1)] + ([] if query is None else [(query, 3)])
        z_gate = None if gated is None else gated.z_gate
        extras = (ratio.z_q, ratio.z_local, z_gate, d_context, d_v, query)
        return self._launch("linear", k.linear_kernel, extras, types, in_place=in_place)

    def _finer(self) -> "_Segment":
        """Whole rows in one tile, fewer of them: LayerNorm needs a row, and no dot product needs a power of two."""
        width = max(16, 1 << (self.geo.width - 1).bit_length())
        rows = min(self.geo.chunk, max(16, ROW_TILE // width))
        steps = self.geo.chunk // rows
        geo = replace(self.geo, launch=replace(self.geo.launch, block_m=rows, block_d=width))
        return self._replace(first=self.first * steps, chunks=self.chunks * steps, geo=geo)

    def _norm(self, final: jax.Array, context: jax.Array, old: EvoParams) -> k.Norm:
        finer, parts = self._finer(), (old.final_bias, old.norm_scale, old.norm_bias)
        types = k.Norm(finer._rows(self.geo.dot_dtype), finer._rows("float32"), *(finer._sums() for _ in parts))
        in_place = [(array, 2 + i) for i, array in enumerate(parts)]
        return finer._launch("norm", k.norm_kernel, (self.d_out, final, context, parts), types, in_place)

    def _ratio_types(self) -> k.Ratio:
        z, rows, sums = self._rows(self.geo.dot_dtype), self._rows("float32"), self._sums()
        return k.Ratio(z, z, rows, rows, self._sums(self.geo.accum), sums, sums)

    def _params(self, old: EvoParams, gate: k.Gate, norm: k.Norm, ratio: k.Ratio, gated: k.Gated | None) -> EvoParams:
        """The parts of the parameters' gradients with this segment's; those of the gate only where it is causal."""
        query = self.inputs.v if self.inputs.query is None else self.inputs.query
        if gated is not None:
            factor = k.Factor(in_segment=True, is_context=True)
            old = old._replace(
                gate_kernel=self._weight(gate.context, gated.z_gate, factor, old.gate_kernel),
                gate_bias=gated.gate_bias,
            )
        return old._replace(
            q_kernel=self._weight(query, ratio.z_q, k.Factor(), old.q_kernel),
            q_bias=ratio.q_bias,
            local_kernel=self._weight(self.inputs.v, ratio.z_local, k.Factor(), old.local_kernel),
            local_bias=ratio.local_bias,
            final_kernel=self._weight(gate.gate, norm.z_final, k.Factor(in_segment=True), old.final_kernel),
            final_bias=norm.final_bias,
            norm_scale=norm.norm_scale,
            norm_bias=norm.norm_bias,
        )

    def _weight_geometry(self) -> Geometry:
        if self.geo.dot_dtype == "bfloat16" and self.geo.width % 64 == 0:  # two operands and one accumulator: room
            return replace(self.geo, launch=replace(self.geo.launch, block_d=64))
        return self.geo

    def _weight_chunks(self) -> int:
        return weight_chunks(self.chunks, self._weight_geometry().blocks ** 2 * self.inputs.v.shape[0])

    def _weight_shape(self) -> tuple[int, ...]:
        return self.inputs.v.shape[0], -(-self.chunks // self._weight_chunks()), self.geo.width, self.geo.width

    def _weight(self, x: jax.Array, z: jax.Array, factor: k.Factor, old: jax.Array) -> jax.Array:
        """old + x^T z over the segment: one register block per program."""
        geo, out, extras = self._weight_geometry(), jax.ShapeDtypeStruct(old.shape, old.dtype), (x, z, old)
        return plk.call(
            partial(k.weight_kernel, factor=factor, split=(self.chunks, self._weight_chunks()), geo=geo),
            self.first,
            self.inputs,
            extras,
            name="evo_bwd_weight",
            grid=(geo.blocks, geo.blocks, old.shape[1], old.shape[0]),
            in_specs=(plk.whole(self.first), self.inputs.specs(3), tuple(plk.per_group(array, 3) for array in extras)),
            out_specs=plk.per_group(out, 3),
            out_shape=out,
            num_warps=geo.launch.num_warps,
            num_stages=geo.launch.num_stages,
            interpret=geo.launch.interpret,
            in_place=[(old, 0)],
        )

    def _launch(
        self, name: str, kernel: Any, extras: Any, out_shape: Any, in_place: Any = (), warps: int | None = None
    ) -> Any:
        """One program per (column block, chunk of the segment, group)."""
        launch = self.geo.launch
        specs = partial(jax.tree.map, lambda array: plk.per_group(array, 2))
        return plk.call(
            partial(kernel, geo=self.geo),
            self.first,
            self.inputs,
            self.tables,
            extras,
            name=f"evo_bwd_{name}",
            grid=(self.geo.blocks, self.chunks, self.inputs.v.shape[0]),
            in_specs=(plk.whole(self.first), self.inputs.specs(2), specs(self.tables), specs(extras)),
            out_specs=specs(out_shape),
            out_shape=out_shape,
            num_warps=warps or launch.num_warps,
            num_stages=launch.num_stages,
            interpret=launch.interpret,
            in_place=in_place,
        )

    def _rows(self, dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (self.inputs.v.shape[0], self.chunks * self.geo.chunk, self.geo.width)
        return jax.ShapeDtypeStruct(shape, dtype)

    def _sums(self, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.inputs.v.shape[0], self.chunks, self.geo.width), dtype)


def _type(array: Any) -> Any:
    return None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)


def _suffix_carries(sums: jax.Array, after: jax.Array) -> jax.Array:
    """What follows each chunk: the sums of the later chunks of the segment and of everything after it."""
    later = jnp.flip(exclusive_carries(jnp.flip(sums, 1)), 1)
    return later + after[:, None]


def _through_totals(state: State, inputs: Inputs, tables: Tables, geo: Geometry) -> State:
    """Non-causal: c and S = g c are one vector per sequence and head, so their gradients join v' in one addition."""
    _, vjp = jax.vjp(lambda c, p: totals_to_tables(c, inputs.rows, p, geo), tables.context, inputs.params)
    d_context, d_params = vjp(Tables(state.context[:, None], state.gated[:, None]))
    d_v = state.v.astype(jnp.float32) + d_context.astype(jnp.float32)
    if geo.absent and inputs.rows is not None:
        live = jnp.repeat(jnp.logical_not(inputs.rows < 0), d_v.shape[0] // inputs.rows.shape[0], axis=0)
        d_v = jnp.where(live[..., None], d_v, 0.0)
    params = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), state.params, d_params)
    return state._replace(v=d_v.astype(state.v.dtype), params=params)
