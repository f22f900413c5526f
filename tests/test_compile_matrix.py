"""The matrix of programs, and what they are held to: which are compiled, floors, budgets, cache, planted faults."""

import re
from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import budgets, compile_cache, compile_report, examine, matrix
from benchmarks.compile_for import Report, compile_once, lower_placed, missing_wheels
from benchmarks.programs import DTYPES, OPS, Program
from benchmarks.ptx import KernelReport
from benchmarks.roofline import floor, live_pairs, occupancy
from benchmarks.targets import TARGETS
from benchmarks.ttir import triton_calls
from pallas_kernels import _pallas as plk
from pallas_kernels import dots, tuned
from reference.mask import FAR, Mask, Pattern, allowed

needs_wheels = pytest.mark.skipif(
    missing_wheels() is not None, reason=f"compiling for CUDA needs wheels: {missing_wheels()}"
)
WHOLE = matrix.whole()
KERNEL = KernelReport("k", 128, 0, 0, 60000, 8, (1, 1, 1), {"wgmma": 4, "mma.sync": 0, "atom/red": 0})
REPORT = Report("h100", 100, 10, 20, (KERNEL,), (), 1.0)


def test_the_matrix_holds_every_operation_pass_dtype_width_and_gpu():
    found = {(p.op, p.phase, p.dtype, p.width, target) for p, target in WHOLE}
    passes = [(op, phase) for op in OPS for phase in ("forward", "backward", "decode")]
    passes.remove(("prefix_sum", "decode"))
    assert found >= {(*a, *b) for a, b in product(passes, product(DTYPES, (64, 80, 96, 128, 256), TARGETS))}
    assert len({(p.label, target) for p, target in WHOLE}) == len(WHOLE), "labels are keys of the budgets"


@pytest.mark.parametrize("cells", [WHOLE, [cell for cell in WHOLE if cell[1] == "h100"]], ids=["all", "h100"])
def test_a_part_of_the_matrix_covers_every_pair(cells):
    def pairs(cells):
        facts = [(replace(p, dtype="bfloat16", width=64), p.dtype, p.width, target) for p, target in cells]
        return {pair for fact in facts for pair in combinations(enumerate(fact), 2)}

    part = matrix.covering(cells)
    assert {(program, "h100") for program in matrix.AIMED} <= set(part)
    assert pairs(part) == pairs(cells) and part == matrix.covering(cells) and len(part) < 200


PATTERNS = (
    Pattern(causal=False),
    Pattern(windows=((9, 9),), offset=31),
    Pattern(causal=False, windows=((9, 3), (0, 0), (FAR, FAR), (200, 1))),
    Pattern(windows=((8, 8),), num_global=3, block_size=16, num_random=2, offset=31),
    Pattern(causal=False, windows=((8, 8),), num_global=20, block_size=16, num_random=2, seed=1),
    Pattern(causal=False, windows=((8, 8),), num_global=5, block_size=16, num_random=2, offset=-7),
)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_live_pairs_are_those_that_the_rule_allows(pattern):
    queries, keys = 99, 130
    seen = jnp.broadcast_to(allowed(Mask(pattern), (1, 4, queries, keys), 2), (1, 4, queries, keys))
    assert live_pairs(pattern, 4, 2, queries, keys) == int(seen.sum())


def test_a_floor_is_the_longer_of_moving_and_computing():
    """By hand, for H100: 3.35 TB/s; 989 dense TFLOP/s in bfloat16, and a third of 495 for float32 by TF32x3."""
    flash = Program("flash", length=4, heads=2, kv_heads=2, width=8)
    found = floor(flash, REPORT)
    assert (found.bytes, found.flops, found.bound) == (30, 4 * 8 * 2 * 10, "memory")
    assert found.seconds == pytest.approx(30 / 3.35232e12)
    dense = floor(replace(flash, length=8192, dtype="float32", phase="backward"), REPORT)
    assert dense.bound == "compute"
    assert dense.seconds == pytest.approx(14 * 8 * 2 * (8192 * 8193 // 2) / (494.7e12 / 3))
    window = Program("sliding_window", "decode", length=1000, heads=2, kv_heads=1, width=8, window=100)
    assert floor(window, replace(REPORT, argument_bytes=40000)).bytes == 40020 - 900 * 8 * 2 * 2


@pytest.mark.parametrize(
    "registers, shared, warps, share", [(32, 0, 4, 1.0), (128, 0, 8, 0.25), (32, 100_000, 8, 0.25), (32, 0, 1, 0.5)]
)
def test_occupancy_is_bounded_by_registers_shared_memory_and_blocks(registers, shared, warps, share):
    kernel = replace(KERNEL, registers=registers, shared_bytes=shared, num_warps=warps)
    assert occupancy(kernel, "h100") == share


def test_what_is_worse_than_its_budget_is_named_with_both_figures():
    allowed_row = budgets.row(REPORT)
    assert budgets.worsened(REPORT, allowed_row) == budgets.worsened(REPORT, None) == []
    kernel = replace(KERNEL, registers=130, shared_bytes=60001, instructions={"wgmma": 0, "mma.sync": 2})
    assert budgets.worsened(replace(REPORT, temp_bytes=101, kernels=(kernel,)), allowed_row) == [
        "temporary memory is 101 bytes, 100 budgeted",
        "k takes 130 registers, 128 budgeted",
        "k takes 60001 bytes of shared memory, 60000 budgeted",
        "k has 0 wgmma and 2 mma.sync, 4 and 0 budgeted",
    ]
    better = replace(KERNEL, registers=100, instructions={"wgmma": 5, "mma.sync": 0})
    assert budgets.worsened(replace(REPORT, temp_bytes=0, kernels=(better,)), allowed_row) == []
    renamed = replace(REPORT, kernels=(replace(KERNEL, name="new"),))
    (found,) = budgets.worsened(renamed, allowed_row)
    assert found.startswith("new is in no budget of this program") and budgets.worsened(renamed, None) == []


@pytest.mark.parametrize(
    "before, now, worse",
    [
        *(((4, 2), (3, 2), True), ((4, 2), (4, 1), True), ((4, 2), (3, 3), False), ((0, 4), (2, 0), False)),
        *(((4, 0), (0, 9), True), ((0, 4), (0, 0), True), ((4, 2), (4, 2), False), ((4, 2), (5, 2), False)),
    ],
)
def test_fewer_tensor_core_instructions_are_worse(before, now, worse):
    def report(counts):
        instructions = dict(zip(("wgmma", "mma.sync"), counts, strict=True))
        return replace(REPORT, kernels=(replace(KERNEL, instructions=instructions),))

    assert len(budgets.worsened(report(now), budgets.row(report(before)))) == worse


def test_aims_of_temporary_memory_are_absolute():
    more = replace(REPORT, temp_bytes=9 * 2**20)
    assert budgets.over_aim(Program("sparse", "backward"), more) == [
        "temporary memory is 9437184 bytes, 8388608 allowed at this shape"
    ]
    assert budgets.over_aim(Program("sparse", "backward", width=64), more) == []


def test_budgets_are_kept_for_each_version_of_jax(tmp_path, monkeypatch):
    path = tmp_path / "budgets.json"
    monkeypatch.setattr(budgets, "series", lambda: "9.8")
    budgets.save({"a @ h100": {"temp": 1}, "b @ h100": {"temp": 2}}, {"a @ h100", "b @ h100"}, path)
    monkeypatch.setattr(budgets, "series", lambda: "9.9")
    budgets.save({"a @ h100": {"temp": 3}}, {"a @ h100"}, path)
    monkeypatch.setattr(budgets, "series", lambda: "9.8")
    budgets.save({"c @ h100": {"temp": 4}}, {"b @ h100", "c @ h100"}, path)
    found = {series: content["programs"] for series, content in budgets.load(path).items()}
    assert found == {"9.8": {"b @ h100": {"temp": 2}, "c @ h100": {"temp": 4}}, "9.9": {"a @ h100": {"temp": 3}}}


def test_the_checked_in_budgets_are_those_of_the_matrix():
    """None is of a program that is no more, and this version of JAX has at least those that CI compiles."""
    known = {f"{program.label} @ {target}" for program, target in WHOLE}
    table = budgets.load()
    assert all(set(content["programs"]) <= known for content in table.values())
    lane = WHOLE if budgets.series() == "0.10" else [cell for cell in WHOLE if cell[1] == "h100"]
    wanted = {f"{program.label} @ {target}" for program, target in matrix.covering(lane)}
    assert wanted <= set(table[budgets.series()]["programs"])


@needs_wheels
def test_what_was_compiled_is_found_again_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("EVO_CACHE_DIR", str(tmp_path))

    def compiled(width):
        program = Program("prefix_sum", heads=2, length=300, width=width)
        lowered = lower_placed(*program.build(), "h100")
        return compile_once(lowered, triton_calls(lowered), "h100")

    first, found = compiled(32)
    assert not found and compiled(32) == (first, True) and not compiled(48)[1]
    for entry in (tmp_path / "compile").iterdir():
        entry.write_text('{"kernels": 3')
    assert compiled(32)[1] is False and compiled(32)[1] is True


def test_entries_of_the_cache_that_are_none_are_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("EVO_CACHE_DIR", str(tmp_path))
    compile_cache.store("k", {"a": 1})
    assert compile_cache.load("k") == {"a": 1} and compile_cache.load("other") is None
    (tmp_path / "compile" / "k.json").write_text("[1]")
    assert compile_cache.load("k") is None
    monkeypatch.setenv("EVO_CACHE_DIR", str(tmp_path / "compile" / "k.json"))
    compile_cache.store("k", {"a": 1})  # a file where the folder should be: nothing is stored, nothing raised
    assert compile_cache.key_of("ab", "c") != compile_cache.key_of("a", "bc")


class Planted:
    """A program whose kernels are launched otherwise."""

    def __init__(self, program: Program, launch: dict[str, Any]) -> None:
        self.program, self.launch, self.dtype, self.label = program, launch, program.dtype, program.label

    def build(self) -> Any:
        fn, args = self.program.build()

        def run(*args: Any) -> Any:
            with tuned.override({"attend_forward": self.launch}):
                return fn(*args)

        return run, args


ODD = Program("flash", length=777, heads=2, kv_heads=2, width=56)  # of no other test, whose kernels are traced once


@needs_wheels
@pytest.mark.parametrize(
    "launch, why",
    [
        ({"block_q": 128, "block_k": 64, "num_warps": 2}, r"attend_forward spills \d+ bytes"),
        ({"block_k": 128, "num_stages": 8}, r"attend_forward: .*Shared memory size limit exceeded: requested \d+"),
    ],
    ids=["spill", "shared"],
)
def test_launches_that_a_gpu_cannot_take_are_named(launch, why):
    (failure,) = examine.examine(Planted(replace(ODD, width=128), launch), "a100", cached=False)["failures"]
    assert re.match(why, failure), failure


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12),
    reason="JAX 0.12 masks blocks that pass the end of an array itself; what it leaves to us: test_compile_report",
)
def test_a_load_without_its_mask_is_named(monkeypatch):
    monkeypatch.setattr(examine, "missing_wheels", lambda: "as if")
    monkeypatch.setattr(plk, "load", lambda ref, index, mask: plk.pltriton.load(ref.at[index]))
    failures = examine.examine(ODD, "h100")["failures"]
    assert failures and all(line.startswith("attend_forward: unmasked load (elements ") for line in failures)


def test_a_float32_product_in_tf32_is_named(monkeypatch):
    monkeypatch.setattr(examine, "missing_wheels", lambda: "as if")
    tf32 = lax.DotAlgorithmPreset.TF32_TF32_F32
    presets = SimpleNamespace(TF32_TF32_F32=tf32, TF32_TF32_F32_X3=tf32)
    monkeypatch.setattr(dots, "lax", SimpleNamespace(dot_general=lax.dot_general, DotAlgorithmPreset=presets))
    found = examine.examine(replace(ODD, dtype="float32", width=40), "h100")["failures"]
    assert found == ["attend_forward: dot f32 x f32 -> f32, inputPrecision = tf32, where tf32x3 is stated"]


def test_without_the_compiler_programs_are_lowered_and_audited(monkeypatch, tmp_path, capsys):
    def serial(function, tasks, *rest):
        return {key: function(*arguments) for key, arguments in tasks.items()}

    for module in (examine, compile_report):
        monkeypatch.setattr(module, "missing_wheels", lambda: "not installed: nvidia-cuda-nvcc")
    monkeypatch.setattr(compile_report, "run_in_pool", serial)
    arguments = ["--op", "prefix_sum", "--shape", "L100,D24", "--pass", "forward"]
    assert compile_report.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 programs lowered and audited, 0 compiled" in printed
    assert "Nothing was compiled: not installed: nvidia-cuda-nvcc" in printed
    long = tmp_path / ("x" * 300)
    assert compile_report.main([*arguments, "--json", str(long)]) == 1
    assert capsys.readouterr().err.endswith(f"--json {long}: File name too long\n")
    assert compile_report.main([*arguments, "--require-compile"]) == 1


@needs_wheels
def test_any_shape_is_reported_on(tmp_path, capfd):
    path = tmp_path / "report.json"
    shape = ["--shape", "B1,L12345,N7,K1,D72,W1000", "--pass", "backward", "--jobs", "1", "--json", str(path)]
    assert compile_report.main(["--op", "sliding_window", *shape]) == 0
    printed = capfd.readouterr().out
    assert "sliding_window backward bfloat16 B1 L12345 N7 K1 D72 W1000" in printed and "attend_forward" in printed
    assert "1 programs lowered and audited, 1 compiled" in printed and "1 of those compiled have no budget" in printed
    assert '"bound": "compute"' in path.read_text()


@pytest.mark.parametrize(
    "arguments, why",
    [
        ("--shape L100", "a shape needs an operation"),
        ("--op flash --shape L100,X7", "'X7' must be one letter"),
        ("--op flash --heads 7 --kv-heads 2", "heads=7 must be a multiple of kv_heads=2"),
        ("--op prefix_sum --pass decode --width 64", "no decoding of prefix_sum"),
        ("--op prefix_sum --pass decode", "the matrix holds no such program"),
        ("--op linear --with bias", "linear has no bias; it has mask, state, relu, softmax"),
        ("--op flash --pass decode --with bias", "no decoding with bias"),
        ("--op flash --length 0", "length=0 must be at least 1"),
        ("--jobs 0", "argument --jobs: must be at least 1"),
        ("--json .", "--json: . is a folder"),
        ("--json no/such/folder.json", "there is no folder no/such"),
        ("--sweep flash --dtype float16", "float16 is not swept"),
        ("--op dense", "argument --op: invalid choice: 'dense'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, why, capsys):
    with pytest.raises(SystemExit) as stopped:
        compile_report.main(arguments.split())
    assert stopped.value.code == 2
    assert why in capsys.readouterr().err.splitlines()[-1]
