"""Operations inside jax.shard_map: each shard computes its sequences and heads as the whole does."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import quick_environment

PROGRAM = Path(__file__).with_name("sharded_ops.py")


def test_shards_of_sequences_and_heads_are_those_of_the_whole():
    env = quick_environment() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout)
    assert len(differences) == 14 and all(d <= 1e-5 for d in differences.values()), differences
