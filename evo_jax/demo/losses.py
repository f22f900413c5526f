"""The losses of a run, one JSON line per step, written as they come and kept exactly."""

import json
from pathlib import Path
from typing import TextIO

_FILE = "losses.jsonl"


class Losses:
    """losses.jsonl under `out`: what was there of the first `keep` steps stays, the rest is written anew."""

    def __init__(self, out: Path, *, keep: int):
        self.path = out / _FILE
        old = self.path.read_text().splitlines() if keep and self.path.is_file() else []
        records = [json.loads(line) for line in old]
        self.values = [record["loss"] for record in records if record["step"] < keep]
        self._file: TextIO = self.path.open("w")
        for step, loss in enumerate(self.values):
            self._write(step, loss)

    def __enter__(self) -> "Losses":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, loss: float) -> None:
        """Add the loss, in nats per byte, of the next step."""
        self._write(len(self.values), loss)
        self.values.append(loss)

    def _write(self, step: int, loss: float) -> None:
        self._file.write(json.dumps({"step": step, "loss": loss}) + "\n")
        self._file.flush()
