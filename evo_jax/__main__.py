"""The command line, `python -m evo_jax <command>`: reads the arguments; each command imports what it needs itself."""

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from evo_jax import check_command, tune_command
from evo_jax._version import __version__
from evo_jax.backend import check_environment
from evo_jax.demo.model import ATTENTION
from evo_jax.demo.settings import BACKENDS, DTYPES, DemoError, Settings

_DEMO_LIBRARIES = {"optax": "optax", "orbax": "orbax-checkpoint", "rich": "rich", "matplotlib": "matplotlib"}
INTERRUPTED = 130  # the shell's exit status of a command that ended on Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        check_environment()
    except ValueError as error:
        parser.error(str(error))
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evo_jax", description="Attention layers for JAX of O(L) memory.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_generate(commands)
    check_command.add(commands)
    tune_command.add(commands)
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
    if not _has_libraries("demo"):
        return 1
    from evo_jax.demo import run

    given = {name: getattr(arguments, name) for name in Settings.names() if getattr(arguments, name) is not None}
    try:
        finished = run.demo(given, arguments.out, resume=arguments.resume)
    except (DemoError, NotImplementedError) as error:  # the latter: a --backend that this machine does not have
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0 if finished else INTERRUPTED


def _has_libraries(name: str) -> bool:
    missing = [package for module, package in _DEMO_LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        way_out = "install the extra `demo`: pip install 'evo-jax[demo]'"
        print(f"{name} needs {', '.join(missing)}: {way_out}", file=sys.stderr)
    return not missing


def _add_generate(commands) -> None:
    command = commands.add_parser(
        "generate",
        help="continue a text with a model that the demo trained",
        description="Continue a text, byte by byte, with the newest checkpoint of a run of the demo; its speed goes to "
        "standard error.",
    )
    command.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="the --out folder of the demo's run"
    )
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; - reads standard input")
    command.add_argument("--length", type=int, default=300, metavar="N", help="new bytes at most (default %(default)s)")
    command.add_argument(
        "--temperature", type=float, default=0.7, metavar="X", help="0 takes the likeliest byte (default %(default)s)"
    )
    command.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest bytes alone")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the fewest bytes that hold the probability P"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default %(default)s)")
    command.add_argument("--stop", metavar="BYTE", help=r"a character after which to stop, such as \n")
    command.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    if not _has_libraries("generate"):
        return 1
    from evo_jax.demo import continuation, report

    sampler = {name: getattr(arguments, name) for name in ("length", "temperature", "top_k", "top_p", "seed")}
    try:
        sampler = continuation.Sampler(**sampler, stop=_stop_byte(arguments.stop))
        if (given := arguments.prompt) == "-":
            prompt = sys.stdin.buffer.read()
        else:
            prompt = given.encode(errors="surrogateescape")  # as Python kept bytes that are no UTF-8
        written = continuation.continue_checkpoint(arguments.checkpoint, prompt, sampler)
    except (DemoError, NotImplementedError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character that the model writes
    print(report.printable(prompt + written.text), flush=True)
    count, seconds = len(written.text), written.seconds
    print(f"{count} tokens in {seconds:.2f} s: {count / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)
    return 0


def _stop_byte(given: str | None) -> int | None:
    if given is None:
        return None
    text = {r"\n": "\n", r"\t": "\t"}.get(given, given).encode(errors="surrogateescape")
    if len(text) != 1:
        raise DemoError(rf"--stop {given!r} must be one byte, such as . or \n")
    return text[0]


if __name__ == "__main__":
    sys.exit(main())
