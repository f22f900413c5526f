"""Measure a suite: `python -m benchmarks.run --suite cpu|gpu [--op OP] [--quick] [--originals DIR] [--out FILE]`.

Each contender is judged before it is timed; one that is wrong or raises is reported in its row, and the run goes on.
Contenders of a row take turns, and are compared by their medians. The JSON, written again after every row, holds the
raw samples, this device's measured ceilings, versions, driver, commit and date; `python -m benchmarks.tables` makes
tables and plots of it. On a CPU, large outputs cost page faults: what the environment tells malloc, and so
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which avoids most of them, is recorded.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "triton", "tokamax", "flash-linear-attention", "evo-jax")
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "XLA_FLAGS", "OMP_NUM_THREADS")
_ROOT = Path(__file__).resolve().parents[1]
GPU_MINUTES = 6.5  # after which no row is begun: the suite is to finish in eight
INTERRUPTED = 130  # the shell's exit status of a command that ended on Ctrl-C


def environment() -> dict[str, Any]:
    """Where and with what a report was made."""
    import jax

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _said("git", "-C", str(_ROOT), "describe", "--always", "--dirty"),
        "device": jax.devices()[0].device_kind,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "settings": {name: os.environ.get(name) for name in _SETTINGS},
    }


def _said(*command: str) -> str | None:
    """The first line that a command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]


def slug(where: dict[str, Any]) -> str:
    """A name for a folder: nvidia-h200, cpu-2-cores."""
    name = where["device"] if where["device"] != "cpu" else f"cpu {where['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite; 1 where something of ours was wrong or failed, 130 where it was interrupted."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device
    if arguments.suite == "cpu":
        _stay_on_the_cpu()
    from benchmarks import peers

    report = {"suite": arguments.suite, "environment": environment(), "absent": peers.absent()}
    report |= {"ceilings": {}, "rows": [], "left_out": [], "complete": False}
    out = arguments.out or Path("runs/benchmarks") / slug(report["environment"]) / f"{arguments.suite}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _fill(report, arguments, out)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {out}", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
        _write(report, out)
    print(f"{len(report['rows'])} rows in {out}; `python -m benchmarks.tables {out}` makes tables and plots of them")
    return 1 if any(map(ours_failed, report["rows"])) else 0


def _stay_on_the_cpu() -> None:
    """Unless JAX_PLATFORMS says otherwise; JAX may have been imported, but has not looked for devices."""
    import jax

    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def _parser() -> argparse.ArgumentParser:
    from benchmarks.suites import OPS, SUITES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--op", action="append", choices=OPS, default=[], help="repeatable: only these operations")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="TEXT",
        help="repeatable: beside ours only peers with this in their names",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the shortest shapes, few samples")
    parser.add_argument("--rounds", type=_positive, default=15, help="turns of each contender (default %(default)s)")
    parser.add_argument(
        "--seconds", type=_seconds, metavar="S", help="at most for a contender of a case (cpu: 3, gpu: 0.8)"
    )
    parser.add_argument("--longest", type=_positive, default=1 << 30, help="leave out longer sequences")
    parser.add_argument("--no-growth", action="store_true", help="do not measure memory in processes of their own")
    parser.add_argument(
        "--originals", action="append", type=_folder, default=[], metavar="DIR",
        help="repeatable: a folder from which evo_attn or complexity can be imported",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="M", help=f"begin no row later (gpu suite: {GPU_MINUTES:g})")
    parser.add_argument(
        "--out", type=_file, metavar="FILE", help="the report (default runs/benchmarks/<device>/<suite>.json)"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _seconds(text: str) -> float:
    if not (seconds := float(text)) > 0:
        raise ValueError(text)
    return seconds


def _folder(text: str) -> Path:
    if not (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not next(parent for parent in path.parents if parent.exists()).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is in no folder")
    return path


def _fill(report: dict[str, Any], arguments: argparse.Namespace, out: Path) -> None:
    """Measure row by row, writing after each."""
    from benchmarks.ceilings import ceilings
    from benchmarks.measure import Effort
    from benchmarks.suites import SUITES, Options

    on_cpu, start = arguments.suite == "cpu", time.monotonic()
    seconds = arguments.seconds or (0.3 if arguments.quick else 3.0 if on_cpu else 0.8)
    rounds = min(arguments.rounds, 5) if arguments.quick else arguments.rounds
    growth = on_cpu and not arguments.quick and not arguments.no_growth
    effort = Effort(rounds, seconds, growth, tuple(map(str, arguments.originals)))
    minutes = arguments.minutes if arguments.minutes is not None else None if on_cpu else GPU_MINUTES
    chosen = Options(
        tuple(arguments.op), arguments.longest, arguments.quick, tuple(arguments.originals), tuple(arguments.peer)
    )
    entries = list(SUITES[arguments.suite](chosen))
    try:
        report["ceilings"] = ceilings(["float32"] if on_cpu else ["bfloat16", "float32"], seconds)
    except Exception as error:  # rows are worth having without shares of them
        report["ceilings_error"] = _reason(error)
        print(f"no ceilings: {report['ceilings_error']}", file=sys.stderr)
    for number, (title, measured) in enumerate(entries):
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            report["left_out"].append(title)
            continue
        _progress(number, len(entries), start, title)
        try:
            row = measured(effort, report["ceilings"])
        except Exception as error:  # no right result to compare with, for want of memory perhaps
            row = {"case": title, "error": _reason(error)}
        if not on_cpu:
            _free()
        report["rows"].append(row)
        _write(report, out)
        _progress(None, len(entries), start, "")
        print(line(row), flush=True)
    for title in report["left_out"]:
        print(f"{title}: left out, {minutes:g} minutes were over")
    report["complete"] = not report["left_out"]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _free() -> None:
    """Give back what the last row held on the device, which JAX and torch share."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write(report: dict[str, Any], out: Path) -> None:
    """At once or not at all."""
    part = out.with_name(f"{out.name}.part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(out)


def _progress(number: int | None, total: int, start: float, title: str) -> None:
    if not sys.stderr.isatty():
        return
    text = ""
    if number is not None:
        bar = "#" * (30 * number // total)
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        text = f"[{bar:.<30}] {number}/{total} {minutes}:{seconds:02} {title}"
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def line(row: dict[str, Any]) -> str:
    """One row as text: medians in ms and ratios to ours, or what went wrong."""
    if "error" in row:
        return f"{row['case']}: FAILED: {row['error']}"
    entries, parts = row["contenders"], []
    first = next((entry["median_s"] for entry in entries.values() if "median_s" in entry), None)
    for name, entry in entries.items():
        if "median_s" in entry:
            parts.append(f"{name} {1e3 * entry['median_s']:.3f} ms ({entry['median_s'] / first:.2f}x)")
        else:
            parts.append(f"{name} {entry['status'].upper()} ({entry['reason'][:80]})")
    return f"{row['case']}: " + ", ".join(parts)


def ours_failed(row: dict[str, Any]) -> bool:
    """Whether something of ours was wrong or raised; what a peer does is its own affair."""
    entries = row.get("contenders", {}).items()
    return "error" in row or any(name.startswith("evo_jax") and entry["status"] != "ok" for name, entry in entries)


if __name__ == "__main__":
    sys.exit(main())
