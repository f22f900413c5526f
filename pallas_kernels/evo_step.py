"""One token of each sequence after a carry: EvoAttention's O(1) step. Mathematics: reference/evo.py.

The tokens of all sequences and heads are the rows of its tiles, since they share the weights: no tile is mostly empty.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import evo_tile as t
from pallas_kernels.evo_fwd import Inputs, Tables, load_v, store_normalised
from pallas_kernels.evo_tile import Geometry

ROWS = 16  # of a tile: the fewest that a tensor core multiplies, for as many programs as there can be


class Step(NamedTuple):
    """What a step writes, each (G, D): the output, and the carry for the next token."""

    out: Any
    carry: Tables


def serves(geo: Geometry) -> bool:
    """Whether the step is for this call; wider rows of float32 would spill registers."""
    return geo.length == 1 and (geo.width <= 128 or geo.dot_precision != "tf32x3")


def forward(inputs: Inputs, carry: Tables, geo: Geometry) -> tuple[jax.Array, Tables]:
    """(output (G, 1, D), the carry after the token) from v (G, 1, D) and the carry before it, (G, D) each."""
    packed, geo = _packed(inputs), _geometry(inputs.v.shape[0], geo)
    like = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)  # noqa: E731
    types = Step(like(packed.v), Tables(like(carry.context), like(carry.gated)))
    step = plk.call(
        partial(_step_kernel, geo=geo),
        packed,
        carry,
        name="evo_step",
        grid=(geo.chunks,),
        in_specs=jax.tree.map(plk.whole, (packed, carry)),
        out_specs=jax.tree.map(plk.whole, types),
        out_shape=types,
        num_warps=geo.launch.num_warps,
        num_stages=geo.launch.num_stages,
        interpret=geo.launch.interpret,
    )
    return step.out[:, None], step.carry


def _packed(inputs: Inputs) -> Inputs:
    """Arrays without the axis of one token, and one number of `rows` for each (sequence, head)."""
    groups = inputs.v.shape[0]
    rows = jnp.ones(groups, jnp.float32)  # the first token
    if inputs.rows is not None:
        rows = jnp.repeat(inputs.rows[:, 0], groups // inputs.rows.shape[0])
    return Inputs(inputs.v[:, 0], None if inputs.query is None else inputs.query[:, 0], rows, inputs.params)


def _geometry(groups: int, geo: Geometry) -> Geometry:
    """Groups in place of tokens. Columns past the width cost less here than more, narrower blocks would."""
    widest = 64 if geo.dot_dtype == "bfloat16" and geo.width <= 128 else 32
    block = min(widest, max(16, 1 << (geo.width - 1).bit_length()))
    warps = 8 if block < geo.width and block == 64 else geo.launch.num_warps  # with four, some widths spill
    return replace(geo, length=groups, launch=replace(geo.launch, block_m=ROWS, block_d=block, num_warps=warps))


def _step_kernel(inputs: Inputs, carry: Tables, out: Step, *, geo: Geometry) -> None:
    """The gates of whole rows are held; y = f c is computed block by block twice, for LayerNorm's moments and to write.

    Held as well, or with its products unrolled, wide rows of float32 would spill registers.
    """
    rows = t.chunk_rows(inputs.rows, plk.program_id(0), geo)
    gates = [_gate(inputs, carry, rows, block, out.carry, geo) for block in range(geo.blocks)]

    def y_of(block: Any) -> tuple[jax.Array, jax.Array]:
        final = t.load_columns(inputs.params.final_bias, block, geo)[None, :]
        for k, gate in enumerate(gates):
            final = final + t.dot(gate, t.load_weight(inputs.params.final_kernel, k, block, geo), geo)
        context = _after(carry.context, rows, block, load_v(inputs, rows, block, geo), geo).astype(jnp.float32)
        _, ok = t.columns(block, geo)
        return jnp.where(rows.live[:, None] & ok[None, :], t.sigmoid(final) * context, 0.0), ok

    def add(block: Any, moments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _add_block(moments, *y_of(block), block, geo)

    zero = jnp.zeros((geo.chunk,), jnp.float32)
    mean, squares = t.over_blocks(add, (zero, zero), geo)
    inverse = jax.lax.rsqrt(squares / geo.width + t.NORM_EPS)

    def write(block: Any, nothing: tuple[()]) -> tuple[()]:
        y, _ = y_of(block)
        x_hat = (y - mean[:, None]) * inverse[:, None]
        store_normalised(inputs, rows, [(block, x_hat)], out.out, geo)
        return nothing

    t.over_blocks(write, (), geo)


def _add_block(moments: tuple[jax.Array, jax.Array], y: jax.Array, ok: jax.Array, block: Any, geo: Geometry) -> Any:
    """(mean, sum of squared distances from it) of the columns before `block` and of its own (Chan et al., 1979)."""
    mean, squares = moments
    before = jnp.asarray(block * geo.block, jnp.float32)
    own = jnp.minimum(jnp.float32(geo.block), geo.width - before)
    own_mean = y.sum(1) / own
    centred = jnp.where(ok[None, :], y - own_mean[:, None], 0.0)
    step, share = own_mean - mean, own / (before + own)
    return mean + step * share, squares + (centred * centred).sum(1) + step * step * before * share


def _gate(inputs: Inputs, carry: Tables, rows: t.Rows, block: Any, new: Tables, geo: Geometry) -> jax.Array:
    """One column block of silu(r) v, in the dtype of the dot products; writes that of both carries."""
    params, query = inputs.params, inputs.v if inputs.query is None else inputs.query
    exact = geo.dot_dtype == "bfloat16"  # TF32 keeps float16's bits; two of its products would spill

    def step(k: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        v = load_v(inputs, rows, k, geo)
        mean = (_after(carry.context, rows, k, v, geo) / rows.count.astype(geo.accum)[:, None]).astype(jnp.float32)
        q = t.load_tile(query, rows.index, rows.used, k, geo)
        gate, local, own = sums
        kernel = t.load_weight(params.gate_kernel, k, block, geo)
        gate = t.exact_dot(mean, kernel, geo, gate) if exact else gate + t.dot(mean, kernel, geo)
        local = local + t.dot(v, t.load_weight(params.local_kernel, k, block, geo), geo)
        return gate, local, own + t.dot(q, t.load_weight(params.q_kernel, k, block, geo), geo)

    sums = t.over_blocks(step, (t.zeros(geo),) * 3, geo)
    biases = (params.gate_bias, params.local_bias, params.q_bias)
    gate, local, q = (x + t.load_columns(bias, block, geo)[None, :] for x, bias in zip(sums, biases, strict=True))
    v = load_v(inputs, rows, block, geo)
    context = _after(carry.context, rows, block, v, geo)
    gated = _after(carry.gated, rows, block, t.sigmoid(gate) * v, geo)
    t.store_tile(new.context, rows.index, rows.inside, block, context, geo)
    t.store_tile(new.gated, rows.index, rows.inside, block, gated, geo)
    ratio = q / (jnp.abs(gated.astype(jnp.float32)) + jnp.abs(local) + t.DEN_EPS)
    return (ratio * t.sigmoid(ratio) * v).astype(geo.dot_dtype)


def _after(carry_ref: Any, rows: t.Rows, block: Any, tile: jax.Array, geo: Geometry) -> jax.Array:
    """One column block of carry + tile, in the accumulation dtype."""
    column, ok = t.columns(block, geo)
    carry = plk.load(carry_ref, (rows.index[:, None], column[None, :]), rows.inside[:, None] & ok[None, :])
    return carry + tile.astype(geo.accum)
