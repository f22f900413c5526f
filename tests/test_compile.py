"""Every kernel configuration, lowered and audited for CUDA on this machine, and compiled for H100 and A100."""

import json
from functools import partial

import jax
import pytest

import evo_jax
from benchmarks.compile_configs import CONFIGS
from benchmarks.compile_report import dot_precisions, main, missing_wheels, ttir, unsafe
from evo_jax import EvoParams

ALL_WIDTHS = (1, 7, 12, 16, 24, 32, 48, 64, 80, 96, 100, 128, 192, 256)
LENGTH = 1000  # not a multiple of any chunk


@pytest.mark.skipif(missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}")
def test_every_configuration_compiles_within_its_budgets(tmp_path, capsys):
    """No spills, shared memory and temporary memory within limits, no atomics: the last is what makes reruns equal."""
    results = tmp_path / "compile.json"
    status = main(["--target", "h100", "--target", "a100", "--json", str(results)])
    assert status == 0, capsys.readouterr().out
    rows = json.loads(results.read_text())["results"]
    assert {row["target"] for row in rows} == {"h100", "a100"}
    assert len(rows) == 2 * sum(len(list(config.cases())) for config in CONFIGS)
    kernels = [kernel for row in rows for kernel in row["report"]["kernels"]]
    assert [k["name"] for k in kernels if k["instructions"]["atom/red"]] == []
    for row in rows:
        if row["case"].startswith("evo"):
            products = {k["name"].split("__")[0]: k["instructions"] for k in row["report"]["kernels"]}
            for name, counts in products.items():
                if name in ("evo_output", "evo_gate", "evo_bwd_gate", "evo_bwd_ratio", "evo_bwd_weight"):
                    assert counts["wgmma"] + counts["mma.sync"] > 0, f"{row['case']}: {name} has no tensor-core dot"


def _gradient(width, dtype, **options):
    """(fn, args): output and every gradient."""
    v = jax.ShapeDtypeStruct((1, 2, LENGTH, width), dtype)
    matrix, vector = jax.ShapeDtypeStruct((width, width), dtype), jax.ShapeDtypeStruct((width,), dtype)
    params = EvoParams(*(matrix if name.endswith("kernel") else vector for name in EvoParams._fields))
    valid = jax.ShapeDtypeStruct((1, LENGTH), "bool")

    def both(v, query, params, valid, cotangent):
        call = partial(evo_jax.evo_attention, attention_mask=valid, implementation="triton", **options)
        out, vjp = jax.vjp(lambda v, query, params: call(v, params, query=query), v, query, params)
        return out, vjp(cotangent)

    return both, (v, v, params, valid, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", ALL_WIDTHS)
def test_no_evo_access_can_leave_its_array(width, causal):
    """Lowered only; the audit follows every offset, and flags atomics too."""
    fn, args = _gradient(width, "float32", causal=causal)
    modules = ttir(fn, args)
    assert {name for name, _ in modules} >= {"evo_bwd_ratio", "evo_bwd_weight", "evo_sums"}
    assert {name: found for name, text in modules if (found := unsafe(text))} == {}


@pytest.mark.parametrize("shape, axis", [((3, LENGTH, 5), 1), ((7, LENGTH), 1), ((LENGTH,), 0), ((2, 70, 130), 1)])
@pytest.mark.parametrize("reverse, exclusive", [(False, False), (False, True), (True, False), (True, True)])
def test_no_prefix_access_can_leave_its_array(shape, axis, reverse, exclusive):
    run = partial(evo_jax.prefix_sum, axis=axis, reverse=reverse, exclusive=exclusive, implementation="triton")
    modules = ttir(run, (jax.ShapeDtypeStruct(shape, "bfloat16"),))
    assert modules and {name: found for name, text in modules if (found := unsafe(text))} == {}


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_offsets_past_two_billion_elements_are_64_bit(dtype):
    run = partial(evo_jax.prefix_sum, axis=1, implementation="triton")
    modules = ttir(run, (jax.ShapeDtypeStruct((1, 2**25 + 5, 65), dtype),))
    assert modules and {name: found for name, text in modules if (found := unsafe(text))} == {}


@pytest.mark.parametrize("dtype, precision", [("bfloat16", "bf16"), ("float16", "= tf32"), ("float32", "tf32x3")])
def test_dot_products_take_the_precision_of_their_inputs(dtype, precision):
    fn, args = _gradient(64, dtype)
    dots = [dot for _, text in ttir(fn, args) for dot in dot_precisions(text)]
    assert dots and all(precision in dot for dot in dots)
