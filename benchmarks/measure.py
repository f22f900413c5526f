"""One row of a report: contenders are made and judged; the right ones are timed in turns and put beside ceilings."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import peak
from benchmarks.problems import Problem, work
from benchmarks.timing import LONG, Contender, Results, errors_of, fault_of, interleave, spread

ENOUGH = 10.0  # seconds of a first call that on a CPU, where little is compiled, stands for the others
UNMEASURED = ("torch FlexAttention",)  # compiles in its first call, which would count as memory


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: how to make each contender, and the right results."""

    given: Problem
    make: Mapping[str, Callable[[], Contender]]
    truth: Callable[[], Results]

    @property
    def passes(self) -> str:
        return "forward+backward" if self.given.gradient else "forward"

    @property
    def title(self) -> str:
        return f"{self.given.op} {self.passes} {self.given.shape}"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Args:
        rounds: turns of each contender; seconds: the most that one contender's turns of a case may take together.
        growth: whether a process of its own measures each contender's memory.
        folders: those of the originals, for these processes.
    """

    rounds: int = 15
    seconds: float = 3.0
    growth: bool = True
    folders: tuple[str, ...] = ()


def measure(case: Case, effort: Effort, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """The row. A contender that raises or is wrong is in it with the reason, and is not timed; the others are."""
    given = case.given
    flops, moved = work(given)
    entries, right, took = _judged(case)
    samples = interleave(right, effort.rounds, 0, effort.seconds, took)
    for contender in right:
        entry = entries[contender.name]
        entry |= _times(samples[contender.name]) | {"temp_bytes": contender.temp_bytes}
        entry |= _rates(entry["median_s"], flops, moved, given.shape.dtype, ceilings)
    names = [contender.name for contender in right]
    del right
    gc.collect()
    for name in names if effort.growth else ():
        if name not in UNMEASURED:
            arguments = (given.op, given.shape, given.gradient, name, list(effort.folders))
            entries[name]["growth_bytes"] = peak.growth(*arguments)
    row = {"case": case.title, "op": given.op, "passes": case.passes, "shape": asdict(given.shape)}
    return row | {"flops": flops, "bytes": moved, "contenders": entries}


def _judged(case: Case) -> tuple[dict[str, Any], list[Contender], dict[str, float]]:
    """({name: status, errors and reason}, the contenders that are right, seconds of a call of each)."""
    tolerances = case.given.tolerances
    entries: dict[str, Any] = {}
    right, took = [], {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # compilers let each other run
        made = {name: pool.submit(make) for name, make in case.make.items()}
        truth = case.truth()
    for name, future in made.items():
        try:
            contender = future.result()
            result, took[name] = _first(contender)
            errors = errors_of(result, truth)
        except Exception as error:  # whatever a peer has to say: it is its row's, and the run goes on
            lines = str(error).strip().splitlines() or [""]
            entries[name] = {"status": "failed", "reason": f"{type(error).__name__}: {lines[0][:300]}"}
            continue
        fault = fault_of(errors, tolerances)
        finite = {key: error if math.isfinite(error) else None for key, error in errors.items()}
        entries[name] = {"status": "ok" if fault is None else "wrong", "errors": finite}
        if fault is None:
            right.append(contender)
        else:
            entries[name]["reason"] = fault
    return entries, right, took


def _first(contender: Contender) -> tuple[Results, float]:
    """(its result, seconds of a call): of a second one where the first was long, for that may have been compilation."""
    start = time.perf_counter()
    result = contender.result()
    took = time.perf_counter() - start
    if took < LONG or (took >= ENOUGH and contender.repeat is None):
        return result, took
    start = time.perf_counter()
    contender.run()
    return result, time.perf_counter() - start


def _times(samples: list[float]) -> dict[str, Any]:
    return {"median_s": statistics.median(samples), "spread": spread(samples), "samples_s": samples}


def _rates(
    seconds: float, flops: float | None, moved: float | None, dtype: str, ceilings: Mapping[str, Any]
) -> dict[str, float]:
    """What was achieved, and its share of what this device was seen to do."""
    rates: dict[str, float] = {}
    if moved is not None:
        rates["bytes_per_s"] = moved / seconds
        if "copy_bytes_per_s" in ceilings:
            rates["share_of_copy"] = rates["bytes_per_s"] / ceilings["copy_bytes_per_s"]
    if flops is not None:
        rates["flops_per_s"] = flops / seconds
        if dtype in ceilings.get("flops_per_s", {}):
            rates["share_of_matmul"] = rates["flops_per_s"] / ceilings["flops_per_s"][dtype]
    return rates
