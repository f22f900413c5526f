"""The forward kernel of softmax attention: each program takes one tile of queries through the tiles it visits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import tile as t
from pallas_kernels import tuned
from pallas_kernels.dots import Dots
from pallas_kernels.launch import AttendLaunch, attend_launch
from pallas_kernels.tile import Refs, Task
from reference.dense import AttendInputs
from reference.logits import AttendSpec
from reference.mask import random_table
from reference.online_softmax import LOG2_E, SoftmaxState, finish, update
from reference.visit import Tiling, Visits, key_visits


@dataclass(frozen=True, slots=True)
class Plan:
    """Statics of one call that its kernels share; None is the default."""

    spec: AttendSpec
    interpret: bool
    block_q: int | None = None
    block_k: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None

    def dots(self, inputs: AttendInputs, bounded: bool = True) -> Dots:
        return Dots.of({jnp.dtype(x.dtype).name for x in inputs[:3]}, self.interpret, bounded)

    def launch(self, kind: str, inputs: AttendInputs) -> AttendLaunch:
        width, precision = max(inputs.key.shape[3], inputs.value.shape[3]), self.dots(inputs).precision
        hopper = tuned.for_hopper()
        default = attend_launch(
            kind, width, precision, interpret=self.interpret, load=self._load(kind, inputs), hopper=hopper
        )
        return tuned.choose(self.key(f"attend_{kind}", inputs), default, self.own)

    def _load(self, kind: str, inputs: AttendInputs) -> str:
        """What takes registers beside the tiles, as attend_launch names it: the one that matters most to `kind`."""
        pattern, scores = inputs.mask.pattern, (inputs.bias, self.spec.soft_cap, self.spec.dropout_rate or None)
        if any(x is not None for x in scores) and (kind == "forward" or not pattern.scattered):
            return "scores"
        if pattern.scattered:
            return "blocks"
        return "heads" if inputs.query.shape[2] != inputs.key.shape[2] or len(pattern.windows) > 1 else ""

    def key(self, kernel: str, inputs: AttendInputs) -> tuned.Key:
        """By which a launch of `kernel` is looked up."""
        pattern = inputs.mask.pattern
        seen = "sparse" if pattern.scattered else "window" if pattern.banded else "causal" if pattern.causal else "full"
        narrowed = [inputs.bias, self.spec.soft_cap, self.spec.dropout_rate or None]
        mask = seen + "+scores" * any(x is not None for x in narrowed)
        width, length = max(inputs.key.shape[3], inputs.value.shape[3]), max(inputs.query.shape[1], inputs.key.shape[1])
        return tuned.Key.of(kernel, self.dots(inputs).precision, width, length, mask)

    @property
    def own(self) -> dict[str, int | None]:
        """What the caller chose."""
        return {name: getattr(self, name) for name in ("block_q", "block_k", "num_warps", "num_stages")}

    def task(
        self, kind: str, inputs: AttendInputs, visits: Visits, programs: tuple[int, int], launch: AttendLaunch
    ) -> Task:
        return Task(
            name=f"attend_{kind}",
            spec=self.spec,
            pattern=inputs.mask.pattern,
            tiling=tiling_of(inputs, launch),
            widths=(inputs.key.shape[3], inputs.value.shape[3]),
            programs=programs,
            loops=t.loops_of(visits, inputs.mask),
            launch=launch,
            dots=self.dots(inputs),
            wide_dots=self.dots(inputs, bounded=False),
        )


def tiling_of(inputs: AttendInputs, launch: AttendLaunch) -> Tiling:
    """Queries and keys in the tiles of `launch`."""
    (batch, queries, heads, _), (keys, kv_heads) = inputs.query.shape, inputs.key.shape[1:3]
    return Tiling(batch, heads, kv_heads, queries, keys, launch.block_q, launch.block_k)


def refs_of(inputs: AttendInputs, visits: Visits) -> Refs:
    """What every kernel reads."""
    mask, scattered = inputs.mask, visits.extras.shape[-1] > 0
    windows = mask.pattern.windows
    table = random_table(mask.pattern, inputs.key.shape[2], inputs.key.shape[1])
    given = {name: getattr(mask, name) for name in ("offset", "q_lengths", "kv_lengths", "q_segments", "kv_segments")}
    return Refs(
        query=inputs.query,
        key=inputs.key,
        value=inputs.value,
        bounds=visits.bounds,
        extras=visits.extras.reshape(-1, *visits.extras.shape[-3:]) if scattered else None,
        counts=visits.counts.reshape(-1, *visits.counts.shape[-2:]) if scattered else None,
        windows=jnp.asarray(windows, jnp.int32) if len(windows) > 1 else None,
        table=table,
        keep=mask.keep,
        bias=inputs.bias,
        sinks=inputs.sinks,
        seeds=inputs.seeds,
        **given,
    )


def forward(inputs: AttendInputs, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """(out (B, T, N, V), lse (B, N, T) in base 2)."""
    (batch, queries, heads, _), width = inputs.query.shape, inputs.value.shape[3]
    launch = plan.launch("forward", inputs)
    tiling = tiling_of(inputs, launch)
    visits = key_visits(inputs.mask, tiling)
    task = plan.task("forward", inputs, visits, (heads, batch), launch)
    types = Refs(
        out=jax.ShapeDtypeStruct((batch, queries, heads, width), inputs.query.dtype),
        lse=jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    outs = t.run(_kernel, task, refs_of(inputs, visits), types, tiling.q_tiles)
    return outs.out, outs.lse


def _kernel(refs: Refs, outs: Refs, *, task: Task) -> None:
    t.over_places(lambda place, _: _tile(refs, outs, place, task), None, task)


def _tile(refs: Refs, outs: Refs, place: t.Place, task: Task) -> None:
    width, value_width = task.widths
    tile = query_tile(task)
    i = t.queries(refs, place, tile, task, axis=0)
    q = t.rows(refs.query, place, i, width, task)

    def step(k_tile: Any, state: SoftmaxState, masked: bool) -> SoftmaxState:
        j = t.keys(refs, place, k_tile, task, axis=1)
        products = t.product(task, q, t.rows(refs.key, place, j, width, task))
        scores, _ = t.scores(products, refs, place, i, j, task, masked)

        def dot(weights: jax.Array) -> tuple[jax.Array, ...]:
            weights = t.dropped(weights, refs, place, i, j, task)
            v = t.rows(refs.value, place, j, value_width, task)
            return tuple(task.dots(weights, v.part(n)) for n in range(len(v.parts)))

        return update(state, scores, dot, plk.exp2, t.score_scale(refs, task), plk.fma)

    size = task.tiling.block_q
    acc = tuple(jnp.zeros((size, columns), jnp.float32) for _, columns in task.parts(value_width))
    state = SoftmaxState(jnp.full((size,), -jnp.inf, jnp.float32), jnp.zeros((size,), jnp.float32), acc)
    state = t.over_visits(step, state, refs, place, tile, task)
    if refs.q_lengths is not None:  # tiles that need no mask count for these rows too
        state = state._replace(total=jnp.where(i.here, state.total, 0.0))
    sink = None
    if refs.sinks is not None:
        sink = plk.load_one(refs.sinks, *place.of(refs.sinks, None, 0)).astype(jnp.float32) * LOG2_E
    parts, lse = finish(state, sink)
    parts = tuple(part * (1 / (1 - task.spec.dropout_rate)) for part in parts)
    t.store_rows(outs.out, place, i, parts, value_width, task)
    t.store_vector(outs.lse, place, i, lse)


def query_tile(task: Task) -> Any:
    """This program's tile of queries. Causal ones come last first: those that visit most start first."""
    tile = plk.program_id(0)
    return task.tiling.q_tiles - 1 - tile if task.pattern.causal else tile
