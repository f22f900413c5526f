"""Everything that an operation is measured against: {name: how to make it}, each peer only where it can be imported."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contenders import jax_contender
from benchmarks.problems import WINDOW, Arrays, Problem, evo_params, ours, visible
from benchmarks.timing import Contender
from reference.evo import evo_dense
from reference.evo_params import EvoSpec
from reference.linear import LinearSpec, linear_dense

Make = Callable[[], Contender]
_GPU_PALLAS = "jax.experimental.pallas.ops.gpu.attention"


def contenders(given: Problem, originals: bool = False) -> dict[str, Make]:
    """Ours first. A peer that cannot do this case raises when it is made, and the report says so."""
    gpu = jax.default_backend() != "cpu"
    names = ("triton", "reference") if gpu else ("reference",)
    if gpu and given.op == "prefix_sum" and given.shape.length > 2**17:
        names = ("triton",)
    found: dict[str, Make] = {
        f"evo_jax {how}": partial(jax_contender, f"evo_jax {how}", given, ours(given, how)) for how in names
    }
    found |= {name: partial(jax_contender, name, given, function) for name, function in _jax_peers(given, gpu).items()}
    if given.op in ("sparse", "multiscale") and given.shape.length <= 8192:
        found["jax.nn xla, dense mask"] = partial(_masked, given)
    if present("torch") and _torch_fits(gpu):
        from benchmarks import peers_torch

        found |= peers_torch.peers(given, gpu)
        if not present("fla"):
            found.pop("flash-linear-attention", None)
        if originals and given.op == "evo":
            from benchmarks.originals import evo

            found["original evo-attn"] = partial(evo, given)
    return found


def present(module: str) -> bool:
    """Whether it is installed, without importing it."""
    return importlib.util.find_spec(module) is not None


def absent() -> list[str]:
    """Which libraries of peers this environment lacks."""
    return [name for name in ("torch", "fla", "tokamax") if not present(name)]


def _torch_fits(gpu: bool) -> bool:
    """torch for the CPU is no peer on a GPU."""
    if not gpu:
        return True
    import torch

    return torch.cuda.is_available()


def _jax_peers(given: Problem, gpu: bool) -> dict[str, Callable[[Arrays], Any]]:
    length = given.shape.length
    if given.op == "prefix_sum":
        return {
            "jnp.cumsum": lambda a: jnp.cumsum(a["x"], axis=2, dtype=jnp.float32).astype(a["x"].dtype),
            "lax.associative_scan": lambda a: jax.lax.associative_scan(
                jnp.add, a["x"].astype(jnp.float32), axis=2
            ).astype(a["x"].dtype),
        }
    if given.op == "evo":
        return {"jnp formulas": lambda a: evo_dense(a["v"], None, evo_params(a), None, EvoSpec())}
    if given.op == "linear":
        dense = lambda a: linear_dense(a["query"], a["key"], a["value"], None, None, LinearSpec())[0]  # noqa: E731
        return {"jnp formulas, L x L": dense} if length <= 2048 else {}
    return _softmax_peers(given, gpu)


def _softmax_peers(given: Problem, gpu: bool) -> dict[str, Callable[[Arrays], Any]]:
    def call(function: Any, **options: Any) -> Callable[[Arrays], Any]:
        return lambda a: function(a["query"], a["key"], a["value"], **options)

    jax_nn: dict[str, Any] = {"is_causal": True}
    if given.op == "sliding_window":
        jax_nn["local_window_size"] = (WINDOW - 1, 0)
    plain, found = given.op in ("flash", "sliding_window"), {}
    if plain and given.shape.length <= 8192:
        found["jax.nn xla"] = call(jax.nn.dot_product_attention, implementation="xla", **jax_nn)
    if gpu and plain and given.shape.dtype != "float32":
        found["jax.nn cudnn"] = call(jax.nn.dot_product_attention, implementation="cudnn", **jax_nn)
    if gpu and given.op == "flash":
        found["jax pallas.ops.gpu"] = _pallas_attention
    if gpu and plain and present("tokamax"):
        for name in ("triton", "mosaic"):
            found[f"tokamax {name}"] = partial(_tokamax, name, jax_nn)
    return found


def _masked(given: Problem) -> Contender:
    """XLA over all L x L scores, which is what there is for a pattern that jax.nn does not know; the mask is given."""

    def attend(a: Arrays, mask: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(a["query"], a["key"], a["value"], mask=mask, implementation="xla")

    return jax_contender("jax.nn xla, dense mask", given, attend, visible(given.op, given.shape)[None])


def _pallas_attention(a: Arrays) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        attention: Any = importlib.import_module(_GPU_PALLAS)
    width = a["query"].shape[3]
    return attention.mha(a["query"], a["key"], a["value"], segment_ids=None, sm_scale=width**-0.5, causal=True)


def _tokamax(implementation: str, options: dict[str, Any], a: Arrays) -> Any:
    import tokamax  # type: ignore[import-not-found]

    attention = tokamax.dot_product_attention
    return attention(a["query"], a["key"], a["value"], implementation=implementation, **options)
