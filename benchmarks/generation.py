"""Generation on a CPU: what a token costs after a short prompt and after a long one, layer by layer."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import evo_jax
from benchmarks.timing import Contender, GateError, interleave, spread

WIDTH, HEADS, VOCABULARY = 512, 8, 256
SHORT, NEW = 64, 256
KINDS: dict[str, Any] = {
    "sliding_window": lambda rngs: evo_jax.SlidingWindowAttention(WIDTH, HEADS, window_size=256, rngs=rngs),
    "linear": lambda rngs: evo_jax.LinearAttention(WIDTH, HEADS, rngs=rngs),
    "evo": lambda rngs: evo_jax.EvoAttention(WIDTH, HEADS, out_proj=True, rngs=rngs),
    "flash": lambda rngs: evo_jax.FlashAttention(WIDTH, HEADS, rngs=rngs),
}


class Model(nnx.Module):
    """Embedding, one attention layer around a residual, and the embedding again: the least that generates."""

    def __init__(self, kind: str, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attention = KINDS[kind](rngs)

    def __call__(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x = self.embedding(tokens)
        out, cache = self.attention(x, cache=cache)
        return self.embedding.attend(x + out), cache


def row(kind: str, long: int, rounds: int) -> dict[str, Any]:
    """Seconds per token, of NEW tokens after SHORT and after `long`, greedily, one sequence in float32."""
    graph, state = nnx.split(Model(kind, nnx.Rngs(0)))

    def step(state: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return nnx.merge(graph, state)(tokens, cache)

    model = jax.tree_util.Partial(step, state)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (1, long + 1))
    empty = nnx.merge(graph, state).attention.init_cache(1, long + 1 + NEW)
    prefill = jax.jit(model)

    def contender(length: int) -> Contender:
        cache, last = prefill(prompt[:, :length], empty)[1], prompt[:, length : length + 1]

        def run() -> np.ndarray:
            return np.asarray(evo_jax.generate(model, cache, last, max_new_tokens=NEW).tokens)

        whole = np.concatenate([prompt[:, : length + 1], run()], axis=1)
        logits = prefill(whole[:, :-1], empty)[0][:, length:]  # the gate: all at once must agree with one by one
        if not np.array_equal(jnp.argmax(logits, axis=-1), whole[:, length + 1 :]):
            raise GateError(f"generate {kind} after {length}: tokens differ from those of the whole sequence")
        return Contender(f"after {length}", run, dict)

    samples = interleave([contender(n) for n in (SHORT, long)], rounds)
    entries = {
        name: {
            "status": "ok",
            "median_s": statistics.median(times),
            "spread": spread(times),
            "samples_s": times,
            "ns_per_token": 1e9 * statistics.median(times) / NEW,
        }
        for name, times in samples.items()
    }
    shape = {"batch": 1, "heads": HEADS, "length": long, "width": WIDTH // HEADS, "dtype": "float32"}
    row = {"case": f"generate {NEW} tokens, {kind}", "op": "generate", "passes": kind, "shape": shape}
    return row | {"flops": None, "bytes": None, "contenders": entries}
