"""Interval arithmetic: what integers a value of a kernel can be."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Every integer that a value can be, both ends included; of a pointer, its distance from `base` in elements."""

    low: float
    high: float
    base: Any = None  # the kernel's pointer argument


ANY = Range(-math.inf, math.inf)


def widen(before: Range, after: Range) -> Range:
    """`before`, with no bound on the side where `after` passes it."""
    if before.base != after.base:
        return ANY
    low = before.low if after.low >= before.low else -math.inf
    return Range(low, before.high if after.high <= before.high else math.inf, before.base)


def union(a: Range, b: Range) -> Range:
    if a.base != b.base:
        return ANY
    return Range(min(a.low, b.low), max(a.high, b.high), a.base)


def add(a: Range, b: Range) -> Range:
    return Range(a.low + b.low, a.high + b.high, a.base)


def subtract(a: Range, b: Range) -> Range:
    return Range(a.low - b.high, a.high - b.low)


def times(x: float, y: float) -> float:
    return 0 if 0 in (x, y) else x * y


def multiply(a: Range, b: Range) -> Range:
    corners = [times(x, y) for x in a[:2] for y in b[:2]]
    return Range(min(corners), max(corners))


def divide(a: Range, b: Range) -> Range:
    if b.low <= 0 or math.inf in (-a.low, a.high, b.high):
        return ANY
    corners = [int(abs(x) // y) * (1 if x >= 0 else -1) for x in a[:2] for y in b[:2]]
    return Range(min(corners), max(corners))


def remainder(a: Range, b: Range) -> Range:
    if b.low <= 0:
        return ANY
    if a.low >= 0 and a.high < b.low:
        return a
    return Range(0 if a.low >= 0 else 1 - b.high, min(b.high - 1, max(a.high, 0)))


def unsigned(rule: Callable[[Range, Range], Range]) -> Callable[[Range, Range], Range]:
    """The rule, where no number has a sign bit to be misread."""
    return lambda a, b: rule(a, b) if a.low >= 0 and b.low >= 0 else ANY


ARITHMETIC = {
    "arith.addi": add,
    "tt.addptr": add,
    "arith.subi": subtract,
    "arith.muli": multiply,
    "arith.divsi": divide,
    "arith.remsi": remainder,
    "arith.divui": unsigned(divide),
    "arith.remui": unsigned(remainder),
    "arith.minsi": lambda a, b: Range(min(a.low, b.low), min(a.high, b.high)),
    "arith.maxsi": lambda a, b: Range(max(a.low, b.low), max(a.high, b.high)),
}
