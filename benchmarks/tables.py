"""Markdown and plots of a stored report: `python -m benchmarks.tables FILE [--plots DIR]`.

The table goes to standard output. With --plots, a PNG for each operation: time and memory against length, both
logarithmic, a line for each contender.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_COLUMNS = (
    "case",
    "contender",
    "ms",
    "±",
    "ours is",
    "TFLOP/s",
    "GB/s",
    "of matmul",
    "of copy",
    "temp MB",
    "growth MB",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="what `python -m benchmarks.run` wrote")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw, with matplotlib")
    arguments = parser.parse_args(argv)
    try:
        report = json.loads(arguments.file.read_text())
    except (OSError, ValueError) as error:
        report = {}
        print(f"tables: {arguments.file}: {error}", file=sys.stderr)
    if not isinstance(report, dict) or not {"rows", "environment"} <= report.keys():
        print(f"tables: {arguments.file} is no report of benchmarks.run", file=sys.stderr)
        return 2
    print(markdown(report))
    if arguments.plots:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            print("tables: --plots needs matplotlib: pip install 'evo-jax[demo]'", file=sys.stderr)
            return 1
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for path in plots(report, arguments.plots):
            print(path, file=sys.stderr)
    return 0


def markdown(report: dict[str, Any]) -> str:
    """Where it was measured, a table of all rows, and what was not measured and why."""
    lines = [_heading(report), "", _cells(_COLUMNS), _cells(["---"] * len(_COLUMNS))]
    faults = [f"{row['case']}: {row['error']}" for row in report["rows"] if "error" in row]
    for row in report["rows"]:
        for name, entry in row.get("contenders", {}).items():
            if entry["status"] == "ok":
                lines.append(_cells([row["case"], name, *_figures(row, entry)]))
            else:
                faults.append(f"{row['case']}: {name} {entry['status']}, not timed: {entry['reason']}")
    faults += [f"{title}: left out for want of time" for title in report.get("left_out", [])]
    if "ceilings_error" in report:
        faults.append(f"no ceilings: {report['ceilings_error']}")
    if report.get("absent"):
        faults.append(f"not installed: {', '.join(report['absent'])}")
    return "\n".join(lines + ([""] + [f"- {fault}" for fault in faults] if faults else []))


def _heading(report: dict[str, Any]) -> str:
    where = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    parts = [where["device"], f"{where['cores']} cores", f"Python {where['python']}", versions, where["date"]]
    parts += [f"commit {where['commit']}"] if where.get("commit") else []
    ceilings = report.get("ceilings") or {}
    if ceilings:
        rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in ceilings["flops_per_s"].items())
        parts.append(f"ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s, matmul {rates}")
    return "; ".join(parts) + "."


def ours_of(row: Row) -> float | None:
    """Seconds of the first of ours that was measured."""
    entries = row["contenders"].items()
    return next((e["median_s"] for name, e in entries if name.startswith("evo_jax") and "median_s" in e), None)


def _figures(row: Row, entry: dict[str, Any]) -> list[str]:
    ours, seconds = ours_of(row), entry["median_s"]
    ratio = "" if ours is None or ours == seconds else f"{seconds / ours:.2f}x as fast"
    cells = [f"{1e3 * seconds:.4g}", f"{100 * entry['spread']:.0f}%", ratio]
    cells += [_scaled(entry.get(name), scale) for name, scale in (("flops_per_s", 1e-12), ("bytes_per_s", 1e-9))]
    cells += [_scaled(entry.get(name), 100, "%") for name in ("share_of_matmul", "share_of_copy")]
    return cells + [_scaled(entry.get(name), 1e-6) for name in ("temp_bytes", "growth_bytes")]


def _scaled(value: float | None, scale: float, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:.3g}{unit}"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plots(report: dict[str, Any], folder: Path) -> Iterator[Path]:
    """One PNG for each operation, and batch, heads, width and dtype, that was measured at two lengths or more."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in report["rows"]:
        if "contenders" in row and row["op"] != "generate":
            rest = tuple(value for name, value in row["shape"].items() if name != "length")
            families.setdefault((row["op"], *rest), []).append(row)
    for (op, batch, heads, width, dtype), rows in families.items():
        if len({row["shape"]["length"] for row in rows}) > 1:
            path = folder / f"{op}_b{batch}_h{heads}_d{width}_{dtype}.png"
            _draw(rows, f"{op}, B {batch}, H {heads}, D {width}, {dtype}, {report['environment']['device']}", path)
            yield path


def _draw(rows: list[Row], title: str, path: Path) -> None:
    """Time above, memory below; one column for each pass."""
    from matplotlib.figure import Figure

    passes = sorted({row["passes"] for row in rows})
    figure = Figure(figsize=(5.5 * len(passes), 8), layout="constrained")
    panels: Any = figure.subplots(2, len(passes), squeeze=False)
    for column, name in enumerate(passes):
        chosen = sorted((row for row in rows if row["passes"] == name), key=lambda row: row["shape"]["length"])
        _lines(panels[0][column], chosen, _milliseconds, f"{name}: ms")
        _lines(panels[1][column], chosen, _megabytes, "memory: MB besides arguments and results")
    panels[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _lines(axes: Any, rows: list[Row], value: Any, label: str) -> None:
    names = dict.fromkeys(name for row in rows for name in row["contenders"])
    for number, name in enumerate(names):
        points = [(row["shape"]["length"], value(row["contenders"].get(name, {}))) for row in rows]
        points = [(length, y) for length, y in points if y]
        width = 2.5 if name.startswith("evo_jax") else 1.2
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=name, linewidth=width,
                  color=f"C{number}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    axes.set_xticks(lengths := sorted({row["shape"]["length"] for row in rows}), labels=[str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _milliseconds(entry: dict[str, Any]) -> float | None:
    return 1e3 * entry["median_s"] if "median_s" in entry else None


def _megabytes(entry: dict[str, Any]) -> float | None:
    """The process's growth where it was measured, else the compiler's figure; nothing is drawn as nothing."""
    size = entry.get("growth_bytes") or entry.get("temp_bytes")
    return size / 1e6 if size else None


if __name__ == "__main__":
    sys.exit(main())
