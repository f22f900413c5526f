"""Linear attention's dense oracle and chunked form against the original's recorded layer (shared/golden)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import errors, load, names

from reference.linear import LinearSpec, LinearState, linear_chunked, linear_dense

FORMS = {"dense": linear_dense, "chunked": linear_chunked}


def attend(form: str, record: dict, q, k, v, state) -> tuple[jax.Array, LinearState]:
    """All tokens at once, or a prefill and then one by one."""
    spec, length = LinearSpec(record["constructor"]["feature_map"]), q.shape[1]
    prefill = record["call"].get("decode_prefill", length)
    out, state = FORMS[form](q[:, :prefill], k[:, :prefill], v[:, :prefill], state, None, spec)
    if prefill == length:
        return out, state

    def decode(state, token):
        q, k, v = (a[:, None] for a in token)
        out, state = FORMS[form](q, k, v, state, None, spec)
        return state, out[:, 0]

    state, rest = jax.lax.scan(decode, state, [jnp.moveaxis(a[:, prefill:], 1, 0) for a in (q, k, v)])
    return jnp.concatenate([out, jnp.moveaxis(rest, 0, 1)], 1), state


def actual(form: str, name: str, dtype: str) -> dict[str, np.ndarray]:
    """Output, new state and gradients under the record's own names; the layer's projections in numpy."""
    record, z = load(name)
    x, ct, w = z["x"].astype(dtype), z["ct"].astype(dtype), {p: z[f"w.{p}_proj.weight"].astype(dtype) for p in "qkvo"}
    heads = (*x.shape[:2], record["constructor"]["num_heads"], -1)
    state = None
    if "state_kv" in z:
        state = LinearState(*(jnp.asarray(a, dtype) for a in (z["state_kv"], z["state_k"][:, :, 0])))

    @jax.jit
    def run(arrays, cotangent):
        out, vjp, state = jax.vjp(partial(attend, form, record), *arrays, has_aux=True)
        return out, state, vjp(cotangent)

    q, k, v = ((x @ w[p].T).reshape(heads) for p in "qkv")
    out, new, (*grads, d_state) = run((q, k, v, state), (ct @ w["o"]).reshape(heads))
    assert out.dtype == dtype and new.kv.dtype == dtype
    out, *grads = (np.asarray(a).reshape(x.shape) for a in (out, *grads))
    found = {"out": out @ w["o"].T, "grad.x": sum(d @ w[p] for d, p in zip(grads, "qkv", strict=True))}
    for p, d, a in (*zip("qkv", grads, (x, x, x), strict=True), ("o", ct, out)):
        found[f"grad.w.{p}_proj.weight"] = np.einsum("bti,btj->ij", d, a)
    if "new_state_kv" in z:
        found |= {"new_state_kv": new.kv, "new_state_k": new.z[:, :, None]}
    if state is not None:
        found |= {"grad.state_kv": d_state.kv, "grad.state_k": d_state.z[:, :, None]}
    return found


NAMES = names(8, "linear")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_in_float64(name, form, x64):
    found = errors(name, actual(form, name, "float64"))
    assert max(found.values()) <= 1e-10, found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_in_float32_to_twice_the_error_of_the_original(name, form):
    """A new state's own error is not recorded: it is a sum over tokens, as the gradients of the weights are."""
    original = load(name)[0]["torch_float32_rel_err"]
    for key, error in errors(name, actual(form, name, "float32")).items():
        assert error <= 2 * original["out" if key == "out" else "grad"], (key, error, original)
