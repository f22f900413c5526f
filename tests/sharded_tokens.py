"""A program of tests/test_sharding.py: on four CPU devices, sequences whose tokens are divided. As sharded_types.py."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
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
    difference,
    evo_from_state,
    from_state,
    gradients,
    layers,
    uses,
    with_options,
)  # fmt: skip

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
    yield "linear attention, not causal", partial(linear, is_causal=False, return_state=True), qkv
    v, params = (QUERY.swapaxes(1, 2), P(batch, None, tokens)), [(x, P()) for x in PARAMS]
    yield "EvoAttention from a state", evo_from_state, [v, *((x, each) for x in SUMS), (HOLES, of_tokens), *params]
    multiplied = partial(evo_from_state, mask_semantics="multiply")
    yield "EvoAttention, multiplied", multiplied, [v, *((x, each) for x in SUMS), (HOLES, each), *params]
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


def differences(mesh: Any) -> Iterator[tuple[str, float]]:
    for batch, tokens in ((None, ALL), ("data", SOME)):
        for name, function, arrays in operations(batch, tokens):
            yield f"{name}, over {tokens}", difference(partial(gradients, function), arrays, mesh)
    for name, function, arrays in kernels():
        yield f"{name}, interpret", difference(partial(gradients, function), arrays, mesh)
    for name, layer, _ in layers():
        graph, state = nnx.split(layer)
        state = jax.tree.map(np.asarray, state)
        arrays = [(state, jax.tree.map(lambda _: P(), state)), (HIDDEN, P("data", SOME)), (MASK, P("data"))]
        yield f"{name} layer", difference(uses(graph)["train"], arrays, mesh)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    print(json.dumps(dict(differences(jax.make_mesh((2, 2), ("data", "model"))))))
