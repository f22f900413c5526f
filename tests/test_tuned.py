"""Which launch a kernel gets: the caller's, an override's, the cache's, a table's, the default; in that order."""

import dataclasses
import json
import multiprocessing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evo_jax
from pallas_kernels import tuned, tuned_store
from pallas_kernels.launch import attend_launch, prefix_launch
from pallas_kernels.tuned import Key, choose, override, recording

KEY = Key.of("attend_forward", "bf16", 128, 5000, "causal")
DEFAULT = attend_launch("forward", 128, "bf16", interpret=False)
X = np.arange(300, dtype=np.float32).reshape(100, 3)


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> str:
    """As if a CUDA device were there, with a cache of its own."""
    monkeypatch.setenv("EVO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned_store, "device_kind", lambda: "Some GPU")
    monkeypatch.setattr(tuned_store, "_WARNED", set())
    tuned_store.forget()
    return "Some GPU"


def store(device, key=KEY, **launch):
    path = tuned_store.save(device, key, launch, {})
    tuned_store.forget()
    return path


def sum_of(x, **options):
    return evo_jax.prefix_sum(x, axis=0, implementation="interpret", **options)


def grid_of(fn, *args):
    """Of the last Pallas call in fn's program."""
    calls = [str(eqn.params["grid_mapping"].grid) for eqn in _pallas_calls(jax.make_jaxpr(fn)(*args).jaxpr)]
    return calls[-1]


def _pallas_calls(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    yield from _pallas_calls(inner.jaxpr)


def test_an_override_launches_otherwise_and_sums_alike():
    expected, before = sum_of(X), grid_of(sum_of, X)
    with override({"prefix": {"chunk": 16, "block": 2}}):
        assert grid_of(sum_of, X) == "(2, 1, 7)" != before == "(1, 1, 2)"
        np.testing.assert_array_equal(sum_of(X), expected)


def test_a_jitted_function_is_traced_again_inside_and_not_afterwards():
    traces = []
    run = jax.jit(lambda x: (traces.append(1), sum_of(x))[1])
    for _ in range(2):
        run(X)
        with override({"prefix": {"chunk": 32}}):
            run(X)
    assert len(traces) == 2


def test_the_order_of_precedence(gpu):
    assert choose(KEY, DEFAULT) is DEFAULT
    store(gpu, block_q=64, num_stages=3)
    stored = choose(KEY, DEFAULT)
    assert (stored.block_q, stored.block_k, stored.num_stages) == (64, DEFAULT.block_k, 3)
    with override({KEY: {"block_q": 32}, "attend_forward": {"block_q": 16, "num_warps": 4}}):
        chosen = choose(KEY, DEFAULT)
        assert (chosen.block_q, chosen.num_warps, chosen.num_stages) == (32, 4, 3), "a key wins over a kernel"
        with override({"attend_forward": {"block_q": 16}}):
            assert choose(KEY, DEFAULT).block_q == 16, "the inner block wins"
        own = choose(KEY, DEFAULT, {"block_q": 256, "num_warps": None})
        assert (own.block_q, own.num_warps, own.num_stages) == (256, 4, DEFAULT.num_stages)
    with override(stored=False):
        assert choose(KEY, DEFAULT) == DEFAULT
    assert choose(Key.of("attend_forward", "bf16", 128, 9000, "causal"), DEFAULT) == DEFAULT, "another length"


def test_a_shipped_table_counts_where_the_cache_holds_nothing(gpu, monkeypatch, tmp_path):
    facts = {"evo_jax": "1", "jax": "1", "driver": "1", "date": "2000-01-01", "command": "python -m evo_jax tune"}
    table = {
        "device": gpu,
        "provenance": facts,
        "launches": [{"key": dataclasses.asdict(KEY), "launch": {"block_k": 32}}],
    }
    (tmp_path / "some-gpu.json").write_text(json.dumps(table))
    monkeypatch.setattr(tuned_store, "tables", lambda: tmp_path)
    with recording() as seen:
        assert choose(KEY, DEFAULT).block_k == 32
    assert seen[KEY].source == "table"
    store(gpu, block_q=64)
    assert choose(KEY, DEFAULT).block_k == DEFAULT.block_k
    (tmp_path / "some-gpu.json").write_text(json.dumps({**table, "provenance": {}}))
    tuned_store.forget()
    with pytest.raises(ValueError, match="provenance"):
        choose(Key.of("prefix", "float32", 64, 1, "last"), prefix_launch(True, interpret=False))


def test_without_a_device_and_in_the_interpreter_nothing_stored_counts(gpu, monkeypatch):
    store(gpu, block_q=64)
    assert choose(KEY, attend_launch("forward", 128, "bf16", interpret=True)).block_q == DEFAULT.block_q
    monkeypatch.setattr(tuned_store, "device_kind", lambda: None)
    assert choose(KEY, DEFAULT) is DEFAULT


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:20],
        lambda text: b"\xff\xfe",
        lambda text: text.replace(b"64", b"48"),
        lambda text: text.replace(b"block_q", b"block_z"),
        lambda text: text.replace(b"causal", b"window"),
    ],
    ids=["cut", "no text", "no launch", "no such field", "another key's"],
)
def test_a_corrupt_file_is_ignored_with_one_warning(gpu, damage):
    path = store(gpu, block_q=64)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="ignored") as caught:
        assert choose(KEY, DEFAULT) == DEFAULT
        tuned_store.forget()
        assert choose(KEY, DEFAULT) == DEFAULT
    assert len(caught) == 1
    store(gpu, block_q=32)
    assert choose(KEY, DEFAULT).block_q == 32, "tuning again mends it"


def test_an_entry_that_cannot_be_read_is_as_none(gpu, monkeypatch):
    path = store(gpu, block_q=64)
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert choose(KEY, DEFAULT) == DEFAULT and not tuned_store.has(KEY)
    path.rmdir()
    path.write_text("[" * 200_000)
    monkeypatch.setattr(tuned_store, "_WARNED", set())
    tuned_store.forget()
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert choose(KEY, DEFAULT) == DEFAULT


def test_a_cache_that_cannot_be_looked_into_is_as_none(gpu, monkeypatch, tmp_path):
    def fail(path=None):
        if path is None:
            raise RuntimeError("no home")
        if path.is_relative_to(tmp_path):
            raise PermissionError("not yours")
        return False

    for target, names, why in ((Path, ("is_file", "read_bytes"), "not yours"), (tuned_store, ("folder",), "no home")):
        with monkeypatch.context() as patched, pytest.warns(RuntimeWarning, match=why) as caught:
            patched.setattr(tuned_store, "_WARNED", set())
            for name in names:
                patched.setattr(target, name, fail)
            assert choose(KEY, DEFAULT) == DEFAULT and not tuned_store.has(KEY)
        assert len(caught) == 1


def _write(folder: str, number: int) -> None:
    import os

    os.environ["EVO_CACHE_DIR"] = folder
    for length in range(20):
        tuned_store.save("Some GPU", Key("prefix", "float32", 64, 1 << length, f"p{number}"), {"chunk": 16}, {})
        tuned_store.save("Some GPU", KEY, {"block_q": 16 << number}, {})


def test_processes_that_write_at_once_lose_nothing(gpu, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_write, args=(str(tmp_path), number)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    files = list(tmp_path.rglob("*"))
    assert len([f for f in files if f.suffix == ".json"]) == 41 and not [f for f in files if f.suffix == ".tmp"]
    tuned_store.forget()
    assert choose(KEY, DEFAULT).block_q in (32, 64)
    assert {json.loads(f.read_text())["device"] for f in files if f.is_file()} == {gpu}


def test_results_of_other_kernels_or_another_jax_are_not_found(gpu, monkeypatch):
    store(gpu, block_q=64)
    for name, value in (("kernels_version", lambda: "0"), ("jax", type("Jax", (), {"__version__": "0"}))):
        with monkeypatch.context() as patched:
            patched.setattr(tuned_store, name, value)
            assert choose(KEY, DEFAULT) == DEFAULT


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("EVO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert tuned_store.folder() == Path("/x/evo-jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned_store.folder() == Path.home() / ".cache/evo-jax"
    monkeypatch.setenv("EVO_CACHE_DIR", "/mine")
    assert tuned_store.folder() == Path("/mine")


def test_recording_sees_every_kernel_of_a_gradient():
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    flash = jax.grad(lambda q: evo_jax.flash_attention(q, q, q, implementation="interpret").sum())
    linear = jax.grad(lambda q: evo_jax.linear_attention(q, q, q, implementation="interpret").sum())
    for fn, kernels in (
        (flash, {"attend_forward", "attend_d_query", "attend_d_key_value"}),
        (linear, {"linear_forward", "linear_backward"}),
    ):
        with recording() as launches:
            jax.eval_shape(fn, x)
        assert {key.kernel for key in launches} == kernels
        assert all(chosen.source == "default" and chosen.launch == chosen.default for chosen in launches.values())


def test_the_backward_of_evo_keeps_the_chunks_of_its_forward():
    """Its carry tables have one row per chunk, so that an override between the two must not change the chunk."""
    v = jax.random.normal(jax.random.key(0), (1, 1, 100, 16))
    params = evo_jax.init_evo_params(jax.random.key(1), 16)
    run = lambda v: evo_jax.evo_attention(v, params, implementation="interpret")  # noqa: E731
    expected = jax.vjp(run, v)[1](v)[0]
    with override({"evo_forward": {"block_m": 16}}):
        _, pull = jax.vjp(run, v)
    np.testing.assert_allclose(pull(v)[0], expected, rtol=1e-3, atol=1e-4)


def test_what_is_no_launch_is_named():
    with pytest.raises(ValueError, match="'attend' is not one of attend_forward"), override({"attend": {}}):
        pass
    with pytest.raises(ValueError, match="evo_backward has no block_m"), override({"evo_backward": {"block_m": 16}}):
        pass
    with pytest.raises(ValueError, match="chunk=3"), override({"prefix": {"chunk": 3}}):
        choose(Key.of("prefix", "float32", 64, 1, "last"), prefix_launch(True, interpret=True))


def test_lengths_share_a_key_up_to_a_power_of_two():
    assert [Key.of("prefix", "float32", 64, n, "last").length for n in (0, 1, 3, 4096, 4097)] == [1, 1, 4, 4096, 8192]


def test_every_kernel_may_choose_fields_that_its_launch_has():
    assert set(tuned.fields_of(KEY, DEFAULT)) == set(tuned.KERNELS["attend_forward"])


def test_default_launches_are_those_of_the_gpu_that_is_compiled_for():
    """Hopper's own for a GPU of capability 9; anywhere else, and where none is known, those that fit every GPU."""
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def chosen():
        with recording() as launches:
            jax.eval_shape(lambda q: evo_jax.flash_attention(q, q, q, implementation="triton"), q)
        (launch,) = (choice.launch for choice in launches.values())
        return launch

    general = attend_launch("forward", 64, "bf16", interpret=False)
    assert chosen() == general
    with override(capability=(8, 0)):
        assert chosen() == general
    with override(capability=(9, 0)):
        assert chosen() == attend_launch("forward", 64, "bf16", interpret=False, hopper=True) != general
        with override({"attend_forward": {"num_warps": 8}}):
            assert chosen().num_warps == 8 and chosen().num_stages == 3


PLAIN = {"shape": (2, 8, 65536, 64), "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("change", "repeats"),
    [
        ({}, 8),
        ({"shape": (2, 8, 65536, 128)}, 8),
        ({"shape": (1, 8, 16384, 64)}, 4),
        ({"shape": (2, 8, 65536, 32), "masked": True}, 8),
        ({"shape": (1, 8, 4096, 64)}, 1),  # too few programs would be left
        ({"shape": (2, 8, 65536, 80)}, 1),
        ({"shape": (1, 1, 65536, 64)}, 1),  # these four would spill registers
        ({"shape": (2, 8, 65537, 64)}, 1),
        ({"masked": True}, 1),
        ({"own_query": True}, 1),
        ({"dtype": "float32"}, 1),
        ({"capability": (8, 0)}, 1),
    ],
)
def test_evo_takes_several_chunks_a_program_where_it_was_seen_not_to_spill(change, repeats):
    case = PLAIN | {"masked": False, "own_query": False, "capability": (9, 0)} | change
    v = jax.ShapeDtypeStruct(case["shape"], case["dtype"])
    kernel, bias = (jax.ShapeDtypeStruct((v.shape[3],) * n, v.dtype) for n in (2, 1))
    params = evo_jax.EvoParams(*(kernel if name.endswith("kernel") else bias for name in evo_jax.EvoParams._fields))
    options = {"query": v} if case["own_query"] else {}
    if case["masked"]:
        options["attention_mask"] = jax.ShapeDtypeStruct((v.shape[0], v.shape[2]), bool)
    with override(stored=False, capability=case["capability"]), recording() as launches:
        run = lambda v, params, options: evo_jax.evo_attention(v, params, **options, implementation="triton")  # noqa: E731
        jax.eval_shape(run, v, params, options)
    assert next(c.launch.repeats for key, c in launches.items() if key.kernel == "evo_forward") == repeats


def test_a_program_takes_one_chunk_at_least():
    with override({"evo_forward": {"repeats": 0}}), pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        v, params = jnp.zeros((1, 1, 16, 16)), evo_jax.init_evo_params(jax.random.key(0), 16)
        evo_jax.evo_attention(v, params, implementation="interpret")
