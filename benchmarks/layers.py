"""Whole layers of the CUDA factory: ours, the original's mathematics in eager torch, and the original where it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from flax import nnx

import evo_jax
from benchmarks.contenders import jax_contender
from benchmarks.problems import WINDOW, Arrays, Problem, visible
from benchmarks.shapes import Shape
from benchmarks.timing import Contender

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class LayerProblem(Problem):
    """x (B, L, E) and the four projections (E, E), of which the cotangent is one of x."""

    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.op.removesuffix("_layer")

    @property
    def tolerances(self) -> dict[str, float]:
        return dict.fromkeys(("out", *self.arrays), 1e-4 if self.shape.dtype == "float32" else 2e-2)


OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "sliding_window": {"window_size": WINDOW},
    "sparse": {"block_size": 64, "num_random_blocks": 0},  # the original takes the option, and draws none
    "multiscale": {},
}
LAYERS = tuple(f"{kind}_layer" for kind in OPTIONS)


def layer_problem(op: str, shape: Shape, gradient: bool) -> LayerProblem:
    """A causal layer of H heads of width D, as the factory draws it, and standard normal hidden states."""
    layer, keys = _layer(op, shape), jax.random.split(jax.random.key(1), 2)
    size = (shape.batch, shape.length, shape.heads * shape.width)
    x, cotangent = (jax.random.normal(key, size).astype(shape.dtype) for key in keys)
    kernels = {name: getattr(layer, name).kernel[...].astype(shape.dtype) for name in PROJECTIONS}
    return LayerProblem(op, shape, gradient, {"x": x, **kernels}, cotangent, OPTIONS[op.removesuffix("_layer")])


def _layer(op: str, shape: Shape) -> Any:
    kind = op.removesuffix("_layer")
    return evo_jax.CUDA.create(kind, shape.heads * shape.width, shape.heads, **OPTIONS[kind])


def ours(given: Problem, implementation: str | None) -> Callable[[Arrays], jax.Array]:
    """The layer as a function of its input and kernels."""
    graph, state = nnx.split(_layer(given.op, given.shape))

    def forward(a: Arrays) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf, state)  # to be written to
        nnx.replace_by_pure_dict(own, {name: {"kernel": a[name]} for name in PROJECTIONS})
        return nnx.merge(graph, own)(a["x"], implementation=implementation)[0]

    return forward


def contenders(given: LayerProblem, originals: bool) -> dict[str, Callable[[], Contender]]:
    """Ours by the reference, and the originals, whose mathematics restated stands in where they are not at hand."""
    from benchmarks.peers import present

    name = "evo_jax reference"
    found: dict[str, Callable[[], Contender]] = {
        name: partial(jax_contender, name, given, ours(given, "reference")),
    }
    if present("torch"):
        from benchmarks import originals as theirs
        from benchmarks.peers_torch import ORIGINAL

        if originals:
            found["original complexity"] = partial(theirs.layer, given, given.kind, given.options)
        else:
            found[ORIGINAL] = partial(_torch_layer, given)
    return found


def _torch_layer(given: Problem) -> Contender:
    import torch

    from benchmarks import peers_torch
    from benchmarks.contenders import torch_contender, torch_tensor

    (batch, length, heads, width), kind = _sizes(given.shape), given.op.removesuffix("_layer")
    seen = None if kind == "linear" else visible(kind, given.shape, random_blocks=0)
    hidden = None if seen is None else torch.logical_not(torch_tensor(seen, torch.bool))

    def attend(a: dict[str, Any]) -> Any:
        if hidden is None:
            return peers_torch.linear(a)
        return peers_torch.masked_softmax(a, hidden)

    def layer(a: dict[str, Any]) -> Any:
        names = zip(("query", "key", "value"), PROJECTIONS, strict=False)
        heads_of = {
            name: (a["x"] @ a[kernel]).view(batch, length, heads, width).transpose(1, 2) for name, kernel in names
        }
        return attend(heads_of).transpose(1, 2).reshape(batch, length, heads * width) @ a["o_proj"]

    return torch_contender(peers_torch.ORIGINAL, given, layer)


def _sizes(shape: Shape) -> tuple[int, int, int, int]:
    return shape.batch, shape.length, shape.heads, shape.width
