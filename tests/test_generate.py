"""generate: its sampler against hand-written numpy, and its loop on models whose every token a hand can follow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import sampling
from evo_jax.generate import Generated, generate
from evo_jax.sampling import Sampling

VOCABULARY = 10


def successor(tokens: jax.Array, cache: jax.Array, attention_mask: jax.Array | None = None) -> Any:
    """Certain that each token is the sum of all before it and 1, modulo 10: the cache holds the sums (B,)."""
    seen = tokens if attention_mask is None else jnp.where(attention_mask, tokens, 0)
    sums = cache[:, None] + jnp.cumsum(seen, axis=1, dtype=jnp.int32)
    return 100 * jax.nn.one_hot((sums + 1) % VOCABULARY, VOCABULARY), sums[:, -1]


def by_hand(prompt: list[int], count: int) -> list[int]:
    written = list(prompt)
    for _ in range(count):
        written.append((sum(written) + 1) % VOCABULARY)
    return written[len(prompt) :]


def nothing(batch: int) -> jax.Array:
    return jnp.asarray(np.zeros(batch, np.int32))


def scores_by_hand(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """One row of probabilities, by loops over the tokens in falling order."""
    weights = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if top_k is not None:
        weights[logits < logits[order[min(top_k, len(order)) - 1]]] = 0
    chances, total = weights / weights.sum(), 0.0
    if top_p is not None:
        for token in order:
            total += chances[token]
            if total >= top_p:
                chances[logits < logits[token]] = 0
                break
    return chances / chances.sum()


ROWS = np.array([[2.0, 1.0, 1.0, 0.5, -1.0, 1.0], [0.0, 3.0, 2.9, -np.inf, 2.8, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, 2, None), (2.0, 4, 0.6), (1.0, None, 0.35), (1.0, 9, 1.0), (0.7, 1, 1e-6)],
)
def test_scores_are_those_of_a_loop(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Three tokens of the first row are equally likely, and all of the last: ties stay together."""
    with jax.enable_x64(True):
        limit = None if top_p is None else jnp.float64(top_p)
        given = sampling.scores(jnp.asarray(ROWS), jnp.float64(temperature), top_k, limit)
        chances = np.exp(np.asarray(given)) / np.exp(np.asarray(given)).sum(axis=-1, keepdims=True)
    expected = [scores_by_hand(row, temperature, top_k, top_p) for row in ROWS]
    np.testing.assert_allclose(chances, expected, atol=1e-12)
    np.testing.assert_array_equal(chances == 0, np.array(expected) == 0)


def test_a_top_p_of_1_keeps_tokens_that_rounded_sums_do_not_see() -> None:
    logits = np.array([0, -30, -31, -32], np.float32)
    kept = sampling.scores(jnp.asarray(logits), jnp.float32(1), None, jnp.float32(1))
    np.testing.assert_array_equal(kept, logits)


def test_tokens_are_drawn_as_often_as_their_scores_say_and_by_step_and_row() -> None:
    draw = jax.jit(sampling.next_tokens, static_argnums=3)
    logits = np.broadcast_to(ROWS[0].astype(np.float32), (4000, 6))
    options = Sampling(jnp.float32(0.8), jnp.float32(0.9), jax.random.key(1))
    drawn = np.asarray(draw(logits, np.int32(0), options, 4))
    expected = scores_by_hand(ROWS[0], 0.8, 4, 0.9)
    # Four standard deviations of a count's share.
    bound = 4 * np.sqrt(expected * (1 - expected) / len(drawn))
    assert (np.abs(np.bincount(drawn, minlength=6) / len(drawn) - expected) <= bound).all()
    other = np.asarray(draw(logits, np.int32(1), options, 4))
    assert 0 < (drawn == other).mean() < 1
    cold = Sampling(jnp.float32(0), None, jax.random.key(1))
    np.testing.assert_array_equal(draw(logits, np.int32(0), cold, None), 0)


def test_logits_that_are_no_distribution_give_no_token() -> None:
    inf, nan = np.inf, np.nan
    logits = np.array([[nan, 1, 2], [-inf, -inf, -inf], [-inf, 1, -inf], [1, inf, 2], [1, 1, 1]], np.float32)
    for options in (Sampling(None, None, None), Sampling(jnp.float32(1e-30), jnp.float32(0.5), jax.random.key(0))):
        chosen = np.asarray(jax.jit(sampling.next_tokens, static_argnums=3)(logits, np.int32(0), options, None))
        assert chosen[:4].tolist() == [-1, -1, 1, 1] and chosen[4] >= 0


def test_ten_thousand_tokens_take_two_traces() -> None:
    """One of the prompt and one of a token; none more in a second call, of another number of tokens."""
    traces = []

    def counted(tokens: jax.Array, cache: jax.Array) -> Any:
        traces.append(tokens.shape)
        return successor(tokens, cache)

    prompt = np.array([[1, 2, 3], [4, 5, 6]])
    written = generate(counted, nothing(2), prompt, max_new_tokens=10_000)
    assert traces == [(2, 3), (2, 1)]
    assert written.tokens.shape == (2, 10_000) and written.lengths.tolist() == [10_000, 10_000]
    assert written.tokens[:, :20].tolist() == [by_hand(row, 20) for row in prompt.tolist()]
    generate(counted, nothing(2), prompt[::-1], max_new_tokens=10_000)
    generate(counted, nothing(2), prompt, max_new_tokens=3)
    assert traces == [(2, 3), (2, 1)]


@pytest.mark.parametrize("chunk", [None, 2, 3, 6, 100])
def test_ragged_prompts_stop_tokens_and_chunks(chunk: int | None) -> None:
    """Each sequence ends where one of its own would, and leaves the sums of its own tokens but the last."""
    prompts = [[5], [1, 2, 3, 4, 9, 8], [3, 3, 3], [7, 7, 7, 7]]
    padded = np.full((4, 6), 9)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    written = generate(
        successor, nothing(4), padded, prompt_lengths=lengths, max_new_tokens=4, stop_token=4, prefill_chunk=chunk
    )
    for row, prompt in enumerate(prompts):
        alone = by_hand(prompt, 4)
        count = alone.index(4) + 1 if 4 in alone else 4
        assert written.lengths[row] == count
        assert written.tokens[row].tolist() == (alone[:count] + [4] * 4)[:4]
        assert written.cache[row] == sum(prompt + alone[: count - 1])
    assert sorted(set(written.lengths.tolist())) != [4], "some sequence stops early"


def test_the_loop_ends_with_the_last_sequence() -> None:
    """The cache counts the calls: of the prompt, and of a token each until both sequences have stopped."""

    def counting(tokens: jax.Array, cache: Any) -> Any:
        logits, sums = successor(tokens, cache[0])
        return logits, (sums, cache[1] + 1)

    first, new = (nothing(2), jnp.asarray(np.int32(0))), by_hand([1], 3)
    written = generate(counting, first, [[1], [1]], max_new_tokens=1000, stop_token=new[-1])
    assert written.lengths.tolist() == [3, 3] and int(written.cache[1]) == 3
    assert written.tokens.tolist() == [new + new[-1:] * 997] * 2


def test_a_key_gives_a_row_its_tokens_in_any_company_and_a_traced_temperature_the_same() -> None:
    def flat(tokens: jax.Array, cache: jax.Array, attention_mask: jax.Array | None = None) -> Any:
        logits, cache = successor(tokens, cache, attention_mask)
        return logits / 60, cache

    @jax.jit
    def warm(prompt: jax.Array, temperature: jax.Array) -> Generated:
        options = {"temperature": temperature, "top_p": 0.95, "top_k": 8, "key": jax.random.key(3)}
        return generate(flat, nothing(3), prompt, max_new_tokens=40, **options)

    prompt = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    company = np.array([[9, 9], [3, 4], [0, 0]], np.int32)
    one, other = (np.asarray(warm(p, np.float32(1)).tokens) for p in (prompt, company))
    np.testing.assert_array_equal(one[1], other[1])
    assert (one[0] != one[2]).any() and (one[0] != other[0]).any()
    greedy = np.asarray(warm(prompt, np.float32(0)).tokens)
    assert greedy.tolist() == [by_hand(row, 40) for row in prompt.tolist()]
    eager = generate(
        flat, nothing(3), prompt, max_new_tokens=40, temperature=1, top_p=0.95, top_k=8, key=jax.random.PRNGKey(3)
    )
    np.testing.assert_array_equal(eager.tokens, one)


def test_a_sequence_without_a_next_token_ends_and_says_so() -> None:
    """A model that knows no more once its sum passes 20; and, traced, a prompt of length 0."""

    def forgetful(tokens: jax.Array, cache: jax.Array, attention_mask: jax.Array) -> Any:
        logits, cache = successor(tokens, cache, attention_mask)
        return jnp.where((cache > 20)[:, None, None], jnp.nan, logits), cache

    @jax.jit
    def run(lengths: jax.Array) -> Generated:
        return generate(forgetful, nothing(3), [[9, 8], [1, 1], [5, 5]], prompt_lengths=lengths, max_new_tokens=4)

    written = run(np.array([2, 2, 0], np.int32))
    # 9 + 8 = 17, then 8: 25; 1 + 1 = 2, then 3, 6, 2, 4 of sums 5, 11, 13.
    assert written.tokens.tolist() == [[8, -1, -1, -1], [3, 6, 2, 4], [-1, -1, -1, -1]]
    assert written.lengths.tolist() == [1, 4, 0]


def test_parameters_may_come_as_a_tree() -> None:
    """In a Partial they are arguments: others need no other trace."""
    traces = []

    def scaled(params: jax.Array, tokens: jax.Array, cache: jax.Array) -> Any:
        traces.append(tokens.shape)
        logits, cache = successor(tokens, cache)
        return params * logits, cache

    written = [
        generate(jax.tree_util.Partial(scaled, np.float32(p)), nothing(1), [[2, 5]], max_new_tokens=3).tokens.tolist()
        for p in (1, 0)
    ]
    assert written == [[by_hand([2, 5], 3)], [[0, 0, 0]]]
    assert traces == [(1, 2), (1, 1)]


def _float_cache(tokens: jax.Array, cache: jax.Array) -> Any:
    return successor(tokens, cache)[0], cache.astype(jnp.float32)


def _last_logits(tokens: jax.Array, cache: jax.Array) -> Any:
    return successor(tokens, cache)[0][:, -1], cache


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"prompt.shape=\(1, 0\) must be", {"prompt": np.zeros((1, 0), int)}),
        (ValueError, r"prompt.shape=\(2,\) must be", {"prompt": np.zeros(2, int)}),
        (TypeError, "prompt.dtype=float32 must be", {"prompt": np.zeros((1, 2), np.float32)}),
        (ValueError, "max_new_tokens=0 must be at least 1", {"max_new_tokens": 0}),
        (ValueError, "prompt_lengths holds 3 and must hold 1 to", {"prompt_lengths": [3]}),
        (ValueError, r"prompt_lengths.shape=\(2,\) must be", {"prompt_lengths": [1, 2]}),
        (ValueError, "temperature=-1 must be", {"temperature": -1}),
        (ValueError, "temperature=0.5 needs key=", {"temperature": 0.5}),
        (TypeError, "temperature of dtype bool", {"temperature": True}),
        (TypeError, r"key.shape=\(2,\) of .* must be one key", {"temperature": 1, "key": "two keys"}),
        (ValueError, "top_k=0 must be at least 1", {"top_k": 0}),
        (ValueError, "top_p=1.5 must be", {"top_p": 1.5}),
        (ValueError, r"top_p.shape=\(1,\) must be", {"top_p": [0.5]}),
        (ValueError, "stop_token=-1 must be at least 0", {"stop_token": -1}),
        (ValueError, "stop_token=10 must be below the vocabulary", {"stop_token": 10}),
        (ValueError, "prefill_chunk=0 must be at least 1", {"prefill_chunk": 0}),
        (TypeError, "model_step is a int and must be callable", {"model_step": 3}),
        (TypeError, r"model_step gave a \w+ and must give a pair", {"model_step": lambda tokens, _: tokens}),
        (ValueError, r"gave logits.shape=\(1, 10\) and must give", {"model_step": _last_logits}),
        (ValueError, r"must keep cache as it was, int32\(1,\), not float32\(1,\)", {"model_step": _float_cache}),
        (ValueError, "must keep the cache's structure", {"model_step": lambda *a: (successor(*a)[0], None)}),
    ],
)
def test_what_is_wrong_is_named(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    given = {"model_step": successor, "cache": nothing(1), "prompt": [[1, 2]], "max_new_tokens": 2} | options
    if given.get("key") is not None:
        given["key"] = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(error, match=message) as caught:
        generate(**given)
    assert str(caught.value).startswith("generate: ")
