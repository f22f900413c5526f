"""What "right" means for an Evo implementation: forward and every gradient against the dense oracle, by case."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import EvoCase, evo_inputs, padding_mask

import evo_jax
from pallas_kernels import evo_bwd
from reference.evo import EvoParams, EvoSpec, evo_dense

# Relative L2 error allowed: (output, gradients of v and query, gradients of params). The operation is ill-conditioned
# where its denominator nears 0, which rules out elementwise bounds.
TOLERANCE = {"float32": (1e-5, 1e-3, 1e-3), "float16": (2e-3, 1e-2, 1e-2), "bfloat16": (5e-3, 3e-2, 5e-2)}
STEADY = 1e-2  # of bfloat16 where the operation is well-conditioned, and there in every row: some roundings


def evo_params(width: int, dtype: Any, seed: int = 1) -> EvoParams:
    """Random parameters, the LayerNorm's too."""
    first, second = jax.random.split(jax.random.key(seed))
    params = evo_jax.init_evo_params(first, width, jnp.dtype(dtype))
    scale, bias = (0.3 * jax.random.normal(key, (width,)) for key in jax.random.split(second))
    return params._replace(norm_scale=(1.0 + scale).astype(dtype), norm_bias=bias.astype(dtype))


def signed_rows(mask: np.ndarray | None, causal: bool, semantics: str) -> jax.Array | None:
    """The `rows` of reference.evo from a (B, L) mask, by counting; negative where masked."""
    if mask is None:
        return None
    positions = np.broadcast_to(np.arange(1, mask.shape[1] + 1) if causal else mask.shape[1], mask.shape)
    valid = np.cumsum(mask, 1) if causal else np.broadcast_to(mask.sum(1, keepdims=True), mask.shape)
    count = np.maximum(valid if semantics == "padding" else positions, 1)
    return jnp.asarray(np.where(mask, count, -count), jnp.float32)[:, None]


def expected_evo(case: EvoCase) -> tuple[jax.Array, tuple[Any, Any, EvoParams]]:
    """The oracle's output and gradients in float32, on the CPU, with unpoisoned inputs."""
    with jax.default_device(jax.devices("cpu")[0]):
        v, query, mask, cotangent = _in_float32(evo_inputs(case))
        params = _in_float32(evo_params(case.width, case.dtype))
        spec = EvoSpec(case.causal, case.semantics == "padding")
        rows = signed_rows(mask, case.causal, case.semantics)
        factor = 1.0 if mask is None or spec.absent else mask[:, None, :, None].astype(np.float32)

        factor = jnp.asarray(factor, jnp.float32)
        return _oracle(v, query, params, cotangent, rows, factor, spec)


@partial(jax.jit, static_argnums=6)  # here, so that cases of one shape compile once
def _oracle(v: Any, query: Any, params: EvoParams, cotangent: Any, rows: Any, factor: Any, spec: EvoSpec) -> Any:
    out, vjp = jax.vjp(lambda v, q, p: evo_dense(v * factor, q, p, rows, spec), v, query, params)
    return out, vjp(cotangent)


def actual_evo(case: EvoCase, implementation: str, **options: Any) -> tuple[jax.Array, tuple[Any, Any, EvoParams]]:
    """The public function's output and gradients, jitted as one; NaN stands wherever it must not matter."""
    v, query, mask, cotangent = evo_inputs(case)
    if mask is not None and case.semantics == "padding":
        poison = jnp.where(jnp.asarray(mask)[:, None, :, None], 0.0, jnp.nan).astype(v.dtype)
        v, query = v + poison, None if query is None else query + poison
    options |= {"causal": case.causal, "mask_semantics": case.semantics, "implementation": implementation}
    arrays = (v, query, evo_params(case.width, case.dtype), mask, cotangent)
    return _actual(*arrays, tuple(sorted(options.items())), evo_bwd.SEGMENT_TOKENS)


@partial(jax.jit, static_argnums=(5, 6))
def _actual(v: Any, query: Any, params: EvoParams, mask: Any, cotangent: Any, options: Any, _: Any) -> Any:
    """The last argument decides launches, and a test changes it."""
    call = partial(evo_jax.evo_attention, **dict(options))
    out, vjp = jax.vjp(lambda v, q, p: call(v, p, query=q, attention_mask=mask), v, query, params)
    return out, vjp(cotangent)


def check_evo(case: EvoCase, implementation: str, tolerances: Any = TOLERANCE, **options: Any) -> None:
    """Assert shapes, dtypes, exact zeros and relative L2 errors of one case."""
    out, grads = actual_evo(case, implementation, **options)
    expected_out, expected_grads = expected_evo(case)
    assert out.dtype == jnp.dtype(case.dtype) and out.shape == expected_out.shape
    mask = padding_mask(case.mask, case.batch, case.length)
    if mask is not None and case.semantics == "padding":
        absent = ~np.broadcast_to(mask[:, None], out.shape[:3])
        for name, array in (("out", out), ("v", grads[0]), ("query", grads[1])):
            assert array is None or not np.asarray(array, np.float32)[absent].any(), f"{name} is not 0 where masked"
    tolerance = tolerances[case.dtype]
    tolerance = (tolerance[0], STEADY, STEADY) if case.steady else tolerance
    # LayerNorm over one column is constant: what comes through it is exactly 0, so errors are judged by its input.
    floor = float(jnp.linalg.norm(evo_inputs(case)[3].astype(jnp.float32))) if case.width == 1 else 0.0
    assert_close("out", out, expected_out, tolerance[0])
    assert_close("v", grads[0], expected_grads[0], tolerance[1], floor)
    if case.own_query:
        assert_close("query", grads[1], expected_grads[1], tolerance[1], floor)
    if case.steady:
        pairs = (("out", out, expected_out), *zip(("v", "query"), grads[:2], expected_grads[:2], strict=True))
        for name, actual, expected in pairs[: 2 + case.own_query]:
            assert_rows_close(name, actual, expected, STEADY)
    for name, grad, expected in zip(EvoParams._fields, grads[2], expected_grads[2], strict=True):
        assert grad.dtype == jnp.dtype(case.dtype)
        assert_close(name, grad, expected, tolerance[2], floor)


def assert_close(name: str, actual: Any, expected: Any, tolerance: float, floor: float = 0.0) -> None:
    """|actual - expected| <= tolerance * max(|expected|, floor), in the 2-norm over the whole array; NaN fails."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    error, size = np.linalg.norm(actual - expected), max(np.linalg.norm(expected), floor)
    assert error <= tolerance * size, f"{name}: relative L2 error {error / max(size, 1e-300):.2e} > {tolerance:.0e}"


def assert_rows_close(name: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Each row, along the last axis, as in assert_close; a small one counts as large as an average row."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error, size = (np.linalg.norm(x, axis=-1) for x in (actual - expected, expected))
    worst = np.max(error / np.maximum(size, np.sqrt(np.mean(size**2))))
    assert worst <= tolerance, f"{name}: relative L2 error {worst:.2e} > {tolerance:.0e} in a row"


def _in_float32(tree: Any) -> Any:
    """Floating arrays of a pytree in float32, exactly; masks as they are."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
