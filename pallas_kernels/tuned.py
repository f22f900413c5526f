"""The one seam through which every launch is chosen: the caller, an override, stored results, or the default rule."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from pallas_kernels import tuned_store
from pallas_kernels.launch import AttendLaunch, Launch, LinearStepLaunch, PrefixLaunch

AnyLaunch = TypeVar("AnyLaunch", AttendLaunch, Launch, LinearStepLaunch, PrefixLaunch)

_ATTEND = ("block_q", "block_k", "num_warps", "num_stages", "widest", "reread")
_DECODE = ("block_k", "num_warps", "num_stages", "widest")
_EVO = ("block_d", "num_warps", "num_stages")
_LINEAR = ("block_m", "block_d", "block_k", "num_warps", "num_stages")
KERNELS: dict[str, tuple[str, ...]] = {  # what of its launch may be chosen
    **{f"attend_{kind}": _ATTEND for kind in ("forward", "d_query", "d_key_value", "d_bias")},
    "attend_decode": _DECODE,
    "evo_forward": ("block_m", *_EVO, "repeats"),
    "evo_backward": _EVO,  # its chunks are those of the forward, whose carry tables it reads
    "linear_forward": _LINEAR,
    "linear_backward": _LINEAR,
    "linear_step": ("columns", "num_warps"),
    "prefix": ("chunk", "block", "num_warps"),
}


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What a launch is chosen by. Lengths are taken together up to the next power of two."""

    kernel: str  # of KERNELS
    precision: str  # of its dot products, or the dtype of what it sums: "bf16", "fp16", "tf32", "tf32x3", "float32" ...
    width: int  # columns of a row: the wider of key and value
    length: int  # a power of two
    mask: str  # "causal", "full", "window", "sparse"; with "+" what narrows a tile further, as "causal+scores"

    @classmethod
    def of(cls, kernel: str, precision: str, width: int, length: int, mask: str) -> "Key":
        """The key of any length."""
        return cls(kernel, precision, width, 1 << max(length - 1, 0).bit_length(), mask)

    def __str__(self) -> str:
        return f"{self.kernel} {self.precision} D{self.width} L{self.length} {self.mask}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """One launch that recording() saw."""

    default: Any
    launch: Any
    source: str  # "default", "table", "cache", "override" or "caller"


Fields = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the context holds; being part of jit's key, a new setting means a new trace."""

    overrides: tuple[tuple[str | Key, Fields], ...] = ()  # later ones win
    stored: bool = True  # whether the user's cache and the shipped tables are read
    records: "_Records | None" = None
    capability: tuple[int, int] | None = None  # of the GPU that is compiled for; None: this process's first one


class _Records:
    """Compared by identity, so that every recording() traces anew."""

    def __init__(self) -> None:
        self.launches: dict[Key, Chosen] = {}


_context = jax.make_user_context(_Setting())


@contextlib.contextmanager
def override(
    launches: Mapping[Any, Mapping[str, Any]] | None = None,
    *,
    stored: bool = True,
    capability: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Launch kernels otherwise in this block and thread: {kernel or Key: {"block_q": 64, ...}}.

    A Key wins over its kernel's name, an inner block over an outer one, and the caller's own arguments over both.
    The setting is part of jit's key: a jitted function called outside and then inside the block is traced again.

    Args:
        stored: False leaves out what was tuned on this machine and what ships as tables, inside this block.
        capability: the default rules are those for a GPU of this compute capability, which need not be here.

    Raises:
        ValueError: an unknown kernel or field; while tracing, a value that no launch can have.
    """
    added = tuple((name, _checked(name, fields)) for name, fields in (launches or {}).items())
    added = tuple(sorted(added, key=lambda item: isinstance(item[0], Key)))
    now = _context.value
    with _context(_Setting((*now.overrides, *added), now.stored and stored, now.records, capability or now.capability)):
        yield


@contextlib.contextmanager
def recording() -> Iterator[dict[Key, Chosen]]:
    """Gather the launches of all kernels that are traced inside the block, in the order of their first use."""
    now, records = _context.value, _Records()
    with _context(dataclasses.replace(now, records=records)):
        yield records.launches


def choose(key: Key, default: AnyLaunch, own: Mapping[str, Any] | None = None, *, record: bool = True) -> AnyLaunch:
    """The launch of one kernel: the caller's `own` fields over an override over stored results over the default.

    Stored results were timed as they are, and hold only where the caller gives nothing. They are never read in the
    interpreter, nor on a machine without a CUDA device. Who only asks, and may not launch it, has no `record` of it.
    """
    now, own = _context.value, {name: value for name, value in (own or {}).items() if value is not None}
    fields, source = {}, "default"
    if now.stored and not own and not default.interpret:
        fields, source = _stored(key, default)
    for name, given in now.overrides:
        if name in (key, key.kernel):
            fields, source = {**fields, **dict(given)}, "override"
    if own:
        fields, source = {**fields, **own}, "caller"
    launch = dataclasses.replace(default, **fields) if fields else default
    if now.records is not None and record:
        now.records.launches.setdefault(key, Chosen(default, launch, source))
    return launch


def for_hopper() -> bool:
    """Whether default launches are to be those of Hopper, which need its tensor cores and shared memory.

    Where no GPU is known, as in an export, they are those that fit every GPU since Ampere.
    """
    return (_context.value.capability or tuned_store.capability() or (0, 0))[0] == 9


def undisturbed() -> bool:
    """Whether neither override() nor recording() is in force."""
    return _context.value == _Setting()


def fields_of(key: Key, launch: Any) -> dict[str, Any]:
    """What of `launch` may be chosen for this kernel."""
    return {name: getattr(launch, name) for name in KERNELS[key.kernel]}


def _stored(key: Key, default: Any) -> tuple[dict[str, Any], str]:
    """What was measured for this key, unless it is no launch of this kernel."""
    fields, source = tuned_store.find(key)
    try:
        if not fields.keys() <= set(KERNELS[key.kernel]):
            raise ValueError(f"{key.kernel} has no {', '.join(fields.keys() - set(KERNELS[key.kernel]))}")
        dataclasses.replace(default, **fields)
    except ValueError as error:
        tuned_store.warn_once(f"a stored launch is ignored: {key}: {error}; tune again")
        return {}, "default"
    return fields, source


def _checked(name: Any, fields: Mapping[str, Any]) -> Fields:
    kernel = name.kernel if isinstance(name, Key) else name
    if kernel not in KERNELS:
        raise ValueError(f"override: {kernel!r} is not one of {', '.join(KERNELS)}")
    unknown = [field for field in fields if field not in KERNELS[kernel]]
    if unknown:
        raise ValueError(f"override: {kernel} has no {', '.join(unknown)}; it has {', '.join(KERNELS[kernel])}")
    return tuple(fields.items())
