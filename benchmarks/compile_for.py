"""compile_for: any jitted function as machine code for a GPU that is not there, and what the compiler says of it."""

import importlib.metadata
import importlib.util
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import compile_cache
from benchmarks.ptx import KernelReport, find_ptxas, kernel_reports, ptxas_version
from benchmarks.targets import TARGETS, allow_no_gpu
from benchmarks.ttir import Call, quiet_lowering, triton_calls
from pallas_kernels import tuned

_LEVEL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # whatever XLA_FLAGS says
_DUMP = {"xla_dump_hlo_as_text": True, "xla_dump_emitter_re": "ptx"}  # the second: jax >= 0.12 writes no PTX without it


@dataclass(frozen=True, slots=True)
class Report:
    """One compiled function: XLA's buffers in bytes, its Triton kernels, and the names of XLA's own kernels."""

    target: str
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    kernels: tuple[KernelReport, ...]
    fusions: tuple[str, ...]
    seconds: float  # of the compiler, when it ran


def missing_wheels() -> str | None:
    """Why `compile_for` cannot run here, or None: which of the wheels it needs is not installed."""
    needed = {"jax_cuda13_plugin": "jax-cuda13-plugin", "jax_plugins.xla_cuda13": "jax-cuda13-pjrt"}
    absent = [wheel for module, wheel in needed.items() if not _importable(module)]
    absent += ["nvidia-cuda-nvcc"] * (find_ptxas() is None)
    return f"not installed: {', '.join(absent)} (pip install 'evo-jax[aot]')" if absent else None


def versions() -> dict[str, str]:
    """Of all that decides what is compiled."""
    found = {"jax": jax.__version__, "ptxas": ptxas_version()}
    for wheel in ("jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found[wheel] = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            found[wheel] = "none"
    return found


def compile_for(fn: Callable[..., Any], args: Any, target: str = "h100") -> Report:
    """Compile `fn(*args)` to machine code for `target` and report what the compiler says of it.

    Args:
        fn: the function; jitted here.
        args: a tuple of pytrees of jax.ShapeDtypeStruct.
        target: a key of TARGETS.

    Raises:
        jax.errors.JaxRuntimeError: XLA or ptxas refuses (too much shared memory, invalid PTX, too few registers).
    """
    lowered = lower_placed(fn, args, target)
    return compile_lowered(lowered, triton_calls(lowered), target)


def lower_placed(fn: Callable[..., Any], args: Any, target: str) -> jax.stages.Lowered:
    """Lower for one device of `target`, which the plugin then compiles for."""
    mesh = mesh_of(target)
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    with jax.sharding.set_mesh(mesh), quiet_lowering(), tuned.override(capability=TARGETS[target].capability):
        return jax.jit(fn).lower(*placed)


def compile_lowered(lowered: jax.stages.Lowered, calls: list[Call], target: str) -> Report:
    """The report of what was lowered for `target`; `calls` are its Triton kernels."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="compile_report_") as dump:
        compiled = compile_dumping(lowered, dump)
        text = compiled.as_text() or ""  # without the kernels whose results nobody asks for
        names = {call.name for call in calls if 0 not in call.grid and call.name in text}
        kernels, fusions = kernel_reports(Path(dump), lambda entry: base_name(entry, names) is not None)
    if lost := names - {base_name(kernel.name, names) for kernel in kernels}:
        raise RuntimeError(
            f"XLA compiled {sorted(lost)} but its dump holds no PTX of them: the dump options have changed"
        )
    memory = compiled.memory_analysis()
    assert memory is not None, "the CUDA compiler states its buffers"
    sizes = {name: max(len(call.text) for call in calls if call.name == name) for name in names}
    return Report(
        target,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        tuple(replace(kernel, ir_bytes=sizes[base_name(kernel.name, names) or ""]) for kernel in kernels),
        fusions,
        round(time.perf_counter() - start, 2),
    )


def compile_dumping(lowered: jax.stages.Lowered, folder: str) -> jax.stages.Compiled:
    """Compile, and leave PTX and launches of every kernel in `folder`."""
    return lowered.compile(compiler_options={"xla_dump_to": folder, **_LEVEL, **_DUMP})


def compile_once(lowered: jax.stages.Lowered, calls: list[Call], target: str) -> tuple[Report, bool]:
    """compile_lowered, or what it said when the same was compiled before; and whether it was."""
    key = _content(lowered, calls, target)
    if (found := compile_cache.load(key)) is not None:
        try:
            kernels = tuple(KernelReport(**{**kernel, "grid": tuple(kernel["grid"])}) for kernel in found["kernels"])
            return Report(**{**found, "kernels": kernels, "fusions": tuple(found["fusions"])}), True
        except (KeyError, TypeError):
            pass  # an entry that is none is written anew
    report = compile_lowered(lowered, calls, target)
    compile_cache.store(key, asdict(report))
    return report, False


def _content(lowered: jax.stages.Lowered, calls: list[Call], target: str) -> str:
    """Of the module, of its kernels without the lines of source in their bytecode, and of all that works on them."""
    module = re.sub(r'\bir = "(?:[^"\\]|\\.)*"', "ir", lowered.as_text())
    kernels = [f"{call.name} {call.grid} {call.num_warps} {call.num_stages} {call.text}" for call in calls]
    code = [Path(__file__).with_name(name).read_text() for name in ("compile_for.py", "ptx.py")]
    return compile_cache.key_of(module, *kernels, TARGETS[target].proto, str(versions()), str(_LEVEL), *code)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def mesh_of(target: str, devices: int = 1) -> Mesh:
    """GPUs that are not there, as the axis "device" of a mesh."""
    allow_no_gpu()
    shape = f"1x1x{devices}"
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=TARGETS[target].proto, topology=shape)
    except NotImplementedError as error:
        advice = missing_wheels() or "set JAX_PLATFORMS=cpu before JAX starts its backends"
        raise RuntimeError(f"JAX's CUDA plugin is not available: {advice}") from error
    return topologies.make_mesh(topology, (devices,), ("device",))


def base_name(entry: str, names: set[str]) -> str | None:
    """The Triton kernel that PTX entry `entry` is; XLA appends __1, __2, ... to a repeated name."""
    if entry in names:
        return entry
    stem, _, number = entry.rpartition("__")
    return stem if number.isdigit() and stem in names else None
