"""Checks, on import, that `pallas_kernels` and `reference` are the packages installed together with evo_jax."""

import importlib.util
import sys
from pathlib import Path


def check(home: Path, names: tuple[str, ...] = ("pallas_kernels", "reference")) -> None:
    """Raise ImportError, naming the file in the way, unless each package is found in the directory `home`."""
    for name in names:
        found = _where(name)
        if found is None:
            raise ImportError(f"evo_jax needs its own package {name!r} in {home}, and there is none: reinstall evo-jax")
        if found.resolve() != home / name / "__init__.py":
            raise ImportError(
                f"evo_jax needs its own package {name!r} from {home}, but {found} comes first on sys.path and hides "
                "it: rename that file or package, or move its directory behind evo_jax's"
            )


def _where(name: str) -> Path | None:
    """The file that `import name` gives: a package's __init__.py, or whatever is in its way."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None) if module is not None else importlib.util.find_spec(name)
    origin = getattr(module, "__file__", None) or getattr(spec, "origin", None)
    if origin is not None:
        return Path(origin)
    folders = list(getattr(spec, "submodule_search_locations", None) or ())
    return Path(folders[0]) / "__init__.py" if folders else None


check(Path(__file__).resolve().parent.parent)
