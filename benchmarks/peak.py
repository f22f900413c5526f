"""How much a process grows at its peak in one call, measured in a process of its own: `growth(op, shape, ...)`.

Run as a module, it is that process: it builds and compiles the call, resets the kernel's high-water mark of resident
memory (Linux), makes the call once, and prints the growth in bytes.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape

TIMEOUT = 300  # seconds


def growth(op: str, shape: Shape, gradient: bool, name: str, folders: list[str]) -> int | None:
    """Bytes by which a fresh process grows at its peak during one call; None where that cannot be measured."""
    request = {"op": op, "shape": asdict(shape), "gradient": gradient, "name": name, "folders": folders}
    command = [sys.executable, "-m", "benchmarks.peak", json.dumps(request)]
    here = Path(__file__).parents[1]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=here, timeout=TIMEOUT)
        return int(done.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _main(request: dict[str, Any]) -> None:
    from benchmarks.suites import case

    folders = [Path(folder) for folder in request["folders"]]
    shape = Shape(**request["shape"])
    contender = case(request["op"], shape, request["gradient"], folders).make[request["name"]]()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _resident("VmRSS")
    contender.run()
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
