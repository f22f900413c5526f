"""Forward and backward of linear attention as sequences of walks (linear_walk.py), and the states between segments."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tuned
from pallas_kernels.dots import Dots
from pallas_kernels.launch import Launch, linear_launch, linear_segments
from pallas_kernels.linear_tile import Operand
from pallas_kernels.linear_walk import Outs, Refs, Walk, run
from reference.linear import LinearSpec, LinearState


class Inputs(NamedTuple):
    """query (B, T, N, D), key (B, S, K, D), value (B, S, K, V), rows (B, T) or None."""

    query: Any
    key: Any
    value: Any
    state: Any  # LinearState or None
    rows: Any


class Gradients(NamedTuple):
    query: Any
    key: Any
    value: Any
    state: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """Statics of one call that every walk of it shares."""

    spec: LinearSpec
    interpret: bool
    block: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    kernel: str = "linear_forward"  # or "linear_backward"

    def launch(self, inputs: Inputs, width: int) -> Launch:
        """Of rows of `width` columns; looked up by the wider of key and value, so that all walks have one chunk."""
        own = {"block_m": self.block, "num_warps": self.num_warps, "num_stages": self.num_stages}
        plain = inputs.rows is None and inputs.query.shape[2] == inputs.key.shape[2]
        plain = plain and self.spec.feature_map != "softmax"
        rule = partial(
            linear_launch,
            precision=self.dots(inputs).precision,
            plain=plain,
            causal=self.spec.causal,
            interpret=self.interpret,
            backward=self.kernel == "linear_backward",
            hopper=tuned.for_hopper(),
        )
        chunk = min(rule(x.shape[3]).block_m for x in (inputs.key, inputs.value))
        default = replace(rule(width), block_m=chunk)
        return tuned.choose(self.key(self.kernel, inputs, plain), default, own)

    def key(self, kernel: str, inputs: Inputs, plain: bool = True) -> tuned.Key:
        """By which a launch of `kernel` is looked up."""
        width, length = max(inputs.key.shape[3], inputs.value.shape[3]), max(x.shape[1] for x in inputs[:2])
        mask = ("causal" if self.spec.causal else "full") + ("" if plain else "+rows")
        return tuned.Key.of(kernel, self.dots(inputs).precision, width, length, mask)

    def dots(self, inputs: Inputs) -> Dots:
        return Dots.of({jnp.dtype(x.dtype).name for x in inputs[:3]}, self.interpret)

    def both_ways(self, inputs: Inputs) -> bool:
        """Non-causal with rows: what a token sees starts and ends with its run, so walks go both ways."""
        return not self.spec.causal and inputs.rows is not None


class Side(NamedTuple):
    """What is summed into a state: keys (phi(k) v^T, phi(k)) or queries (phi(q) d_num^T, d_den phi(q))."""

    name: str
    b: Operand
    c: Operand
    extra: Any  # d_den
    reverse: bool  # the direction in which later tokens see it
    start: Any  # LinearState before the first token walked, or None


class States(NamedTuple):
    """The state before each segment, in the side's direction and in the other one (None: zero throughout)."""

    onward: Any
    back: Any
    segments: int


def forward(inputs: Inputs, plan: Plan, *, save: bool, keep_state: bool) -> tuple[jax.Array, Any, Any]:
    """(out, 1 / den of every token if `save`, the state after the last token if `keep_state`)."""
    query, key, value, _, rows = inputs
    (batch, tokens, heads, _), width, feature = query.shape, value.shape[3], plan.spec.feature_map
    states = _states(_keys(inputs), inputs, plan)
    walk = _walk("num", inputs, plan, states, own_query=True, extra=None, maps=(feature, feature, None))
    walk = replace(walk, eps=plan.spec.eps)
    refs = Refs(a=Operand(query), b=Operand(key), c=Operand(value), rows=rows)
    types = Outs(
        _type((batch, tokens, heads, width), query.dtype),
        _type((batch, heads, tokens)) if save else None,
        _state_type(inputs) if keep_state else None,
    )
    outs = _run_directions(walk, refs, types, states, inputs, plan)
    return outs.out, outs.den, outs.state


def backward(inputs: Inputs, out: Any, inverse: Any, cotangents: tuple[Any, Any], plan: Plan) -> Gradients:
    """Gradients, from the output, 1 / den (B, N, T), and the cotangents of the output and of the last state."""
    d_out, d_state = cotangents
    plan = replace(plan, kernel="linear_backward")
    d_num, d_den = Operand(d_out, inverse), _d_den(out, d_out, inverse, inputs.rows)
    queries = Side("queries", Operand(inputs.query), d_num, d_den, True, d_state)
    states = _states(queries, inputs, plan)
    d_key, d_state = _d_key(queries, states, inputs, plan)
    return Gradients(_d_query(queries, inputs, plan), d_key, _d_value(queries, states, inputs, plan), d_state)


def _d_query(queries: Side, inputs: Inputs, plan: Plan) -> jax.Array:
    query, key, value, _, rows = inputs
    states = _states(_keys(inputs), inputs, plan)
    walk = _walk("d_query", inputs, plan, states, own_query=True, extra="own", maps=(None, None, plan.spec.feature_map))
    refs = Refs(queries.c, Operand(value), Operand(key), queries.extra, rows)
    return _run_to_features(walk, refs, query, None, states, inputs, plan)[0]


def _d_key(queries: Side, states: States, inputs: Inputs, plan: Plan) -> tuple[jax.Array, Any]:
    """Also the gradient of the initial state, which is the queries' state at the end of the walk."""
    key, value, rows = inputs.key, inputs.value, inputs.rows
    maps = (None, None, plan.spec.feature_map)
    walk = _walk("d_key", inputs, plan, states, own_query=False, extra="other", maps=maps)
    refs = Refs(Operand(value), queries.c, queries.b, queries.extra, rows)
    state_type = None if inputs.state is None else _state_type(inputs)
    return _run_to_features(walk, refs, key, state_type, states, inputs, plan)


def _d_value(queries: Side, states: States, inputs: Inputs, plan: Plan) -> jax.Array:
    feature, value = plan.spec.feature_map, inputs.value
    walk = _walk("d_value", inputs, plan, states, own_query=False, extra=None, maps=(feature, feature, None))
    refs = Refs(Operand(inputs.key), queries.b, queries.c, rows=inputs.rows)
    return _run_directions(walk, refs, Outs(_type(value.shape, value.dtype)), states, inputs, plan).out


def _run_to_features(
    walk: Walk, refs: Refs, x: jax.Array, state_type: Any, states: States, inputs: Inputs, plan: Plan
) -> tuple[jax.Array, Any]:
    """(gradient of x, state at the end), by a walk that computes the gradient of phi(x).

    A softmax couples the columns of a row, which the walk computes apart: its derivative is taken outside, in float32.
    """
    softmax = walk.maps[2] == "softmax"
    walk = replace(walk, transposed=True, slope=None if softmax else walk.maps[2])
    refs = refs._replace(origin=None if softmax else x)
    types = Outs(_type(x.shape, "float32" if softmax else x.dtype), None, state_type)
    outs = _run_directions(walk, refs, types, states, inputs, plan)
    return _through_softmax(x, outs.out, inputs.rows) if softmax else outs.out, outs.state


def _keys(inputs: Inputs) -> Side:
    return Side("keys", Operand(inputs.key), Operand(inputs.value), None, False, inputs.state)


def _walk(
    name: str, inputs: Inputs, plan: Plan, states: States, *, own_query: bool, extra: str | None, maps: Any
) -> Walk:
    """A walk whose output has the query's tokens and heads, or the key's."""
    query, key, value = inputs[:3]
    group, own = query.shape[2] // key.shape[2], query if own_query else key
    widths = (key.shape[3], value.shape[3])
    width, columns = widths if extra is None else widths[::-1]
    return Walk(
        name=f"linear_{name}",
        kind="inclusive" if plan.spec.causal or inputs.rows is not None else "apply",
        length=own.shape[1],
        width=width,
        columns=columns,
        maps=maps,
        heads=own.shape[2],
        share=group if own_query else 1,
        others=1 if own_query else group,
        segments=states.segments,
        reverse=not own_query,
        launch=plan.launch(inputs, width),
        dots=plan.dots(inputs),
        extra=extra,
    )


def _run_directions(walk: Walk, refs: Refs, types: Outs, states: States, inputs: Inputs, plan: Plan) -> Outs:
    """One walk, or two: the tokens on one side of each token and itself, then those on the other side."""
    if walk.kind == "apply":
        refs = refs._replace(b=None, c=None, extra=refs.extra if walk.extra == "own" else None, state=states.onward)
        segments = linear_segments(refs.a.array.shape[0] * walk.heads * walk.tiles, walk.chunks)
        outs = run(replace(walk, segments=segments), refs, types._replace(state=None))
        return outs if types.state is None else outs._replace(state=states.onward)
    refs = refs._replace(state=states.onward)
    if not plan.both_ways(inputs):
        return run(walk, refs, types)
    den = None if walk.eps is None else _type((inputs.key.shape[0], walk.heads, walk.length))
    first = run(
        replace(walk, finish=False, slope=None, name=f"{walk.name}_onward"),
        refs._replace(origin=None),
        Outs(_type(types.out.shape), den, types.state),
    )
    back = replace(walk, kind="exclusive", reverse=not walk.reverse, name=f"{walk.name}_back")
    refs = refs._replace(state=states.back, partial=(first.out, first.den))
    return run(back, refs, types._replace(state=None))._replace(state=first.state)


def _states(side: Side, inputs: Inputs, plan: Plan) -> States:
    """What each segment starts from; a single segment starts from what the caller gave."""
    query, key, value = inputs[:3]
    of_keys = side.name == "keys"
    launch = plan.launch(inputs, key.shape[3])
    heads = query.shape[2] if of_keys and (plan.spec.causal or inputs.rows is not None) else key.shape[2]
    tiles = -(-max(key.shape[3], value.shape[3]) // launch.block_d)
    chunks = -(-side.b.array.shape[1] // launch.block_m)
    segments = linear_segments(key.shape[0] * heads * tiles, chunks)
    if plan.spec.causal or inputs.rows is not None:
        onward = _before_segments(side, segments, inputs, plan)
        back = None
        if plan.both_ways(inputs):
            back = _before_segments(side._replace(reverse=not side.reverse, start=None), segments, inputs, plan)
        return States(onward, back, segments)
    table = _totals(side, segments, segments, inputs, plan)
    start = _start(side, table)
    return States(jax.tree.map(lambda x, s: x.sum(2, keepdims=True) + s, table, start), None, segments)


def _before_segments(side: Side, segments: int, inputs: Inputs, plan: Plan) -> Any:
    """LinearState (B, K, segments, ...): of the run that the last token before the segment belongs to."""
    if segments == 1:
        return None if side.start is None else jax.tree.map(lambda x: x.astype(jnp.float32)[:, :, None], side.start)
    table = _totals(side, segments, segments - 1, inputs, plan)
    table = jax.tree.map(lambda s, x: jnp.concatenate([s, x], axis=2), _start(side, table), table)
    seen = jnp.tril(jnp.ones((1, segments, segments), bool))
    if inputs.rows is not None:
        runs = _runs_before(side, segments, inputs, plan)
        seen = seen & (runs[:, :, None] == runs[:, None, :])

    def total(x: jax.Array) -> jax.Array:
        mask = seen[:, None].reshape(seen.shape[0], 1, segments, segments, *(1,) * (x.ndim - 3))
        return jnp.where(mask, x[:, :, None], 0).sum(3)

    return jax.tree.map(total, table)


def _runs_before(side: Side, segments: int, inputs: Inputs, plan: Plan) -> jax.Array:
    """(B, segments) the run of the last token walked before each segment; of the first token, before any."""
    launch, length = plan.launch(inputs, inputs.key.shape[3]), inputs.rows.shape[1]
    chunks = -(-length // launch.block_m)
    tokens = -(-chunks // segments) * launch.block_m * jnp.arange(segments)
    place = chunks * launch.block_m - tokens if side.reverse else tokens - 1
    return jnp.abs(inputs.rows[:, jnp.clip(place, 0, length - 1)])


def _totals(side: Side, segments: int, count: int, inputs: Inputs, plan: Plan) -> LinearState:
    """The state of each of the first `count` segments by itself, (B, K, count, ...): of its last token's run."""
    feature, width = plan.spec.feature_map, inputs.key.shape[3]
    walk = Walk(
        name=f"linear_{side.name}",
        kind="totals",
        length=side.b.array.shape[1],
        width=width,
        columns=inputs.value.shape[3],
        maps=(None, feature, None),
        heads=inputs.key.shape[2],
        share=1,
        others=side.b.array.shape[2] // inputs.key.shape[2],
        segments=segments,
        reverse=side.reverse,
        launch=plan.launch(inputs, width),
        dots=plan.dots(inputs),
        extra=None if side.extra is None else "other",
    )
    refs = Refs(b=side.b, c=side.c, extra=side.extra, rows=inputs.rows)
    return run(walk, refs, Outs(state=_state_type(inputs, count))).state


def _start(side: Side, table: LinearState) -> LinearState:
    """(B, K, 1, ...): the state given, or zeros."""
    if side.start is None:
        return jax.tree.map(lambda x: jnp.zeros_like(x[:, :, :1]), table)
    return jax.tree.map(lambda x: x.astype(jnp.float32)[:, :, None], side.start)


def _d_den(out: jax.Array, d_out: jax.Array, inverse: jax.Array, rows: Any) -> jax.Array:
    """(B, N, T): d_den = -(d_out . out) / den, 0 for masked tokens."""
    product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    product = product if rows is None else jnp.where((rows > 0)[..., None, None], product, 0)
    return -product.sum(-1).transpose(0, 2, 1) * inverse


def _through_softmax(x: jax.Array, d_phi: jax.Array, rows: Any) -> jax.Array:
    x32 = x.astype(jnp.float32)
    phi = jax.nn.softmax(x32 if rows is None else jnp.where((rows > 0)[..., None, None], x32, 0), axis=-1)
    return (phi * (d_phi - (phi * d_phi).sum(-1, keepdims=True))).astype(x.dtype)


def _type(shape: tuple[int, ...], dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _state_type(inputs: Inputs, segments: int = 1) -> LinearState:
    batch, _, heads, width = inputs.key.shape
    kv = (batch, heads, segments, width, inputs.value.shape[3])
    state: Any = LinearState  # of shapes, not arrays
    return state(_type(kv), _type(kv[:-1]))
