"""Writes the pins of one lane: `python requirements/pin.py base|newest`, run by that lane's Python (`make pins`)."""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Lane(NamedTuple):
    """One combination of Python and JAX that the tests run on."""

    python: tuple[int, int]
    jax: str
    torch: bool


LANES = {
    "base": Lane(python=(3, 11), jax="0.10.2", torch=True),
    # torch stays out: its tests ran in the base lane, and this Python's build of it brings gigabytes of CUDA libraries.
    "newest": Lane(python=(3, 12), jax="0.12.0.1", torch=False),
}

# The one nvidia-cuda-runtime that both nvcc and the CUDA build of torch 2.13.0 accept.
EXTRA_CONSTRAINTS = ["nvidia-cuda-runtime==13.0.96"]

# Not for `make test`: a contributor's tool, and triton, which the CUDA build of torch pins to a version of its own.
UNPINNED = {"evo-jax", "pre-commit", "triton"}


def requirements_of(extras: list[str]) -> list[str]:
    """The project's own dependencies and those of `extras`, with references to other extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted, todo, seen = list(project["dependencies"]), list(extras), set()
    while todo:
        extra = todo.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            inner = re.fullmatch(r"evo-jax\[(.*)\]", requirement)
            if inner:
                todo += inner[1].split(",")
            elif re.split(r"[\[<>=;~! ]", requirement)[0] not in UNPINNED:
                wanted.append(requirement)
    return wanted


def resolve(requirements: list[str], constraints: list[str]) -> dict[str, str]:
    """Name -> version of everything that pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report, limits = Path(folder, "report.json"), Path(folder, "constraints.txt")
        limits.write_text("\n".join(constraints))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--only-binary", ":all:", "--report", str(report), "--constraint", str(limits), *requirements]
        subprocess.run(command, check=True)
        installed = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    # A local label, as in 2.13.0+cpu, says which build this machine found; the pin is for every machine.
    return {item["name"].lower().replace("_", "-"): item["version"].partition("+")[0] for item in installed}


def is_linux_only(name: str) -> bool:
    return name.startswith(("nvidia-", "jax-cuda"))


def write(name: str, about: str, pins: dict[str, str]) -> None:
    lines = [f"# {about} Made by `make pins`."]
    for name, version in sorted(pins.items()):
        lines.append(f"{name}=={version}" + ("; sys_platform == 'linux'" if is_linux_only(name) else ""))
    (ROOT / f"requirements/{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"requirements/{name}.txt: {len(pins)} packages")


def main(name: str) -> None:
    lane = LANES[name]
    if sys.version_info[:2] != lane.python:
        raise SystemExit(f"lane {name} is pinned by Python {lane.python}, this is {sys.version_info[:2]}")
    jax = [f"jax=={lane.jax}", f"jaxlib=={lane.jax}"]
    wanted = [r for r in requirements_of(["dev", "aot"]) if lane.torch or not r.startswith("torch")]
    everything = resolve(wanted, [*jax, *EXTRA_CONSTRAINTS])
    frozen = [f"{package}=={version}" for package, version in everything.items()]
    demo = resolve([*requirements_of(["demo"]), "hatchling"], frozen)
    write(f"{name}-demo", f"JAX {lane.jax}: what `make demo` installs.", demo)
    write(name, f"JAX {lane.jax}: what `make test`, `make lint` and `make types` install.", everything)


if __name__ == "__main__":
    main(sys.argv[1])
