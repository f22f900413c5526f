"""The matrix of programs that are compiled without a GPU, and a small part of it that covers every pair of choices."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from benchmarks.programs import DTYPES, Program
from benchmarks.targets import TARGETS

Cell = tuple[Program, str]  # and the target that it is compiled for
WIDTHS = (64, 80, 96, 128, 256)

_LONG: dict[str, Any] = {
    "batch": 2,
    "heads": 8,
    "length": 65536,
}  # (batch, heads, length, width): 8 or 16 rows, few for a GPU
_CACHE: dict[str, Any] = {"phase": "decode", "batch": 8, "length": 32768, "kv_heads": 8}
_STEP: dict[str, Any] = {"phase": "decode", "batch": 8}
_OPS = (
    *(Program("prefix_sum", **_LONG), Program("evo", **_LONG), Program("evo", **_LONG, causal=False)),
    *(Program("flash"), Program("flash", kv_heads=8), Program("flash", causal=False, kv_heads=8)),
    *(Program("sliding_window"), Program("sparse"), Program("multiscale")),
    *(Program("linear"), Program("linear", causal=False)),
)
KINDS = (
    *(replace(op, phase=phase) for op in _OPS for phase in ("forward", "backward")),
    *(Program(op, **_CACHE) for op in ("flash", "sliding_window", "sparse", "multiscale")),
    *(Program("linear", **_STEP), Program("evo", **_STEP)),
)
AIMED = tuple(  # whose temporary memory the project set itself a limit (benchmarks/budgets.py), at the default shape
    Program(op, phase)
    for op in ("flash", "sliding_window", "sparse", "multiscale", "linear")
    for phase in ("forward", "backward")
)
_EVERYTHING = ("segments", "key_bias", "sinks", "lengths", "soft_cap", "dropout")
SPECIALS = (  # what is compiled at one point alone, for one GPU of each generation
    Program("prefix_sum", "backward", "float16", 1, 65536, 1, width=64, extras=("last_axis",)),
    Program("evo", "backward", "bfloat16", 1, 65536, 1, width=64),
    Program("evo", "backward", "bfloat16", **_LONG, width=64, extras=("query", "mask")),
    Program("evo", "backward", "bfloat16", **_LONG, width=32, extras=("mask",)),
    Program("evo", "backward", "float32", **_LONG, width=80, extras=("query", "mask")),
    Program("evo", "backward", "bfloat16", **_LONG, width=128, extras=("state",)),
    Program("linear", "backward", "bfloat16", heads=4, kv_heads=2, width=80, extras=("mask", "state")),
    Program("linear", "backward", "float32", width=64, causal=False, extras=("mask",)),
    Program("linear", "backward", "float16", width=128, causal=False, extras=("softmax",)),
    *(Program("flash", "backward", dtype, kv_heads=8, width=112) for dtype in ("bfloat16", "float16")),  # odd widths
    *(Program("flash", "backward", dtype, kv_heads=8, width=40) for dtype in ("bfloat16", "float32")),
    *(Program("sparse", "backward", dtype, kv_heads=8, width=200) for dtype in ("bfloat16", "float16")),
    *(Program(op, "backward", "bfloat16", kv_heads=8, width=72) for op in ("sliding_window", "multiscale")),
    Program("sparse", "backward", "float32", kv_heads=8, width=80, causal=False),
    Program("sliding_window", "backward", "float16", kv_heads=8, width=96, extras=_EVERYTHING),
    Program("sliding_window", "backward", "bfloat16", width=64, causal=False, extras=("key_bias",)),
    Program("multiscale", "backward", "float32", kv_heads=8, width=64, extras=("segments", "sinks")),
    Program("flash", "backward", "float32", width=256, extras=("mask",)),
    Program("flash", "backward", "bfloat16", width=128, extras=("bias",)),
    Program("flash", "forward", "bfloat16", width=128, extras=("soft_cap",)),
    Program("flash", "decode", "bfloat16", 8, 32768, kv_heads=4, width=256, extras=("soft_cap",), tokens=8),
    Program("flash", "decode", "float32", 8, 32768, kv_heads=32, width=128, extras=("sinks",)),
    Program("flash", "decode", "bfloat16", 1, 131072, kv_heads=8, width=128),
)


def whole() -> list[Cell]:
    """Every kind at every dtype and width for every target, and the special programs."""
    grid = [replace(kind, dtype=dtype, width=width) for kind in KINDS for dtype in DTYPES for width in WIDTHS]
    cells = [(program, target) for program in grid for target in TARGETS]
    return [*cells, *((program, target) for program in SPECIALS for target in ("h100", "a100"))]


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """Some of `cells`, in which every pair of kind, dtype, width and target occurs that occurs in `cells`; and AIMED.

    Chosen greedily, the same for the same cells: of those that bring the most new pairs the first whose dtype and
    target were chosen least.
    """
    pairs = {cell: _pairs(cell) for cell in cells}
    missing, chosen = set().union(*pairs.values()) if pairs else set(), set()
    used: Counter[tuple[str, str]] = Counter()
    while missing:
        best = max(pairs, key=lambda cell: (len(pairs[cell] & missing), -used[cell[0].dtype, cell[1]]))
        chosen.add(best)
        used[best[0].dtype, best[1]] += 1
        missing -= pairs.pop(best)
    chosen.update((program, "h100") for program in AIMED)
    return [cell for cell in cells if cell in chosen]


def _pairs(cell: Cell) -> frozenset[object]:
    program, target = cell
    kind = replace(program, dtype="bfloat16", width=64).label
    return frozenset(combinations((("kind", kind), program.dtype, program.width, target), 2))
