"""The only resolver of implementations: EVO_BACKEND, `with backend(...)`, choose() and explain()."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from pallas_kernels import tuned

_LOGGER = logging.getLogger("evo_jax")
_ENVIRONMENT = {"auto": "auto", "triton": "triton", "reference": "reference", "torch": "reference"}
_CONTEXT = {**_ENVIRONMENT, "interpret": "interpret"}
_ARGUMENT = {"triton": "triton", "reference": "reference", "interpret": "interpret"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of a report: which implementation `op` uses for arrays of these shapes, and why."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    implementation: str
    reason: str


@dataclass(eq=False, slots=True)
class Report:
    """What explain() returns: its choices in order of first use, one of each; printed as a table.

    `launches` are those of the kernels among them, as pallas_kernels.tuned.recording() gathers them: printed as a
    second table that says where each comes from: default, table (shipped), cache (tuned here), override or caller.
    """

    choices: list[Choice] = field(default_factory=list)
    launches: dict[tuned.Key, tuned.Chosen] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.choices:
            return "no evo_jax operation was called"
        rows = [("op", "shapes", "dtype", "implementation", "reason")]
        rows += [(c.op, " ".join(map(_shape, c.shapes)), c.dtype, c.implementation, c.reason) for c in self.choices]
        return aligned(rows) + (f"\n\n{self._launch_table()}" if self.launches else "")

    def _launch_table(self) -> str:
        rows = [("kernel", "launch", "from")]
        for key, chosen in self.launches.items():
            fields = tuned.fields_of(key, chosen.launch).items()
            rows.append((str(key), " ".join(f"{name}={value}" for name, value in fields), chosen.source))
        return aligned(rows)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the context holds; being part of jit's key, a new setting means a new trace."""

    name: str | None = None
    report: Report | None = None


context = jax.make_user_context(_Setting())


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one implementation for every operation called, or traced, inside the `with` block, in this thread.

    The choice is part of jit's key: a jitted function called outside and then inside the block is traced again.
    An explicit `implementation=` wins over this context, and this context over the variable EVO_BACKEND.

    Args:
        name: "auto", "triton", "reference" (or its old name "torch"), or "interpret".

    Raises:
        ValueError: another name.

    >>> import jax.numpy as jnp, evo_jax
    >>> with evo_jax.backend("reference"):
    ...     print(evo_jax.prefix_sum(jnp.arange(4)))
    [0 1 3 6]
    """
    setting = _Setting(_known(name, _CONTEXT, "evo_jax.backend(name)"), context.value.report)
    with context(setting):
        yield


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Say which implementation each operation inside `fn(*args, **kwargs)` would use, and why, without running it.

    Where that is a kernel the report has its launch, too, and where that comes from.

    `fn` is traced on the shapes and dtypes of its array arguments (`jax.ShapeDtypeStruct` will do); every other
    argument is passed as it is. A jitted `fn` is traced afresh.

    >>> import jax.numpy as jnp, evo_jax
    >>> report = evo_jax.explain(evo_jax.prefix_sum, jnp.ones((8, 4)), implementation="reference")
    >>> print(report)
    op          shapes  dtype    implementation  reason
    prefix_sum  (8, 4)  float32  reference       implementation='reference'
    """
    call, arrays = on_arrays(fn, args, kwargs)
    report = Report()
    with context(_Setting(context.value.name, report)), tuned.recording() as launches:
        jax.eval_shape(lambda arrays: (call(arrays), None)[1], arrays)
    report.launches.update(launches)
    return report


def on_arrays(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """(call, arrays): call(arrays) is fn(*args, **kwargs), whose other arguments stay as they are."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def call(arrays: list[Any]) -> Any:
        merged = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            merged[place] = array
        args, kwargs = jax.tree.unflatten(tree, merged)
        return fn(*args, **kwargs)

    return call, [leaves[i] for i in places]


def aligned(rows: list[tuple[str, ...]]) -> str:
    """A table as text, its columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def choose(op: str, implementation: str | None, refusal: Callable[[], str | None], arrays: tuple[Any, ...]) -> str:
    """Resolve how `op` runs on `arrays`: "triton", "reference", "interpret", or "platform".

    "platform" is the kernel where the computation is lowered for CUDA and the reference elsewhere, so that arrays
    placed on the CPU of a GPU host still work. An explicit "triton" may be traced anywhere (to be lowered for CUDA
    elsewhere); require_cuda() stops it from running without a CUDA device.

    Args:
        refusal: why the kernel cannot do this case, or None; called only where a kernel may run.

    Raises:
        ValueError: an unknown name. NotImplementedError: an explicit choice of a kernel that refuses this case.
    """
    wanted, source = _wanted(implementation)
    how, reason = _resolve(op, wanted, source, refusal)
    report = context.value.report
    if report is not None:
        name = "triton" if how == "platform" else how
        choice = Choice(op, tuple(tuple(a.shape) for a in arrays), str(arrays[0].dtype), name, reason)
        if choice not in report.choices:
            report.choices.append(choice)
    return how


def has_cuda_device() -> bool:
    """Whether this process sees a CUDA device."""
    try:
        return len(jax.devices("cuda")) > 0
    except RuntimeError:
        return False


def _wanted(implementation: str | None) -> tuple[str, str]:
    """(the choice in force, who made it): the argument, else the context, else the environment, else auto."""
    if implementation is not None:
        return _known(implementation, _ARGUMENT, "implementation"), f"implementation={implementation!r}"
    if (name := context.value.name) is not None:
        return name, f"evo_jax.backend({name!r})"
    name = _known(os.environ.get("EVO_BACKEND") or "auto", _ENVIRONMENT, "EVO_BACKEND")
    return name, f"EVO_BACKEND={name}"


def _resolve(op: str, wanted: str, source: str, refusal: Callable[[], str | None]) -> tuple[str, str]:
    if wanted == "reference":
        return "reference", source
    cuda = has_cuda_device()
    refused = "no CUDA device" if wanted == "auto" and not cuda else refusal()
    if wanted == "auto":
        if refused is None:
            return "platform", "CUDA device present; the reference for arrays on the CPU"
        _log_once(logging.WARNING if cuda else logging.INFO, f"{op} uses the reference implementation: {refused}")
        return "reference", refused
    if refused is not None:
        raise NotImplementedError(f"{op}: {source} cannot run: {refused}; use implementation='reference'")
    if wanted == "triton" and not cuda:
        return "triton", f"{source}; no CUDA device here, so it can be lowered but not run"
    return wanted, source


def check_environment() -> None:
    """ValueError where EVO_BACKEND is set to what is no implementation."""
    _known(os.environ.get("EVO_BACKEND") or "auto", _ENVIRONMENT, "EVO_BACKEND")


@functools.cache
def _log_once(level: int, message: str) -> None:
    _LOGGER.log(level, message)


def _known(name: str, choices: dict[str, str], what: str) -> str:
    if not isinstance(name, str) or name not in choices:
        extra = "" if what != "implementation" else " or None"
        raise ValueError(f"{what}={name!r} is not one of {', '.join(map(repr, choices))}{extra}")
    return choices[name]


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
