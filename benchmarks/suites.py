"""What each suite of `python -m benchmarks.run` measures: cases in order of importance, for a run may be cut short."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import decoding, generation, layers, peers, problems, shapes
from benchmarks.contenders import jax_contender
from benchmarks.measure import Case, Effort, measure
from benchmarks.shapes import Shape

OTHERS = ("decode", "generate")
OPS = (*problems.OPS, *layers.LAYERS, *OTHERS)


@dataclass(frozen=True, slots=True)
class Options:
    """Which part of a suite: operations and peers (none: all), the longest sequence, and where the originals are."""

    ops: tuple[str, ...] = ()
    longest: int = 1 << 30
    quick: bool = False
    originals: tuple[Path, ...] = ()
    peers: tuple[str, ...] = ()  # parts of names

    def wants(self, op: str) -> bool:
        return not self.ops or op in self.ops

    def narrowed(self, case: Case) -> Case:
        """The case with ours and the peers that are wanted alone."""
        wanted = ("evo_jax", *self.peers) if self.peers else ("",)
        return replace(case, make={name: make for name, make in case.make.items() if any(x in name for x in wanted)})


Row = Callable[[Effort, Mapping[str, Any]], dict[str, Any]]
Entry = tuple[str, Row]  # (title, how to measure it)


def case(op: str, shape: Shape, gradient: bool, originals: Sequence[Path] = (), alone: bool = False) -> Case:
    """An operation or a layer at a shape against every peer, or `alone`."""
    if originals:
        from benchmarks.originals import look_in

        look_in(originals)
    if op in layers.LAYERS:
        given = layers.layer_problem(op, shape, gradient)
        right = layers.ours(given, "reference")
        return Case(given, layers.contenders(given, bool(originals)), partial(problems.truth, given, right))
    given = problems.problem(op, shape, gradient)
    right = problems.ours(given, "reference")
    name = "evo_jax reference"
    make = {name: partial(jax_contender, name, given, right)} if alone else peers.contenders(given, bool(originals))
    return Case(given, make, partial(problems.truth, given, right))


def cpu(options: Options) -> Iterator[Entry]:
    """All operations against what else runs on a CPU, whole layers against the originals, long ones alone."""
    lengths = shapes.CPU[:1] if options.quick else shapes.CPU
    for op in filter(options.wants, (*problems.OPS, *layers.LAYERS)):
        for shape in _within(lengths, options):
            yield from _passes(op, shape, options)
    for op in filter(options.wants, () if options.quick else shapes.LINEAR_TIME):
        for shape in _within(shapes.CPU_LONG, options):
            yield from _passes(op, shape, options, alone=True)
    for kind in generation.KINDS if options.wants("generate") and not options.quick else ():
        yield f"generate {kind}", partial(_generation, kind, min(4096, options.longest))


def gpu(options: Options) -> Iterator[Entry]:
    """First every operation at its first shape, then decoding, then their gradients, then the other shapes."""
    yield from _turn(0, (False,), options)
    if options.wants("decode"):
        for shape in _within(shapes.GPU_DECODE[:1] if options.quick else shapes.GPU_DECODE, options):
            yield f"decode {shape}", partial(_decode, shape)
    yield from _turn(0, (True,), options)
    for number in range(1, 1 if options.quick else max(map(len, shapes.GPU.values()))):
        yield from _turn(number, (False, True), options)


SUITES = {"cpu": cpu, "gpu": gpu}


def _turn(number: int, gradients: Sequence[bool], options: Options) -> Iterator[Entry]:
    """Every operation at its shape of that number."""
    for op in filter(options.wants, problems.OPS):
        for shape in _within(shapes.GPU[op][number : number + 1], options):
            yield from _passes(op, shape, options, gradients)


def _passes(
    op: str, shape: Shape, options: Options, gradients: Sequence[bool] = (False, True), alone: bool = False
) -> Iterator[Entry]:
    for gradient in gradients:
        title = f"{op} {'forward+backward' if gradient else 'forward'} {shape}"
        yield title, partial(_row, op, shape, gradient, options, alone)


def _row(
    op: str, shape: Shape, gradient: bool, options: Options, alone: bool, effort: Effort, ceilings: Any
) -> dict[str, Any]:
    return measure(options.narrowed(case(op, shape, gradient, options.originals, alone)), effort, ceilings)


def _decode(shape: Shape, effort: Effort, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    return measure(decoding.case(shape), effort, ceilings)


def _generation(kind: str, long: int, effort: Effort, _: Mapping[str, Any]) -> dict[str, Any]:
    return generation.row(kind, long, max(effort.rounds // 3, 1))


def _within(candidates: Sequence[Shape], options: Options) -> list[Shape]:
    return [shape for shape in candidates if shape.length <= options.longest]
