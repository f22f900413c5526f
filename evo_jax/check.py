"""Whether the operations are right on this machine's own device: against whole-array formulas in float64, case by case.

The limit is FlashAttention's rule: at most twice the error of the same formulas in the dtype in question, every
intermediate result of which is rounded to it, plus EPSILON. A rerun must give the same bits.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from evo_jax.check_cases import CASES, Case

DTYPES = ("bfloat16", "float16", "float32")
# Of (results, gradients), relative in the 2-norm. Triton's float32 products are three of TF32, good to some 2^-21.
EPSILON = {"triton": (1e-5, 5e-5), "reference": (1e-6, 3e-6), "interpret": (1e-6, 3e-6)}
_SEED, _THREADS = 0, 8
_FLOAT64 = 52  # bits of mantissa
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # half the time to compile


@dataclass(frozen=True, slots=True)
class Figure:
    """One result: its relative error in the 2-norm, and the most it may be."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True, slots=True)
class Row:
    """What one case gave in one dtype by one implementation; `problem` says what was raised instead."""

    op: str
    case: str
    dtype: str
    implementation: str
    figures: tuple[Figure, ...] = ()
    same_bits: bool = True
    seconds: float = 0.0
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and self.same_bits and all(figure.passed for figure in self.figures)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an error that is no number is None."""
        figures = [asdict(f) | {"error": f.error if math.isfinite(f.error) else None} for f in self.figures]
        return asdict(self) | {"figures": figures, "passed": self.passed}


def rows(ops: Sequence[str], dtypes: Sequence[str], implementations: Sequence[str]) -> Iterator[Row]:
    """Every case of the operations, in every dtype, by every implementation, in order, as they are done.

    Cases run in threads, as most of the time goes to compilers, which let each other run.
    """
    stop = Event()

    def of_case(case: Case) -> list[Row]:
        turns = [(dtype, how) for dtype in dtypes for how in implementations]
        return [row(case, dtype, how) for dtype, how in turns if not stop.is_set()]

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for done in pool.map(of_case, [case for case in CASES if case.op in ops]):
                yield from done
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def count(ops: Sequence[str], dtypes: Sequence[str], implementations: Sequence[str]) -> int:
    """How many rows there will be."""
    return sum(case.op in ops for case in CASES) * len(dtypes) * len(implementations)


def row(case: Case, dtype: str, implementation: str) -> Row:
    """Run one case; what it raises becomes its `problem`, so that the others still run."""
    start = time.perf_counter()
    found = partial(Row, case.op, case.name, dtype, implementation)
    try:
        figures, same = _figures(case, dtype, implementation)
    except Exception as error:  # whatever the compiler or the device has to say
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return found(seconds=time.perf_counter() - start, problem=text)
    return found(figures, same, time.perf_counter() - start)


def _figures(case: Case, dtype: str, implementation: str) -> tuple[tuple[Figure, ...], bool]:
    values, weights = _inputs(case, dtype)
    given = {name: jnp.asarray(a, "float32" if name in case.wide else dtype) for name, a in values.items()}
    compiled = jax.jit(partial(_with_gradients, lambda a: case.call(a, implementation), case.gradient))
    first, again = (jax.device_get(compiled(given, weights)) for _ in range(2))
    exact, plain = _expected(case, dtype)
    same = all(first[name].tobytes() == again[name].tobytes() for name in first)
    return tuple(_figure(name, first[name], exact[name], plain[name], implementation) for name in exact), same


def _figure(name: str, actual: Any, exact: np.ndarray, plain: np.ndarray, implementation: str) -> Figure:
    size = max(float(np.linalg.norm(exact)), 1e-300)
    error, allowed = (float(np.linalg.norm(np.asarray(a, np.float64) - exact)) / size for a in (actual, plain))
    return Figure(name, error, 2 * allowed + EPSILON[implementation][name.startswith("d_")])


def _inputs(case: Case, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(arrays, cotangents of the results), float64 numbers that the dtype holds exactly."""
    rng = np.random.default_rng(_SEED)
    values = {
        name: a.astype(np.float32 if name in case.wide else jnp.dtype(dtype)).astype(np.float64)
        for name, a in case.draw(rng).items()
    }
    with jax.enable_x64(True):
        shapes = jax.eval_shape(case.exact, values)
    cotangents = {name: rng.normal(size=s.shape).astype(jnp.bfloat16).astype(np.float64) for name, s in shapes.items()}
    return values, cotangents


def _with_gradients(function: Callable[..., Any], gradient: bool, arrays: Any, cotangents: Any) -> dict[str, Any]:
    """The results of function(arrays) and, named d_..., the gradients of the arrays."""
    if not gradient:
        return function(arrays)
    out, vjp = jax.vjp(function, arrays)
    grads = vjp({name: jnp.asarray(cotangents[name], a.dtype) for name, a in out.items()})[0]
    return out | {f"d_{name}": a for name, a in grads.items()}


@cache
def _expected(case: Case, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Results by the formulas in float64, and with every intermediate result rounded to the dtype; on the CPU."""
    given = _inputs(case, dtype)
    with jax.enable_x64(True), jax.default_device(_host()):
        exact, plain = (jax.device_get(_formulas(case)(np.int64(bits), *given)) for bits in (_FLOAT64, _bits(dtype)))
    return exact, plain


def _bits(dtype: str) -> int:
    """Of the mantissa."""
    return int(jnp.finfo(dtype).nmant)


@cache
def _formulas(case: Case) -> Callable[..., Any]:
    """(bits, arrays, cotangents) -> results, compiled once for all dtypes."""
    formulas = partial(rounded, partial(_with_gradients, case.exact, case.gradient))
    return jax.jit(formulas, compiler_options=_QUICK if _host().platform == "cpu" else None)


def _host() -> Any:
    """The CPU, where JAX_PLATFORMS does not leave it out."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


def rounded(function: Callable[..., Any], bits: Any, *args: Any) -> Any:
    """function(*args) with every float64 result of its primitives rounded to `bits` of mantissa; the range stays.

    >>> import jax, numpy as np
    >>> with jax.enable_x64(True):
    ...     print(rounded(lambda x: (x + 0.001) * 3, np.int64(7), np.float64(1)), jax.devices("cpu")[0].platform)
    3.0 cpu
    """
    drop = jnp.asarray(_FLOAT64 - bits, jnp.uint64)
    unit = jnp.left_shift(jnp.uint64(1), drop)
    half, kept = jnp.right_shift(unit, jnp.uint64(1)), jnp.bitwise_not(unit - jnp.uint64(1))

    def narrow(x: Any) -> Any:
        if x.dtype != jnp.float64:
            return x
        number = lax.bitcast_convert_type(x, jnp.uint64)
        return lax.bitcast_convert_type((number + half) & kept, jnp.float64)

    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    outs = _evaluate(closed, jax.tree.leaves(args), narrow)
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def _evaluate(closed: Any, args: Sequence[Any], narrow: Callable[[Any], Any]) -> list[Any]:
    """The results of a closed jaxpr, each equation's narrowed; jitted functions and custom rules are gone into."""
    jaxpr = closed.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    for equation in jaxpr.eqns:
        values = [read(variable) for variable in equation.invars]
        inner = next((equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params), None)
        if inner is not None and equation.primitive.name not in ("scan", "while", "cond"):
            outs = _evaluate(inner, values, narrow)
        else:
            outs = equation.primitive.bind(*values, **equation.params)
            outs = [narrow(out) for out in (outs if equation.primitive.multiple_results else [outs])]
        known.update(zip(equation.outvars, outs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]
