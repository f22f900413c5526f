"""The Triton IR of every Pallas kernel in a function, lowered for CUDA without a GPU or a plugin."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from benchmarks.targets import TARGETS, allow_no_gpu
from pallas_kernels import tuned

_TRITON_CALL = "__gpu$xla.gpu.triton"
_BITS = re.compile(r"\D*(\d+)")  # of f32, bf16, i8, ui8, f8E4M3FN; i1 takes a byte


class Operand(NamedTuple):
    """One array behind a kernel's pointer argument (inputs, then outputs)."""

    shape: tuple[int, ...]
    dtype: str  # as MLIR spells it: f32, bf16, i32


class Call(NamedTuple):
    """One launch of a Triton kernel, read off the lowered module."""

    name: str
    text: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    operands: tuple[Operand, ...]

    @property
    def bytes(self) -> int:
        """Of all its arrays, each once."""
        return sum(prod(array.shape) * max(_bits(array.dtype) // 8, 1) for array in self.operands)


def _bits(dtype: str) -> int:
    found = _BITS.match(dtype)
    assert found, dtype
    return int(found.group(1))


def ttir(fn: Callable[..., Any], args: Any, target: str = "h100") -> list[tuple[str, str]]:
    """[(kernel name, Triton IR)] in the order of the calls; `args` is a tuple of pytrees of jax.ShapeDtypeStruct.

    The first line of each text is a comment with the grid and the arrays, which `audit` reads.
    """
    return [(call.name, text_of(call)) for call in triton_calls(lower_abstract(fn, args, target))]


def lower_abstract(fn: Callable[..., Any], args: Any, target: str) -> jax.stages.Lowered:
    """Lower for CUDA against an abstract device: nothing but jaxlib is needed."""
    allow_no_gpu()
    device = AbstractDevice(TARGETS[target].description, num_cores=TARGETS[target].core_count, platform="gpu")
    mesh, capability = AbstractMesh((1,), ("device",), abstract_device=device), TARGETS[target].capability
    with jax.sharding.use_abstract_mesh(mesh), quiet_lowering(), tuned.override(capability=capability):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))


@contextlib.contextmanager
def quiet_lowering() -> Iterator[None]:
    """Silence JAX's notice that Pallas-Triton is deprecated (jax >= 0.11); every other warning stays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


def triton_calls(lowered: jax.stages.Lowered) -> list[Call]:
    """Every Triton kernel that the lowered module calls."""
    module: Any = lowered.compiler_ir()
    return [_read_call(op) for op in walk(module.operation) if _is_triton_call(op)]


def walk(op: Any) -> Iterator[Any]:
    """`op` and every operation inside it, outermost first."""
    yield op
    for region in op.regions:
        for block in region:
            for inner in block:
                yield from walk(inner.operation)


def _is_triton_call(op: Any) -> bool:
    return op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == _TRITON_CALL


def _read_call(op: Any) -> Call:
    config = ir.DictAttr(op.attributes["mhlo.backend_config"])
    number = {
        key: ir.IntegerAttr(config[key]).value for key in ("grid_x", "grid_y", "grid_z", "num_warps", "num_stages")
    }
    with ir.Context() as context:
        dialect.register_dialect(context)
        text = str(ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes))
    types = [value.type for value in (*op.operands, *op.results)]
    operands = tuple(Operand(tuple(t.shape), str(t.element_type)) for t in map(ir.RankedTensorType, types))
    grid = (number["grid_x"], number["grid_y"], number["grid_z"])
    return Call(ir.StringAttr(config["name"]).value, text, grid, number["num_warps"], number["num_stages"], operands)


def text_of(call: Call) -> str:
    """Its Triton IR below the comment that states grid and arrays."""
    arrays = " ".join(f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in call.operands)
    return f"// grid {' '.join(map(str, call.grid))} arrays {arrays}\n{call.text}"
