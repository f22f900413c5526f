"""Split-K decoding: the forward of few queries over many keys, whose tiles several programs share."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import tile as t
from pallas_kernels import tuned
from pallas_kernels.attend_fwd import Plan, refs_of
from pallas_kernels.decode_visits import most_far, seek, sought
from pallas_kernels.launch import AttendLaunch, decode_launch, decode_rows, decode_splits
from pallas_kernels.tile import Refs, Task
from reference.dense import AttendInputs
from reference.mask import Mask
from reference.online_softmax import LOG2_E, SoftmaxState, finish, merge, update
from reference.visit import Tiling, Visits, key_visits


def serves(inputs: AttendInputs, plan: Plan) -> bool:
    """Whether this forward is the one to run: by shapes alone. A caller who gives `block_q` wants tiles of queries."""
    mask = inputs.mask
    plain = inputs.bias is None and mask.keep is None and not plan.spec.dropout_rate and plan.block_q is None
    few = _rows(inputs) <= decode_rows(_width(inputs), plan.dots(inputs).precision)
    if not (plain and few and len(mask.pattern.windows) == 1):
        return False
    tiles = _live_tiles(inputs, plan)
    return _splits(inputs, plan) > 1 or (sought(mask) and tiles < _token_tiling(inputs, plan).k_tiles)


def forward(inputs: AttendInputs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """(out (B, T, N, V), lse (B, N, T) in base 2)."""
    tiling = _token_tiling(inputs, plan)
    splits, visits = _splits(inputs, plan), (seek if sought(inputs.mask) else key_visits)(inputs.mask, tiling)
    task, packed = _task(inputs, visits, plan), _packed(inputs)
    (batch, rows, heads, _), width = packed.query.shape, inputs.value.shape[3]
    vector = jax.ShapeDtypeStruct((batch, heads, splits * rows), jnp.float32)
    acc = jax.ShapeDtypeStruct((batch, splits * rows, heads, width), jnp.float32)
    outs = t.run(_kernel, task, refs_of(packed, visits), Refs(out=acc, lse=vector, delta=vector), splits)
    return _merged(outs, inputs, splits)


def _group(inputs: AttendInputs) -> int:
    return inputs.query.shape[2] // inputs.key.shape[2]


def _rows(inputs: AttendInputs) -> int:
    """Of the one tile: queries times the heads of a group."""
    return inputs.query.shape[1] * _group(inputs)


def _width(inputs: AttendInputs) -> int:
    return max(inputs.key.shape[3], inputs.value.shape[3])


def _launch(inputs: AttendInputs, plan: Plan, record: bool = False) -> AttendLaunch:
    own, precision = {**plan.own, "block_q": None}, plan.dots(inputs).precision
    default = decode_launch(_width(inputs), precision, _rows(inputs), interpret=plan.interpret)
    key = plan.key("attend_decode", inputs)
    return tuned.choose(replace(key, mask=f"{key.mask}+rows{default.block_q}"), default, own, record=record)


def _splits(inputs: AttendInputs, plan: Plan) -> int:
    return decode_splits(inputs.query.shape[0] * inputs.key.shape[2], _live_tiles(inputs, plan))


def _live_tiles(inputs: AttendInputs, plan: Plan) -> int:
    """The most tiles of keys that one sequence's queries can see."""
    tiling, pattern = _token_tiling(inputs, plan), inputs.mask.pattern
    if pattern.scattered and not sought(inputs.mask):
        return tiling.k_tiles
    left, right = pattern.windows[0]
    band = min(tiling.keys, left + tiling.queries + (0 if pattern.causal else right))
    return min(tiling.k_tiles, -(-band // tiling.block_k) + most_far(pattern, tiling))


def _token_tiling(inputs: AttendInputs, plan: Plan) -> Tiling:
    """All queries are one tile; the heads of a group see the same keys."""
    (batch, queries, *_), (keys, kv_heads) = inputs.query.shape, inputs.key.shape[1:3]
    return Tiling(batch, kv_heads, kv_heads, queries, keys, queries, _launch(inputs, plan).block_k)


def _task(inputs: AttendInputs, visits: Visits, plan: Plan) -> Task:
    launch, group, tiling = _launch(inputs, plan, record=True), _group(inputs), _token_tiling(inputs, plan)
    tiling = replace(tiling, queries=tiling.queries * group, block_q=launch.block_q)
    task = plan.task("decode", inputs, visits, (tiling.heads, tiling.batch), launch)
    return replace(task, tiling=tiling, group=group)


def _packed(inputs: AttendInputs) -> AttendInputs:
    """With queries (B, T * G, K, D): row r is query r // G of head r % G of the group; lengths and segments alike."""
    group, mask = _group(inputs), inputs.mask
    batch, queries, heads, width = inputs.query.shape
    query = inputs.query.reshape(batch, queries, heads // group, group, width)
    lengths, segments = mask.q_lengths, mask.q_segments
    narrow: Mask = replace(
        mask,
        q_lengths=None if lengths is None else jnp.clip(lengths, 0, queries) * group,
        q_segments=None if segments is None else jnp.repeat(segments, group, axis=1),
    )
    query = query.swapaxes(2, 3).reshape(batch, queries * group, heads // group, width)
    return inputs._replace(query=query, mask=narrow, sinks=None)


def _kernel(refs: Refs, outs: Refs, *, task: Task) -> None:
    """One split of one head and sequence: its state, as it is."""
    place, split, splits = t.first_place(task), plk.program_id(0), outs.lse.shape[-1] // task.tiling.queries
    width, value_width = task.widths
    i = t.queries(refs, place, jnp.int32(0), task, axis=0)
    q = t.rows(refs.query, place, i, width, task)

    def step(k_tile: Any, state: SoftmaxState, masked: bool) -> SoftmaxState:
        j = t.keys(refs, place, k_tile, task, axis=1)
        k, v = (t.rows(x, place, j, w, task) for x, w in ((refs.key, width), (refs.value, value_width)))
        scores, _ = t.scores(t.product(task, q, k), refs, place, i, j, task, masked)
        dot = lambda weights: tuple(task.dots(weights, v.part(n)) for n in range(len(v.parts)))  # noqa: E731
        return update(state, scores, dot, plk.exp2, t.score_scale(refs, task), plk.fma)

    size = task.tiling.block_q
    acc = tuple(jnp.zeros((size, columns), jnp.float32) for _, columns in task.parts(value_width))
    state = SoftmaxState(jnp.full((size,), -jnp.inf, jnp.float32), jnp.zeros((size,), jnp.float32), acc)
    state = t.over_visits(step, state, refs, place, jnp.int32(0), task, share=(split, splits))
    if refs.q_lengths is not None:  # tiles that need no mask count for these rows too
        state = state._replace(total=jnp.where(i.here, state.total, 0.0))
    i = i._replace(start=split * task.tiling.queries)
    t.store_rows(outs.out, place, i, state.acc, value_width, task)
    t.store_vector(outs.lse, place, i, state.top)
    t.store_vector(outs.delta, place, i, state.total)


def _merged(outs: Refs, inputs: AttendInputs, splits: int) -> tuple[jax.Array, jax.Array]:
    """Of all splits, in the order of heads and tokens."""
    (batch, queries, heads, _), group, width = inputs.query.shape, _group(inputs), inputs.value.shape[3]
    shape, rows = (batch, heads // group, splits, queries, group), (batch, splits, queries, heads)
    top, total = (x.reshape(shape).transpose(0, 2, 3, 1, 4).reshape(rows) for x in (outs.lse, outs.delta))
    acc = outs.out.reshape(batch, splits, queries, group, heads // group, width).swapaxes(3, 4).reshape(*rows, width)
    sinks = None if inputs.sinks is None else inputs.sinks.astype(jnp.float32)[None, None] * LOG2_E
    (out,), lse = finish(merge(SoftmaxState(top, total, (acc,)), 1), sinks)
    return out.astype(inputs.query.dtype), lse.transpose(0, 2, 1)
