"""README.md: its example runs and prints what it says, and its table names what exists."""

import re
from pathlib import Path

import jax
import pytest

import evo_jax
import evo_jax.linen

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
NAMES = sorted(set(re.findall(r"`(?:with )?evo_jax\.([\w.]+)", README)))


@pytest.mark.parametrize("block", CODE, ids=range(len(CODE)))
def test_example_runs_and_prints_what_its_comments_say(block, capsys):
    if "import torch" in block:
        pytest.importorskip("torch", reason="an example is for torch, which the newest lane leaves out")
    with jax.numpy_rank_promotion("allow"):  # users' own lines
        exec(block, {})
    # A comment after print(...) starts with the text that is printed.
    promised = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    printed = capsys.readouterr().out.splitlines()
    assert promised
    for line, promise in zip(printed, promised, strict=True):
        assert promise.startswith(line)


@pytest.mark.parametrize("name", NAMES)
def test_name_exists(name):
    found = evo_jax
    for part in name.split("."):
        found = getattr(found, part)


def test_every_public_name_is_in_the_readme():
    public = {name for name, value in vars(evo_jax).items() if callable(value) and not name.startswith("_")}
    named = {name.split(".")[0] for name in NAMES}
    assert public <= named, public - named
