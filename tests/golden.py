"""The originals' recorded layers (shared/golden): their index, their arrays, and how far a result is from them."""

import json
from functools import cache

import numpy as np
import pytest
from conftest import GOLDEN_DIR


@cache
def records(*ops: str) -> dict[str, dict]:
    """Those of `ops`, by name; none where the folder is not beside this checkout."""
    index = GOLDEN_DIR / "index.json"
    cases = json.loads(index.read_text())["cases"] if index.is_file() else []
    return {case["id"]: case for case in cases if not ops or case["op"] in ops}


def names(count: int, *ops: str) -> list[str]:
    """Names of the cases of `ops`, or `count` absent ones, so that each is seen to skip."""
    return list(records(*ops)) or [f"absent_{i}" for i in range(count)]


@cache
def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(record, arrays) of one case."""
    if not GOLDEN_DIR.is_dir():
        pytest.skip("the original's recorded cases are not beside this checkout (shared/golden)")
    record = records()[name]
    with np.load(GOLDEN_DIR / record["file"]) as arrays:
        return record, dict(arrays)


def errors(name: str, found: dict) -> dict[str, float]:
    """Largest error over largest value per array, as index.json has it; for gradients at least 1e-3 of the largest."""
    wanted = load(name)[1]
    assert {key for key in wanted if key.startswith(("out", "new", "grad"))} == set(found)
    floor = 1e-3 * max(np.abs(a).max() for key, a in wanted.items() if key.startswith("grad"))
    result = {}
    for key, a in found.items():
        a, b = np.asarray(a, np.float64), wanted[key]
        assert a.shape == b.shape
        result[key] = float(np.abs(a - b).max() / max(np.abs(b).max(), floor if key.startswith("grad") else 0))
    return result
