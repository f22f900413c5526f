"""Results of compilations in the user's cache folder, found again by the content of what was compiled."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pallas_kernels import tuned_store


def folder() -> Path:
    """Where they lie: `compile` in the folder of the library's tuning results."""
    return tuned_store.folder() / "compile"


def key_of(*parts: str) -> str:
    """One name for all of `parts`, which must say everything that the result depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(key: str) -> dict[str, Any] | None:
    """What was stored under `key`; None if nothing was, or nothing that can be read."""
    try:
        found = json.loads((folder() / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def store(key: str, content: dict[str, Any]) -> None:
    """Write whole or not at all; a folder that cannot be written to stores nothing."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder(), prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file)
            os.replace(name, folder() / f"{key}.json")
        except OSError:
            os.unlink(name)
            raise
