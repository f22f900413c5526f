"""What is asked of every program: its Triton IR is audited, and what compiles is held to absolute limits."""

import os
from typing import Any, Protocol

from benchmarks.compile_for import Report, base_name, compile_lowered, compile_once, lower_placed, missing_wheels
from benchmarks.programs import DTYPES, Built
from benchmarks.targets import TARGETS
from benchmarks.ttir import Call, lower_abstract, text_of, triton_calls
from benchmarks.ttir_audit import unsafe, wrong_dots

NOTHING: dict[str, Any] = {"failures": (), "report": None, "calls": (), "kernel_bytes": 0, "cached": False}


class Buildable(Protocol):
    """A benchmarks.programs.Program, or what stands for one."""

    @property
    def dtype(self) -> str: ...

    @property
    def label(self) -> str: ...

    def build(self) -> Built: ...


def examine(program: Buildable, target: str, cached: bool = True) -> dict[str, Any]:
    """Lower, audit and compile `program` in this process, which is one of a pool.

    Args:
        cached: whether a report of the same kernels by the same compiler may stand for compiling them.

    Returns:
        failures: list of str, which name the kernel where there is one.
        report: the Report, or None where the compiler refuses or is not installed.
        calls: names of the Triton kernels in the order of their calls.
        kernel_bytes: of the arrays of every call, each once a call: what is moved where nothing stays in a cache
            between two kernels, and all does within one. A call in a loop counts once: too little for the gradients of
            EvoAttention, whose kernels run once a segment.
        cached: whether the compiler did not run.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    result = {**NOTHING, "failures": []}
    absent = missing_wheels()
    try:
        lowered = (lower_abstract if absent else lower_placed)(*program.build(), target)
        calls = triton_calls(lowered)
        result["calls"] = [call.name for call in calls]
        result["kernel_bytes"] = sum(call.bytes for call in calls)
        result["failures"] += audited(calls, DTYPES[program.dtype])
        if not absent:
            compiled = (
                compile_once(lowered, calls, target) if cached else (compile_lowered(lowered, calls, target), False)
            )
            result["report"], result["cached"] = compiled
            result["failures"] += problems(result["report"], {call.name for call in calls if "tt.dot " in call.text})
    except Exception as error:
        names = ", ".join(dict.fromkeys(result["calls"])) or "not lowered"
        result["failures"].append(f"{names}: {type(error).__name__}: {error}")
    return result


def audited(calls: list[Call], stated: str) -> list[str]:
    """What is wrong with the Triton IR of `calls`, whose dot products are stated to be "bf16", "fp16" or "tf32x3"."""
    if not calls:
        return ["the program has no Triton kernel"]
    texts = {text_of(call): call.name for call in calls}
    return [f"{name}: {line}" for text, name in texts.items() for line in (*unsafe(text), *wrong_dots(text, stated))]


def problems(report: Report, dotted: set[str] | None = None) -> list[str]:
    """Spills and stacks, more shared memory than a block may have, atomics, and products that use no tensor core.

    Args:
        dotted: names of the kernels that take dot products.
    """
    limit, found = TARGETS[report.target].shared_memory_limit, []
    for kernel in report.kernels:
        if spilled := kernel.spill_store_bytes + kernel.spill_load_bytes:
            found.append(f"{kernel.name} spills {spilled} bytes")
        elif kernel.stack_bytes:  # an array that is not in registers, or a call; what spills has a stack too
            found.append(f"{kernel.name} keeps {kernel.stack_bytes} bytes of each thread on a stack in memory")
        if kernel.shared_bytes > limit:
            found.append(f"{kernel.name} wants {kernel.shared_bytes} bytes of shared memory, {limit} available")
        if atomics := kernel.instructions["atom/red"]:
            found.append(f"{kernel.name} has {atomics} atomics, whose order is not fixed")
        if base_name(kernel.name, dotted or set()) and not kernel.tensor_cores:
            found.append(f"{kernel.name} has dot products and uses no tensor core")
    return found
