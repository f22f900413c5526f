"""How much a process grows at its peak in one call, measured in a process of its own: `growth(name, kind, shape)`.

Run as a module, it is that process: it builds and compiles the call, resets the kernel's high-water mark of resident
memory (Linux), makes the call once, and prints the growth in bytes.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import layers
from benchmarks.shapes import EvoShape


def _torch(kind: str, shape: EvoShape) -> Callable[[], Any]:
    return layers.torch_layer(kind, shape, True).run


def _jax(kind: str, shape: EvoShape) -> Callable[[], Any]:
    fn, args = layers.jax_call(kind, shape, True, "reference")
    compiled = fn.lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


# Forward and backward of a layer.
CALLS = {"torch": _torch, "evo_jax reference": _jax}


def growth(name: str, kind: str, shape: EvoShape) -> int:
    """Bytes by which a fresh process grows at its peak during one call of CALLS[name] for that kind of layer."""
    sizes = map(str, (shape.batch, shape.heads, shape.length, shape.width))
    command = [sys.executable, "-m", "benchmarks.peak", name, kind, *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _main(name: str, kind: str, *sizes: str) -> None:
    batch, heads, length, width = map(int, sizes)
    run = CALLS[name](kind, EvoShape(batch, heads, length, width))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _resident("VmRSS")
    run()
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    _main(*sys.argv[1:])
