"""Kernels at odd widths and shapes, lowered and audited for CUDA on this machine, and what layers take of memory.

The matrix of ordinary widths is compiled by `make compile`.
"""

from functools import partial
from typing import Any

import jax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import evo_jax
from benchmarks.compile_for import compile_for, mesh_of, missing_wheels
from benchmarks.ttir import ttir
from benchmarks.ttir_audit import dot_precisions, unsafe
from evo_jax import EvoParams

ALL_WIDTHS = (1, 7, 16, 32, 48, 64, 80, 100, 256)
LENGTH = 1000  # not a multiple of any chunk


def _gradient(width, dtype, **options):
    """(fn, args): output and every gradient."""
    v = jax.ShapeDtypeStruct((1, 2, LENGTH, width), dtype)
    matrix, vector = jax.ShapeDtypeStruct((width, width), dtype), jax.ShapeDtypeStruct((width,), dtype)
    params = EvoParams(*(matrix if name.endswith("kernel") else vector for name in EvoParams._fields))
    valid = jax.ShapeDtypeStruct((1, LENGTH), "bool")

    def both(v, query, params, valid, cotangent):
        call = partial(evo_jax.evo_attention, attention_mask=valid, implementation="triton", **options)
        out, vjp = jax.vjp(lambda v, query, params: call(v, params, query=query), v, query, params)
        return out, vjp(cotangent)

    return both, (v, v, params, valid, v)


@pytest.mark.parametrize("width, causal", [*((w, True) for w in ALL_WIDTHS), *((w, False) for w in (1, 24, 256))])
def test_no_evo_access_can_leave_its_array(width, causal):
    """Lowered only; the audit follows every offset, and flags atomics too."""
    fn, args = _gradient(width, "float32", causal=causal)
    modules = ttir(fn, args)
    assert {name for name, _ in modules} >= {"evo_bwd_ratio", "evo_bwd_weight", "evo_sums"}
    assert {name: found for name, text in modules if (found := unsafe(text))} == {}


def _linear_gradient(width, dtype, causal=True):
    """(fn, args): output, last state and every gradient, of grouped heads with a mask and a state."""
    shape = lambda *dims: jax.ShapeDtypeStruct((1, *dims), dtype)  # noqa: E731
    query, key, value = shape(LENGTH, 4, width), shape(LENGTH, 2, width), shape(LENGTH, 2, 24)
    kv, z = (jax.ShapeDtypeStruct(s, "float32") for s in ((1, 2, width, 24), (1, 2, width)))
    linear_state: Any = evo_jax.LinearState  # of shapes, not arrays
    state = linear_state(kv, z)
    valid = jax.ShapeDtypeStruct((1, LENGTH), "bool")

    def both(query, key, value, state, valid, cotangents):
        call = partial(evo_jax.linear_attention, is_causal=causal, attention_mask=valid, implementation="triton")
        run = lambda q, k, v, state: call(q, k, v, initial_state=state, return_state=True)  # noqa: E731
        out, vjp = jax.vjp(run, query, key, value, state)
        return out, vjp(cotangents)

    return both, (query, key, value, state, valid, (shape(LENGTH, 4, 24), state))


@pytest.mark.parametrize("width, causal", [*((w, True) for w in (1, 16, 100, 256)), (7, False), (80, False)])
def test_no_linear_access_can_leave_its_array(width, causal):
    """Both the walks and the sums of segments: these few heads do not fill a GPU."""
    modules = ttir(*_linear_gradient(width, "float32", causal))
    names = {name.removesuffix("_onward").removesuffix("_back") for name, _ in modules}
    assert names == {f"linear_{name}" for name in ("keys", "queries", "num", "d_query", "d_key", "d_value")}
    assert {name: found for name, text in modules if (found := unsafe(text))} == {}


def _attend_gradient(width, dtype, causal=True, bias_shape=(1, 4, LENGTH, 777)):
    """(fn, args): output and every gradient of sparse attention, grouped heads, with all that narrows a mask."""
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    query, key, value = shape(2, LENGTH, 4, width), shape(2, 777, 2, width), shape(2, 777, 2, 24)
    segments = tuple(shape(2, n, dtype="int32") for n in (LENGTH, 777))
    fixed = {"mask": shape(1, 1, LENGTH, 777, dtype="bool"), "segment_ids": segments,
             "query_seq_lengths": shape(2, dtype="int32"), "dropout_seed": shape(dtype="uint32")}  # fmt: skip
    free = {"bias": shape(*bias_shape), "sinks": shape(4, dtype="float32")}

    def both(query, key, value, free, fixed, cotangent):
        call = partial(evo_jax.sparse_attention, is_causal=causal, dropout_rate=0.1, implementation="triton", **fixed)
        out, vjp = jax.vjp(lambda q, k, v, free: call(q, k, v, **free), query, key, value, free)
        return out, vjp(cotangent)

    return both, (query, key, value, free, fixed, shape(2, LENGTH, 4, 24))


ATTEND_AUDITS = (
    *((width, True, (1, 4, LENGTH, 777)) for width in (1, 24, 100, 256)),
    (80, False, (2, 1, 1, 777)),
    (16, False, (2, 4, LENGTH, 1)),
)


@pytest.mark.parametrize("width, causal, bias_shape", ATTEND_AUDITS, ids=str)
def test_no_attend_access_can_leave_its_array(width, causal, bias_shape):
    modules = ttir(*_attend_gradient(width, "float32", causal, bias_shape))
    assert {name for name, _ in modules} == {
        f"attend_{name}" for name in ("forward", "d_query", "d_key_value", "d_bias")
    }
    assert {name: found for name, text in modules if (found := unsafe(text))} == {}


@pytest.mark.parametrize("width, dtypes", [(24, ("float32",) * 2), (100, ("bfloat16", "float32"))], ids=str)
def test_no_decode_access_can_leave_its_array(width, dtypes):
    """Of three tokens, by each thing that narrows a mask: at a known offset, and at one for each sequence."""
    shape = lambda *dims, dtype="int32": jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    query, key, value = (
        shape(2, n, heads, columns, dtype=dtype)
        for n, heads, columns, dtype in (
            (3, 4, width, dtypes[0]),
            (7777, 2, width, dtypes[1]),
            (7777, 2, 24, dtypes[1]),
        )
    )
    arrays = {"segment_ids": (shape(2, 3), shape(2, 7777)), "sinks": shape(4, dtype="float32")}

    def both(query, key, value, arrays, lengths):
        call = partial(evo_jax.sparse_attention, query, key, value, implementation="triton", **arrays)
        return call(), call(**lengths)

    lengths = {"query_seq_lengths": shape(2), "key_value_seq_lengths": shape(2)}
    modules = ttir(both, (query, key, value, arrays, lengths))
    assert [name for name, _ in modules] == ["attend_decode"] * 2
    assert [found for _, text in modules if (found := unsafe(text))] == []


@pytest.mark.parametrize("width, heads", [(1, (2, 2)), (100, (6, 2))], ids=str)
def test_no_linear_step_access_can_leave_its_array(width, heads):
    token = lambda heads, width: jax.ShapeDtypeStruct((3, 1, heads, width), "bfloat16")  # noqa: E731
    kv, z = (jax.ShapeDtypeStruct((3, heads[1], *s), "float32") for s in ((width, 40), (width,)))

    def step(query, key, value, kv, z, valid):
        call = partial(evo_jax.linear_attention, attention_mask=valid, return_state=True, implementation="triton")
        return call(query, key, value, initial_state=evo_jax.LinearState(kv, z))

    args = (token(heads[0], width), token(heads[1], width), token(heads[1], 40), kv, z)
    modules = ttir(step, (*args, jax.ShapeDtypeStruct((3, 1), "bool")))
    assert [name for name, _ in modules] == ["linear_step"]
    assert unsafe(modules[0][1]) == []


@pytest.mark.skipif(missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}")
def test_gradients_that_nobody_asks_for_are_not_computed():
    """Nor is that of a bias: the compiler drops whole kernels."""
    x, bias = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((1, LENGTH, 2, 64), (1, 1, LENGTH, LENGTH)))

    def d_query(query, bias):
        run = lambda q: evo_jax.flash_attention(q, query, query, bias=bias, implementation="triton")  # noqa: E731
        return jax.grad(lambda q: run(q).astype("float32").sum())(query)

    kernels = {kernel.name for kernel in compile_for(d_query, (x, bias)).kernels}
    assert kernels == {"attend_forward", "attend_d_query"}


@pytest.mark.skipif(missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}")
def test_heads_that_fill_the_gpu_keep_no_state_in_memory():
    """Temporary memory of the forward: none, at any length."""

    def forward(x):
        return evo_jax.linear_attention(x, x, x, implementation="triton")

    for length in (1000, 65536):
        report = compile_for(forward, (jax.ShapeDtypeStruct((1, length, 32, 128), "bfloat16"),))
        assert [kernel.name for kernel in report.kernels] == ["linear_num"]
        assert report.temp_bytes == 0


@pytest.mark.parametrize("shape, axis", [((3, LENGTH, 5), 1), ((7, LENGTH), 1), ((LENGTH,), 0), ((2, 70, 130), 1)])
@pytest.mark.parametrize("reverse, exclusive", [(False, False), (False, True), (True, False), (True, True)])
def test_no_prefix_access_can_leave_its_array(shape, axis, reverse, exclusive):
    run = partial(evo_jax.prefix_sum, axis=axis, reverse=reverse, exclusive=exclusive, implementation="triton")
    modules = ttir(run, (jax.ShapeDtypeStruct(shape, "bfloat16"),))
    assert modules and {name: found for name, text in modules if (found := unsafe(text))} == {}


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_offsets_past_two_billion_elements_are_64_bit(dtype):
    run = partial(evo_jax.prefix_sum, axis=1, implementation="triton")
    modules = ttir(run, (jax.ShapeDtypeStruct((1, 2**25 + 5, 65), dtype),))
    assert modules and {name: found for name, text in modules if (found := unsafe(text))} == {}


@pytest.mark.parametrize("dtype, precision", [("bfloat16", "bf16"), ("float16", "= tf32"), ("float32", "tf32x3")])
@pytest.mark.parametrize("gradient", [_gradient, _linear_gradient, _attend_gradient], ids=["evo", "linear", "attend"])
def test_dot_products_take_the_precision_of_their_inputs(gradient, dtype, precision):
    fn, args = gradient(64, dtype)
    dots = [dot for _, text in ttir(fn, args) for dot in dot_precisions(text)]
    assert dots and all(precision in dot for dot in dots)


@pytest.mark.skipif(missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}")
def test_a_flash_layer_trains_in_half_a_gigabyte_and_linear_memory():
    """Temporaries of output and gradients at the size of the original's table: 32 heads of 128, one sequence."""

    def temporaries(length):
        make = partial(evo_jax.FlashAttention, 4096, 32, param_dtype=jax.numpy.bfloat16)
        graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

        def both(state, x, cotangent):
            run = lambda state, x: nnx.merge(graph, state)(x, implementation="triton")[0]  # noqa: E731
            out, vjp = jax.vjp(run, state, x)
            return out, vjp(cotangent)

        x = jax.ShapeDtypeStruct((1, length, 4096), "bfloat16")
        return compile_for(both, (state, x, x)).temp_bytes

    short, long = temporaries(8192), temporaries(131072)
    assert 0 < short <= 500e6 and long <= 16.1 * short


@pytest.mark.skipif(missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}")
@pytest.mark.parametrize(
    "kind, options, megabytes",
    [(evo_jax.SlidingWindowAttention, {"window_size": 512}, 64), (evo_jax.LinearAttention, {}, 32)],
)
def test_a_stream_costs_the_memory_of_a_chunk(kind, options, megabytes):
    """The original's own figures: 32 heads of 128, one sequence in bfloat16, 512 tokens at a time."""

    def temporaries(length):
        make = partial(kind, 4096, 32, param_dtype=jax.numpy.bfloat16, **options)
        graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        run = lambda state, x: nnx.merge(graph, state).stream(x, 512, implementation="triton")  # noqa: E731
        return compile_for(run, (state, jax.ShapeDtypeStruct((1, length, 4096), "bfloat16"))).temp_bytes

    short, long = temporaries(8192), temporaries(131072)
    assert 0 < short <= megabytes * 1e6 and long <= 1.001 * short


@pytest.mark.skipif(missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}")
@pytest.mark.parametrize(
    "place, query, exchanged",
    [
        (P("device"), "bf16[1,256,2,64]", set()),
        (P(None, None, "device"), "bf16[2,256,1,64]", set()),
        (P(None, "device"), "bf16[2,128,2,64]", {"all-gather", "reduce-scatter"}),
    ],
    ids=("sequences", "heads", "tokens"),
)
def test_each_of_two_gpus_computes_half(place, query, exchanged):
    """Kernels on what an Explicit axis divides; where it divides tokens, keys are gathered, gradients scattered."""
    devices = mesh_of("h100", devices=2).devices
    mesh = Mesh(devices, ("device",), axis_types=(AxisType.Explicit,))
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), "bfloat16", sharding=NamedSharding(mesh, place))
    run = partial(evo_jax.flash_attention, implementation="triton")
    gradients = lambda *arrays: jax.vjp(run, *arrays)[1](arrays[0])  # noqa: E731
    with jax.set_mesh(mesh):
        text = jax.jit(gradients).lower(x, x, x).compile().as_text() or ""
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3  # forward, d_query, d_key_value
    assert f"({query}" in text.partition("\n")[0].replace("{", "(")  # what a device is given
    assert "bf16[2,256,2,64]" not in text or exchanged
    words = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert {word for word in words if f" {word}(" in text or f" {word}-start(" in text} == exchanged
