"""EVO_AUTOTUNE=1: an operation's first call on a GPU, with a key that is not tuned yet, tunes it before it runs.

That holds while a caller's function is traced, too: the kernels are timed on drawn arrays, in a thread that traces
nothing. Nothing here happens without the variable; what was found before is used either way, and never tuned again.
Nobody having chosen the moment, only launches are tried that were compiled beforehand for just this architecture,
kernel, precision and mask (autotune.candidates); for all else the default stays, and evo_jax.autotune() may be asked.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evo_jax.autotune import tunable, tune
from evo_jax.backend import context
from pallas_kernels import tuned, tuned_store

_SEEN: set[Any] = set()


def before(run: partial, *args: Any) -> None:
    """Tune run(*args) and its gradients, unless there is no need; `run` holds its statics, `mode` among them.

    Of `args` only shapes and dtypes matter: lengths, segments and masks of single pairs had better be left out.

    Raises:
        ValueError: EVO_AUTOTUNE is neither 0 nor 1.
    """
    if not wanted() or run.keywords["mode"] not in ("triton", "platform") or tuned_store.device_kind() is None:
        return
    if not tuned.undisturbed() or context.value.report is not None:  # someone else is choosing, or only asking
        return
    leaves, tree = jax.tree.flatten(args)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    asked = (run.func, *run.keywords.items(), tree, *((x.shape, str(x.dtype)) for x in types))
    if asked in _SEEN:
        return
    _SEEN.add(asked)
    x64 = jnp.result_type(float).itemsize == 8
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_tune, run, tree, types, x64).result()
    except Exception as error:  # the caller's operation works without
        warnings.warn(f"EVO_AUTOTUNE=1: {run.func.__name__} is not tuned: {error}", RuntimeWarning, stacklevel=2)


def wanted() -> bool:
    """Whether EVO_AUTOTUNE asks for it.

    Raises:
        ValueError: a value other than 0, 1 or none.
    """
    value = os.environ.get("EVO_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"EVO_AUTOTUNE={value!r} must be '0' or '1'")
    return value == "1"


def _tune(run: partial, tree: Any, types: list[Any], x64: bool) -> None:
    """In a thread of its own, which starts without the caller's settings; decoding is tuned without gradients."""

    def forward(arrays: list[Any]) -> Any:
        return run(*jax.tree.unflatten(tree, arrays))

    with jax.enable_x64(x64):
        decoding = any(key.kernel == "attend_decode" for key in tunable(forward, types))
        tune(forward if decoding else partial(_with_gradient, run, tree), types, asked=False)


def _with_gradient(run: partial, tree: Any, leaves: list[Any]) -> Any:
    """(results, gradients of all floating-point arrays), with the results as their cotangents."""
    floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

    def forward(*given: Any) -> Any:
        left = iter(given)
        return run(*jax.tree.unflatten(tree, [next(left) if f else x for f, x in zip(floats, leaves, strict=True)]))

    out, pull = jax.vjp(forward, *(x for f, x in zip(floats, leaves, strict=True) if f))
    return out, pull(out) if any(floats) else ()
