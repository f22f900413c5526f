"""The demo's progress: a bar with loss, tokens per second and time left on a terminal, a few lines elsewhere."""

import math
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evo_jax.demo.settings import Settings

_LINES = 10
_RECENT = 20


class Meter:
    """Shows a run's progress; a context manager."""

    def __init__(self, console: Console, settings: Settings, done: int):
        self._console, self._settings, self._first = console, settings, done
        self._started = time.perf_counter()
        self._compiled = self._started
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("compiling", total=settings.steps, completed=done)

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def advance(self, losses: Sequence[float]) -> None:
        """Show the state after one more step; the first is left out of the speed, for it includes compilation."""
        now, done = time.perf_counter(), len(losses)
        if done == self._first + 1:
            self._compiled = now
            self._console.print(f"compiled in {now - self._started:.1f} s")
        recent = losses[-_RECENT:]
        loss = sum(recent) / len(recent) / math.log(2)
        steps_per_second = (done - self._first - 1) / max(now - self._compiled, 1e-9)
        tokens = steps_per_second * self._settings.batch_size * self._settings.seq_len
        line = f"loss {loss:.3f} bits/byte, {tokens:,.0f} tokens/s"
        self._bar.update(self._task, completed=done, description=line)
        total = self._settings.steps
        if not self._console.is_terminal and (done % -(-total // _LINES) == 0 or done == total):
            left = (total - done) / steps_per_second if steps_per_second else math.nan
            self._console.print(f"step {done}/{total}: {line}, {left:.0f} s left")
