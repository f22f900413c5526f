"""What Triton IR shows without running it: accesses that may leave their array, int32 overflow, and dot precisions."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxlib.mlir import ir
from jaxlib.triton import dialect

from benchmarks.ranges import ANY, ARITHMETIC, Range, add, union, widen
from benchmarks.ttir import walk

_INT32_LIMIT = 2**31
_ACCESSES = {"tt.load": ("load", 1), "tt.store": ("store", 2)}  # name and the number of operands without a mask
_SAME_VALUE = frozenset(
    ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.extsi", "arith.index_cast")
)


def audit(text: str) -> list[str]:
    """Every problem of `unsafe(text)`, then one line of `dot_precisions(text)` per dot."""
    return [*unsafe(text), *dot_precisions(text)]


def unsafe(text: str) -> list[str]:
    """Accesses without a mask that are not shown to stay in their array, int32 offsets that can overflow, atomics.

    `text` is Triton IR as `ttir` returns it: its first line states the grid and the arrays. Ranges of offsets are
    followed from program ids, loop bounds and constants; a range that depends on loaded data is unknown, so that such
    an access needs a mask. Without that first line only an access at element 0 is accepted without a mask.
    "In its array" means between its first and its last element: a column past the end of a row is not seen here, but
    by the interpreter.
    """
    grid, sizes = _read_header(text)
    with ir.Context() as context:
        dialect.register_dialect(context)
        module = ir.Module.parse(text)
        kernel = next(op for op in walk(module.operation) if op.name == "tt.func")
        state = _Ranges(grid)
        arguments = kernel.regions[0].blocks[0].arguments
        for argument in arguments:
            state.of[argument] = Range(0, 0, argument)
        state.run(kernel.regions[0].blocks[0])
        elements = dict(zip(arguments, sizes, strict=False))
        return [line for op in state.seen.values() for line in _judge(op, elements)]


def dot_precisions(text: str) -> list[str]:
    """One line per tt.dot, "dot f32 x f32 -> f32, inputPrecision = tf32"; only f32 operands heed the precision."""
    return [_dot(line) for line in text.splitlines() if re.search(r"\btt\.dot\w* ", line)]


def wrong_dots(text: str, stated: str) -> list[str]:
    """The dots that do not take the precision `stated` for the program: "bf16", "fp16" or "tf32x3".

    float16 numbers are multiplied as they are or, where something computed could pass 65504, as TF32, which holds them
    exactly. Sums are in float32, always.
    """
    operands = {
        "bf16": ("bf16 x bf16 -> f32",),
        "fp16": ("f16 x f16 -> f32", "f32 x f32 -> f32.* = tf32$"),
        "tf32x3": ("f32 x f32 -> f32.* = tf32x3$",),
    }
    found = {dot: None for dot in dot_precisions(text) if not any(re.search(f" {o}", dot) for o in operands[stated])}
    return [f"{dot}, where {stated} is stated" for dot in found]


def _dot(line: str) -> str:
    types = r"tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)> -> tensor<[\dx]+x(\w+)>"
    found = re.search(rf"tt\.dot .*?(?:inputPrecision = (\w+) )?: {types}", line)
    if found is None:
        return f"dot of an unknown form: {line.strip()}"
    precision, left, right, out = found.groups()
    return f"dot {left} x {right} -> {out}, inputPrecision = {precision or 'ieee'}"


class _Seen(NamedTuple):
    """A memory operation and what is known of its pointer (and of its offset's type) where it was last visited."""

    op: Any
    pointer: Range
    mask: Range | None = None
    narrow: bool = False
    wrapped: Range | None = None  # of a 32-bit number that the offset is made of, which passes 32 bits


def _read_header(text: str) -> tuple[tuple[int, ...], list[int]]:
    """The grid, and the number of elements of each array, from the comment that `ttir` puts on the first line."""
    found = re.match(r"// grid (\d+) (\d+) (\d+) arrays (.*)", text)
    if found is None:
        return (), []
    shapes = re.findall(r"\w+\[([\d,]*)\]", found.group(4))
    return tuple(map(int, found.groups()[:3])), [math.prod(int(n) for n in s.split(",") if n) for s in shapes]


def _judge(seen: _Seen, elements: dict[Any, int]) -> list[str]:
    """The problems of one memory operation."""
    line, where, found = str(seen.op).strip(), seen.pointer, []
    size = elements.get(where.base)
    span = f"elements {where.low} to {where.high} of {'an unknown number' if size is None else size}"
    if seen.op.name in _ACCESSES:
        inside = where.base is not None and where.low >= 0 and where.high < (1 if size is None else size)
        unmasked = seen.mask is None or (seen.mask.low == seen.mask.high != 0)
        if unmasked and not inside:
            found.append(f"unmasked {_ACCESSES[seen.op.name][0]} ({span}): {line}")
    elif seen.op.name == "tt.addptr":
        overflows = -math.inf < where.low < -_INT32_LIMIT or _INT32_LIMIT <= where.high < math.inf
        if seen.narrow and (overflows or (size or 0) > _INT32_LIMIT):
            found.append(f"int32 offset can overflow ({span}): {line}")
        elif seen.wrapped is not None:
            values = f"values {seen.wrapped.low} to {seen.wrapped.high}"
            found.append(f"int32 offset can overflow before it is widened ({values}): {line}")
    else:
        found.append(f"atomic: {line}")
    return found


class _Ranges:
    """Interval analysis of one kernel: `of` holds each value's range, `seen` every memory operation met.

    `wrapped` holds the 32-bit values that can pass 32 bits, and what is computed from them. Hashes wrap on purpose; an
    offset must not.
    """

    def __init__(self, grid: tuple[int, ...]) -> None:
        self.grid, self.of, self.seen, self.wrapped = grid, {}, {}, {}

    def run(self, block: Any) -> list[Range]:
        """Visit `block` in order and return the ranges that its last operation passes on."""
        for view in block:
            op = view.operation
            values = [self.of.get(value, ANY) for value in op.operands]
            self._record(op, values)
            for result, known in zip(op.results, self._results(op, values), strict=True):
                self.of[result] = known
                if op.name in ARITHMETIC or op.name in _SAME_VALUE:
                    self._note_wrapping(op, result, known)
        return values if block else []

    def _record(self, op: Any, values: list[Range]) -> None:
        if op.name in _ACCESSES:
            masked = len(values) > _ACCESSES[op.name][1]
            self.seen[op] = _Seen(op, values[0], values[_ACCESSES[op.name][1]] if masked else None)
        elif op.name == "tt.addptr":
            narrow, wrapped = "i32" in str(op.operands[1].type), self.wrapped.get(op.operands[1])
            self.seen[op] = _Seen(op, add(values[0], values[1]), None, narrow, wrapped)
        elif op.name.startswith("tt.atomic"):
            self.seen[op] = _Seen(op, values[0])

    def _note_wrapping(self, op: Any, result: Any, known: Range) -> None:
        from_operands = [self.wrapped[value] for value in op.operands if value in self.wrapped]
        passes = -math.inf < known.low < -_INT32_LIMIT or _INT32_LIMIT <= known.high < math.inf
        if from_operands:
            self.wrapped[result] = from_operands[0]
        elif passes and op.name != "tt.addptr" and re.search(r"\bi32$|xi32>$", str(result.type)):
            self.wrapped[result] = known

    def _results(self, op: Any, values: list[Range]) -> list[Range]:
        if op.name == "scf.for":
            return self._for(op, values)
        if op.name == "scf.while":
            return self._while(op, values)
        if op.name == "scf.if":
            branches = [self.run(region.blocks[0]) for region in op.regions if len(region.blocks)]
            return [union(*pair) for pair in zip(*branches, strict=True)] if len(branches) == 2 else []
        for region in op.regions:  # of tt.reduce and tt.scan: their arguments stay unknown
            for block in region:
                self.run(block)
        known = self._value(op, values) if len(op.results) == 1 else ANY
        return [known] * len(op.results)

    def _for(self, op: Any, values: list[Range]) -> list[Range]:
        body = op.regions[0].blocks[0]
        self.of[body.arguments[0]] = Range(values[0].low, values[1].high - 1)

        def turn(carried: list[Range]) -> tuple[list[Range], list[Range]]:
            leaving = self._enter(body, list(body.arguments)[1:], carried)
            return leaving, leaving

        leaving = _settle(turn, values[3:])
        return [union(before, after) for before, after in zip(values[3:], leaving, strict=True)]

    def _while(self, op: Any, values: list[Range]) -> list[Range]:
        before, after = (region.blocks[0] for region in op.regions)

        def turn(carried: list[Range]) -> tuple[list[Range], list[Range]]:
            passed = self._enter(before, before.arguments, carried)[1:]  # the first is the condition
            return self._enter(after, after.arguments, passed), passed

        return _settle(turn, values)

    def _enter(self, block: Any, arguments: Any, values: list[Range]) -> list[Range]:
        self.of.update(zip(arguments, values, strict=True))
        return self.run(block)

    def _value(self, op: Any, values: list[Range]) -> Range:
        if op.name in _SAME_VALUE:
            return values[0]
        if op.name == "arith.constant":
            return _constant(op.attributes["value"])
        if op.name == "tt.make_range":
            return Range(ir.IntegerAttr(op.attributes["start"]).value, ir.IntegerAttr(op.attributes["end"]).value - 1)
        if op.name == "tt.get_program_id" and self.grid:
            return Range(0, self.grid[ir.IntegerAttr(op.attributes["axis"]).value] - 1)
        if op.name == "arith.select":
            return union(*values[1:])
        rule = ARITHMETIC.get(op.name)
        return rule(*values) if rule else ANY


def _settle(turn: Callable[[list[Range]], tuple[list[Range], list[Range]]], carried: list[Range]) -> list[Range]:
    """Run `turn` (carried values -> carried values after it, and what to return) until the ranges no longer grow."""
    while True:
        leaving, result = turn(carried)
        widened = [widen(before, after) for before, after in zip(carried, leaving, strict=True)]
        if widened == carried:
            return result
        carried = widened


def _constant(attribute: Any) -> Range:
    if isinstance(attribute, ir.DenseElementsAttr) and attribute.is_splat:
        attribute = attribute.get_splat_value()
    if isinstance(attribute, ir.IntegerAttr | ir.BoolAttr):
        return Range(int(attribute.value), int(attribute.value))
    return ANY
