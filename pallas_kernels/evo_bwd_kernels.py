"""Backward Evo kernels over one segment of the sequence; evo_bwd.py runs them in the order they stand here.

Every kernel takes (first, inputs, tables, extras, out): `first` is the segment's first chunk, arrays named z_* and d_*
belong to the segment alone, and a program owns one (rows, columns) tile of them. Gradients of parameters are parts that
a program of every segment adds to, in place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import evo_tile as t
from pallas_kernels.evo_fwd import (
    Inputs,
    Tables,
    context_of_v,
    final_gate,
    gate_of,
    gate_of_mean,
    load_v,
    local_of_v,
    q_of_query,
)
from pallas_kernels.evo_tile import Geometry


def _tile_of(first_ref: Any, inputs: Inputs, geo: Geometry, reverse: bool = False) -> tuple[Any, Any, Any, t.Rows]:
    """(column block, chunk of the segment, chunk of the sequence, rows) of this program."""
    block, chunk = plk.program_id(0), plk.program_id(1)
    first = jnp.maximum(plk.load_scalar(first_ref), 0)  # for the audit of accesses: no segment starts before the first
    return block, chunk, first + chunk, t.chunk_rows(inputs.rows, chunk, geo, first, reverse)


class Gate(NamedTuple):
    """Recomputed from the carries: the gate, g (None if not causal) and c of every token."""

    gate: Any
    g: Any
    context: Any


def gate_kernel(first: Any, inputs: Inputs, tables: Tables, _: Any, out: Gate, *, geo: Geometry) -> None:
    """The gate again, with the g and c it was made from."""
    block, _, chunk, rows = _tile_of(first, inputs, geo)
    context, g = context_of_v(inputs, tables, rows, chunk, geo), None
    if geo.causal:
        g = gate_of_mean(inputs, rows, context, block, geo)
        t.store_tile(out.g, rows.local, rows.inside, block, g, geo)
    t.store_tile(out.context, rows.local, rows.inside, block, context(block), geo)
    gate = gate_of(inputs, tables, rows, chunk, block, g, geo)
    t.store_tile(out.gate, rows.local, rows.inside, block, gate, geo)


def final_kernel(first: Any, inputs: Inputs, tables: Tables, gate: Any, out: Any, *, geo: Geometry) -> None:
    """f = sigmoid(gate @ W_f + b_f)."""
    block, _, _, rows = _tile_of(first, inputs, geo)
    t.store_tile(out, rows.local, rows.inside, block, final_gate(inputs, gate, rows, block, geo), geo)


class Norm(NamedTuple):
    """Through LayerNorm and y = f c: z_final, the part of c' that comes from y, and sums over each block of rows."""

    z_final: Any
    d_context: Any
    final_bias: Any
    norm_scale: Any
    norm_bias: Any


def norm_kernel(
    first: Any, inputs: Inputs, tables: Tables, extras: tuple[Any, Any, Any, Any], out: Norm, *, geo: Geometry
) -> None:
    """LayerNorm backwards; here `geo` is one of whole rows: a single column block, few rows, no dot products."""
    d_out_ref, final_ref, context_ref, old = extras
    block, chunk, _, rows = _tile_of(first, inputs, geo)
    final = t.load_tile(final_ref, rows.local, rows.inside, block, geo)
    context = t.load_tile(context_ref, rows.local, rows.inside, block, geo)
    d_out = t.load_tile(d_out_ref, rows.index, rows.used, block, geo)
    _, ok = t.columns(block, geo)
    live = rows.live[:, None]
    x_hat, inverse = t.normalise(jnp.where(live, final * context, 0.0), geo.width, ok)
    d_hat = d_out * t.load_columns(inputs.params.norm_scale, block, geo)[None, :]
    mean = d_hat.sum(1)[:, None] / geo.width
    slope = (d_hat * x_hat).sum(1)[:, None] / geo.width
    d_y = jnp.where(live, inverse[:, None] * (d_hat - mean - x_hat * slope), 0.0)
    z_final = d_y * context * final * (1.0 - final)
    t.store_tile(out.z_final, rows.local, rows.inside, block, z_final, geo)
    t.store_tile(out.d_context, rows.local, rows.inside, block, d_y * final, geo)
    for ref, old_ref, tile in zip(out[2:], old, (z_final, d_out * x_hat, d_out), strict=True):
        _add(ref, old_ref, chunk, block, tile, geo)


def _add(ref: Any, old_ref: Any, chunk: Any, block: Any, tile: jax.Array, geo: Geometry) -> None:
    """Write the sum of a tile's rows, on top of what earlier segments left."""
    t.store_carry(ref, chunk, block, t.load_carry(old_ref, chunk, block, geo) + tile.sum(0), geo)


class Ratio(NamedTuple):
    """Through gate = silu(r) v and r = q / (|S| + |local| + eps): z_q, z_local, S', the first part of v', and sums."""

    z_q: Any
    z_local: Any
    d_gated: Any
    d_v: Any
    gated_sums: Any
    q_bias: Any
    local_bias: Any


def ratio_kernel(
    first: Any, inputs: Inputs, tables: Tables, extras: tuple[Any, Any, Any, Any], out: Ratio, *, geo: Geometry
) -> None:
    """gate' = z_final @ W_f^T, then down to the three arguments of r."""
    z_final_ref, g_ref, old_q_bias, old_local_bias = extras
    block, local_chunk, chunk, rows = _tile_of(first, inputs, geo)

    v = load_v(inputs, rows, block, geo)
    gv = v if g_ref is None else v * t.load_tile(g_ref, rows.local, rows.inside, block, geo)
    gated = t.prefix(tables.gated, chunk, block, gv, geo).astype(jnp.float32)
    local = local_of_v(inputs, rows, block, geo)
    inverse = plk.reciprocal(jnp.abs(gated) + jnp.abs(local) + t.DEN_EPS)
    ratio = q_of_query(inputs, rows, block, geo) * inverse
    d_gate = _back(z_final_ref, inputs.params.final_kernel, rows, block, geo)
    s = t.sigmoid(ratio)
    z_q = d_gate * v * s * (1.0 + ratio * (1.0 - s)) * inverse
    z_local = -z_q * ratio * t.sign(local)
    d_gated = -z_q * ratio * t.sign(gated)
    for ref, tile in ((out.z_q, z_q), (out.z_local, z_local), (out.d_gated, d_gated), (out.d_v, d_gate * ratio * s)):
        t.store_tile(ref, rows.local, rows.inside, block, tile, geo)
    z_q, z_local, d_gated = (jnp.where(rows.inside[:, None], tile, 0.0) for tile in (z_q, z_local, d_gated))
    t.store_carry(out.gated_sums, local_chunk, block, d_gated.sum(0), geo)
    _add(out.q_bias, old_q_bias, local_chunk, block, z_q, geo)
    _add(out.local_bias, old_local_bias, local_chunk, block, z_local, geo)


class Gated(NamedTuple):
    """Through S = prefix(g v), causal form: z_gate, v' with its part D_S g, and sums."""

    z_gate: Any
    d_v: Any
    gate_bias: Any


def gated_kernel(
    first: Any, inputs: Inputs, tables: Tables, extras: tuple[Any, ...], out: Gated, *, geo: Geometry
) -> None:
    """D_S by a suffix sum (rows from last to first), then z_gate = D_S v g (1 - g) and v' += D_S g."""
    carries, d_gated_ref, d_v_ref, g_ref, old_bias = extras
    block, chunk, _, rows = _tile_of(first, inputs, geo, reverse=True)
    suffix = t.prefix(carries, chunk, block, t.load_tile(d_gated_ref, rows.local, rows.inside, block, geo), geo)
    suffix = suffix.astype(jnp.float32)
    g = t.load_tile(g_ref, rows.local, rows.inside, block, geo)
    v = load_v(inputs, rows, block, geo)
    d_v = t.load_tile(d_v_ref, rows.local, rows.inside, block, geo)
    z_gate = suffix * v * g * (1.0 - g)
    t.store_tile(out.z_gate, rows.local, rows.inside, block, z_gate, geo)
    t.store_tile(out.d_v, rows.local, rows.inside, block, d_v + suffix * g, geo)
    _add(out.gate_bias, old_bias, chunk, block, z_gate, geo)


class Linear(NamedTuple):
    """Through the linears: all of c' and its sums over chunks, v' but for the suffix of c', and query' in place."""

    d_context: Any
    d_v: Any
    context_sums: Any
    d_query: Any


def linear_kernel(
    first: Any, inputs: Inputs, tables: Tables, extras: tuple[Any, ...], out: Linear, *, geo: Geometry
) -> None:
    """c' += (z_gate @ W_g^T) / t and v' += z_local @ W_l^T, and z_q @ W_q^T into query' (or v' where q is v)."""
    z_q_ref, z_local_ref, z_gate_ref, d_context_ref, d_v_ref, _ = extras
    params = inputs.params
    block, local_chunk, _, rows = _tile_of(first, inputs, geo)

    d_context = t.load_tile(d_context_ref, rows.local, rows.inside, block, geo)
    if z_gate_ref is not None:
        from_mean = _back(z_gate_ref, params.gate_kernel, rows, block, geo)
        d_context = d_context + jnp.where(rows.inside[:, None], from_mean * (1.0 / rows.count)[:, None], 0.0)
    d_v = t.load_tile(d_v_ref, rows.local, rows.inside, block, geo)
    d_v = d_v + _back(z_local_ref, params.local_kernel, rows, block, geo)
    from_q = _back(z_q_ref, params.q_kernel, rows, block, geo)
    if out.d_query is None:
        d_v = d_v + from_q
    else:
        t.store_tile(out.d_query, rows.index, rows.used, block, from_q, geo)
    t.store_tile(out.d_context, rows.local, rows.inside, block, d_context, geo)
    t.store_tile(out.d_v, rows.local, rows.inside, block, d_v, geo)
    t.store_carry(out.context_sums, local_chunk, block, d_context.astype(geo.accum).sum(0), geo)


def _back(z_ref: Any, kernel: Any, rows: t.Rows, block: Any, geo: Geometry) -> jax.Array:
    """One column block of z @ kernel^T."""
    return t.linear_transposed(lambda k: t.load_tile(z_ref, rows.local, rows.inside, k, geo), kernel, block, geo)


def v_kernel(first: Any, inputs: Inputs, tables: Tables, extras: tuple[Any, ...], out: Any, *, geo: Geometry) -> None:
    """v' += D_c by a suffix sum (causal form), written once; rows of absent tokens stay 0."""
    carries, d_context_ref, d_v_ref, _ = extras
    block, chunk, _, rows = _tile_of(first, inputs, geo, reverse=True)
    d_v = t.load_tile(d_v_ref, rows.local, rows.inside, block, geo)
    if geo.causal:
        d_context = t.load_tile(d_context_ref, rows.local, rows.inside, block, geo)
        d_v = d_v + t.prefix(carries, chunk, block, d_context, geo).astype(jnp.float32)
    t.store_tile(out, rows.index, rows.used, block, d_v, geo)


class Factor(NamedTuple):
    """What the left factor x of a weight gradient x^T z is: rows of the sequence or of the segment, or c / t."""

    in_segment: bool = False
    is_context: bool = False


def weight_kernel(
    first_ref: Any,
    inputs: Inputs,
    refs: tuple[Any, Any, Any],
    out: Any,
    *,
    factor: Factor,
    split: tuple[int, int],
    geo: Geometry,
) -> None:
    """One (w, w) block of x^T z over `repeats` of the segment's `chunks`, on top of what earlier segments left."""
    (x_ref, z_ref, old_ref), (chunks, repeats) = refs, split
    row_block, column_block = plk.program_id(0), plk.program_id(1)
    part, first = plk.program_id(2), plk.load_scalar(first_ref)

    def step(i: Any, acc: jax.Array) -> jax.Array:
        rows = t.chunk_rows(inputs.rows, part * repeats + i, geo, first)
        if factor.in_segment:
            x = t.load_tile(x_ref, rows.local, rows.inside, row_block, geo)
        else:
            x = t.load_tile(x_ref, rows.index, rows.used, row_block, geo)
        if factor.is_context:
            x = x * (1.0 / rows.count)[:, None]
        z = t.load_tile(z_ref, rows.local, rows.inside, column_block, geo)
        return acc + t.dot(x, z, geo, (0, 0))

    steps = jnp.minimum(repeats, chunks - part * repeats)
    acc = jax.lax.fori_loop(0, steps, step, jnp.zeros((geo.block, geo.block), jnp.float32))
    (row, row_ok), (column, column_ok) = t.columns(row_block, geo), t.columns(column_block, geo)
    index, ok = (part, row[:, None], column[None, :]), row_ok[:, None] & column_ok[None, :]
    plk.store(out, index, plk.load(old_ref, index, ok) + acc, ok)
