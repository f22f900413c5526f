"""Timing of contenders that must first agree: a correctness gate, then interleaved rounds, medians and ratios."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SETTLE = 0.02  # seconds before a sample: thread pools spin for a while after their work, and would slow the next one
LONG = 1.0  # seconds of a call that needs no other before it
SAMPLE = 0.05  # seconds that a sample lasts at least: short calls follow each other, as in a training loop


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a case: `run()` returns when the work is done; `result()` gives numpy arrays to compare."""

    name: str
    run: Callable[[], Any]
    result: Callable[[], dict[str, np.ndarray]]


class GateError(AssertionError):
    """Two contenders disagree: there is nothing to time."""


def gate(contenders: Sequence[Contender], tolerances: dict[str, float]) -> dict[str, float]:
    """Largest relative L2 difference of each named array from the first contender's; GateError beyond `tolerances`."""
    first, *others = (contender.result() for contender in contenders)
    worst = {name: 0.0 for name in first}
    for contender, result in zip(contenders[1:], others, strict=True):
        for name, expected in first.items():
            wide, actual = np.asarray(expected, np.float64), np.asarray(result[name], np.float64)
            error = float(np.linalg.norm(actual - wide) / max(np.linalg.norm(wide), 1e-300))
            if not error <= tolerances[name]:
                raise GateError(
                    f"{contender.name}: {name} differs by {error:.1e} in L2, {tolerances[name]:.0e} allowed"
                )
            worst[name] = max(worst[name], error)
    return worst


def interleave(contenders: Sequence[Contender], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds per call, one sample per round: rounds take turns, so that what else the machine does hits all alike.

    All contenders make the same number of calls in a sample, enough for the fastest to fill SAMPLE. An untimed call
    comes first, unless it takes seconds: what another contender left in caches and in the allocator is not ours.
    """
    for contender in contenders:
        for _ in range(warmup):
            contender.run()
    once = {contender.name: _seconds(contender, 1) for contender in contenders}
    calls = max(1, math.ceil(SAMPLE / min(once.values())))
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            if once[contender.name] < LONG:
                contender.run()
            time.sleep(SETTLE)
            samples[contender.name].append(_seconds(contender, calls))
    return samples


def _seconds(contender: Contender, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        contender.run()
    return (time.perf_counter() - start) / calls


def compare(
    case: str, contenders: Sequence[Contender], tolerances: dict[str, float], rounds: int, warmup: int = 2
) -> dict[str, Any]:
    """One row of a report: differences that the gate saw, raw samples, medians, and ratios to the first contender."""
    errors = gate(contenders, tolerances)
    samples = interleave(contenders, rounds, warmup)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    reference = medians[contenders[0].name]
    return {
        "case": case,
        "errors": errors,
        "median_s": medians,
        "ratio": {name: median / reference for name, median in medians.items()},
        "samples_s": samples,
    }
