"""What each suite of `python -m benchmarks.run` measures; a suite is a function from options to report rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import evo_jax
from benchmarks import contenders, decoding, generation, layers, peak, shapes
from benchmarks.shapes import EvoShape
from benchmarks.timing import compare


@dataclass(frozen=True, slots=True)
class Options:
    """How long to measure: rounds of every case, the longest sequence, and of which operations (none: all)."""

    rounds: int = 15
    longest: int = 1 << 30
    ops: tuple[str, ...] = ()

    def wants(self, op: str) -> bool:
        return not self.ops or op in self.ops


def cpu(options: Options) -> Iterator[dict[str, Any]]:
    """Against the original in torch with two threads; then memory, generation, and time against length."""
    for shape in _within(shapes.CPU_EVO, options, "evo"):
        for gradient in (False, True):
            pair = [contenders.torch_evo(shape, gradient), contenders.jax_evo(shape, gradient, "reference")]
            yield compare(_name("evo", shape, gradient), pair, contenders.EVO_TOLERANCES[shape.dtype], options.rounds)
    for shape in _within(shapes.CPU_EVO[-1:], options, "prefix_sum"):
        pair = [
            contenders.torch_prefix(shape),
            contenders.jax_prefix(shape, "evo_jax reference", _prefix_sum("reference")),
        ]
        yield compare(f"prefix_sum {shape}", pair, {"out": 1e-5}, options.rounds)
    for shape in _within(shapes.CPU_EVO, options, "evo"):
        yield _memory(shape, "reference")
    yield from _cpu_layers(options)
    yield from _cpu_ops(options)
    for kind in generation.KINDS if options.wants("generate") else ():
        yield generation.row(kind, min(4096, options.longest), max(options.rounds // 3, 1))
    for shape in _within(shapes.CPU_LENGTHS, options):
        for op, contender in _BY_LENGTH.items():
            for gradient in (False, True) if options.wants(op.removesuffix(" layer")) else ():
                alone = [contender(shape, gradient, "reference")]
                row = compare(f"length: {_name(op, shape, gradient)}", alone, {}, max(options.rounds // 3, 3))
                yield row | {"ns_per_token": 1e9 * row["median_s"][alone[0].name] / shape.length}


def _cpu_layers(options: Options) -> Iterator[dict[str, Any]]:
    """Whole layers against the originals, which take seconds at L = 8,192: few calls of those."""
    for kind in filter(options.wants, layers.KINDS):
        for shape in _within(shapes.CPU_LAYERS, options):
            for gradient in (False, True):
                pair = [layers.torch_layer(kind, shape, gradient), layers.jax_layer(kind, shape, gradient, "reference")]
                slow = shape.length >= 8192  # there the original takes 5 to 30 seconds a call
                rounds, warmup = (1 if kind == "linear" else 2, 0) if slow else (max(options.rounds // 3, 1), 1)
                name = _name(f"{kind} layer", shape, gradient)
                yield compare(name, pair, layers.TOLERANCES, rounds, warmup)
        for shape in _within(shapes.CPU_LAYERS[1:], options):
            growth = {name: peak.growth(name, kind, shape) for name in peak.CALLS}
            yield {"case": f"peak memory growth, {kind} layer forward+backward {shape}", "temp_bytes": growth}


def _cpu_ops(options: Options) -> Iterator[dict[str, Any]]:
    """flash against torch's own attention, a sliding window against its compiled FlexAttention (no backward there)."""
    from benchmarks import peers

    flash = partial(evo_jax.flash_attention, implementation="reference")
    sliding = partial(evo_jax.sliding_window_attention, window_size=layers.WINDOW, implementation="reference")
    rounds = max(options.rounds // 3, 1)
    for shape in _within(shapes.CPU_LAYERS, options, "flash"):
        for gradient in (False, True):
            pair = [
                layers.torch_op("torch SDPA", shape, gradient, peers.torch_sdpa),
                layers.jax_op("evo_jax reference", shape, gradient, flash),
            ]
            yield compare(_name("flash", shape, gradient), pair, layers.OP_TOLERANCES[shape.dtype], rounds)
    for shape in _within(shapes.CPU_LAYERS[1:], options, "sliding_window"):
        flex = peers.torch_flex(layers.WINDOW, shape.length)
        pair = [
            layers.torch_op("torch FlexAttention", shape, False, flex),
            layers.jax_op("evo_jax reference", shape, False, sliding),
        ]
        yield compare(_name("sliding_window", shape, False), pair, layers.OP_TOLERANCES[shape.dtype], rounds)
        alone = [layers.jax_op("evo_jax reference", shape, True, sliding)]
        yield compare(_name("sliding_window", shape, True), alone, {}, rounds)


def gpu(options: Options) -> Iterator[dict[str, Any]]:
    """The kernels against XLA's own compilation of the reference and eager torch; sums and decoding against a copy."""
    for shape in _within(shapes.GPU_PREFIX, options, "prefix_sum"):
        runs = {
            "copy": lambda x: jnp.negative(x),  # one read, one write: what the memory allows
            "evo_jax triton": _prefix_sum("triton"),
            "jax.numpy.cumsum": lambda x: jnp.cumsum(x, axis=2, dtype=jnp.float32).astype(x.dtype),
        }
        rows = [contenders.jax_prefix(shape, name, fn) for name, fn in runs.items()]
        tolerance = {"out": 1e-2 if shape.dtype == "bfloat16" else 1e-5}
        row = compare(f"prefix_sum {shape}", rows[1:], tolerance, options.rounds)
        copy = compare("copy", rows[:1], {}, options.rounds)
        yield row | {"copy_s": copy["median_s"]["copy"]}
    for shape in _within(shapes.GPU_EVO, options, "evo"):
        for gradient in (False, True):
            rows = [
                contenders.jax_evo(shape, gradient, "triton"),
                contenders.jax_evo(shape, gradient, "reference"),
                contenders.torch_evo(shape, gradient, "cuda"),
            ]
            # Eager torch keeps its prefixes in bfloat16: there is nothing to agree with there, so it is not a gate.
            rows = rows if shape.dtype == "float32" else rows[:2]
            yield compare(_name("evo", shape, gradient), rows, contenders.EVO_TOLERANCES[shape.dtype], options.rounds)
    yield from _gpu_attention(options)
    for shape in _within(shapes.GPU_DECODE, options, "decode"):
        yield decoding.row(shape, options.rounds)


def _gpu_attention(options: Options) -> Iterator[dict[str, Any]]:
    """The attention kernels, of which each has its peer: cuDNN through jax.nn, torch's own, or our flash attention."""
    from benchmarks import peers

    ours = {
        "flash": evo_jax.flash_attention,
        "sliding_window": partial(evo_jax.sliding_window_attention, window_size=512),
        "sparse": evo_jax.sparse_attention,
        "multiscale": evo_jax.multiscale_attention,
        "linear": evo_jax.linear_attention,
    }
    cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    for shape in _within(shapes.GPU_ATTENTION, options):
        for gradient in (False, True):
            tolerances = layers.OP_TOLERANCES[shape.dtype]
            if options.wants("flash"):
                flash = layers.jax_op(
                    "evo_jax triton", shape, gradient, partial(ours["flash"], implementation="triton")
                )
                others = [layers.torch_op("torch SDPA", shape, gradient, peers.torch_sdpa, "cuda")]
                if shape.dtype == "bfloat16":
                    others.append(layers.jax_op("jax.nn cudnn", shape, gradient, cudnn))
                yield compare(_name("flash", shape, gradient), [*others, flash], tolerances, options.rounds)
            for name, function in list(ours.items())[1:]:
                if not options.wants(name):
                    continue
                pair = [
                    layers.jax_op(f"evo_jax {how}", shape, gradient, partial(function, implementation=how))
                    for how in ("reference", "triton")
                ]
                yield compare(_name(name, shape, gradient), pair, tolerances, max(options.rounds // 5, 1))


_BY_LENGTH: dict[str, Any] = {
    "evo": contenders.jax_evo,
    "linear layer": partial(layers.jax_layer, "linear"),
    "sliding_window layer": partial(layers.jax_layer, "sliding_window"),
}
SUITES = {"cpu": cpu, "gpu": gpu}
OPS = ("evo", "prefix_sum", *layers.KINDS, "flash", "generate", "decode")


def _prefix_sum(implementation: str) -> Any:
    return lambda x: evo_jax.prefix_sum(x, axis=2, implementation=implementation)


def _memory(shape: EvoShape, implementation: str) -> dict[str, Any]:
    """XLA's own figure for temporary buffers, forward and with gradients, in bytes."""
    v, params, cotangent = contenders.evo_arrays(shape)

    def forward(v: Any, params: Any) -> jax.Array:
        return evo_jax.evo_attention(v, params, implementation=implementation)

    def both(v: Any, params: Any, cotangent: Any) -> Any:
        out, vjp = jax.vjp(forward, v, params)
        return out, vjp(cotangent)

    compiled = {
        "forward": jax.jit(forward).lower(v, params).compile(),
        "gradient": jax.jit(both).lower(v, params, cotangent).compile(),
    }
    analyses: dict[str, Any] = {name: fn.memory_analysis() for name, fn in compiled.items()}
    sizes = {name: analysis.temp_size_in_bytes for name, analysis in analyses.items()}
    return {"case": f"temporary memory, evo {shape}", "temp_bytes": sizes}


def _within(candidates: tuple[EvoShape, ...], options: Options, op: str | None = None) -> list[EvoShape]:
    wanted = op is None or options.wants(op)
    return [shape for shape in candidates if wanted and shape.length <= options.longest]


def _name(op: str, shape: EvoShape, gradient: bool) -> str:
    return f"{op} {'forward+backward' if gradient else 'forward'} {shape}"
