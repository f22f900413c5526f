"""Temporary memory of each kind of attention on a GPU that is not there: README's table, and a plot against length.

    python -m benchmarks.memory_table --json benchmarks/results/memory.json --plot docs/memory.png

compiles, for an H100, one forward pass in bfloat16 of one sequence, 32 heads of 128 (hidden size 4,096): the operation
alone, the layer with its projections, and the layer fed 512 tokens at a time; and takes the bytes that XLA allocates
besides arguments, parameters and results. The dense softmax is jax.nn.dot_product_attention, as XLA compiles it.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import evo_jax
from benchmarks.compile_for import compile_once, lower_placed, missing_wheels, versions
from benchmarks.compile_pool import run_in_pool
from benchmarks.compile_table import Progress
from benchmarks.programs import Built, Program
from benchmarks.targets import allow_no_gpu
from benchmarks.ttir import triton_calls

HIDDEN, HEADS, WIDTH, LENGTH, CHUNK = 4096, 32, 128, 8192, 512
LENGTHS = tuple(4**n for n in range(5, 11))  # 1,024 to 1,048,576
DENSE_LENGTHS = tuple(n for n in LENGTHS if n <= 65536)  # beyond, one array of scores passes what an H100 holds
WINDOWED = {"window_size": 512}
KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {  # op of Program, layer, its options
    "Standard": ("", None, {}),
    "Flash": ("flash", evo_jax.FlashAttention, {}),
    "Sliding (W=512)": ("sliding_window", evo_jax.SlidingWindowAttention, WINDOWED),
    "Sparse": ("sparse", evo_jax.SparseAttention, {}),
    "Linear": ("linear", evo_jax.LinearAttention, {}),
    "Multi-scale": ("multiscale", evo_jax.MultiScaleAttention, {}),
    "Evo": ("evo", evo_jax.EvoAttention, {}),
}
ORIGINAL = {"Standard": "~2 GB", "Flash": "~500 MB", "Sliding (W=512)": "~64 MB", "Linear": "~32 MB"}
FORMS = ("operation", "layer", "stream")


def build(kind: str, form: str, length: int) -> Built:
    """The function, and its arguments as shapes; "stream" is the layer, CHUNK tokens at a time."""
    if kind == "Standard":
        return _dense(form, length)
    op, layer, options = KINDS[kind]
    if form == "operation":
        return Program(op, length=length, heads=HEADS, kv_heads=HEADS, width=WIDTH).build()
    make = partial(layer, HIDDEN, HEADS, param_dtype=jnp.bfloat16, **options)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def run(state: Any, x: jax.Array) -> Any:
        module = nnx.merge(graph, state)
        out = (
            module.stream(x, CHUNK, implementation="triton") if form == "stream" else module(x, implementation="triton")
        )
        return out[0] if isinstance(out, tuple) else out

    return run, (state, jax.ShapeDtypeStruct((1, length, HIDDEN), "bfloat16"))


def _dense(form: str, length: int) -> Built:
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    heads = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), "bfloat16")
    if form == "operation":
        return attend, (heads, heads, heads)

    def layer(weights: Any, x: jax.Array) -> jax.Array:
        query, key, value = ((x @ weight).reshape(heads.shape) for weight in weights[:3])
        return attend(query, key, value).reshape(x.shape) @ weights[3]

    matrix = jax.ShapeDtypeStruct((HIDDEN, HIDDEN), "bfloat16")
    return layer, ([matrix] * 4, jax.ShapeDtypeStruct((1, length, HIDDEN), "bfloat16"))


def measure(kind: str, form: str, length: int) -> dict[str, Any]:
    """{"temp": bytes}, or {"failures": [why]}; runs in a worker."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        lowered = lower_placed(*build(kind, form, length), "h100")
        return {"temp": compile_once(lowered, triton_calls(lowered), "h100")[0].temp_bytes}
    except Exception as error:
        return {"failures": [f"{type(error).__name__}: {str(error)[:300]}"]}


def tasks() -> dict[str, tuple[str, str, int]]:
    """What is compiled: every form at LENGTH, and operations and streams at all lengths."""
    table = [(kind, form, LENGTH) for kind in KINDS for form in FORMS if (kind, form) != ("Standard", "stream")]
    dense = [("Standard", "operation", n) for n in DENSE_LENGTHS]
    plot = [(kind, form, n) for kind in list(KINDS)[1:] for form in ("operation", "stream") for n in LENGTHS]
    return {" ".join(map(str, task)): task for task in (*table, *dense, *plot)}


def table_of(results: dict[str, dict[str, Any]]) -> str:
    """README's table, in Markdown."""
    lines = [
        "| kind | operation | layer | layer, 512 tokens at a time | the original's documentation |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        cells = [_size(results.get(f"{kind} {form} {LENGTH}", {}).get("temp")) for form in FORMS]
        lines.append(f"| {' | '.join([kind, *cells, ORIGINAL.get(kind, '-')])} |")
    return "\n".join(lines)


def _size(number: int | None) -> str:
    if not number:
        return "-" if number is None else "0"
    if number >= 1e9:
        return f"{number / 1e9:.1f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e7 else f"{number / 1e6:.1f} MB"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bytes against length, both logarithmic: of operations, and of layers fed CHUNK tokens at a time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    titles = {"operation": "The operation alone", "stream": f"The layer, {CHUNK} tokens at a time"}
    for axes, (form, title) in zip(panels, titles.items(), strict=True):
        lines: dict[tuple[tuple[int, int], ...], list[str]] = {}  # kinds that take the same share one line
        for kind in KINDS:
            found = ((n, results.get(f"{kind} {form} {n}", {}).get("temp")) for n in LENGTHS)
            lines.setdefault(tuple((n, size) for n, size in found if size), []).append(kind)
        for points, kinds in lines.items():
            colour = f"C{list(KINDS).index(kinds[0])}"
            if not points and form == "operation":
                axes.plot([], [], color=colour, label=f"{', '.join(kinds)}: none")
            elif points:
                lengths, sizes = zip(*points, strict=True)
                axes.loglog(lengths, [n / 2**20 for n in sizes], marker="o", color=colour, label=", ".join(kinds))
        axes.axhline(80 * 1024, color="grey", linestyle=":", label="80 GiB")
        axes.set(xlabel="tokens", title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small")
    panels[0].set_ylabel("MiB besides arguments and results")
    figure.suptitle("Temporary memory of a forward pass on H100: 32 heads of 128, bfloat16, one sequence")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Compile everything, print the table, and return the exit status."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("python -m benchmarks.memory_table", description=summary)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all bytes here")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw memory against length; needs matplotlib")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at a time")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    allow_no_gpu()
    if absent := missing_wheels():
        parser.error(f"nothing can be compiled: {absent}")
    for path in filter(None, (options.json, options.plot)):
        if not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    wanted = tasks()
    progress = Progress(len(wanted))
    results = run_in_pool(measure, wanted, options.jobs, 300, progress.step)
    print(table_of(results))
    failures = [f"FAILED {key}: {line}" for key, result in results.items() for line in result.get("failures", ())]
    print(*failures, sep="\n", end="\n" * bool(failures))
    if options.json:
        content = {
            "versions": versions(),
            "target": "h100",
            "temp_bytes": {k: r.get("temp") for k, r in results.items()},
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
