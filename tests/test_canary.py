"""The canary: fails by name on the day that JAX removes Pallas-Triton, or changes what `_pallas.py` takes from it.

Nothing of this project is imported here, so that no other failure hides this one. It reads the source of the one file
that imports Pallas for the names it uses.
"""

import ast
import importlib
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

SEAM = Path(__file__).resolve().parents[1] / "pallas_kernels" / "_pallas.py"
MODULES = {"pl": "jax.experimental.pallas", "pltriton": "jax.experimental.pallas.triton"}
ADVICE = f"jax {jax.__version__}: see docs/backends.md for what to do. "
TRITON_CALL = "__gpu$xla.gpu.triton"


def pallas(module: str) -> Any:
    """The module, or a failure that says what its absence means."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"PALLAS-TRITON WAS REMOVED: {module} cannot be imported ({error}). {ADVICE}", pytrace=False)


def names_used() -> dict[str, set[str]]:
    """{module: names} that the seam file reads off each module of Pallas."""
    tree = ast.parse(SEAM.read_text(encoding="utf-8"))
    used: dict[str, set[str]] = {module: set() for module in MODULES.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            used[MODULES[node.value.id]].add(node.attr)
    return used


def keywords_used(function: str) -> set[str]:
    """The keywords with which the seam file calls `<module>.function`."""
    tree = ast.parse(SEAM.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == function]
    return {keyword.arg for call in named for keyword in call.keywords if keyword.arg}


def gone() -> list[str]:
    """Every name that the seam file uses and this JAX lacks."""
    used = names_used().items()
    return [f"{module}.{name}" for module, names in used for name in sorted(names) if not hasattr(pallas(module), name)]


def test_the_seam_is_read():
    """Otherwise the canary would sing about nothing."""
    used = names_used()
    assert used[MODULES["pl"]] >= {"pallas_call", "BlockSpec", "program_id"}
    assert used[MODULES["pltriton"]] >= {"CompilerParams", "load", "store"}
    assert keywords_used("CompilerParams") == {"num_warps", "num_stages"}


def test_pallas_triton_has_every_name_that_the_kernels_use():
    missing = gone()
    assert not missing, f"PALLAS-TRITON CHANGED: {', '.join(missing)} no longer exists. {ADVICE}"


@pytest.mark.parametrize(
    "module, function",
    [
        ("pl", "pallas_call"),
        *(("pltriton", name) for name in ("CompilerParams", "load", "store", "elementwise_inline_asm")),
    ],
)
def test_pallas_triton_takes_every_keyword_that_the_kernels_pass(module, function):
    known = set(inspect.signature(getattr(pallas(MODULES[module]), function)).parameters)
    missing = sorted(keywords_used(function) - known)
    assert not missing, f"PALLAS-TRITON CHANGED: {function} no longer takes {', '.join(missing)}. {ADVICE}"


def test_a_kernel_that_asks_for_triton_is_lowered_to_triton():
    pl, triton = pallas(MODULES["pl"]), pallas(MODULES["pltriton"])

    def double(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = 2 * x_ref[...]

    x = jax.ShapeDtypeStruct((32,), "float32")
    call = pl.pallas_call(double, out_shape=x, compiler_params=triton.CompilerParams(num_warps=1, num_stages=1))
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("device",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        try:
            text = jax.jit(call).trace(x).lower(lowering_platforms=("cuda",)).as_text()
        except Exception as error:
            pytest.fail(f"PALLAS-TRITON NO LONGER LOWERS: {type(error).__name__}: {error}. {ADVICE}", pytrace=False)
    assert TRITON_CALL in text, f"PALLAS-TRITON IS BYPASSED: the kernel was lowered to something else. {ADVICE}"


def test_the_failure_on_removal_is_clear(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES["pltriton"], None)  # importing it raises ImportError
    with pytest.raises(pytest.fail.Exception, match=r"PALLAS-TRITON WAS REMOVED.*docs/backends\.md"):
        gone()


def test_a_name_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(pallas(MODULES["pltriton"]), "store")
    assert gone() == ["jax.experimental.pallas.triton.store"]


def test_the_advice_exists():
    assert "test_canary.py" in (SEAM.parents[1] / "docs" / "backends.md").read_text(encoding="utf-8")
