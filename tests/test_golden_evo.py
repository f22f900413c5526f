"""The dense oracle and the chunked form against the original's recorded outputs and gradients (shared/golden)."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import signed_rows
from conftest import GOLDEN_DIR

from reference.evo import EvoParams, EvoSpec, evo_chunked, evo_dense

FORMS = {"dense": evo_dense, "chunked": evo_chunked}
QUIRKS_DIR = GOLDEN_DIR.with_name("golden_quirks")


@cache
def evo_records(folder: Path) -> dict[str, dict]:
    index = folder / "index.json"
    cases = json.loads(index.read_text())["cases"] if index.is_file() else []
    return {case["id"]: case for case in cases if case["op"].startswith("evo.")}


def named(folder: Path, count: int) -> list[str]:
    """Ids of the folder's cases, or one placeholder a case where the folder is absent, so that each is seen to skip."""
    return list(evo_records(folder)) or [f"absent_{i}" for i in range(count)]


def load(folder: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    if not folder.is_dir():
        pytest.skip(f"the original's recorded cases are not beside this checkout (shared/{folder.name})")
    record = evo_records(folder)[name]
    with np.load(folder / record["file"]) as arrays:
        return record, dict(arrays)


def split_heads(a: np.ndarray, shape: dict) -> np.ndarray:
    """(B, L, E) of the module as (B, H, L, D); the cores' arrays are that already."""
    if a.ndim == 4:
        return a
    return a.reshape(shape["B"], shape["L"], shape["H"], shape["D"]).transpose(0, 2, 1, 3)


def state_dict(z: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in z.items() if name.startswith(prefix)}


def token_mask(record: dict, z: dict[str, np.ndarray]) -> np.ndarray | None:
    return z["mask"].reshape(record["shape"]["B"], record["shape"]["L"]) if "mask" in z else None


def inputs(record: dict, z: dict[str, np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray | None, EvoParams]:
    """(v, query or None, params) as recorded, all of one dtype."""
    v = split_heads(z["v" if "v" in z else "x"], record["shape"]).astype(dtype)
    params = EvoParams.from_state_dict({name: a.astype(dtype) for name, a in state_dict(z, "w.").items()})
    return v, z["q"].astype(dtype) if "q" in z else None, EvoParams(*map(np.asarray, params))


def runner(form: str, record: dict, z: dict[str, np.ndarray], semantics: str):
    """`(v, query, params) -> {"out": ..., "v": ..., "query": ..., "q_kernel": ...}` of one form of ours, jitted."""
    causal, mask = record["call"]["causal"], token_mask(record, z)
    rows = None if mask is None else signed_rows(mask > 0, causal, semantics)
    # The original's torch.cumsum carries float32 in float64 on a CPU: to compare like with like, so do we here.
    spec = EvoSpec(causal, semantics == "padding", "float64")

    def call(v, query, params):
        factor = 1 if mask is None or spec.absent else mask.astype(v.dtype)[:, None, :, None]
        return FORMS[form](v * factor, query, params, rows, spec)

    @jax.jit
    def run(v, query, params):
        out, vjp = jax.vjp(call, v, query, params)
        dv, dq, dparams = vjp(jnp.asarray(split_heads(z["ct"], record["shape"]), v.dtype))
        return {"out": out, "v": dv, "query": dq, **dparams._asdict()}

    return run


def expected(record: dict, z: dict[str, np.ndarray], absent: bool) -> dict[str, np.ndarray]:
    """What the original gave, under our names and in our layout."""
    params = EvoParams.from_state_dict(state_dict(z, "grad.w."))
    mask = token_mask(record, z)
    if absent and mask is not None:
        # The original's masked rows are norm.bias and send their cotangents there; absent tokens have no such rows.
        masked = split_heads(z["ct"], record["shape"]).astype("float64") * (mask[:, None, :, None] == 0)
        params = params._replace(norm_bias=params.norm_bias - masked.sum((0, 1, 2)))
    dv = split_heads(z["grad.v" if "grad.v" in z else "grad.x"], record["shape"])
    query = {"query": z["grad.q"]} if "q" in z else {}
    return {"out": split_heads(z["out"], record["shape"]), "v": dv, **query, **params._asdict()}


def errors(actual: dict, wanted: dict) -> dict[str, float]:
    """Largest error over largest value per array, as index.json has it; for gradients at least 1e-3 of the largest."""
    floor = 1e-3 * max(np.abs(a).max() for name, a in wanted.items() if name != "out")
    found = {}
    for name, b in wanted.items():
        a, b = np.asarray(actual[name], np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        found[name] = float(np.abs(a - b).max() / max(np.abs(b).max(), 0 if name == "out" else floor))
    return found


def rounding_errors(record: dict, z: dict[str, np.ndarray], draws: int = 8) -> dict[str, float]:
    """The errors that the rounding of float32 inputs alone would make: exact float64 at inputs half an ulp away."""
    run, rng = runner("dense", record, z, "padding"), np.random.default_rng(0)

    def half_ulp_away(a):
        return a * (1 + rng.choice([-1.0, 1.0], a.shape) * 2.0**-24)

    exact = inputs(record, z, "float64")
    wanted = {name: np.asarray(a) for name, a in run(*exact).items() if a is not None}
    found = [errors(run(*jax.tree.map(half_ulp_away, exact)), wanted) for _ in range(draws)]
    return {name: max(one[name] for one in found) for name in wanted}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", named(GOLDEN_DIR, 16))
def test_golden_in_float64(name, form, x64):
    record, z = load(GOLDEN_DIR, name)
    for semantics in ("padding", "multiply") if "mask" in z else ("padding",):
        actual = runner(form, record, z, semantics)(*inputs(record, z, "float64"))
        found = errors(actual, expected(record, z, semantics == "padding"))
        assert max(found.values()) <= 1e-10, (semantics, found)


def typical_errors(form: str, record: dict, z: dict[str, np.ndarray], draws: int = 9) -> dict[str, float]:
    """Median float32 errors of a form over inputs an ulp apart, each judged by float64 at the very same inputs."""
    run, exact, rng = (
        runner(form, record, z, "padding"),
        runner("dense", record, z, "padding"),
        np.random.default_rng(1),
    )

    def next_to(a):
        return np.nextafter(a, np.where(rng.random(a.shape) < 0.5, -np.inf, np.inf).astype(a.dtype))

    given = jax.tree.map(np.asarray, inputs(record, z, "float32"))
    found = []
    for _ in range(draws):
        moved = jax.tree.map(next_to, given)
        wanted = exact(*jax.tree.map(lambda a: a.astype("float64"), moved))
        wanted = {name: np.asarray(a) for name, a in wanted.items() if a is not None}
        found.append(errors(run(*moved), wanted))
    return {name: float(np.median([one[name] for one in found])) for name in found[0]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", named(GOLDEN_DIR, 16))
def test_golden_in_float32_to_twice_the_error_of_the_original(name, form, x64):
    """Where one denominator near 0 decides a case, the error there of one run, the original's or ours, is one draw:
    then ours is the median over nine, and the bar twice what rounding the inputs alone would do."""
    record, z = load(GOLDEN_DIR, name)
    original = record["torch_float32_rel_err"]
    actual = runner(form, record, z, "padding")(*inputs(record, z, "float32"))
    assert actual["out"].dtype == jnp.float32
    found = errors(actual, expected(record, z, absent=True))
    over = {name: e for name, e in found.items() if e > 2 * original["out" if name == "out" else "grad"]}
    unavoidable = rounding_errors(record, z) if over else {}
    typical = typical_errors(form, record, z) if over else {}
    for array, error in over.items():
        bar = 2 * max(unavoidable[array], original["out" if array == "out" else "grad"])
        assert typical[array] <= bar, f"{array}: {error:.2e}, {typical[array]=:.2e}, {original=}, {bar=:.2e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", named(QUIRKS_DIR, 5))
def test_quirks_of_the_original_under_multiply(name, form, x64):
    record, z = load(QUIRKS_DIR, name)
    found = errors(
        runner(form, record, z, "multiply")(*inputs(record, z, "float64")), expected(record, z, absent=False)
    )
    assert max(found.values()) <= 1e-10, found
