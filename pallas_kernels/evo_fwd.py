"""Forward Evo kernels: chunk sums of v, gated chunk sums, output. Mathematics: reference/evo.py."""

from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import evo_tile as t
from pallas_kernels.evo_tile import Geometry
from pallas_kernels.prefix_scan import exclusive_carries
from reference.evo import EvoParams


class Tables(NamedTuple):
    """What precedes each chunk, (G, n, D) in the accumulation dtype: of the sum of v, and of the sum of g * v.

    Non-causal: the two totals, (G, 1, D). These are the only residuals besides the inputs.
    """

    context: Any
    gated: Any


class Inputs(NamedTuple):
    """Arrays of one call: v and query (None: v itself) as (G, L, D) with G = B * H, rows (R, L) or None, params."""

    v: Any
    query: Any
    rows: Any
    params: EvoParams

    def specs(self, group_axis: int) -> "Inputs":
        """Block specs: a program sees its own group of v, query and rows, and all the parameters."""
        rows = None
        if self.rows is not None:
            rows = plk.per_group(self.rows, group_axis, repeat=self.v.shape[0] // self.rows.shape[0])
        query = None if self.query is None else plk.per_group(self.query, group_axis)
        return Inputs(plk.per_group(self.v, group_axis), query, rows, EvoParams(*map(plk.whole, self.params)))


def forward(inputs: Inputs, carry: Tables | None, geo: Geometry) -> tuple[jax.Array, Tables, Tables | None]:
    """Output (G, L, D), the carry tables, and what the last token leaves, (G, D) each, if `carry` is what precedes."""
    tables, last = carry_tables(inputs, carry, geo)
    out_type = jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype)
    if geo.blocks == 1:
        return _launch("evo_output", _output_kernel, inputs, tables, out_type, geo), tables, last
    gate_type = jax.ShapeDtypeStruct(inputs.v.shape, geo.dot_dtype)
    gate = _launch("evo_gate", _gate_kernel, inputs, tables, gate_type, geo)
    if geo.dot_dtype == "float32" and geo.width > 128:  # beside rows this wide, its products would spill registers
        final = _launch("evo_final", _final_kernel, inputs, gate, gate_type, _one_chunk(geo))
        return _norm(inputs, tables, final, geo, final=True), tables, last
    return _norm(inputs, tables, gate, geo), tables, last


def carry_tables(inputs: Inputs, carry: Tables | None, geo: Geometry) -> tuple[Tables, Tables | None]:
    """Sums over chunks and their scans; the second needs the first, since the gate reads the running mean."""
    table = jax.ShapeDtypeStruct((inputs.v.shape[0], geo.chunks, geo.width), geo.accum)
    sums = _launch("evo_sums", _sums_kernel, inputs, None, table, _one_chunk(geo))  # it has no kernels to hold
    if not geo.causal:
        return totals_to_tables(sums.sum(1, keepdims=True), inputs.rows, inputs.params, geo), None
    context = _carries(sums, carry and carry.context)
    gated_sums = _launch("evo_gated_sums", _gated_sums_kernel, inputs, Tables(context, None), table, geo)
    gated = _carries(gated_sums, carry and carry.gated)
    last = None if carry is None else Tables(context[:, -1] + sums[:, -1], gated[:, -1] + gated_sums[:, -1])
    return Tables(context, gated), last


def _one_chunk(geo: Geometry) -> Geometry:
    """Of a pass whose programs take a chunk each."""
    return replace(geo, launch=replace(geo.launch, repeats=1))


def _carries(sums: jax.Array, before: Any) -> jax.Array:
    """What precedes each chunk, (G, n, D), with `before` (G, D) or nothing in front of the first."""
    if before is None:
        return exclusive_carries(sums)
    return jnp.cumsum(jnp.concatenate([before[:, None], sums[:, :-1]], axis=1), axis=1)


def totals_to_tables(context: jax.Array, rows: Any, params: EvoParams, geo: Geometry) -> Tables:
    """The non-causal form: S = sigmoid(mean @ W_g + b_g) * c, once for each sequence and head."""
    count = jnp.float32(geo.length)
    if rows is not None:
        count = jnp.repeat(jnp.abs(rows[:, :1]), context.shape[0] // rows.shape[0], axis=0)[:, :, None]
    mean = (context / count.astype(context.dtype)).astype(jnp.float32)
    kernel, bias = params.gate_kernel.astype(jnp.float32), params.gate_bias.astype(jnp.float32)
    gate = jax.nn.sigmoid(jnp.matmul(mean, kernel, precision="highest") + bias[None, None])
    return Tables(context, gate.astype(context.dtype) * context)


def _launch(name: str, kernel: Any, inputs: Inputs, tables: Any, out_shape: Any, geo: Geometry) -> Any:
    """One program per (column block, chunk or `repeats` of them, group)."""
    table_specs = jax.tree.map(lambda table: plk.per_group(table, 2), tables)
    return plk.call(
        partial(kernel, geo=geo),
        inputs,
        tables,
        name=name,
        grid=(geo.blocks, -(-geo.chunks // geo.repeats), inputs.v.shape[0]),
        in_specs=(inputs.specs(2), table_specs),
        out_specs=jax.tree.map(lambda out: plk.per_group(out, 2), out_shape),
        out_shape=out_shape,
        num_warps=geo.launch.num_warps,
        num_stages=geo.launch.num_stages,
        interpret=geo.launch.interpret,
    )


def _sums_kernel(inputs: Inputs, _: None, sums_ref: Any, *, geo: Geometry) -> None:
    """Pass A: the sum of v over each chunk."""
    block, chunk = plk.program_id(0), plk.program_id(1)
    v = load_v(inputs, t.chunk_rows(inputs.rows, chunk, geo), block, geo)
    t.store_carry(sums_ref, chunk, block, v.astype(geo.accum).sum(0), geo)


def _gated_sums_kernel(inputs: Inputs, tables: Tables, sums_ref: Any, *, geo: Geometry) -> None:
    """Pass B: the sum of g * v over each chunk, with g the gate of the running mean."""
    block = plk.program_id(0)
    inputs = inputs._replace(params=t.hold(inputs.params, block, geo))

    def step(chunk: Any) -> None:
        rows = t.chunk_rows(inputs.rows, chunk, geo)
        context = context_of_v(inputs, tables, rows, chunk, geo)
        gated = gate_of_mean(inputs, rows, context, block, geo) * load_v(inputs, rows, block, geo)
        t.store_carry(sums_ref, chunk, block, gated.astype(geo.accum).sum(0), geo)

    t.each_chunk(step, plk.program_id(1), geo)


def gate_of_mean(inputs: Inputs, rows: t.Rows, context_of: Any, block: Any, geo: Geometry) -> jax.Array:
    """One column block of g = sigmoid(m @ W_g + b_g), with m_t = c_t / t the running mean of v.

    `context_of(k)` is column block k of c. Rounding m would show wherever the denominator of r is next to 0, and so in
    the gradients of all earlier tokens.
    """

    def mean(k: Any) -> jax.Array:
        return (context_of(k) * (1.0 / rows.count.astype(geo.accum))[:, None]).astype(jnp.float32)

    kernel, bias = inputs.params.gate_kernel, inputs.params.gate_bias
    return t.sigmoid(t.linear(mean, kernel, bias, block, geo, exact=True))


def context_of_v(inputs: Inputs, tables: Tables, rows: t.Rows, chunk: Any, geo: Geometry) -> Any:
    """A function of k that gives column block k of c, the running sum of v; a single block is summed once."""
    of = lambda k: t.prefix(tables.context, chunk, k, load_v(inputs, rows, k, geo), geo, exact=True)  # noqa: E731
    if geo.blocks > 1:
        return of
    whole = of(0)
    return lambda _: whole


def load_v(inputs: Inputs, rows: t.Rows, block: Any, geo: Geometry) -> jax.Array:
    """One column block of v, 0 where a token is absent."""
    return t.load_tile(inputs.v, rows.index, rows.used, block, geo)


def local_of_v(inputs: Inputs, rows: t.Rows, block: Any, geo: Geometry) -> jax.Array:
    """One column block of v @ W_l + b_l."""
    params = inputs.params
    return t.linear(lambda k: load_v(inputs, rows, k, geo), params.local_kernel, params.local_bias, block, geo)


def q_of_query(inputs: Inputs, rows: t.Rows, block: Any, geo: Geometry) -> jax.Array:
    """One column block of query @ W_q + b_q."""
    query, params = inputs.v if inputs.query is None else inputs.query, inputs.params
    tile_of = lambda k: t.load_tile(query, rows.index, rows.used, k, geo)  # noqa: E731
    return t.linear(tile_of, params.q_kernel, params.q_bias, block, geo)


def gate_of(
    inputs: Inputs, tables: Tables, rows: t.Rows, chunk: Any, block: Any, g: jax.Array | None, geo: Geometry
) -> jax.Array:
    """One column block of the gate silu(r) v, from that of g (None in the non-causal form, where it is constant)."""
    v = load_v(inputs, rows, block, geo)
    gated = t.prefix(tables.gated, chunk, block, v if g is None else g * v, geo).astype(jnp.float32)
    denominator = jnp.abs(gated) + (jnp.abs(local_of_v(inputs, rows, block, geo)) + t.DEN_EPS)
    ratio = q_of_query(inputs, rows, block, geo) * plk.reciprocal(denominator)
    return ratio * t.sigmoid(ratio) * v


def _output_kernel(inputs: Inputs, tables: Tables, out_ref: Any, *, geo: Geometry) -> None:
    """Pass C where one block holds a whole row: gate, final gate, LayerNorm, one write."""
    inputs = inputs._replace(params=t.hold(inputs.params, 0, geo))
    params = inputs.params

    def step(chunk: Any) -> None:
        rows = t.chunk_rows(inputs.rows, chunk, geo)
        context = context_of_v(inputs, tables, rows, chunk, geo)
        g = gate_of_mean(inputs, rows, context, 0, geo) if geo.causal else None
        gate = gate_of(inputs, tables, rows, chunk, 0, g, geo)
        final = t.sigmoid(t.linear(lambda _: gate, params.final_kernel, params.final_bias, 0, geo))
        _, ok = t.columns(0, geo)
        y = jnp.where(rows.live[:, None] & ok[None, :], final * context(0).astype(jnp.float32), 0.0)
        x_hat, _ = t.normalise(y, geo.width, ok)
        store_normalised(inputs, rows, [(0, x_hat)], out_ref, geo)

    t.each_chunk(step, plk.program_id(1), geo)


def store_normalised(inputs: Inputs, rows: t.Rows, parts: list, out_ref: Any, geo: Geometry) -> None:
    """Scale, shift, zero the absent rows, write."""
    for block, x_hat in parts:
        params = inputs.params
        scale, bias = (t.load_columns(x, block, geo)[None, :] for x in (params.norm_scale, params.norm_bias))
        out = plk.fma(x_hat, scale, bias)
        if geo.absent:
            out = jnp.where(rows.live[:, None], out, 0.0)
        t.store_tile(out_ref, rows.index, rows.inside, block, out, geo)


def _gate_kernel(inputs: Inputs, tables: Tables, gate_ref: Any, *, geo: Geometry) -> None:
    """Pass C1 of wide rows: one column block of the gate."""
    block = plk.program_id(0)
    inputs = inputs._replace(params=t.hold(inputs.params, block, geo))

    def step(chunk: Any) -> None:
        rows, g = t.chunk_rows(inputs.rows, chunk, geo), None
        if geo.causal:
            g = gate_of_mean(inputs, rows, context_of_v(inputs, tables, rows, chunk, geo), block, geo)
        gate = gate_of(inputs, tables, rows, chunk, block, g, geo)
        t.store_tile(gate_ref, rows.index, rows.inside, block, gate, geo)

    t.each_chunk(step, plk.program_id(1), geo)


def _final_kernel(inputs: Inputs, gate_ref: Any, final_ref: Any, *, geo: Geometry) -> None:
    """One column block of f."""
    block, chunk = plk.program_id(0), plk.program_id(1)
    rows = t.chunk_rows(inputs.rows, chunk, geo)
    t.store_tile(final_ref, rows.index, rows.inside, block, final_gate(inputs, gate_ref, rows, block, geo), geo)


def _norm(inputs: Inputs, tables: Tables, gate: jax.Array, geo: Geometry, final: bool = False) -> jax.Array:
    """Pass C2 of wide rows, in place of the gate, or of f if `final`, where the dtypes agree.

    Blocks are narrower where products are split, and without a carry where they would spill registers on A100. With
    several chunks a program, JAX 0.12's compiler takes half as many registers again.
    """
    geo = _one_chunk(geo)
    if geo.dot_dtype == "float32":
        geo = replace(geo, launch=replace(geo.launch, block_d=16))
    elif geo.width > 128 and not geo.causal:
        geo = replace(geo, launch=replace(geo.launch, block_d=min(geo.launch.block_d, 32)))
    out = jax.ShapeDtypeStruct(gate.shape, inputs.v.dtype)
    return plk.call(
        partial(_norm_kernel, geo=geo, is_final=final),
        inputs,
        tables,
        gate,
        name="evo_norm",
        grid=(geo.chunks, gate.shape[0]),
        in_specs=(inputs.specs(1), Tables(*(plk.per_group(table, 1) for table in tables)), plk.per_group(gate, 1)),
        out_specs=plk.per_group(out, 1),
        out_shape=out,
        num_warps=min(2 * geo.launch.num_warps, 16),  # whole rows are held in registers
        num_stages=geo.launch.num_stages,
        interpret=geo.launch.interpret,
        in_place=[(gate, 0)] if gate.dtype == out.dtype else [],
    )


def _norm_kernel(inputs: Inputs, tables: Tables, gate_ref: Any, out_ref: Any, *, geo: Geometry, is_final: bool) -> None:
    """Whole rows, held as column blocks: f * c, then LayerNorm.

    Writing over the gate is safe: an output row waits for its LayerNorm, which waits for all of its gate.
    """
    chunk = plk.program_id(0)
    rows = t.chunk_rows(inputs.rows, chunk, geo)
    parts = []
    for block in range(geo.blocks):
        if is_final:
            final = t.load_tile(gate_ref, rows.local, rows.inside, block, geo)
        else:
            final = final_gate(inputs, gate_ref, rows, block, geo)
        v = load_v(inputs, rows, block, geo)
        context = t.prefix(tables.context, chunk, block, v, geo, exact=True).astype(jnp.float32)
        _, ok = t.columns(block, geo)
        parts.append((block, ok, jnp.where(rows.live[:, None] & ok[None, :], final * context, 0.0)))
    mean = reduce(jnp.add, [y.sum(1) for _, _, y in parts])[:, None] / geo.width
    centred = [(block, jnp.where(ok[None, :], y - mean, 0.0)) for block, ok, y in parts]
    variance = reduce(jnp.add, [(y * y).sum(1) for _, y in centred]) / geo.width
    inverse = jax.lax.rsqrt(variance + t.NORM_EPS)
    store_normalised(inputs, rows, [(block, y * inverse[:, None]) for block, y in centred], out_ref, geo)


def final_gate(inputs: Inputs, gate_ref: Any, rows: t.Rows, block: Any, geo: Geometry) -> jax.Array:
    """One column block of f = sigmoid(gate @ W_f + b_f), from the gates of these rows, counted within the segment."""

    params = inputs.params
    tile_of = lambda k: t.load_tile(gate_ref, rows.local, rows.inside, k, geo)  # noqa: E731
    return t.sigmoid(t.linear(tile_of, params.final_kernel, params.final_bias, block, geo))
