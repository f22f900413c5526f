"""A program of tests/test_sharding.py: on four CPU devices, arrays whose types say that they are sharded.

Differences between what comes of such arrays and of the same numbers on one device, as JSON.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_ops import BATCH, HEADS, OPS, B, D, K, L, N

import evo_jax
from evo_jax import CUDA

EMBED = N * D
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(B, L, heads, D)).astype(np.float32) for heads in (N, K, K))
HIDDEN = RNG.normal(size=(B, L, EMBED)).astype(np.float32)
MASK = np.arange(L) < np.array([[24], [17], [9], [1]])
QKV = [(x, HEADS) for x in (QUERY, KEY, VALUE)]
BIAS, SINKS = RNG.normal(size=(1, N, L, L)).astype(np.float32), RNG.normal(size=N).astype(np.float32)
STATE = [np.abs(RNG.normal(size=shape)).astype(np.float32) for shape in ((B, K, D, D), (B, K, D))]
SUMS = [RNG.normal(size=(B, N, D)).astype(np.float32) for _ in range(2)]
PARAMS = [
    RNG.normal(size=(D,) * (1 + name.endswith("kernel"))).astype(np.float32) for name in evo_jax.EvoParams._fields
]
LENGTHS, IDS = MASK.sum(1).astype(np.int32), np.cumsum(RNG.random((B, L)) < 0.2, axis=1, dtype=np.int32)
PROMPT, PROMPT_LENGTHS = RNG.integers(0, 37, size=(B, 9)).astype(np.int32), np.array([9, 4, 1, 7], np.int32)


def gradients(function: Callable[..., Any], *arrays: Any) -> Any:
    """(results, gradients of all floating-point arrays)."""
    floats = [np.issubdtype(x.dtype, np.floating) for x in arrays]

    def loss(*given: Any) -> Any:
        left = iter(given)
        out = function(*(next(left) if f else x for f, x in zip(floats, arrays, strict=True)))
        return sum((x**2).sum() for x in jax.tree.leaves(out)), out

    given = [x for f, x in zip(floats, arrays, strict=True) if f]
    if not given:
        return function(*arrays)
    grads, out = jax.grad(loss, argnums=tuple(range(len(given))), has_aux=True)(*given)
    return out, grads


def operations(kind: str) -> Iterator[tuple[str, Callable[..., Any], list[tuple[Any, P]]]]:
    """(name, function, its arrays with their places); P() where all devices hold an array."""
    for name, (op, spec) in OPS.items():
        heads = HEADS if spec == HEADS else BATCH
        yield name, partial(op, implementation=kind), [(x, heads) for x in (QUERY, KEY, VALUE)]
    biased = partial(with_options, implementation=kind)
    places = P(None, "model"), P("model"), P("data"), P("data")
    yield "bias, sinks, masks, dropout", biased, [*QKV, *zip((BIAS, SINKS, MASK, IDS), places, strict=True)]


def with_options(q: Any, k: Any, v: Any, bias: Any, sinks: Any, mask: Any, ids: Any, **options: Any) -> Any:
    options |= {"dropout_rate": 0.3, "dropout_seed": 5, "return_residuals": True}
    out, lse = evo_jax.flash_attention(q, k, v, bias=bias, sinks=sinks, attention_mask=mask, segment_ids=ids, **options)
    return out, jnp.where(mask[..., None], lse, 0)


def from_state(q: Any, k: Any, v: Any, kv: Any, z: Any, ids: Any, mask: Any, **options: Any) -> Any:
    options |= {"segment_ids": ids, "attention_mask": mask, "initial_state": evo_jax.LinearState(kv, z)}
    return evo_jax.linear_attention(q, k, v, return_state=True, **options)


def evo_from_state(v: Any, total: Any, gated: Any, mask: Any, *params: Any, **options: Any) -> Any:
    before = evo_jax.EvoState(total, gated, jnp.full(B, 3, jnp.int32))
    options |= {"attention_mask": mask, "initial_state": before, "return_state": True}
    out, after = evo_jax.evo_attention(v, evo_jax.EvoParams(*params), **options)
    return out, after.sum, after.gated_sum


def further() -> Iterator[tuple[str, Callable[..., Any], list[tuple[Any, P]]]]:
    """The same of the references."""
    flash = evo_jax.flash_attention
    # What all devices hold is divided as the rest is; a single key/value head is not.
    yield "held by all", with_options, [*QKV, *((x, P()) for x in (BIAS, SINKS, MASK, IDS))]
    yield "one key head", flash, [QKV[0], *((x[:, :, :1], BATCH) for x in (KEY, VALUE))]
    narrow = lambda q, k, v, n, m: flash(q, k, v, query_seq_lengths=n, key_value_seq_lengths=n, mask=m)  # noqa: E731
    keep = RNG.random((B, N, L, L)) < 0.8, P("data", "model")
    yield "lengths and pairs", narrow, [*QKV, (LENGTHS, P("data")), keep]
    yield "decoding", flash, [(QUERY[:, :1], HEADS), *QKV[1:]]
    each = [(x, P("data")) for x in (*STATE, IDS, MASK)]
    yield "linear attention from a state", from_state, [*QKV, *each]
    both = P("data", "model")
    arrays = [*((x, both) for x in (QUERY.swapaxes(1, 2), *SUMS)), (MASK, P("data")), *((x, P()) for x in PARAMS)]
    yield "EvoAttention from a state", evo_from_state, arrays
    ints = (QUERY[..., 0] * 9).astype(np.int32)
    yield "prefix sum of integers", partial(evo_jax.prefix_sum, axis=1), [(ints, HEADS)]


def layers() -> Iterator[tuple[str, nnx.Module, bool]]:
    """(name, layer, whether its heads may be divided)."""
    rngs = nnx.Rngs(0)
    yield "flash", CUDA.flash(EMBED, N, num_kv_heads=K, rngs=rngs), True
    yield "sliding window", CUDA.sliding_window(EMBED, N, num_kv_heads=K, window_size=5, rngs=rngs), True
    yield "sparse", CUDA.sparse(EMBED, N, block_size=8, num_random_blocks=1, rngs=rngs), False
    yield "multi-scale", CUDA.multiscale(EMBED, N, window_sizes=(3, 6), rngs=rngs), False
    yield "linear", CUDA.linear(EMBED, N, num_kv_heads=K, rngs=rngs), True
    yield "EvoAttention", evo_jax.EvoAttention(EMBED, N, rngs=rngs), False


def uses(graph: Any) -> dict[str, Callable[..., Any]]:
    """What is done with a layer, of its state, hidden states and a mask."""

    def whole(state: Any, x: Any, mask: Any) -> Any:
        given = nnx.merge(graph, state)(x, attention_mask=mask)
        return given[0] if isinstance(given, tuple) else given

    def train(state: Any, x: Any, mask: Any) -> Any:
        return jax.grad(lambda state, x: (whole(state, x, mask) ** 2).sum(), argnums=(0, 1))(state, x)

    def decode(state: Any, x: Any, mask: Any) -> Any:
        layer: Any = nnx.merge(graph, state)
        cache = layer.init_cache(B, L)
        first, cache = layer(x[:, :9], cache=cache, attention_mask=mask[:, :9])
        second, cache = layer(x[:, 9:12], cache=cache)
        third, cache = layer(x[:, 12:13], cache=cache)
        return first, second, third, cache

    def stream(state: Any, x: Any, mask: Any) -> Any:
        layer: Any = nnx.merge(graph, state)
        return layer.stream(x, chunk_size=7, attention_mask=mask)

    return {"train": train, "decode": decode, "stream": stream}


class Model(nnx.Module):
    """Embedding, two layers, logits."""

    def __init__(self, vocabulary: int) -> None:
        rngs = nnx.Rngs(1)
        self.embed, self.out = nnx.Embed(vocabulary, EMBED, rngs=rngs), nnx.Linear(EMBED, vocabulary, rngs=rngs)
        self.ring, self.all = CUDA.sliding_window(EMBED, N, window_size=4, rngs=rngs), CUDA.flash(EMBED, N, rngs=rngs)

    def __call__(self, tokens: Any, cache: Any, attention_mask: Any = None) -> Any:
        x = jax.nn.one_hot(tokens, self.embed.num_embeddings) @ self.embed.embedding[...]
        y, ring = self.ring(x, cache=cache[0], attention_mask=attention_mask)
        z, rest = self.all(x + y, cache=cache[1], attention_mask=attention_mask)
        return self.out(x + y + z), (ring, rest)


def generation(graph: Any, warm: bool, chunk: int | None) -> Callable[..., Any]:
    def run(state: Any, prompt: Any, lengths: Any) -> Any:
        model = nnx.merge(graph, state)
        cache = model.ring.init_cache(B), model.all.init_cache(B, 2 * L)
        draw: dict[str, Any] = {"temperature": 0.8, "key": jax.random.key(2), "top_p": 0.9} if warm else {}
        given = evo_jax.generate(
            model, cache, prompt, prompt_lengths=lengths, max_new_tokens=5, prefill_chunk=chunk, **draw
        )
        return given.tokens, given.lengths

    return run


def difference(function: Callable[..., Any], arrays: list[tuple[Any, Any]], mesh: Any) -> float:
    """The largest, relative to an array's numbers. `arrays`: pairs of an array, or a tree, and its place."""
    plain = jax.jit(function)(*(x for x, _ in arrays))
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        placed = [put(x, s) if isinstance(s, P) else jax.tree.map(put, x, s) for x, s in arrays]
        sharded = jax.jit(function)(*placed)
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(sharded), strict=True)
    return float(np.max([apart(np.asarray(a, np.float64), np.asarray(b)) for a, b in pairs]))  # NaN stays NaN


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b), initial=0) / max(1.0, np.max(np.abs(a), initial=0)))


def tensor_parallel(state: Any) -> Any:
    """The places of projections whose heads are divided."""

    def place(path: Any, x: Any) -> P:
        return P("model") if "o_proj" in jax.tree_util.keystr(path) else P(None, "model")

    return jax.tree_util.tree_map_with_path(place, state)


def differences(mesh: Any) -> Iterator[tuple[str, float]]:
    for kind in ("reference", "interpret"):
        for name, function, arrays in operations(kind):
            yield f"{name}, {kind}", difference(partial(gradients, function), arrays, mesh)
    for name, function, arrays in further():
        yield name, difference(partial(gradients, function), arrays, mesh)
    for name, layer, divisible in layers():
        graph, state = nnx.split(layer)
        state = jax.tree.map(np.asarray, state)
        for use, function in uses(graph).items():
            if use == "stream" and name not in ("sliding window", "linear", "EvoAttention"):
                continue  # the same loop again
            places = {"": jax.tree.map(lambda _: P(), state)}
            if divisible and use != "stream":
                places[", heads divided"] = tensor_parallel(state)
            for how, place in places.items():
                # Gradients in float64: those of EvoAttention, which divides by sums, lose many digits.
                dtype = np.float64 if use == "train" else np.float32
                wide = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), state)
                arrays = [(wide, place), (HIDDEN.astype(dtype), P("data")), (MASK, P("data"))]
                yield f"{name} layer, {use}{how}, {dtype.__name__}", difference(function, arrays, mesh)
    graph, state = nnx.split(Model(37))
    model = jax.tree.map(np.asarray, state), jax.tree.map(lambda _: P(), state)
    for warm, chunk in ((False, None), (True, 4)):
        arrays = [model, (PROMPT, P("data")), (PROMPT_LENGTHS, P("data"))]
        yield f"generate, {warm=}, {chunk=}", difference(generation(graph, warm, chunk), arrays, mesh)


def refusals(mesh: Any) -> Iterator[tuple[str, str]]:
    """(name, what the error says) of arrays that cannot be divided."""
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    cases: dict[str, tuple[Callable[..., Any], list[Any]]] = {
        "width": (evo_jax.flash_attention, [put(x, None, None, None, "data") for x in (QUERY, KEY, VALUE)]),
        "twice": (evo_jax.flash_attention, [put(QUERY, None, "data"), put(KEY, "data"), put(VALUE, "data")]),
        "heads": (OPS["sparse_attention"][0], [put(x, "data", None, "model") for x in (QUERY, KEY, VALUE)]),
        "unlike": (evo_jax.flash_attention, [put(QUERY, "data"), put(KEY, "model"), put(VALUE, "model")]),
        "uneven": (evo_jax.flash_attention, [put(QUERY, None, None, ("data", "model")), KEY, VALUE]),
        "not causal": (partial(evo_jax.evo_attention, causal=False), [put(QUERY, None, None, "model")]),
    }
    for name, (function, arrays) in cases.items():
        try:
            with jax.set_mesh(mesh):
                jax.jit(function)(*arrays)
        except ValueError as error:
            yield name, str(error)


def collectives(mesh: Any) -> list[str]:
    """What devices exchange in the forward and backward pass of flash attention: nothing."""
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, HEADS)) for x in (QUERY, KEY, VALUE)]
        text = jax.jit(partial(gradients, evo_jax.flash_attention)).lower(*arrays).compile().as_text() or ""
    words = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    return [word for word in words if f" {word}(" in text or f" {word}-start(" in text]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    found = {"differences": dict(differences(mesh)), "refusals": dict(refusals(mesh)), "exchanged": collectives(mesh)}
    print(json.dumps(found))
