"""Settings of the demo: what decides its losses, kept beside its checkpoints so that a resumed run uses the same."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
BACKENDS = ("auto", "triton", "reference", "interpret")
_FILE = "settings.json"


class DemoError(Exception):
    """Something the user can put right; shown without a traceback."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What decides the losses of a run, together with the machine and the standard library it reads.

    Raises:
        DemoError: a value that no model can have.
    """

    steps: int = 3000
    width: int = 128
    layers: int = 2
    heads: int = 4
    seq_len: int = 128
    batch_size: int = 4
    lr: float = 6e-3
    seed: int = 0
    attention: str = "evo"
    dtype: str = "float32"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "width", "layers", "heads", "batch_size"):
            if getattr(self, name) < 1:
                raise DemoError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.seq_len < 2 or self.seq_len % 2:
            raise DemoError(f"--seq-len {self.seq_len} must be even and at least 2")
        if self.width % self.heads:
            raise DemoError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        if not self.lr > 0:
            raise DemoError(f"--lr {self.lr} must be positive")
        if not 0 <= self.seed < 2**31:
            raise DemoError(f"--seed {self.seed} must be at least 0 and below 2**31")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def load(folder: Path, given: Mapping[str, Any], warn: Callable[[str], Any]) -> Settings:
    """The settings of the run in `folder`; `given` may repeat them, and may change only the number of steps.

    Raises:
        DemoError: there is no run in `folder`, or `given` contradicts it.
    """
    saved = _read(folder, "--resume", "start one without --resume")
    for name, value in given.items():
        if name != "steps" and saved[name] != value:
            flag = "--" + name.replace("_", "-")
            raise DemoError(
                f"--resume: the run in {str(folder)!r} has {flag} {saved[name]}, not {value}; leave {flag} out"
            )
    if (steps := given.get("steps", saved["steps"])) != saved["steps"]:
        warn(f"--steps {steps}, earlier {saved['steps']}: the learning rates, and so the losses, differ from here")
    return Settings(**{**saved, **given})


def of_checkpoint(folder: Path) -> Settings:
    """The settings of the run in `folder`, whose model is to be used.

    Raises:
        DemoError: there is no run in `folder`.
    """
    return Settings(**_read(folder, "--checkpoint", "give the --out folder of a demo"))


def _read(folder: Path, flag: str, way_out: str) -> dict[str, Any]:
    path = folder / _FILE
    if not path.is_file():
        raise DemoError(f"{flag}: there is no run in {str(folder)!r} ({_FILE} is missing); {way_out}")
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise DemoError(f"{flag}: {str(path)!r} is no JSON: {error}") from None
    if not isinstance(saved, dict) or set(saved) != set(Settings.names()):
        raise DemoError(f"{flag}: {str(path)!r} does not hold the settings of a run: {', '.join(Settings.names())}")
    return saved
