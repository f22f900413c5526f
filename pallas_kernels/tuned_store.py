"""Launches that were measured: the user's cache, one file per key, and the tables that ship with the package."""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax

FORMAT = 1
_KEY = ("kernel", "precision", "width", "length", "mask")
_FOUND: dict[Path, dict[str, Any]] = {}  # read once: the launches of one program must not change while it is traced
_WARNED: set[str] = set()


def device() -> Any:
    """This process's first CUDA device, or None without one."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


def device_kind() -> str | None:
    """The name of that device."""
    return getattr(device(), "device_kind", None)


@functools.cache
def capability() -> tuple[int, int] | None:
    """The compute capability of that device, as (9, 0)."""
    found = str(getattr(device(), "compute_capability", ""))
    return (int(found.split(".")[0]), int(found.split(".")[1])) if re.fullmatch(r"\d+\.\d+", found) else None


def find(key: Any) -> tuple[dict[str, Any], str]:
    """(fields of the launch, where they are from: "cache", "table" or "default"); nothing without a CUDA device."""
    kind = device_kind()
    if kind is None:
        return {}, "default"
    if found := _read(kind, key):
        return found, "cache"
    found = _table(slug(kind)).get(tuple(_named(key).values()), {})
    return found, "table" if found else "default"


def has(key: Any) -> bool:
    """Whether the user's cache holds a result for `key` on this device, be it that the default is best."""
    kind = device_kind()
    try:
        return kind is not None and path_of(kind, key).is_file()
    except (OSError, RuntimeError) as error:
        warn_once(f"stored launches cannot be read: {error}")
        return False


def save(device: str, key: Any, launch: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Store what was measured, whole or not at all: other processes may read and write the same key meanwhile.

    A key is a file, so that writers of different keys never meet, and the last writer of one key wins.
    """
    path = path_of(device, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "device": device, "key": _named(key), "launch": launch, **facts}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _FOUND[path] = launch
    return path


def folder() -> Path:
    """EVO_CACHE_DIR, else evo-jax in XDG_CACHE_HOME, else in ~/.cache."""
    if given := os.environ.get("EVO_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evo-jax"


def path_of(device: str, key: Any) -> Path:
    """The file of one key: results of another device, other kernels or another JAX are never found."""
    versions = f"kernels-{kernels_version()}-jax-{jax.__version__}"
    return folder() / "launches" / slug(device) / versions / f"{slug(str(key))}.json"


def slug(text: str) -> str:
    """Fit for the name of a file: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@functools.cache
def kernels_version() -> str:
    """A digest of the kernels' sources: finer than the library's version, whose kernels may change before it does."""
    sources = {p.name: p.read_bytes() for p in resources.files("pallas_kernels").iterdir() if p.name.endswith(".py")}
    return hashlib.sha256(b"".join(sources[name] for name in sorted(sources))).hexdigest()[:12]


def tables() -> Any:
    """The folder of what ships as data."""
    return resources.files("pallas_kernels") / "tables"


def forget() -> None:
    """Read every file afresh."""
    _FOUND.clear()
    _table.cache_clear()


def _read(kind: str, key: Any) -> dict[str, Any]:
    """What the cache holds, or nothing: whatever is wrong with it is worth one warning, and no operation."""
    try:
        path = path_of(kind, key)
    except RuntimeError as error:  # there is no home
        warn_once(f"stored launches cannot be read: {error}; or set EVO_CACHE_DIR")
        return {}
    if path not in _FOUND:
        _FOUND[path] = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _FOUND[path] = _launch_in(path, key)
    return _FOUND[path]


def _launch_in(path: Path, key: Any) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_bytes())
        if entry["format"] != FORMAT or entry["key"] != _named(key):
            raise ValueError("not what its name says")
        return _checked(entry["launch"])
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:  # a UnicodeDecodeError is a ValueError
        warn_once(f"a stored launch is ignored: {path}: {error}; delete the file, or tune again")
        return {}


def _checked(launch: Any) -> dict[str, Any]:
    if not isinstance(launch, dict) or not all(isinstance(v, int) and v >= 0 for v in launch.values()):
        raise ValueError(f"{launch!r} is no launch")
    return launch


def warn_once(message: str) -> None:
    """One warning in a process: corrupt files seldom come alone."""
    if not _WARNED:
        _WARNED.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _table(name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The shipped table of one device kind, {values of a key: launch}."""
    file = tables() / f"{name}.json"
    if not file.is_file():
        return {}
    table = json.loads(file.read_text(encoding="utf-8"))
    return {tuple(row["key"][name] for name in _KEY): _checked(row["launch"]) for row in _rows(table)}


def _rows(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    missing = [name for name in ("device", "provenance", "launches") if name not in table]
    if missing or not all(table["provenance"].get(name) for name in ("evo_jax", "jax", "driver", "date", "command")):
        raise ValueError(f"a shipped table lacks {', '.join(missing) or 'part of its provenance'}")
    yield from table["launches"]


def _named(key: Any) -> dict[str, Any]:
    return {name: getattr(key, name) for name in _KEY}
