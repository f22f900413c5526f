"""The references as users run them on a CPU, through XLA's optimiser, which the other tests leave out."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from checks import TOLERANCE, assert_close, evo_params

import evo_jax
from evo_jax import LinearState
from reference.evo import EvoSpec, evo_dense
from reference.linear import LinearSpec, linear_dense
from reference.prefix_scan import prefix_sum_dense

OPTIMISED: Any = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
KEYS = jax.random.split(jax.random.key(0), 6)


def gradients(fn, arrays, cotangent, options=None):
    """fn(*arrays) and its gradients, jitted as one."""

    def both(arrays, cotangent):
        out, vjp = jax.vjp(fn, *arrays)
        return out, *vjp(cotangent)

    return jax.jit(both, compiler_options=options)(arrays, cotangent)


@pytest.mark.parametrize("shape", [(1, 8, 300, 64), (2, 8, 600, 48)], ids=["one chunk", "a loop"])
def test_evo_attention(shape):
    v, cotangent = (jax.random.normal(key, shape) for key in KEYS[:2])
    params = evo_params(shape[3], "float32")
    ours = gradients(lambda v, p: evo_jax.evo_attention(v, p), (v, params), cotangent, OPTIMISED)
    wanted = gradients(lambda v, p: evo_dense(v, None, p, None, EvoSpec()), (v, params), cotangent)
    limits = TOLERANCE["float32"]
    assert_close("out", ours[0], wanted[0], limits[0])
    for actual, expected in zip(jax.tree.leaves(ours[1:]), jax.tree.leaves(wanted[1:]), strict=True):
        assert_close("gradient", actual, expected, limits[1])


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention(causal):
    q, cotangent = (jax.random.normal(key, (2, 300, 4, 32)) for key in KEYS[:2])
    k, v = (jax.random.normal(key, (2, 300, 2, 32)) for key in KEYS[2:4])
    kv, z = jax.random.normal(KEYS[4], (2, 2, 32, 32)), jnp.abs(jax.random.normal(KEYS[5], (2, 2, 32)))

    def ours(q, k, v, kv, z):
        return evo_jax.linear_attention(q, k, v, is_causal=causal, initial_state=LinearState(kv, z))

    def oracle(q, k, v, kv, z):
        return linear_dense(q, k, v, LinearState(kv, z), None, LinearSpec(causal=causal))[0]

    arrays = (q, k, v, kv, z)
    for actual, expected in zip(
        gradients(ours, arrays, cotangent, OPTIMISED), gradients(oracle, arrays, cotangent), strict=True
    ):
        assert_close("array", actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prefix_sum(dtype):
    x, cotangent = (jax.random.normal(key, (2, 500, 33)).astype(dtype) for key in KEYS[:2])
    ours = gradients(evo_jax.prefix_sum, (x,), cotangent, OPTIMISED)
    wanted = gradients(prefix_sum_dense, (x,), cotangent)
    for actual, expected in zip(ours, wanted, strict=True):
        assert_close("array", actual, expected, {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype])
