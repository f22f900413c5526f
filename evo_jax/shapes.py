"""One validation for all operations: ValueError for shapes and values, TypeError for dtypes, each with the way out.

Every check runs while tracing, names the argument with what was given, and returns what the operation goes on with.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from evo_jax.sharding import gathered
from reference.evo_params import EvoParams
from reference.linear_maps import FEATURE_MAPS

_FEATURE_MAPS = tuple(name for name in FEATURE_MAPS if name != "identity")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
INT32, FLOAT32_MAX = np.iinfo(np.int32), float(np.finfo(np.float32).max)
_X64 = (
    "64-bit types, which are off; enable them at start-up with jax.config.update('jax_enable_x64', True) or "
    "JAX_ENABLE_X64=1"
)
MASK_SHAPES = "(B, L), (B, 1, L) or (B, 1, L, 1)"
_GATED = ("evo_attention", "EvoAttention")  # what has values alone, v, and takes mask_semantics


def array(op: str, name: str, x: Any) -> jax.Array:
    """`x` as an array; ValueError for numpy's integers of 64 bits of which JAX would keep 32 and change the number."""
    try:
        made = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{op}: {name} must be an array, not {x!r:.40}") from error
    cut = isinstance(x, np.ndarray) and x.dtype.kind in "iu" and made.dtype.itemsize < x.dtype.itemsize
    if cut and (x != x.astype(made.dtype)).any():
        raise ValueError(f"{op}: {name} holds integers that {made.dtype.name} does not: they need {_X64}")
    return made


def float_array(op: str, name: str, x: Any) -> jax.Array:
    """`x` as an array of float16, bfloat16, float32 or float64."""
    x = array(op, name, x)
    if x.dtype.name not in _FLOATS:
        raise TypeError(f"{op}: {name}.dtype={x.dtype.name} must be one of {', '.join(_FLOATS)}; cast it with astype")
    return x


def values(op: str, v: Any, query: Any) -> tuple[jax.Array, jax.Array | None]:
    """v (B, H, L, D) and query, the same shape and dtype or None."""
    v = float_array(op, "v", v)
    if v.ndim != 4 or v.shape[3] == 0:
        raise ValueError(f"{op}: {v.shape=} must be (B, H, L, D) with D >= 1; reshape (B, L, E) by heads first")
    if query is None:
        return v, None
    query = float_array(op, "query", query)
    if query.shape != v.shape:
        raise ValueError(f"{op}: {query.shape=} must equal {v.shape=}")
    if query.dtype != v.dtype:
        raise TypeError(f"{op}: query.dtype={query.dtype.name} must equal v.dtype={v.dtype.name}; cast one of them")
    return v, query


def attention_arrays(
    op: str, query: Any, key: Any, value: Any, same_length: bool = False, same_dtype: bool = False
) -> tuple[jax.Array, ...]:
    """query (B, T, N, D), key (B, S, K, D) and value (B, S, K, V), N a multiple of K; key and value of one dtype.

    `same_length`: as many queries as keys. `same_dtype`: all three of one dtype.
    """
    query, key, value = (float_array(op, name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    given = f"{query.shape=}, {key.shape=}, {value.shape=}"
    if not query.ndim == key.ndim == value.ndim == 4 or 0 in (query.shape[3], value.shape[3]):
        raise ValueError(f"{op}: {given} must be (B, T, N, D), (B, S, K, D), (B, S, K, V) with D, V >= 1")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"{op}: {given} must agree in B; key and value in S and K; query and key in D")
    heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: {given}: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    if same_length and query.shape[1] != key.shape[1]:
        raise ValueError(f"{op}: {given}: is_causal=True needs as many queries as keys; earlier tokens come as a state")
    if key.dtype != value.dtype or (same_dtype and query.dtype != key.dtype):
        names = f"{query.dtype.name}, {key.dtype.name}, {value.dtype.name}"
        those = "query, key and value" if same_dtype else "key and value"
        raise TypeError(f"{op}: query, key and value are {names}; {those} must be of one dtype; cast them with astype")
    return query, key, value


def segment_ids(op: str, ids: Any, batch: int, length: int) -> jax.Array:
    """`ids` (B, L) of integers, in their own dtype; ValueError for known ones that int32 does not hold."""
    ids = integers(op, "segment_ids", ids)
    if ids.shape != (batch, length):
        raise ValueError(f"{op}: segment_ids.shape={ids.shape} must be (B, L) = {(batch, length)}")
    if ids.size and known(ids) and not fits_int32(ids):
        within_int32(op, "segment_ids", int(ids.min()), int(ids.max()))
    return gathered(jnp.asarray(ids), 1)


def within_int32(op: str, name: str, *numbers: int) -> None:
    """ValueError for a number that int32 does not hold."""
    for number in numbers:
        if not INT32.min <= number <= INT32.max:
            raise ValueError(f"{op}: {name} hold {number} and must be within {INT32.min} and {INT32.max}")


def evo_params(op: str, params: Any, head_dim: int) -> EvoParams:
    """The ten arrays of `params`, each of its shape for heads of this width."""
    if not isinstance(params, EvoParams):
        raise TypeError(
            f"{op}: params is a {type(params).__name__} and must be an EvoParams, as from evo_jax.init_evo_params(key, "
            f"{head_dim}) or EvoParams.from_state_dict(torch_module.state_dict())"
        )
    arrays = EvoParams(*(float_array(op, f"params.{name}", a) for name, a in params._asdict().items()))
    for name, array in arrays._asdict().items():
        expected = (head_dim,) * (2 if name.endswith("kernel") else 1)
        if array.shape != expected:
            raise ValueError(
                f"{op}: params.{name}.shape={array.shape} must be {expected} for v.shape[-1]={head_dim}; "
                f"make them with evo_jax.init_evo_params(key, {head_dim})"
            )
    return arrays


def float_dtype(op: str, name: str, dtype: Any) -> np.dtype:
    """A floating dtype that this process can hold: float64 only where x64 is on."""
    result = _dtype(op, name, dtype)
    if result.name not in _FLOATS:
        raise TypeError(f"{op}: {name}={result.name} must be one of {', '.join(_FLOATS)}")
    return result


def accum_dtype(op: str, array: jax.Array, dtype: Any) -> str:
    """Name of the dtype that sums of `array` are carried in: at least float32 or int32, never narrower than `array`.

    float16 and bfloat16 default to float32, bool and narrow integers to int32, everything else to its own dtype.
    """
    if jnp.issubdtype(array.dtype, jnp.floating):
        default = np.dtype("float64") if array.dtype == np.float64 else np.dtype("float32")
    else:
        default = array.dtype if array.dtype.itemsize >= 4 else np.dtype("int32")
    if dtype is None:
        return default.name
    result = _dtype(op, "accum_dtype", dtype)
    if result.kind != default.kind or result.itemsize < default.itemsize:
        wider = {"f": "float32 or float64", "i": "int32 or int64", "u": "uint32 or uint64"}[default.kind]
        raise TypeError(
            f"{op}: accum_dtype={result.name} cannot carry sums of dtype {array.dtype.name}; "
            f"leave it out for {default.name}, or give {wider}, not narrower than that"
        )
    return result.name


def launch(op: str, **options: Any) -> tuple[tuple[str, int], ...]:
    """(name, value) of the kernels' launch options that were given, checked alike whether or not a kernel runs."""
    given = {name: integer(op, name, value) for name, value in options.items() if value is not None}
    for name, number in given.items():
        low, high = {"num_warps": (1, 16), "num_stages": (1, None)}.get(name, (16, 1024))  # the others are blocks
        if number < low or (high is not None and (number > high or number & (number - 1))):
            span = f"a power of two from {low} to {high}" if high else f"at least {low}"
            raise ValueError(f"{op}: {name}={number} must be {span}; leave it out for the default")
    return tuple(given.items())


def integer(op: str, name: str, value: Any) -> int:
    """`value` as an int; TypeError for anything else, bool and traced values included."""
    try:
        if isinstance(value, bool | np.bool_ | jax.Array):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name}={value!r} must be an int, known while tracing") from None


def at_least(op: str, name: str, value: Any, least: int) -> int:
    """`value` as an int that is not less than `least`."""
    value = integer(op, name, value)
    if value < least:
        raise ValueError(f"{op}: {name}={value} must be at least {least}")
    return value


def boolean(op: str, name: str, value: Any) -> bool:
    """`value` as a bool; TypeError for anything else, traced values included."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name}={value!r} must be True or False, known while tracing")
    return bool(value)


def finite(op: str, name: str, value: Any) -> float:
    """`value` as a float that is finite in float32 too; TypeError for anything else, traced values included."""
    if isinstance(value, bool | str | jax.Array) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{op}: {name}={value!r} must be a float, known while tracing")
    if not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"{op}: {name}={value} must be finite, and in the range of float32")
    return float(value)


def scale(op: str, value: Any) -> float | None:
    """A factor of scores; None stays None."""
    return None if value is None else finite(op, "scale", value)


def soft_cap(op: str, value: Any) -> float | None:
    """A bound on scores; None stays None."""
    if value is not None and not (value := finite(op, "logits_soft_cap", value)) > 0:
        raise ValueError(f"{op}: logits_soft_cap={value} must be greater than 0, or None")
    return value


def dropout_rate(op: str, value: Any) -> float:
    """The share of weights that are dropped."""
    if not 0 <= (value := finite(op, "dropout_rate", value)) < 1:
        raise ValueError(f"{op}: dropout_rate={value} must be at least 0 and less than 1")
    return value


def not_negative(op: str, name: str, value: Any) -> float:
    """`value` as a finite float that is at least 0."""
    if (value := finite(op, name, value)) < 0:
        raise ValueError(f"{op}: {name}={value} must be at least 0")
    return value


def lengths(op: str, name: str, value: Any, batch: int, shared: bool = False) -> jax.Array:
    """`value` (B,) of integers as int32; if `shared`, one number may stand for all sequences."""
    value = integers(op, name, value)
    if value.shape != (batch,) and not (shared and value.shape == ()):
        raise ValueError(f"{op}: {name}.shape={value.shape} must be (B,) = {(batch,)}, one number per sequence")
    return jnp.broadcast_to(int32(value), (batch,))


def integers(op: str, name: str, value: Any) -> jax.Array | np.ndarray:
    """`value` as an array of integers, JAX's own or else numpy's: of 64 bits JAX would keep the lower 32."""
    of_jax = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    value = array(op, name, value) if of_jax else np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{op}: {name}.dtype={value.dtype} must be an integer dtype")
    return value


def fits_int32(x: jax.Array | np.ndarray) -> bool:
    """Whether int32 holds every number of the integer dtype of `x`."""
    info = jnp.iinfo(x.dtype)
    return INT32.min <= info.min and info.max <= INT32.max


def int32(x: jax.Array | np.ndarray) -> jax.Array:
    """Integers as int32; those beyond its range become its ends, and do not wrap around."""
    if fits_int32(x):
        return jnp.asarray(x, jnp.int32)
    low = max(jnp.iinfo(x.dtype).min, INT32.min)
    return jnp.asarray((np if isinstance(x, np.ndarray) else jnp).clip(x, low, INT32.max).astype(np.int32))


def broadcastable(op: str, name: str, x: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """`x` with axes of size 1 put before its own until it has four, each 1 or that of `shape`; None stays None."""
    if x is None:
        return None
    x = array(op, name, x)
    full = (1,) * (len(shape) - x.ndim) + x.shape
    if len(full) != len(shape) or any(n not in (1, m) for n, m in zip(full, shape, strict=False)):
        raise ValueError(f"{op}: {name}.shape={x.shape} must broadcast to (B, N, T, S) = {shape}")
    return x.reshape(full)


def scan_axis(op: str, array: jax.Array, axis: Any) -> int:
    """`axis` counted from 0; the default -2 means the only axis of a rank-1 array."""
    axis = integer(op, "axis", axis)
    if array.ndim == 0:
        raise ValueError(f"{op}: x.shape=() has no axis to sum along; x must have rank >= 1")
    if array.ndim == 1 and axis == -2:
        return 0
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{op}: {axis=} is out of range for x.shape={array.shape}: {-array.ndim} to {array.ndim - 1}")
    return axis % array.ndim


def head_width(op: str, embed_dim: Any, num_heads: Any, head_dim: Any) -> int:
    """Width of one head; heads tile the embedding exactly."""
    embed_dim, num_heads = integer(op, "embed_dim", embed_dim), integer(op, "num_heads", num_heads)
    if embed_dim < 1 or num_heads < 1:
        raise ValueError(f"{op}: {embed_dim=} and {num_heads=} must be at least 1")
    width = embed_dim // num_heads if head_dim is None else integer(op, "head_dim", head_dim)
    if num_heads * width != embed_dim:
        raise ValueError(
            f"{op}: {embed_dim=} must equal num_heads * head_dim, and {num_heads=} with {head_dim=} does not divide it"
        )
    return width


def grouped_heads(op: str, hidden_size: Any, num_heads: Any, num_kv_heads: Any, head_dim: Any) -> tuple[int, int]:
    """(K, D): key/value heads, which divide the query heads, and the width of a head, free unless left to None."""
    hidden_size, num_heads = integer(op, "hidden_size", hidden_size), integer(op, "num_heads", num_heads)
    kv_heads = num_heads if num_kv_heads is None else integer(op, "num_kv_heads", num_kv_heads)
    if min(hidden_size, num_heads, kv_heads) < 1 or num_heads % kv_heads:
        raise ValueError(
            f"{op}: {hidden_size=} and {num_heads=} must be at least 1, and {num_kv_heads=} must divide num_heads"
        )
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(f"{op}: {hidden_size=} must be a multiple of {num_heads=}; or give head_dim")
    width = hidden_size // num_heads if head_dim is None else integer(op, "head_dim", head_dim)
    if width < 1:
        raise ValueError(f"{op}: {head_dim=} must be at least 1")
    return kv_heads, width


def hidden_states(op: str, name: str, x: Any, width: int) -> jax.Array:
    """`x` as a float array (B, L, width)."""
    x = float_array(op, name, x)
    if x.ndim != 3 or x.shape[2] != width:
        raise ValueError(f"{op}: {name}.shape={x.shape} must be (B, L, {width})")
    return x


def feature_map(op: str, value: Any) -> Any:
    """A name that linear attention knows, or a function."""
    return value if callable(value) else one_of(op, "feature_map", value, _FEATURE_MAPS, otherwise="a function")


def token_mask(op: str, mask: Any, batch: int, length: int) -> jax.Array | np.ndarray:
    """`mask` as (B, L), in its own dtype; a mask known while tracing stays what it is."""
    if not isinstance(mask, jax.Array | np.ndarray):
        mask = np.asarray(mask)
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.integer) and mask.dtype.name not in _FLOATS:
        raise TypeError(f"{op}: attention_mask.dtype={mask.dtype.name} must be bool, int or float")
    if mask.shape not in ((batch, length), (batch, 1, length), (batch, 1, length, 1)):
        raise ValueError(
            f"{op}: attention_mask.shape={mask.shape} must be {MASK_SHAPES} with B={batch}, L={length}, 1 or True for "
            "a valid token; a (B, 1, 1, L) or (B, L, 1) key mask: squeeze it to (B, L)"
            + ("; (B, H, L), one per head: multiply v by it instead" if op in _GATED else "")
        )
    return gathered(mask.reshape(batch, length), 1)


def additive(op: str, mask: Any) -> None:
    """ValueError for a known float mask, to be added to scores, that reads as a mask of tokens: 0 and 1 alone."""
    if not known(mask) or not np.size(mask):
        return
    host = np.asarray(mask)
    if (host == 1).any() and ((host == 0) | (host == 1)).all():
        raise ValueError(
            f"{op}: attention_mask {mask.shape} of {mask.dtype.name} holds only 0 and 1, and a float mask of four axes "
            "is added to the scores; for 1 = attend pass a bool mask"
        )


def known(mask: jax.Array | np.ndarray) -> bool:
    """Whether the mask's values can be read here: not traced, and all of it in this process."""
    return not isinstance(mask, Tracer) and getattr(mask, "is_fully_addressable", True)


def zeros_and_ones(op: str, mask: jax.Array | np.ndarray) -> None:
    """ValueError unless every value of a known mask is 0 or 1."""
    host = np.asarray(mask)
    bad = host[(host != 0) & (host != 1)]
    if bad.size:
        raise ValueError(
            f"{op}: attention_mask holds {bad.flat[0]} and must hold only 0 and 1 (or False and True); "
            "an additive mask (0 and -inf): pass mask == 0"
            + ("; a fractional mask: pass mask_semantics='multiply'" if op in _GATED else "")
        )


def one_of(op: str, name: str, value: Any, choices: tuple[str, ...], otherwise: str | None = None) -> str:
    """`value`, which must be one of `choices`; `otherwise` names what else the caller takes."""
    if not isinstance(value, str) or value not in choices:
        extra = "" if otherwise is None else f", or {otherwise}"
        raise ValueError(f"{op}: {name}={value!r} must be one of {', '.join(map(repr, choices))}{extra}")
    return value


def widest(*dtypes: Any) -> np.dtype:
    """The dtype that holds them all, by JAX's standard promotion even where strict promotion is on."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _dtype(op: str, name: str, dtype: Any) -> np.dtype:
    try:
        result = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{op}: {name}={dtype!r} is not a dtype") from None
    if result.kind in "fiu" and jax.dtypes.canonicalize_dtype(result) != result:
        raise ValueError(f"{op}: {name}={result.name} needs {_X64}")
    return result
