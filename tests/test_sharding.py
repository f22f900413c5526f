"""Several devices: each computes its sequences and heads as one device does the whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import quick_environment

HERE = Path(__file__).parent


def test_shards_of_sequences_and_heads_are_those_of_the_whole():
    differences = said_by("sharded_ops.py")
    assert len(differences) == 14 and all(d <= 1e-5 for d in differences.values()), differences


def test_arrays_whose_types_say_that_they_are_sharded():
    """Operations, their gradients, layers with and without divided heads, caches, streams and generation."""
    found = said_by("sharded_types.py")
    differences, refusals = found["differences"], found["refusals"]
    wrong = {name: d for name, d in differences.items() if not d <= 1e-4}
    assert len(differences) == 46 and not wrong, wrong
    assert found["exchanged"] == []
    assert refusals.keys() == {"tokens", "heads", "unlike", "uneven", "scan"}
    for name in ("tokens", "heads", "scan"):
        assert "cannot be divided among devices; jax.reshard it" in refusals[name], refusals
    assert "go together" in refusals["unlike"] and "cannot be divided among the mesh axes" in refusals["uneven"]


def said_by(program: str) -> Any:
    env = quick_environment() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, HERE / program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
