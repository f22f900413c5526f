"""What the border of torch and JAX costs a call: `python -m benchmarks.interop [--rounds N] [--out FILE]`.

Small operations are timed as the jitted function alone, on JAX arrays, and through to_torch_function, on torch tensors:
without gradients, recorded by autograd, and forward with backward. The difference is the overhead, which should stay
below LIMITS; every timing follows a correctness gate. Then how long an array takes to cross, shared and copied.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.run import environment
from benchmarks.timing import Contender, GateError, compare

LIMITS = {"forward": 300, "forward+backward": 600}  # us above the jitted function
_TOLERANCES = {"out": 1e-5, "gradient": 1e-5}


def operations() -> dict[str, tuple[Callable[..., Any], tuple[int, ...]]]:
    """Name: (a function of one array, that array's shape), small enough that a call is mostly overhead."""
    import jax
    import jax.numpy as jnp

    import evo_jax

    params = evo_jax.init_evo_params(jax.random.key(0), 8)
    return {
        "tanh": (jnp.tanh, (16, 16)),
        "flash_attention": (lambda x: evo_jax.flash_attention(x, x, x), (1, 16, 2, 8)),
        "evo_attention": (lambda x: evo_jax.evo_attention(x, params), (1, 2, 16, 8)),
    }


def _forward(fn: Callable[..., Any], x: np.ndarray) -> list[Contender]:
    import jax
    import torch

    from evo_jax.interop import to_torch_function

    jitted, bridged = jax.jit(fn), to_torch_function(fn)
    array, plain = jax.numpy.asarray(x), torch.from_numpy(x)
    recorded = plain.clone().requires_grad_()
    return [
        Contender("jit", lambda: jitted(array).block_until_ready(), lambda: {"out": np.asarray(jitted(array))}),
        Contender("torch", lambda: bridged(plain), lambda: {"out": bridged(plain).numpy()}),
        Contender("torch recorded", lambda: bridged(recorded), lambda: {"out": bridged(recorded).detach().numpy()}),
    ]


def _backward(fn: Callable[..., Any], x: np.ndarray) -> list[Contender]:
    import jax
    import torch

    from evo_jax.interop import to_torch_function

    def both(x: Any, weight: Any) -> Any:
        out, vjp = jax.vjp(fn, x)
        return out, *vjp(weight)

    jitted, bridged = jax.jit(both), to_torch_function(fn)
    array, tensor = jax.numpy.asarray(x), torch.from_numpy(x).requires_grad_()
    weight = np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    wide, given = jax.numpy.asarray(weight), torch.from_numpy(weight)

    def run() -> Any:
        out = bridged(tensor)
        return out, torch.autograd.grad(out, tensor, given)[0]

    def named(results: Any) -> dict[str, np.ndarray]:
        return dict(zip(("out", "gradient"), results, strict=True))

    return [
        Contender(
            "jit",
            lambda: jax.block_until_ready(jitted(array, wide)),
            lambda: named(map(np.asarray, jitted(array, wide))),
        ),
        Contender("torch recorded", run, lambda: named(r.detach().numpy() for r in run())),
    ]


def _crossings(x: np.ndarray) -> list[Contender]:
    import jax
    import torch

    from evo_jax.interop import from_torch, to_torch

    tensor, array = torch.from_numpy(x).clone(), jax.numpy.asarray(x)  # torch aligns its memory as XLA wants it

    def contender(name: str, run: Callable[[], Any]) -> Contender:
        return Contender(name, run, lambda: {"out": np.asarray(run())})

    return [
        contender("copy by numpy", x.copy),
        contender("from_torch", lambda: from_torch(tensor).block_until_ready()),
        contender("from_torch copy=True", lambda: from_torch(tensor, copy=True).block_until_ready()),
        contender("to_torch", lambda: to_torch(array)),
        contender("to_torch copy=False", lambda: to_torch(array, copy=False)),
    ]


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Every row of the report; those of functions have `overhead_us` for each contender above the jitted function."""
    for name, (fn, shape) in operations().items():
        x = np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
        for what, make in (("forward", _forward), ("forward+backward", _backward)):
            row = compare(f"{name} {what} {shape} float32", make(fn, x), _TOLERANCES, rounds)
            alone = row["median_s"]["jit"]
            over = {key: 1e6 * (median - alone) for key, median in row["median_s"].items() if key != "jit"}
            yield row | {"overhead_us": over, "limit_us": LIMITS[what]}
    for size in (1 << 10, 1 << 22):
        yield compare(f"crossing {4 * size:,} bytes", _crossings(np.ones(size, np.float32)), {"out": 0}, rounds)


def line(row: dict[str, Any]) -> str:
    """One row as text, in microseconds."""
    over = row.get("overhead_us", {})
    parts = [
        f"{name} {1e6 * seconds:.1f} us"
        + (f" (overhead {over[name]:.0f} of {row['limit_us']})" if name in over else "")
        for name, seconds in row["median_s"].items()
    ]
    return f"{row['case']}: " + ", ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Print every row, and write them as JSON where asked; 1 where results disagree or a limit is passed."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contender in each case")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report as JSON")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"suite": "interop", "environment": environment(), "rows": []}
    failure = None
    try:
        for row in rows(options.rounds):
            report["rows"].append(row)
            print(line(row), flush=True)
    except GateError as error:
        failure = str(error)
        print(f"GATE FAILED: {failure}", file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report | {"gate_failure": failure}, indent=1) + "\n")
    slow = [
        row["case"] for row in report["rows"] if max(row.get("overhead_us", {"": 0}).values()) > row.get("limit_us", 0)
    ]
    for case in slow:
        print(f"OVER THE LIMIT: {case}", file=sys.stderr)
    return int(failure is not None or bool(slow))


if __name__ == "__main__":
    sys.exit(main())
