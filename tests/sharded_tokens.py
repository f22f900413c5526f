"""A program of tests/test_sharding.py: on four CPU devices, sequences whose tokens are divided. As sharded_types.py."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_ops import OPS, B, L
from sharded_types import (
    BIAS,
    HIDDEN,
    IDS,
    KEY,
    LENGTHS,
    MASK,
    PARAMS,
    QUERY,
    RNG,
    SINKS,
    STATE,
    SUMS,
    VALUE,
    apart,
    difference,
    evo_from_state,
    from_state,
    gradients,
    layers,
    uses,
    with_options,
)

import evo_jax

ALL, SOME = ("data", "model"), "model"
HOLES = RNG.random((B, L)) < 0.7
LONG_RUNS = np.where(RNG.random((B, L)) < 0.1, -1, np.cumsum(RNG.random((B, L)) < 0.1, axis=1)).astype(np.int32)


def operations(batch: Any, tokens: Any) -> Iterator[tuple[str, Callable[..., Any], list[tuple[Any, P]]]]:
    """(name, function, its arrays with their places) for the mesh axes that divide sequences and tokens."""
    of_tokens, each = P(batch, tokens), P(batch)
    qkv = [(x, of_tokens) for x in (QUERY, KEY, VALUE)]
    for name, (op, _) in OPS.items():
        yield name, op_of(op), qkv
    yield "all that masks", with_options, [*qkv, (BIAS, P()), (SINKS, P()), (MASK, each), (IDS, of_tokens)]
    yield "bias by tokens", with_options, [*qkv, (BIAS, P(None, None, tokens)), *((x, P()) for x in (SINKS, MASK, IDS))]
    flash = evo_jax.flash_attention
    narrow = lambda q, k, v, n: flash(q, k, v, query_seq_lengths=n, key_value_seq_lengths=n)  # noqa: E731
    yield "lengths", narrow, [*qkv, (LENGTHS, P())]
    yield "not causal", partial(flash, is_causal=False), qkv
    yield "keys held by all", flash, [qkv[0], (KEY, each), (VALUE, each)]
    yield "one query, divided keys", flash, [(QUERY[:, -1:], each), *qkv[1:]]
    for name, ids, mask in (("segments", LONG_RUNS, MASK), ("one segment", 0 * IDS, HOLES)):
        yield (
            f"linear attention, {name}",
            from_state,
            [*qkv, *((x, each) for x in STATE), (ids, each), (mask, of_tokens)],
        )
    linear = evo_jax.linear_attention
    state = lambda q, k, v, *s: linear(q, k, v, initial_state=evo_jax.LinearState(*s), return_state=True)  # noqa: E731
    yield "linear attention from a state", state, [*qkv, *((x, each) for x in STATE)]
    whole = partial(linear, is_causal=False, return_state=True)
    yield "linear attention, not causal", whole, qkv
    yield "linear attention, one query, divided keys", whole, [(QUERY[:, -1:], each), *qkv[1:]]
    yield "linear attention, divided queries, one key", whole, [qkv[0], *((x[:, -1:], each) for x in (KEY, VALUE))]
    v, params = (QUERY.swapaxes(1, 2), P(batch, None, tokens)), [(x, P()) for x in PARAMS]
    yield "EvoAttention from a state", evo_from_state, [v, *((x, each) for x in SUMS), (HOLES, of_tokens), *params]
    multiplied = partial(evo_from_state, mask_semantics="multiply")
    factors = (HOLES * 0.5).astype(np.float32), each
    yield "EvoAttention, multiplied", multiplied, [v, *((x, each) for x in SUMS), factors, *params]
    for options in ({"reverse": True}, {"exclusive": True}, {"reverse": True, "exclusive": True}):
        yield f"prefix sum, {options}", partial(evo_jax.prefix_sum, axis=1, **options), qkv[:1]
    narrow_ints = (QUERY[..., 0] * 40).astype(np.int8)
    yield "prefix sum of integers", partial(evo_jax.prefix_sum, axis=1, accum_dtype="int32"), [(narrow_ints, of_tokens)]


def op_of(op: Callable[..., Any], kind: str = "reference") -> Callable[..., Any]:
    return partial(op, implementation=kind)


def kernels() -> Iterator[tuple[str, Callable[..., Any], list[tuple[Any, P]]]]:
    """The same in the interpreter, of one kernel for each family."""
    qkv = [(x, P(None, ALL)) for x in (QUERY, KEY, VALUE)]
    yield "all that masks", op_of(with_options, "interpret"), [*qkv, *((x, P()) for x in (BIAS, SINKS, MASK, IDS))]
    for name in ("sparse_attention", "linear_attention", "evo_attention", "prefix_sum"):
        yield name, op_of(OPS[name][0], "interpret"), qkv


def alone(mesh: Any) -> Iterator[tuple[str, float]]:
    """Mesh axes of a single device, which divide nothing; arrays on no mesh; and no tokens at all."""
    row = jax.make_mesh((4, 1), ("data", "model"))
    whole = lambda v, mask: evo_jax.evo_attention(v, causal=False, attention_mask=mask)  # noqa: E731
    values = QUERY.swapaxes(1, 2), P("data", None, "model")
    yield "one device for all tokens", difference(whole, [values, (MASK, P("data"))], row)
    for name, (op, _) in OPS.items():
        plain = jax.jit(op_of(op))(QUERY, KEY, VALUE)
        with jax.set_mesh(mesh):
            yield f"{name}, on no mesh", apart(np.asarray(plain), np.asarray(jax.jit(op_of(op))(QUERY, KEY, VALUE)))
    with jax.set_mesh(mesh):
        none = jax.device_put(QUERY[:, :0], NamedSharding(mesh, P("data")))
        linear = evo_jax.linear_attention(none, none, none, attention_mask=MASK[:, :0], segment_ids=IDS[:, :0])
        out = jax.jit(evo_jax.flash_attention)(jax.reshard(QUERY, P("data", "model")), none, none)
    yield "no tokens", float(np.abs(np.asarray(out)).max() + abs(linear.size))


def reordered(mesh: Any) -> Iterator[tuple[str, float]]:
    """Caches of sequences that lie on several devices, in another order."""
    for name, layer, _ in layers():
        graph, state = nnx.split(layer)
        state = jax.tree.map(np.asarray, state)

        def cache(x: Any, graph: Any = graph, state: Any = state) -> Any:
            layer: Any = nnx.merge(graph, state)
            after = layer(x, cache=layer.init_cache(B, L))[1]
            return [part.take(np.array([2, 0, 3, 1])) for part in getattr(after, "groups", (after,))]

        yield f"{name} cache, taken", difference(cache, [(HIDDEN, P("data"))], mesh)


def differences(mesh: Any) -> Iterator[tuple[str, float]]:
    yield from alone(mesh)
    yield from reordered(mesh)
    for batch, tokens in ((None, ALL), ("data", SOME)):
        for name, function, arrays in operations(batch, tokens):
            wide = [(x.astype(np.float64) if x.dtype == np.float32 else x, place) for x, place in arrays]
            yield f"{name}, float64 over {tokens}", difference(partial(gradients, function), wide, mesh)
    for name, function, arrays in kernels():
        yield f"{name}, interpret", difference(partial(gradients, function), arrays, mesh)
    for name, layer, _ in layers():
        graph, state = nnx.split(layer)
        state = jax.tree.map(lambda x: np.asarray(x, np.float64), state)
        hidden = HIDDEN.astype(np.float64), P("data", SOME)
        arrays = [(state, jax.tree.map(lambda _: P(), state)), hidden, (MASK, P("data"))]
        yield f"{name} layer, float64", difference(uses(graph)["train"], arrays, mesh)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_enable_x64", True)  # float32 stays what it is, and integers do not become 64-bit
    print(json.dumps(dict(differences(jax.make_mesh((2, 2), ("data", "model"))))))
