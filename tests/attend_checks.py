"""What "right" means for softmax attention: output, lse and every gradient against the dense oracle, by case.

`run(inputs, spec) -> (out, lse)` is the implementation in question. 16-bit results may have twice the error of the
oracle's own formulas computed in that precision, as in FlashAttention's tests.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import AttendCase, attend_inputs
from checks import assert_close

from reference.dense import AttendInputs, AttendSpec, attend_dense
from reference.mask import Mask, allowed

Run = Callable[[AttendInputs, AttendSpec], tuple[Any, Any]]
FORWARD, GRADIENT = 1e-6, 3e-6  # relative L2 error allowed in float32, and besides twice the plain error in 16 bits
DIFFERENTIATED = ("query", "key", "value", "bias", "sinks")


def with_gradients(run: Run, inputs: AttendInputs, spec: AttendSpec, cotangents: Any) -> dict[str, Any]:
    """out, lse and the gradients of all arrays that there are, by name."""

    def call(arrays: dict[str, Any]) -> Any:
        return run(inputs._replace(**arrays), spec)

    arrays = {name: getattr(inputs, name) for name in DIFFERENTIATED if getattr(inputs, name) is not None}
    (out, lse), vjp = jax.vjp(call, arrays)
    return {"out": out, "lse": lse, **vjp(cotangents)[0]}


def compiled(run: Run, inputs: AttendInputs, spec: AttendSpec, cotangents: Any) -> dict[str, np.ndarray]:
    """`with_gradients` jitted as one, all arrays of the mask traced."""
    both = jax.jit(partial(with_gradients, run, spec=spec))
    return jax.tree.map(np.asarray, both(inputs=inputs, cotangents=cotangents))


@cache
def expected_attend(case: AttendCase) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The oracle's results in float32 and, for 16-bit cases, those of its formulas in that dtype; on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        inputs, spec, cotangents = attend_inputs(case)
        plain = {}
        if case.dtype != "float32":
            low: Any = partial(attend_dense, dtype=jnp.dtype(case.dtype))
            plain = compiled(low, inputs, spec, cotangents)
        wide = [_in_float32(x) for x in (inputs, cotangents)]
        return compiled(attend_dense, wide[0], spec, wide[1]), plain


def check_attend(run: Run, case: AttendCase) -> None:
    """Assert dtypes, shapes, exact zeros and relative L2 errors of one case, NaN in all tokens that do not exist."""
    inputs, spec, cotangents = attend_inputs(case)
    actual = compiled(run, *poisoned(inputs, spec, cotangents))
    expected, plain = expected_attend(case)
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        wanted = jnp.dtype("float32" if name in ("lse", "sinks") else case.dtype)
        assert array.dtype == wanted and array.shape == expected[name].shape, name
    assert_exact_zeros(actual, inputs)
    for name, array in actual.items():
        tolerance = FORWARD if name in ("out", "lse") else GRADIENT
        want = np.asarray(expected[name], np.float64)
        finite = np.isfinite(want)
        if plain and (size := np.linalg.norm(want[finite])):
            error = np.linalg.norm(np.asarray(plain[name], np.float64)[finite] - want[finite])
            tolerance += 2 * float(error / size)
        assert_close(name, array[finite], want[finite], tolerance)


def assert_exact_zeros(actual: dict[str, np.ndarray], inputs: AttendInputs) -> None:
    """Queries that see nothing give exactly 0, and -inf; keys that nothing sees get exactly 0."""
    seen = visible(inputs)
    (batch, heads, _, keys), kv_heads = seen.shape, inputs.key.shape[2]
    blind = np.logical_not(np.any(seen, axis=3)).transpose(0, 2, 1)
    grouped = np.any(seen, axis=2).reshape(batch, kv_heads, heads // kv_heads, keys)
    unseen = np.logical_not(np.any(grouped, axis=2)).transpose(0, 2, 1)
    for name, dead in (("out", blind), ("query", blind), ("key", unseen), ("value", unseen)):
        assert not np.asarray(actual[name], np.float32)[dead].any(), f"{name} is not 0 where nothing is seen"
    np.testing.assert_array_equal(np.asarray(actual["lse"]) == -np.inf, blind)


def visible(inputs: AttendInputs) -> np.ndarray:
    """(B, N, T, S): which key each query sees, a bias of -inf considered."""
    (batch, queries, heads, _), (keys, kv_heads) = inputs.query.shape, inputs.key.shape[1:3]
    shape = (batch, heads, queries, keys)
    seen = np.broadcast_to(np.asarray(allowed(inputs.mask, shape, kv_heads)), shape)
    return seen if inputs.bias is None else seen & (np.asarray(inputs.bias, np.float32) != -np.inf)


def existing(mask: Mask, length: int, of_keys: bool) -> np.ndarray | None:
    """(B, length) bool: which tokens exist; None where all do."""
    lengths, segments = (mask.kv_lengths, mask.kv_segments) if of_keys else (mask.q_lengths, mask.q_segments)
    if lengths is None and segments is None:
        return None
    here = np.ones((1, length), bool) if lengths is None else np.arange(length) < np.asarray(lengths)[:, None]
    return here if segments is None else here & (np.asarray(segments) >= 0)


def poisoned(inputs: AttendInputs, spec: AttendSpec, cotangents: Any) -> tuple[AttendInputs, AttendSpec, Any]:
    """The same with NaN or infinity in every token that does not exist."""
    queries, keys = (existing(inputs.mask, x.shape[1], of_keys) for x, of_keys in
                     ((inputs.query, False), (inputs.key, True)))  # fmt: skip
    query, d_out, d_lse = (_poison(x, queries, bad) for x, bad in
                           ((inputs.query, np.nan), (cotangents[0], -np.inf), (cotangents[1], np.nan)))  # fmt: skip
    key, value = _poison(inputs.key, keys, np.inf), _poison(inputs.value, keys, np.nan)
    return inputs._replace(query=query, key=key, value=value), spec, (d_out, d_lse)


def _poison(x: Any, here: np.ndarray | None, bad: float) -> Any:
    if here is None:
        return x
    array = np.array(x)
    array[~np.broadcast_to(here, array.shape[:2])] = bad
    return jnp.asarray(array)


def _in_float32(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
