"""to_torch_function: a JAX function as a torch function, differentiable once, one jitted call each way."""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.autograd import forward_ad

from evo_jax.backend import context as backend_context
from evo_jax.interop.arrays import argument, exported

_TWICE = (
    "create_graph=True asks for a second derivative through a function made by to_torch_function, which torch can "
    "differentiate once only: take the inner derivative in JAX instead, as in to_torch_function(jax.grad(fn)), and "
    "let torch differentiate that"
)
_SMALL = 2**14  # bytes
# Places of a call's arrays among its leaves; every other leaf is static, and part of what a trace belongs to.
_DIFFERENTIATED, _GIVEN, _ARRAY = object(), object(), object()


def to_torch_function(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn`, which takes and returns JAX arrays, as a function of torch tensors that autograd differentiates.

    Arguments and results are any nesting of tuples, lists, dicts and NamedTuples. Tensors (and JAX arrays) become
    traced arrays; every other leaf is static: it must be hashable, reaches `fn` as it is, and a new value is a new
    trace, so give what changes between calls, as a position does, in a tensor. The forward pass and the backward pass
    are one jitted call each, traced once for each set of shapes, dtypes and static values; `fn` need not be jitted.

    Gradients reach the floating and complex tensors that require them; integers and bools have none. Under
    torch.no_grad(), or where no tensor requires a gradient, nothing is kept for a backward pass. What is kept are
    inputs and results, which torch watches for changes made in place, and `fn`'s own residuals; all but those of a few
    KB are torch's saved tensors, which torch.utils.checkpoint recomputes and saved_tensors_hooks can move. No result
    shares memory with an argument or with anything that JAX keeps.

    Raises:
        TypeError: an unhashable static argument, or a tensor that from_torch() refuses (so: 64-bit dtypes need
            jax_enable_x64). RuntimeError: a tensor on a device that JAX does not have; in the backward pass, a second
            derivative (`create_graph=True`), or a saved tensor that was changed in place; transforms of torch.func.
            NotImplementedError: a tensor with a tangent of forward mode.

    >>> import torch, evo_jax
    >>> from evo_jax.interop import to_torch_function
    >>> total = to_torch_function(evo_jax.prefix_sum)
    >>> x = torch.arange(4.0, requires_grad=True)
    >>> total(x, axis=0).sum().backward()
    >>> x.grad
    tensor([4., 3., 2., 1.])
    """
    cases: dict[Any, _Case] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        marks = _marks(leaves)
        key = (tree, *marks)
        try:
            case = cases.get(key)
        except TypeError as error:
            raise TypeError(f"{_name(fn)}: an argument must be a tensor or hashable: {error}") from error
        if case is None:
            case = cases[key] = _Case(
                fn, tree, tuple(_static(leaf, mark) for leaf, mark in zip(leaves, marks, strict=True))
            )
        return case(leaves)

    return _outside_compile(functools.wraps(fn)(call))


def _outside_compile(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, at which torch.compile breaks its graph; the compiler takes a second to import, so not before it is."""
    hidden: Callable[..., Any] | None = None

    @functools.wraps(call)
    def outside(*args: Any, **kwargs: Any) -> Any:
        nonlocal hidden
        if "torch._dynamo" not in sys.modules:
            return call(*args, **kwargs)
        if hidden is None:
            hidden = torch.compiler.disable(call, reason="JAX computes it")
        return hidden(*args, **kwargs)

    return outside


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _marks(leaves: Sequence[Any]) -> list[Any]:
    """What each leaf contributes to the key of a call: its place's kind, or its type and value."""
    grad = torch.is_grad_enabled()
    marks: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            marks.append(_DIFFERENTIATED if grad and leaf.requires_grad else _GIVEN)
        elif isinstance(leaf, jax.Array):
            marks.append(_ARRAY)
        else:  # 1, 1.0 and True are equal, and so are 0.0 and -0.0, but not nan and nan
            marks.append((type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf))
    return marks


def _static(leaf: Any, mark: Any) -> Any:
    return leaf if isinstance(mark, tuple) else mark


class _Case:
    """`fn` for one structure of arguments and one set of static values, jitted without and with residuals."""

    def __init__(self, fn: Callable[..., Any], tree: Any, leaves: tuple[Any, ...]) -> None:
        self.fn, self.tree, self.leaves = fn, tree, leaves
        places = {
            kind: [i for i, leaf in enumerate(leaves) if leaf is kind] for kind in (_DIFFERENTIATED, _GIVEN, _ARRAY)
        }
        self.differentiated, self.given, self.arrays = places[_DIFFERENTIATED], places[_GIVEN], places[_ARRAY]
        self.plain = jax.jit(self.run)
        self.forward = jax.jit(self.run_forward)

    def __call__(self, leaves: Sequence[Any]) -> Any:
        tensors = [leaves[i] for i in self.given]
        others = [leaves[i] for i in self.arrays]
        if not self.differentiated:
            _refuse_tangents(tensors)
            return jax.tree.map(exported, self.plain([], [argument(t) for t in tensors], others))
        call = _Call(self, tensors, others)
        results = _Bridge.apply(call, *(leaves[i] for i in self.differentiated))
        return jax.tree.unflatten(call.results, results)

    def run(self, differentiated: Sequence[Any], given: Sequence[Any], others: Sequence[Any]) -> Any:
        leaves = list(self.leaves)
        for places, values in ((self.differentiated, differentiated), (self.given, given), (self.arrays, others)):
            for place, value in zip(places, values, strict=True):
                leaves[place] = jnp.asarray(value)
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return self.fn(*args, **kwargs)

    def run_forward(self, differentiated: list[Any], given: list[Any], others: list[Any]) -> Any:
        """(result leaves, residuals that are neither inputs nor results, the plan of the backward pass)."""

        def run(*differentiated: Any) -> Any:
            nonlocal results
            leaves, results = jax.tree.flatten(self.run(differentiated, given, others))
            leaves = [jnp.asarray(leaf) for leaf in leaves]
            floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
            return floats, leaves

        results: Any = None
        floats, vjp, leaves = jax.vjp(run, *differentiated, has_aux=True)
        places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        for place, value in zip(places, floats, strict=True):
            leaves[place] = value
        residuals, tree = jax.tree.flatten(vjp)
        shared = [*differentiated, *given, *leaves]
        origins = {id(array): i for i, array in reversed(list(enumerate(shared)))}
        sources = [origins.get(id(residual)) for residual in residuals]
        own = [residual for residual, source in zip(residuals, sources, strict=True) if source is None]
        return leaves, own, _Plan(tree, sources, results, places)


@jax.tree_util.register_static
@dataclass(eq=False)
class _Plan:
    """How a backward pass comes by its residuals; hashed by identity, so that a trace of it belongs to it alone."""

    tree: Any  # of the vjp
    sources: list[int | None]  # for each residual, its place among inputs and results, None where it is neither
    results: Any  # the tree of the results
    floats: list[int]  # places of the results that have gradients
    shared: list[int] = field(init=False)  # places to save

    def __post_init__(self) -> None:
        self.shared = sorted({source for source in self.sources if source is not None})
        self.backward = jax.jit(self.run)

    def run(self, own: Sequence[Any], shared: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        known, rest = dict(zip(self.shared, shared, strict=True)), iter(own)
        residuals = [next(rest) if source is None else known[source] for source in self.sources]
        vjp = jax.tree.unflatten(self.tree, residuals)
        # torch's gradient of a complex number is the conjugate of JAX's
        return [jnp.conj(gradient) for gradient in vjp([jnp.conj(cotangent) for cotangent in cotangents])]


@dataclass(slots=True)
class _Call:
    """One call that autograd records: what its forward pass needs beside the differentiated tensors, and finds."""

    case: _Case
    given: list[torch.Tensor]
    others: list[Any]
    results: Any = None


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *differentiated: torch.Tensor) -> tuple[torch.Tensor, ...]:  # pyright: ignore
        inputs = [*differentiated, *call.given]
        arrays = [argument(tensor) for tensor in inputs]
        count = len(differentiated)
        leaves, own, plan = call.case.forward(arrays[:count], arrays[count:], call.others)
        results = [exported(leaf) for leaf in leaves]
        known = [*inputs, *results]
        ctx.save_for_backward(*(known[place] for place in plan.shared), *(exported(a) for a in own if not _stays(a)))
        ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in plan.floats))
        ctx.own, ctx.plan, ctx.settings = [a if _stays(a) else None for a in own], plan, _settings()
        call.results = plan.results
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:  # pyright: ignore
        if torch.is_grad_enabled():
            raise RuntimeError(_TWICE)
        saved, count = ctx.saved_tensors, len(ctx.plan.shared)
        with _restored(ctx.settings):
            known = [argument(tensor) for tensor in saved]
            rest = iter(known[count:])
            own = [next(rest) if array is None else array for array in ctx.own]
            given = [argument(cotangents[place]) for place in ctx.plan.floats]
            gradients = ctx.plan.backward(own, known[:count], given)
        return None, *(exported(gradient) for gradient in gradients)


def _stays(array: jax.Array) -> bool:
    """Whether a residual does not go through torch, which takes 10 us: a small one, or a random key."""
    return jnp.issubdtype(array.dtype, jax.dtypes.extended) or array.nbytes < _SMALL


def _refuse_tangents(tensors: Sequence[torch.Tensor]) -> None:
    """Raise where forward-mode differentiation would lose a tangent; where autograd records, torch itself does."""
    if getattr(forward_ad, "_current_level", 0) >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise NotImplementedError(
            "a function made by to_torch_function has no forward-mode derivative in torch: call jax.jvp inside of it"
        )


def _settings() -> tuple[Any, ...]:
    """The settings of this thread that a trace depends on; autograd may run the backward pass on another thread."""
    return (
        jax.enable_x64.value,
        jax.default_matmul_precision.value,
        backend_context.value,
    )


@contextlib.contextmanager
def _entered(settings: tuple[Any, ...]):
    x64, precision, backend = settings
    with jax.enable_x64(x64), jax.default_matmul_precision(precision), backend_context(backend):
        yield


def _restored(settings: tuple[Any, ...]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if settings == _settings() else _entered(settings)
