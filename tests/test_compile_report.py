"""The compile report itself: it must see tensor-core code, spills, big tiles, missing masks and wrong precisions."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile_report
from benchmarks.compile_for import Report, compile_for, missing_wheels
from benchmarks.examine import problems
from benchmarks.instructions import listings
from benchmarks.ptx import find_ptxas, kernel_reports
from benchmarks.ranges import Range, divide, multiply, remainder
from benchmarks.targets import TARGETS
from benchmarks.ttir import lower_abstract, triton_calls, ttir
from benchmarks.ttir_audit import audit, dot_precisions, unsafe, wrong_dots
from pallas_kernels import _pallas as plk

needs_wheels = pytest.mark.skipif(
    missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}"
)


def _struct(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def _matmul(n, dtype="bfloat16", num_warps=4, precision=None):
    """(fn, args) of one n x n x n tile; every access is masked."""

    def kernel(a_ref, b_ref, out_ref):
        i = jnp.arange(n)
        index = (i[:, None], i[None, :])
        mask = (index[0] < n) & (index[1] < n)
        a, b = plk.load(a_ref, index, mask), plk.load(b_ref, index, mask)
        dims = (((1,), (0,)), ((), ()))
        plk.store(out_ref, index, jax.lax.dot_general(a, b, dims, precision, jnp.float32), mask)

    return _call(kernel, [((n, n), dtype)] * 2, ((n, n), "float32"), num_warps=num_warps)


def _call(kernel, arrays, out, grid=(1,), num_warps=4):
    args, result = [_struct(*array) for array in arrays], _struct(*out)

    def fn(*args):
        return plk.call(
            kernel,
            *args,
            name="toy",
            grid=grid,
            in_specs=[plk.whole(a) for a in args],
            out_specs=plk.whole(result),
            out_shape=result,
            num_warps=num_warps,
        )

    return fn, args


def _copy(rows, block, grid, masked):
    """(fn, args) copying `rows` float32 numbers in blocks; the store is always masked, the load perhaps."""

    def kernel(x_ref, out_ref):
        index = plk.program_id(0) * block + jnp.arange(block)
        x = plk.load(x_ref, (index,), index < rows) if masked else plk.pltriton.load(x_ref.at[index])
        plk.store(out_ref, (index,), x, index < rows)

    return _call(kernel, [((rows,), "float32")], ((rows,), "float32"), (grid,))


def _text(case):
    ((name, text),) = ttir(*case)
    assert name == "toy"
    return text


@needs_wheels
@pytest.mark.parametrize(("target", "used", "absent"), [("h100", "wgmma", "mma.sync"), ("a100", "mma.sync", "wgmma")])
def test_tensor_core_instructions(target, used, absent):
    report = compile_for(*_matmul(64), target)
    (kernel,) = report.kernels
    assert kernel.name == "toy" and kernel.num_warps == 4 and kernel.grid == (1, 1, 1)
    assert kernel.instructions[used] > 0 and kernel.instructions[absent] == kernel.instructions["atom/red"] == 0
    assert 0 < kernel.registers <= 255 and kernel.shared_bytes > 0
    assert (report.temp_bytes, report.argument_bytes, report.output_bytes) == (0, 2 * 64 * 64 * 2, 64 * 64 * 4)
    assert problems(report) == []


@needs_wheels
def test_kernels_are_told_from_the_fusions_around_them():
    narrow, args = _matmul(64)
    wide, _ = _matmul(64, num_warps=8)
    report = compile_for(lambda a, b: jnp.sin(narrow(a, b)) + wide(b, a), args)
    assert sorted(kernel.num_warps for kernel in report.kernels) == [4, 8]
    assert report.fusions and not set(report.fusions) & {kernel.name for kernel in report.kernels}


@needs_wheels
def test_spills_are_a_problem():
    report = compile_for(*_matmul(128), "a100")
    assert report.kernels[0].spill_store_bytes > 0 and report.kernels[0].spill_load_bytes > 0
    assert len(problems(report)) == 1 and "spills" in problems(report)[0]


_PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry toy(.param .u64 out, .param .u32 n)
{
    .local .align 4 .b8 array[64];
    .reg .b32 %r<3>;
    .reg .b64 %d<4>;
    ld.param.u64 %d0, [out];
    ld.param.u32 %r0, [n];
    mov.u64 %d1, array;
    mul.wide.u32 %d2, %r0, 4;
    add.u64 %d3, %d1, %d2;
    st.local.u32 [%d3], %r0;
    ld.local.u32 %r1, [array+4];
    st.global.u32 [%d0], %r1;
    ret;
}
"""


@pytest.mark.skipif(find_ptxas() is None, reason="needs ptxas")
def test_a_stack_is_a_problem_and_a_launch_that_is_not_stated_an_error(tmp_path):
    (tmp_path / "module.ptx").write_text(_PTX)
    with pytest.raises(RuntimeError, match="does not state the launch of toy"):
        kernel_reports(tmp_path, lambda name: True)
    stated = "toy grid: [3, 1, 1] threads: [64, 1, 1] shared_memory: 7 bytes"
    (tmp_path / "module.thunk_sequence.txt").write_text(stated)
    ((kernel,), others) = kernel_reports(tmp_path, lambda name: True)
    assert (kernel.grid, kernel.num_warps, kernel.shared_bytes, kernel.stack_bytes) == ((3, 1, 1), 2, 7, 64)
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0 and others == ()
    (found,) = problems(Report("a100", 0, 0, 0, (kernel,), (), 0.0))
    assert found == "toy keeps 64 bytes of each thread on a stack in memory"


@needs_wheels
def test_too_much_shared_memory_fails():
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"available: {TARGETS['a100'].shared_memory_limit}"):
        compile_for(*_matmul(256), "a100")


def test_every_target_describes_another_device():
    assert len({target.proto for target in TARGETS.values()}) == len(TARGETS) == 3


def test_a_masked_load_is_accepted():
    assert unsafe(_text(_copy(100, 32, 4, masked=True))) == []


def test_an_unmasked_load_past_the_end_is_found():
    (found,) = unsafe(_text(_copy(100, 32, 4, masked=False)))
    assert found.startswith("unmasked load (elements 0 to 127 of 100): ") and "tt.load" in found


def test_an_unmasked_load_that_cannot_leave_its_array_is_accepted():
    assert unsafe(_text(_copy(128, 32, 4, masked=False))) == []


def test_without_the_arrays_every_unmasked_load_but_the_first_element_is_found():
    text = _text(_copy(128, 32, 4, masked=False)).split("\n", 1)[1]
    assert len(unsafe(text)) == 1


@pytest.mark.parametrize(("bound", "count"), [("static", 0), ("minimum", 0), ("loaded", 1)])
def test_ranges_go_through_loops(bound, count):
    """Blocks 0 to 3 of 32 lie in 128 numbers; a bound that was loaded may be anything."""

    def kernel(x_ref, n_ref, out_ref):
        loaded = plk.load_scalar(n_ref)
        stop = {"static": 4, "minimum": jnp.minimum(loaded, 4), "loaded": loaded}[bound]

        def step(i, acc):
            return acc + plk.pltriton.load(x_ref.at[i * 32 + jnp.arange(32)])

        plk.store(out_ref, (jnp.arange(32),), jax.lax.fori_loop(0, stop, step, jnp.zeros(32, jnp.float32)), True)

    found = unsafe(_text(_call(kernel, [((128,), "float32"), ((1,), "int32")], ((32,), "float32"))))
    assert [line.split(" (")[0] for line in found] == ["unmasked load"] * count


def test_int32_offsets_that_overflow_are_found():
    """2^31 + 64 bytes in one-byte numbers: Pallas keeps 32-bit offsets, which wrap around."""
    rows = 2**31 + 64

    def kernel(x_ref, out_ref):
        index = plk.program_id(0) * 64 + jnp.arange(64)
        plk.store(out_ref, (index,), plk.load(x_ref, (index,), index < 7), index < 7)

    small, big = (_call(kernel, [((n,), "int8")], ((n,), "int8"), (n // 64,)) for n in (2**20, rows))
    assert unsafe(_text(small)) == []
    found = unsafe(_text(big))
    assert len(found) == 2 and all(line.startswith("int32 offset can overflow") for line in found)


def test_int32_products_that_overflow_before_they_are_widened_are_found():
    """Under a mask that such a number passes too; a hash, which no offset is made of, may wrap."""

    def kernel(x_ref, out_ref):
        row = plk.program_id(0) * 65536
        index = (row * jnp.int32(4)).astype(jnp.int64) + jnp.arange(64, dtype=jnp.int64)
        noise = (row * jnp.int32(65537)).astype(jnp.float32)
        plk.store(out_ref, (jnp.arange(64, dtype=jnp.int32),), plk.load(x_ref, (index,), index < 7) + noise, True)

    with jax.enable_x64(True):
        texts = [_text(_call(kernel, [((2**33,), "float32")], ((64,), "float32"), (n,))) for n in (8191, 8193)]
    assert unsafe(texts[0]) == []
    (found,) = unsafe(texts[1])
    assert found.startswith("int32 offset can overflow before it is widened (values 0 to 2147483648)")


@pytest.mark.parametrize(("precision", "printed"), [(None, "tf32"), ("highest", "ieee")])
def test_dot_precision_is_read(precision, printed):
    text = _text(_matmul(32, "float32", precision=precision))
    assert dot_precisions(text) == audit(text) == [f"dot f32 x f32 -> f32, inputPrecision = {printed}"]


@pytest.mark.parametrize("stated, operand", [("bf16", "bf16"), ("fp16", "f16"), ("fp16", "f32"), ("tf32x3", "f32")])
def test_sums_of_products_are_float32(stated, operand):
    def dot(out):
        left, right, result = (f"tensor<16x16x{dtype}>" for dtype in (operand, operand, out))
        precision = "tf32x3" if stated == "tf32x3" else "tf32"
        return f"%3 = tt.dot %0, %1, %2, inputPrecision = {precision} : {left} * {right} -> {result}"

    assert wrong_dots(dot("f32"), stated) == []
    assert len(wrong_dots(dot("f16"), stated)) == len(wrong_dots(dot("bf16"), stated)) == 1


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4), ("int8", 1), ("bool", 1), ("uint16", 2)])
def test_the_bytes_of_a_call_are_those_of_its_arrays(dtype, size):
    fn, args = _call(lambda x_ref, out_ref: None, [((7, 33), dtype)], ((5,), dtype))
    (call,) = triton_calls(lower_abstract(fn, tuple(args), "h100"))
    assert call.bytes == size * (7 * 33 + 5)


SASS = """
	.section	.text.attend_forward,"ax",@progbits
.text.attend_forward:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FMUL R2, R2, R3 ;
        /*0020*/              @!P0 FFMA.FTZ R2, R2, R3, R4 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
	.section	.text.other,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_instructions_are_counted_by_kernel_and_loop():
    found = listings(SASS)
    assert {name: listing.whole.total() for name, listing in found.items()} == {"attend_forward": 6, "other": 1}
    assert found["attend_forward"].loops == [{"FMUL": 1, "FFMA": 1, "BRA": 1}]
    assert found["other"].loops == []


def test_range_arithmetic():
    assert multiply(Range(-2, 3), Range(-5, 4)) == Range(-15, 12)
    assert multiply(Range(0, 0), Range(0, float("inf"))) == Range(0, 0)
    assert divide(Range(-7, 9), Range(2, 2)) == Range(-3, 4)
    assert remainder(Range(0, 5), Range(8, 8)) == Range(0, 5)
    assert remainder(Range(-3, 50), Range(8, 8)) == Range(-7, 7)


@dataclass(frozen=True)
class Toy:
    """Stands for a Program; workers import it from here."""

    label: str
    make: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    dtype: str = "bfloat16"

    def build(self):
        return self.make(*self.arguments)


def _hang():
    time.sleep(600)


def _report(capsys, monkeypatch, toys, *argv):
    """(exit status, printed text) of the command, were these the programs of the matrix that were asked for."""
    monkeypatch.setattr(compile_report, "_cells", lambda options: [(toy, "a100") for toy in toys])
    status = compile_report.main(["--jobs", "1", "--no-cache", *argv])
    return status, capsys.readouterr().out


@needs_wheels
def test_command_line_outlives_what_kills_a_compiler(monkeypatch, tmp_path, capsys):
    """LLVM ends the process over three warps; the programs after it still run, and the status says so."""
    path = tmp_path / "report.json"
    toys = [Toy(name, _matmul, arguments) for name, arguments in (
        ("big", (256,)), ("abort", (64, "bfloat16", 3)), ("spill", (128,)), ("good", (32,))
    )]  # fmt: skip
    status, printed = _report(capsys, monkeypatch, toys, "--json", str(path))
    rows = {row["program"]: row for row in json.loads(path.read_text())["results"]}
    assert status == 1 and "4 programs lowered and audited, 2 compiled (0 of them before), 3 failures" in printed
    why = {"big": "Shared memory size limit exceeded", "abort": "ended the process", "spill": "toy spills "}
    assert {label for label, row in rows.items() if row["failures"]} == set(why)
    assert all(text in rows[label]["failures"][0] for label, text in why.items())
    assert rows["good"]["report"]["kernels"][0]["instructions"]["mma.sync"] > 0
    assert "FAILED spill @ a100: toy spills" in printed


def test_command_line_ends_what_hangs(monkeypatch, capsys):
    status, printed = _report(capsys, monkeypatch, [Toy("slow", _hang)], "--limit", "1")
    assert status == 1 and "FAILED slow @ a100: no result within 1 s" in printed
