"""The command line, `python -m evo_jax <command>`: reads the arguments; each command imports what it needs itself."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from evo_jax._version import __version__
from evo_jax.demo.model import ATTENTION
from evo_jax.demo.settings import BACKENDS, DTYPES, DemoError, Settings

_DEMO_LIBRARIES = {"optax": "optax", "orbax": "orbax-checkpoint", "rich": "rich", "matplotlib": "matplotlib"}
INTERRUPTED = 130  # the shell's exit status of a command that ended on Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evo_jax", description="Attention layers for JAX of O(N) memory.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add_demo(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small language model on the standard library's sources",
        description="Train a causal byte-level language model on the source files of this Python's standard library, "
        "with some of its modules held out, and compare it with gzip, bz2 and an order-0 model on the held-out bytes.",
        epilog=f"Ctrl-C saves a checkpoint and exits with status {INTERRUPTED}; --resume goes on from it, "
        "to the same losses as a run that was never stopped.",
    )
    default = Settings()
    for name, meaning in _NUMBERS.items():
        value = getattr(default, name)
        flag = "--" + name.replace("_", "-")
        demo.add_argument(flag, type=type(value), metavar="N", help=f"{meaning} (default {value})")
    demo.add_argument(
        "--attention", choices=tuple(ATTENTION), help=f"which attention layer (default {default.attention})"
    )
    demo.add_argument(
        "--dtype", choices=DTYPES, help=f"of the computation; parameters are float32 (default {default.dtype})"
    )
    demo.add_argument("--backend", choices=BACKENDS, help="which implementation (default: EVO_BACKEND, else auto)")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where results go (default %(default)s)"
    )
    demo.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in DIR, with its settings"
    )
    demo.set_defaults(run=_demo)


_NUMBERS = {
    "steps": "optimiser steps",
    "width": "width of the model",
    "layers": "number of blocks",
    "heads": "attention heads",
    "seq_len": "bytes the model sees at once",
    "batch_size": "sequences in a step",
    "lr": "highest learning rate",
    "seed": "of the parameters, the order of the data and the sample",
}


def _demo(arguments: argparse.Namespace) -> int:
    missing = [package for module, package in _DEMO_LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"the demo needs {', '.join(missing)}: install the extra `demo`: pip install 'evo-jax[demo]'",
            file=sys.stderr,
        )
        return 1
    from evo_jax.demo import run

    given = {name: getattr(arguments, name) for name in Settings.names() if getattr(arguments, name) is not None}
    try:
        finished = run.demo(given, arguments.out, resume=arguments.resume)
    except (DemoError, NotImplementedError) as error:  # the latter: a --backend that this machine does not have
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0 if finished else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
