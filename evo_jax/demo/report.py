"""What the demo leaves to look at: the table of bits per byte and loss.png."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table


def table(bits_per_byte: Mapping[str, float], held_out: int) -> Table:
    """Bits per byte of each model or program, best first."""
    shown = Table(title=f"Held-out text, {held_out:,} bytes")
    shown.add_column("")
    shown.add_column("bits per byte", justify="right")
    for name, value in sorted(bits_per_byte.items(), key=lambda item: item[1]):
        shown.add_row(name, f"{value:.3f}")
    return shown


def printable(text: bytes) -> str:
    """Text that is safe on a terminal: what a model writes may hold control characters."""
    decoded = text.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in decoded)


def save_scores(path: Path, bits_per_byte: Mapping[str, float]) -> None:
    """The table again, for programs."""
    path.write_text(json.dumps(bits_per_byte, indent=2) + "\n")


def plot_losses(path: Path, losses: Sequence[float], bits_per_byte: Mapping[str, float]) -> None:
    """The training loss in bits per byte, with a running mean, and the figures of the table as level lines."""
    bits = np.asarray(losses) / math.log(2)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(bits, color="0.75", linewidth=0.8, label="training, each step")
    window = max(1, len(bits) // 50)
    smooth = np.convolve(bits, np.full(window, 1 / window), mode="valid")
    axes.plot(np.arange(len(smooth)) + window - 1, smooth, color="C0", label=f"training, mean of {window}")
    for index, (name, value) in enumerate(bits_per_byte.items(), start=1):
        axes.axhline(value, color=f"C{index}", linestyle="--", linewidth=1, label=f"held out: {name}, {value:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", title="python -m evo_jax demo")
    axes.legend()
    figure.savefig(path, dpi=120)
