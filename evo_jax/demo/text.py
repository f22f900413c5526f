"""The demo's text: the running Python's own standard library, split by module into train and held-out."""

import hashlib
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from evo_jax.demo.settings import DemoError

_SKIPPED_MODULES = frozenset({"encodings", "pydoc_data"})  # generated tables, not written source
_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"})
_HELD_OUT_ONE_IN = 16
_LEAST_BYTES = 1 << 16


class Corpus(NamedTuple):
    """Train and held-out text, with the names of the top-level modules each was read from."""

    train: bytes
    held_out: bytes
    train_modules: tuple[str, ...]
    held_out_modules: tuple[str, ...]


def is_held_out(module: str) -> bool:
    """Whether a top-level module belongs to the held-out part: decided by its name alone, so the split never moves."""
    return hashlib.sha256(module.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def read_corpus(root: str | Path | None = None) -> Corpus:
    """Read the standard library's sources from `root` (default: where the running Python keeps them).

    Raises:
        DemoError: if there is next to no source text, as where Python ships compiled modules only.
    """
    root = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
    texts = {name: _module_text(root, name) for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES)}
    texts = {name: text for name, text in texts.items() if text}
    held_out_modules = tuple(name for name in texts if is_held_out(name))
    train_modules = tuple(name for name in texts if not is_held_out(name))
    train = b"".join(texts[name] for name in train_modules)
    held_out = b"".join(texts[name] for name in held_out_modules)
    if min(len(train), len(held_out)) < _LEAST_BYTES:
        raise DemoError(
            f"the demo trains on the standard library's .py sources, but {str(root)!r} holds only {len(train)} bytes "
            f"of train and {len(held_out)} of held-out text; this Python seems to ship compiled modules (.pyc or a "
            "zip) only: run the demo with a Python that has its sources installed"
        )
    return Corpus(train, held_out, train_modules, held_out_modules)


def _module_text(root: Path, name: str) -> bytes:
    """All source bytes of one top-level module (a file or a package), in sorted order of path; empty where absent."""
    files = [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]
    kept = [path for path in files if path.is_file() and not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[1:])]
    return b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in kept)
