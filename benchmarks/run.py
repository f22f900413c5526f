"""Measure a suite and print it: `python -m benchmarks.run --suite cpu|gpu [--op OP] [--out FILE]`.

Every timing follows a correctness gate; contenders run interleaved and are compared by medians of the same run. The
JSON holds the raw samples, versions, device and date. On a CPU, large outputs cost page faults: MALLOC_MMAP_THRESHOLD_
and MALLOC_TRIM_THRESHOLD_ are recorded as they were set.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "triton", "evo-jax")
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "XLA_FLAGS", "OMP_NUM_THREADS")


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
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "settings": {name: os.environ.get(name) for name in _SETTINGS},
    }


def line(row: dict[str, Any]) -> str:
    """One row as text: medians in ms and ratios to the first contender, or bytes."""
    if "temp_bytes" in row:
        parts = [f"{name} {size / 1e6:.2f} MB" for name, size in row["temp_bytes"].items()]
    else:
        parts = [f"{name} {1e3 * s:.3f} ms ({row['ratio'][name]:.2f}x)" for name, s in row["median_s"].items()]
        if "copy_s" in row:
            parts.append(f"copy {1e3 * row['copy_s']:.3f} ms")
        if "ns_per_token" in row:
            parts.append(f"{row['ns_per_token']:.0f} ns/token")
    return f"{row['case']}: " + ", ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run a suite; 1 where a gate failed, after which nothing more is timed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device
    from benchmarks.suites import OPS, SUITES, Options
    from benchmarks.timing import GateError

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--rounds", type=int, default=Options().rounds, help="calls of each contender in each case")
    parser.add_argument("--longest", type=int, default=Options().longest, help="leave out longer sequences")
    parser.add_argument("--op", action="append", choices=OPS, default=[], help="repeatable: only these operations")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report as JSON")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"suite": options.suite, "environment": environment(), "rows": []}
    failure = None
    try:
        for row in SUITES[options.suite](Options(options.rounds, options.longest, tuple(options.op))):
            report["rows"].append(row)
            print(line(row), flush=True)
    except GateError as error:
        failure = str(error)
        print(f"GATE FAILED: {failure}", file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report | {"gate_failure": failure}, indent=1) + "\n")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
