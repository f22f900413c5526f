"""What "right" means for the linear attention kernels: output, state and every gradient against the dense oracle."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import LinearCase, LinearInputs, linear_inputs
from checks import assert_close

from pallas_kernels import launch
from pallas_kernels.linear import linear
from reference.linear import LinearSpec, linear_dense

# Relative L2 error allowed: (output, returned state, gradients). A 16-bit output is rounded once; the gradients of
# query and key are differences that cancel, of products of rounded operands.
TOLERANCE = {"float32": (1e-6, 1e-6, 3e-6), "float16": (5e-4, 1e-6, 1e-3), "bfloat16": (5e-3, 5e-3, 1.5e-2)}


def spec_of(case: LinearCase) -> LinearSpec:
    return LinearSpec(case.feature_map, case.causal)


def expected_linear(case: LinearCase) -> Any:
    """The oracle's (out, state) and gradients of query, key, value and state, in float32, on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = jax.tree.map(
            lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, linear_inputs(case)
        )
        return _run(linear_dense, inputs, (), spec_of(case))


def actual_linear(case: LinearCase, mode: str, **options: Any) -> Any:
    """The kernels' own, with NaN wherever a token is masked."""
    inputs = linear_inputs(case)
    if case.mask is not None:
        assert inputs.rows is not None
        masked = (inputs.rows < 0)[:, :, None, None]
        poison = lambda x: jnp.where(masked, jnp.asarray(jnp.nan, x.dtype), x)  # noqa: E731
        query, key, value, d_out = map(poison, (inputs.query, inputs.key, inputs.value, inputs.d_out))
        inputs = inputs._replace(query=query, key=key, value=value, d_out=d_out)
    return _run(linear, inputs, tuple(sorted((options | {"mode": mode}).items())), spec_of(case))


def _run(op: Any, inputs: LinearInputs, options: Any, spec: LinearSpec) -> Any:
    args = (inputs.query, inputs.key, inputs.value, inputs.state, (inputs.d_out, inputs.d_state), inputs.rows)
    return _both(*args, (op, launch.FILLED, launch.SEGMENT_CHUNKS), options, spec)


@partial(jax.jit, static_argnums=(6, 7, 8))  # here, so that cases of one shape compile once
def _both(
    query: Any, key: Any, value: Any, state: Any, cotangents: Any, rows: Any, rules: Any, options: Any, spec: LinearSpec
) -> Any:
    """`rules` are the operation and the numbers that decide its launches, which tests change."""
    run = partial(rules[0], rows=rows, spec=spec, **dict(options))
    out, vjp = jax.vjp(lambda *arrays: run(*arrays[:3], state=arrays[3]), query, key, value, state)
    return out, vjp(cotangents)


def check_linear(case: LinearCase, mode: str, tolerances: Any = TOLERANCE, **options: Any) -> None:
    """Assert dtypes, exact zeros and relative L2 errors of one case."""
    (out, state), grads = actual_linear(case, mode, **options)
    (expected_out, expected_state), expected = expected_linear(case)
    for_out, for_state, for_gradient = tolerances[case.dtype]
    inputs = linear_inputs(case)
    assert out.dtype == jnp.dtype(case.dtype) and state.kv.dtype == jnp.float32
    assert [grad.dtype for grad in grads[:3]] == [jnp.dtype(case.dtype)] * 3
    if case.mask is not None:
        masked = np.asarray(inputs.rows) < 0
        for name, array in (("out", out), *zip(("query", "key", "value"), grads, strict=False)):
            assert not np.asarray(array, np.float32)[masked].any(), f"{name} is not 0 where masked"
    assert_close("out", out, expected_out, for_out)
    assert_close("state.kv", state.kv, expected_state.kv, for_state)
    assert_close("state.z", state.z, expected_state.z, for_state)
    # One feature cancels between numerator and denominator: what its query's gradient is left with is rounding.
    floor = float(jnp.linalg.norm(inputs.d_out.astype(jnp.float32))) if case.width == 1 else 0.0
    assert_close("d_query", grads[0], expected[0], for_gradient, floor)
    for name, grad, want in zip(("d_key", "d_value"), grads[1:3], expected[1:3], strict=True):
        assert_close(name, grad, want, for_gradient)
    assert (grads[3] is None) == (inputs.state is None)
    if inputs.state is not None:
        assert_close("d_state.kv", grads[3].kv, expected[3].kv, for_gradient)
        assert_close("d_state.z", grads[3].z, expected[3].z, for_gradient)
