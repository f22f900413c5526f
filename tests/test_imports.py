"""The shape of the source tree: which file may import what, how long it may be, and whose packages it finds."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("reference", "pallas_kernels", "evo_jax")  # each may import those before it
FLAX_FILES = (
    "evo_jax/modules.py",
    "evo_jax/softmax_modules.py",
    "evo_jax/projections.py",
    "evo_jax/stream.py",
    "evo_jax/factory.py",
    "evo_jax/linen.py",
    "evo_jax/demo/",
    "evo_jax/interop/",
)
PALLAS_FILE = "pallas_kernels/_pallas.py"
TORCH_FOLDER = "evo_jax/interop/"
MAX_LINES = 450

SOURCES = [path.relative_to(ROOT).as_posix() for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
ALL_FILES = SOURCES + [
    path.relative_to(ROOT).as_posix()
    for name in ("tests", "benchmarks", "requirements")
    for path in sorted((ROOT / name).rglob("*.py"))
]


def imported(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Every name that `tree` imports, `import a.b` and `from a import b` both as "a.b", relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(file: str) -> set[str]:
    return set(imported(parse(file), ".".join(Path(file).parent.parts)))


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def runs_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes evaluated when the module is imported: everything but the bodies of functions and lambdas."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):  # decorators and defaults are evaluated
            children = [child for child in children if child not in node.body]
        elif isinstance(node, ast.Lambda):
            children = [node.args]
        todo += children


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in ("environ", "environb", "getenv")
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in a.name for a in node.names)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os.path, sys", {"os.path", "sys"}),
        ("def f():\n    from jax.experimental import pallas as pl", {"jax.experimental.pallas"}),
        ("from . import b", {"p.q.b"}),
        ("from .b import c", {"p.q.b.c"}),
        ("from ..b import c", {"p.b.c"}),
    ],
)
def test_imported_finds_every_form(source, expected):
    assert set(imported(ast.parse(source), "p.q")) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nX = os.environ['A']", True),
        ("import os\nclass C:\n    x = os.getenv('A')", True),
        ("import os\ndef f(x=os.environ): return x", True),
        ("from os import environ", True),
        ("import os\ndef f(): return os.environ['A']", False),
        ("import os\nf = lambda: os.environ['A']", False),
    ],
)
def test_reads_environment_knows_import_time_from_call_time(source, expected):
    assert any(map(reads_environment, runs_at_import(ast.parse(source)))) is expected


def test_all_three_packages_are_searched():
    assert {file.split("/")[0] for file in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize("file", SOURCES)
def test_imports_run_one_way(file):
    package = file.split("/")[0]
    forbidden = [*PACKAGES[PACKAGES.index(package) + 1 :], "tests", "benchmarks", "cases", "conftest"]
    if not file.startswith(FLAX_FILES):
        forbidden += ["flax"]
    if file != PALLAS_FILE:
        forbidden += ["jax.experimental.pallas", "jax._src.pallas"]
    if not file.startswith(TORCH_FOLDER):
        forbidden += ["torch"]
    if package != "evo_jax":
        forbidden += ["optax", "orbax", "rich", "matplotlib"]
    wrong = {name for name in imports_of(file) for module in forbidden if within(name, module)}
    assert not wrong, f"{file} must not import {sorted(wrong)}"


@pytest.mark.parametrize("file", [file for file in SOURCES if file.startswith("reference/")])
def test_reference_imports_jax_and_the_standard_library_alone(file):
    allowed = (*sys.stdlib_module_names, "jax", "numpy", "reference")
    wrong = {name for name in imports_of(file) if name.split(".")[0] not in allowed}
    assert not wrong, f"{file} must not import {sorted(wrong)}"


@pytest.mark.parametrize("file", SOURCES)
def test_no_environment_read_at_import(file):
    lines = [getattr(node, "lineno", 0) for node in runs_at_import(parse(file)) if reads_environment(node)]
    assert not lines, f"{file} reads the environment when imported, in lines {lines}"


@pytest.mark.parametrize("file", ALL_FILES)
def test_file_is_short_and_says_what_it_holds(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert not text or ast.get_docstring(ast.parse(text)), f"{file} has no docstring that says what it holds"


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter that looks in `path` first, then in this source tree."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=path[0] if path else ROOT, env=environment, capture_output=True, text=True)


def test_import_is_silent_and_leaves_the_heavy_modules_alone():
    code = (
        "import sys, evo_jax; print([m for m in ('torch', 'optax', 'rich', 'matplotlib.pyplot') if m in sys.modules])"
    )
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")
    # Flax imports some of these by itself; what matters is that evo_jax adds none.
    flax_alone = python(code.replace("evo_jax", "flax.nnx"))
    assert result.stdout == flax_alone.stdout
    assert "torch" not in result.stdout


@pytest.mark.parametrize("name", ["reference", "pallas_kernels"])
@pytest.mark.parametrize("as_package", [True, False], ids=["package", "module"])
def test_a_strange_sibling_is_an_error_that_names_its_file(tmp_path, name, as_package):
    stranger = tmp_path / (f"{name}/__init__.py" if as_package else f"{name}.py")
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("")
    result = python("import evo_jax", tmp_path)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert str(stranger) in last_line


def test_a_strange_sibling_imported_before_is_an_error_that_names_its_file(tmp_path):
    (tmp_path / "reference.py").write_text("")
    result = python("import reference, sys; del sys.path[:2]; import evo_jax", tmp_path)
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert str(tmp_path / "reference.py") in last_line
