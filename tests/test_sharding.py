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
    wrong = {name: d for name, d in differences.items() if not d <= (1e-11 if "float64" in name else 1e-4)}
    assert len(differences) == 46 and not wrong, wrong
    assert found["exchanged"] == []
    said = {
        "width": "cannot be divided among devices; jax.reshard it",
        "heads": "cannot be divided among devices; jax.reshard it",
        "twice": "over one mesh axis twice",
        "unlike": "along axes that go together",
        "uneven": "cannot be divided among the mesh axes",
        "not causal": "only with causal=True",
    }
    assert refusals.keys() == said.keys() and all(text in refusals[name] for name, text in said.items()), refusals


def test_sequences_whose_tokens_are_divided():
    """Operations and gradients, over one mesh axis and over two, kernels in the interpreter, and layers."""
    differences = said_by("sharded_tokens.py")
    wrong = {name: d for name, d in differences.items() if not d <= (1e-11 if "float64" in name else 1e-4)}
    assert len(differences) == 76 and not wrong, wrong


def said_by(program: str) -> Any:
    env = quick_environment() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, HERE / program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
