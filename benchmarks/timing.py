"""Timing of contenders that must first agree: a correctness gate, then interleaved rounds, medians and ratios."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGE = 2**22  # elements; more are compared on JAX's device, in float32: copies of them take the host seconds
SETTLE = 0.02  # seconds before a sample: thread pools spin for a while after their work, and would slow the next one
LONG = 1.0  # seconds of a call that needs no other before it
OFTEN = 3  # samples in a turn of one that takes less than a tenth of a LONG one: cheap, and a calmer median
SAMPLE = 0.05  # seconds that a sample lasts at least: short calls follow each other, as in a training loop

Results = Mapping[str, Any]  # arrays of NumPy or of JAX


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a case.

    Args:
        run: one call, which returns when the work is done.
        result: arrays to compare, by name.
        repeat: so many calls, queued one after the other where the device works by itself; None: `run` so many times.
        temp_bytes: what the compiler says it needs besides arguments and results.
    """

    name: str
    run: Callable[[], Any]
    result: Callable[[], Results]
    repeat: Callable[[int], Any] | None = None
    temp_bytes: int | None = None


class GateError(AssertionError):
    """Two contenders disagree: there is nothing to time."""


def errors_of(actual: Results, expected: Results) -> dict[str, float]:
    """Relative L2 difference of each expected array; infinite for one that is missing, NaN where NaN is."""
    errors = {}
    for name, wanted in expected.items():
        if name not in actual or np.shape(actual[name]) != np.shape(wanted):
            errors[name] = math.inf
        elif np.size(wanted) > LARGE:
            errors[name] = float(_error_of_large(actual[name], wanted))
        else:
            wide = np.asarray(wanted, np.float64)
            difference = np.linalg.norm(np.asarray(actual[name], np.float64) - wide)
            errors[name] = float(difference / max(np.linalg.norm(wide), 1e-300))
    return errors


@jax.jit
def _error_of_large(actual: Any, wanted: Any) -> jax.Array:
    """All elements, so that nothing wrong is missed; norms of rows, then of those, which keeps float32 exact enough."""
    actual, wanted = (x.astype(jnp.float32) for x in (actual, wanted))
    rows = [jnp.linalg.norm(x, axis=-1) for x in (actual - wanted, wanted)]
    difference, size = (jnp.linalg.norm(x.ravel()) for x in rows)
    return difference / jnp.maximum(size, 1e-30)


def fault_of(errors: Mapping[str, float], tolerances: Mapping[str, float]) -> str | None:
    """What is wrong, or None; an array that has no tolerance is not judged."""
    for name, error in errors.items():
        if name in tolerances and not error <= tolerances[name]:
            return f"{name} differs by {error:.1e} in L2, {tolerances[name]:.0e} allowed"
    return None


def gate(contenders: Sequence[Contender], tolerances: dict[str, float]) -> dict[str, float]:
    """Largest relative L2 difference of each named array from the first contender's; GateError beyond `tolerances`."""
    first, *others = (contender.result() for contender in contenders)
    worst = {name: 0.0 for name in first}
    for contender, result in zip(contenders[1:], others, strict=True):
        errors = errors_of(result, first)
        if (fault := fault_of(errors, tolerances)) is not None:
            raise GateError(f"{contender.name}: {fault}")
        worst = {name: max(worst[name], error) for name, error in errors.items()}
    return worst


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    warmup: int = 2,
    seconds: float = math.inf,
    known: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call, one list of samples each; they take turns, so that what else the machine does hits all alike.

    A sample is as many calls as fill SAMPLE, and a turn one sample, or OFTEN. A contender gets fewer rounds, at least
    one, where they would take it more than `seconds`; how long a call takes may be `known`, by name, where it is LONG.
    An untimed call comes before each turn, unless it is LONG: what others left in caches and the allocator is not ours.
    """
    for contender in contenders:
        for _ in range(warmup):
            contender.run()
    known = {name: took for name, took in (known or {}).items() if took >= LONG}
    once = {c.name: known.get(c.name) or _seconds(c, 1) for c in contenders}
    calls = {name: max(1, math.ceil(SAMPLE / took)) for name, took in once.items()}
    turns = {name: max(1, int(min(rounds, seconds / (calls[name] * took)))) for name, took in once.items()}
    quick = max([took for took in once.values() if took >= LONG], default=0) / 10
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        for contender in contenders:
            name = contender.name
            if number >= turns[name]:
                continue
            if once[name] < LONG:
                contender.run()
            for _ in range(OFTEN if once[name] < quick else 1):
                time.sleep(SETTLE)
                samples[name].append(_seconds(contender, calls[name]))
    return samples


def _seconds(contender: Contender, calls: int) -> float:
    start = time.perf_counter()
    if contender.repeat is not None:
        contender.repeat(calls)
    else:
        for _ in range(calls):
            contender.run()
    return (time.perf_counter() - start) / calls


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; 0 of a single sample."""
    if len(samples) < 2:
        return 0.0
    first, median, third = np.percentile(samples, [25, 50, 75])
    return float((third - first) / 2 / median)


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
