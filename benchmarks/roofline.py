"""What a chip allows a program at best: bytes and operations that it must move and do, and the time they take."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from benchmarks.compile_for import Report
from benchmarks.programs import DTYPES, Program
from benchmarks.ptx import KernelReport
from benchmarks.targets import TARGETS, Target
from reference.mask import Pattern, random_table

_WARPS = 64  # that a multiprocessor of any of the targets can hold; 32 blocks
_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class Floor:
    """Arguments read and results written once, the operations of live pairs, and the time of whichever is longer."""

    bytes: int
    flops: int
    seconds: float
    bound: str  # "memory" or "compute"


def floor(program: Program, report: Report) -> Floor:
    """The least that `program` needs on the chip that `report` was made for."""
    target, flops = TARGETS[report.target], operations(program)
    moved = report.argument_bytes + report.output_bytes - _unread(program)
    times = {"memory": moved / target.memory_bandwidth, "compute": flops / _peak(program, target)}
    bound = max(times, key=lambda name: times[name])
    return Floor(moved, flops, times[bound], bound)


def operations(program: Program) -> int:
    """Multiplications and additions of the products, and of the sums of a prefix sum.

    Softmax attention: 4 D for each pair of a query and a key that it sees; the gradients 10 D, the scores computed
    again. Linear attention: 2 D^2 for a token's key/value head and 2 D^2 for its query head, and with gradients twice
    and three times that. Evo: four products of 2 D^2 for a token, each thrice more with gradients.
    """
    p, gradient = program, program.phase == "backward"
    tokens, square = p.batch * p.queries, p.width**2
    if p.pattern is not None:
        pairs = p.batch * live_pairs(p.pattern, p.heads, p.kv_heads, p.queries, p.length)
        return pairs * p.width * (14 if gradient else 4)
    if p.op == "linear":
        return 2 * tokens * square * (3 * p.heads + 4 * p.kv_heads if gradient else p.heads + p.kv_heads)
    if p.op == "evo":
        return tokens * p.heads * square * (32 if gradient else 8)
    return tokens * p.heads * p.width * (2 if gradient else 1)


def live_pairs(pattern: Pattern, heads: int, kv_heads: int, queries: int, keys: int) -> int:
    """How many (query, key) pairs of one sequence the pattern allows, over all heads."""
    position = np.arange(queries) + pattern.offset
    last = np.minimum(position, keys - 1) if pattern.causal else np.full(queries, keys - 1)
    windows = pattern.windows * (heads if len(pattern.windows) == 1 else 1)
    total = sum(count * _band(pattern, window, position, last) for window, count in Counter(windows).items())
    table = random_table(pattern, kv_heads, keys)
    if table is not None:
        block, size = position // pattern.block_size, pattern.block_size
        local = (position >= pattern.num_global) & (block < table.shape[1])  # global queries see all anyway
        rows = np.bincount(block[local], minlength=table.shape[1])
        drawn = np.where(table < 0, 0, np.minimum(size, keys - table * size)).sum((0, 2))
        total += int(rows @ drawn) * (heads // kv_heads)
    return int(total)


def _band(pattern: Pattern, window: tuple[int, int], position: np.ndarray, last: np.ndarray) -> int:
    """Pairs of one head by band and global tokens."""
    low, high = np.maximum(position - window[0], 0), np.minimum(position + window[1], last)
    seen = np.maximum(high - low + 1, 0)
    first = np.minimum(pattern.num_global, last + 1)  # global keys that the query may see
    outside = np.minimum(first, low) + np.maximum(first - np.maximum(high + 1, low), 0)
    seen = np.where(
        (position >= 0) & (position < pattern.num_global), np.maximum(last + 1, 0), seen + np.maximum(outside, 0)
    )
    return int(seen.sum())


def _unread(program: Program) -> int:
    """Bytes of the cache that no query of a decoded token sees."""
    p = program
    if p.pattern is None or p.phase != "decode":
        return 0
    share = live_pairs(p.pattern, p.heads, p.kv_heads, p.queries, p.length) / (p.heads * p.queries * p.length)
    cache = 2 * p.batch * p.length * p.kv_heads * p.width * (4 if p.dtype == "float32" else 2)
    return int(cache * (1 - share))


def _peak(program: Program, target: Target) -> float:
    """Operations per second: TF32x3 takes three products for one, and a prefix sum no tensor core."""
    if program.op == "prefix_sum":
        return target.peak_float32
    return target.peak_tf32 / 3 if DTYPES[program.dtype] == "tf32x3" else target.peak_16_bit


def occupancy(kernel: KernelReport, target: str) -> float:
    """Share of a multiprocessor's warps that are resident at once, by registers, shared memory and blocks."""
    chip, warps = TARGETS[target], max(kernel.num_warps, 1)
    registers = -(-kernel.registers * 32 // 256) * 256 * warps  # given to a warp by 256
    by_registers = 65536 // max(registers, 1)
    by_shared = chip.shared_memory_per_core // (kernel.shared_bytes + 1024)  # 1 KiB of each block is the system's
    return min(by_registers, by_shared, _BLOCKS, _WARPS // warps) * warps / _WARPS
