"""The wheel: what is in it, and that it works, with one version, in an environment that has no source tree."""

import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("evo_jax", "pallas_kernels", "reference")


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by the pinned hatchling of this environment, so without a download."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """Python of a new environment with the wheel and this one's dependencies, but not its editable installs."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--ignore-installed", wheel, cwd=folder)
    return python


def test_wheel_holds_the_three_packages_whole(names):
    for package in PACKAGES:
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".json")}
        assert sources | {f"{package}/py.typed"} == {name for name in names if name.startswith(f"{package}/")}


def test_wheel_holds_nothing_else_but_its_metadata_and_licence(names):
    rest = {name for name in names if name.split("/")[0] not in PACKAGES}
    assert {re.sub(r"^evo_jax-[^/]+\.dist-info/", "", name) for name in rest} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "licenses/LICENSE",
    }


def test_metadata_asks_for_the_supported_jax_and_leaves_torch_to_an_extra(wheel, names):
    (file,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    lines = zipfile.ZipFile(wheel).read(file).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert sorted(re.split("[<>=]", r)[0] for r in required if "extra ==" not in r) == ["flax", "jax", "numpy"]
    assert "jax<0.13,>=0.10.2" in required
    assert "torch==2.13.0; extra == 'torch'" in required
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.11" in lines


def test_installed_wheel_imports_with_one_version_and_computes(wheel, clean_python):
    code = """if True:
        import importlib.metadata, json
        import jax.numpy as jnp
        import evo_jax, evo_jax.linen, pallas_kernels, reference
        print(json.dumps({
            "files": [module.__file__ for module in (evo_jax, pallas_kernels, reference)],
            "versions": [evo_jax.__version__, importlib.metadata.version("evo-jax")],
            "sums": evo_jax.prefix_sum(jnp.arange(4.0)).tolist(),
            "shape": evo_jax.evo_attention(jnp.ones((1, 2, 3, 4))).shape,
        }))"""
    # -I: neither PYTHONPATH nor the current directory can lead back to the source tree.
    found = json.loads(run(clean_python, "-I", "-W", "error", "-c", code, cwd=clean_python.parent))
    home = clean_python.parents[1]
    assert all(Path(file).is_relative_to(home) for file in found["files"]), found["files"]
    assert found["versions"] == [wheel.name.split("-")[1]] * 2
    assert found["sums"] == [0.0, 1.0, 3.0, 6.0]
    assert found["shape"] == [1, 2, 3, 4]
