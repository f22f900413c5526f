"""Tuning on a real GPU, `pytest -m gpu`: candidates compile, agree, are timed, stored, and launched afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evo_jax
from evo_jax import autotune_first
from evo_jax.autotune import autotune, difference
from pallas_kernels import tuned, tuned_store

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EVO_CACHE_DIR", str(tmp_path))
    tuned_store.forget()
    autotune_first._SEEN.clear()
    jax.clear_caches()
    yield
    tuned_store.forget()
    jax.clear_caches()


def gradient(q, k, v):
    out, pull = jax.vjp(lambda *args: evo_jax.flash_attention(*args, implementation="triton"), q, k, v)
    return out, pull(out)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # no candidate is wrong
def test_what_is_found_is_launched_and_right():
    qkv = jax.random.normal(jax.random.key(0), (3, 1, 2048, 8, 64), jnp.bfloat16)
    expected = jax.device_get(jax.jit(gradient)(*qkv))
    report = autotune(gradient, *qkv)
    assert {row.key.kernel for row in report.rows} == {"attend_forward", "attend_d_query", "attend_d_key_value"}
    assert all(row.tried and row.seconds > 0 and row.gain >= 1 for row in report.rows)
    tuned_store.forget()
    jax.clear_caches()
    with tuned.recording() as launches:
        jax.eval_shape(gradient, *qkv)
    found = {key: tuned.fields_of(key, chosen.launch) for key, chosen in launches.items()}
    assert found == {row.key: row.best for row in report.rows}
    assert all(chosen.source == "cache" for chosen in launches.values())
    assert difference(jax.jit(gradient)(*qkv), expected) is None


def test_the_variable_tunes_inside_a_trace(monkeypatch):
    monkeypatch.setenv("EVO_AUTOTUNE", "1")
    x = jax.random.normal(jax.random.key(0), (4, 4096, 64))
    out = jax.jit(lambda x: evo_jax.prefix_sum(2 * x, axis=1))(x)
    assert len(list(tuned_store.folder().rglob("*.json"))) == 1
    np.testing.assert_allclose(out, jnp.cumsum(2 * x, axis=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_candidate_of_evo_agrees(dtype):
    v = jax.random.normal(jax.random.key(0), (1, 8, 4096, 64)).astype(dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), evo_jax.init_evo_params(jax.random.key(1), 64))

    def both(v, params):
        out, pull = jax.vjp(lambda v, p: evo_jax.evo_attention(v, p, implementation="triton"), v, params)
        return out, pull(out)

    report = autotune(both, v, params)
    assert report.rows and not any("off by" in why for row in report.rows for _, why in row.rejected)
