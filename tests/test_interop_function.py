"""to_torch_function: values and gradients in any nesting, what is traced and kept, and torch's rules of autograd."""

import doctest
import gc
import json
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the newest lane leaves torch out (gigabytes of CUDA)")
import evo_jax  # noqa: E402
from benchmarks import interop as benchmark  # noqa: E402
from evo_jax.interop import arrays, from_torch, function, to_torch, to_torch_function  # noqa: E402


class Pair(NamedTuple):
    left: Any
    right: Any


def _tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def _layer(x, w):
    return jnp.tanh(x @ w)


def test_an_operation_of_ours_matches_torch_and_its_gradients():
    q, k, v = _tensors((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    ours = to_torch_function(evo_jax.flash_attention)(q, k, v, is_causal=True)
    heads = [a.transpose(1, 2) for a in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(theirs.shape)
    expected = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), (q, k, v)), expected)


def test_gradients_against_finite_differences(x64):
    def fn(tree, power, mask, *, scale):
        a, (b, c) = tree["a"], tree["bc"]
        d = jnp.where(mask, a @ b, 0.0) * scale
        return {"out": (jnp.sin(d), [c.left**power]), "count": mask.sum(), "pair": Pair(c.right * d, None)}

    call = to_torch_function(fn)
    mask = torch.tensor([[True, False, True], [True, True, False]])

    def flat(a, b, left, right):
        out = call({"a": a, "bc": (b, Pair(left, right))}, 3, mask, scale=0.5)
        assert (out["count"].item(), out["count"].requires_grad, out["pair"].right) == (4, False, None)
        return out["out"][0], out["out"][1][0], out["pair"].left

    inputs = _tensors((2, 4), (4, 3), (5,), (2, 3), dtype=torch.float64)
    assert torch.autograd.gradcheck(flat, inputs)
    inputs[1].requires_grad_(False)
    assert torch.autograd.gradcheck(flat, inputs)


def test_complex_gradients_follow_the_conventions_of_torch(x64):
    z, x = _tensors((3,), (3,), dtype=torch.complex128)
    x = x.real.detach().requires_grad_()
    fn = to_torch_function(lambda z, x: (z**2 * x.astype(z.dtype), jnp.real(z) * x, jnp.conj(z)))
    assert torch.autograd.gradcheck(fn, (z, x))


def test_each_pass_is_traced_once_per_shape_and_static_value():
    traced = []

    @jax.custom_vjp
    def scaled(x, factor):
        traced.append("plain")
        return x * factor

    def forward(x, factor):
        traced.append("forward")
        return x * factor, factor

    def backward(factor, g):
        traced.append("backward")
        return g * factor, None

    scaled.defvjp(forward, backward)
    fn = to_torch_function(lambda x, factor: scaled(x, jnp.float32(factor)))
    (x,) = _tensors((3,))
    for _ in range(3):
        fn(x, 2).sum().backward()
    assert traced == ["forward", "backward"]  # jax.vjp under jit needs no plain trace
    traced.clear()
    for _ in range(3):
        assert fn(x.detach(), 2).grad_fn is None
        with torch.no_grad():
            assert not fn(x, 2).requires_grad
    assert traced == ["plain"]
    for value, times in ((2.0, 1), (True, 1), (2, 0), (float("nan"), 1), (float("nan"), 0), (0.0, 1), (-0.0, 1)):
        traced.clear()
        fn(x.detach(), value)
        assert len(traced) == times, value
    traced.clear()
    fn(torch.ones(4), 2)
    assert traced == ["plain"]


def test_what_an_argument_can_be():
    fn = to_torch_function(lambda x, y, how: x + y if how == "add" else x * y)
    (x,) = _tensors((2,))
    torch.testing.assert_close(fn(x, jnp.ones(2), "add"), x + 1)
    torch.testing.assert_close(fn(x, 1, "add"), x + 1)
    with pytest.raises(TypeError, match=r"must be a tensor or hashable: unhashable type: 'numpy.ndarray'"):
        fn(x, np.ones(2), "add")
    with pytest.raises(TypeError, match="float64 would lose bits"):
        fn(x, torch.ones(2, dtype=torch.float64), "add")
    assert to_torch_function(lambda: {"zeros": jnp.zeros(2)})()["zeros"].tolist() == [0, 0]


def test_retain_graph_and_backward_twice():
    x, w = _tensors((2, 3), (3, 3))
    y = to_torch_function(_layer)(x, w)
    first = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), (x, w))
    z = to_torch_function(lambda x: jnp.cumsum(x, 0))(x)  # keeps nothing
    z.sum().backward()
    with pytest.raises(RuntimeError, match=r"second time|before without retain_graph=True"):
        z.sum().backward()


def test_a_second_derivative_is_refused_and_the_way_out_works():
    (x,) = _tensors((3,))
    cube = to_torch_function(lambda x: (x**3).sum())
    with pytest.raises(RuntimeError, match=r"take the inner derivative in JAX.*to_torch_function\(jax.grad\(fn\)\)"):
        torch.autograd.grad(cube(x), x, create_graph=True)
    inner = to_torch_function(jax.grad(lambda x: (x**3).sum()))(x)
    torch.testing.assert_close(torch.autograd.grad(inner.sum(), x)[0], 6 * x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself uses it for forward mode
def test_other_ways_to_differentiate_are_refused_not_ignored():
    fn = to_torch_function(jnp.sin)
    x = torch.ones(3)
    with torch.autograd.forward_ad.dual_level():
        for point in (x, x.clone().requires_grad_()):
            with pytest.raises(NotImplementedError, match="jvp"):
                fn(torch.autograd.forward_ad.make_dual(point, x))
        assert fn(x).shape == (3,)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: fn(x).sum())(x)
    for transform in (torch.vmap, torch.func.functionalize):
        with pytest.raises(RuntimeError, match=r"transform of torch\.func"):
            transform(fn)(x[None])


@pytest.mark.parametrize("size", [4, 1 << 19])  # small, and where XLA would share the memory
def test_a_saved_tensor_changed_in_place_is_noticed_and_no_other(size):
    (x,) = _tensors((size,))
    squared = to_torch_function(lambda x, y: x * y)
    other = torch.ones(size)
    y = squared(x, other)
    other.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    linear = to_torch_function(lambda x, y: 2 * x + y)
    y = linear(x, other)
    other.add_(1)
    y.add_(1)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((size,), 2.0))
    z = to_torch_function(jnp.exp)(x)
    with torch.no_grad():
        x.mul_(2)  # exp keeps its result, not its argument
    assert torch.equal(torch.autograd.grad(z.sum(), x, retain_graph=True)[0], z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_no_result_shares_memory_with_what_is_kept():
    kept = jnp.arange(64.0)
    fn = to_torch_function(lambda x: (x, x, x * 2, kept, kept))
    for x in (torch.ones(64), torch.ones(64, requires_grad=True), torch.ones(1 << 19)):
        out = fn(x)
        with torch.no_grad():
            for number, tensor in enumerate(out):
                tensor.fill_(number)
        assert [tensor.max().item() for tensor in out] == [0, 1, 2, 3, 4]
        assert x.sum() == x.numel() and jnp.array_equal(kept, jnp.arange(64.0))


def test_residuals_go_with_the_backward_pass_not_with_the_result():
    def held():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    fn = to_torch_function(lambda x: jnp.sin(jnp.cos(x)) * 2)
    (x,) = _tensors((1 << 13,))
    fn(x).sum().backward()
    before, size, few = held(), x.nbytes, 64
    y = fn(x)
    assert held() >= before + 2 * size  # a result, and residuals of its own
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert held() <= before + size + few
    del y
    assert held() <= before + few


def test_many_calls_leak_nothing():
    fn = to_torch_function(lambda x, w: _layer(x, w) * 2)
    x, w = _tensors((64, 64), (64, 64))

    def calls(number):
        for _ in range(number):
            fn(x, w).sum().backward()
            fn(x.detach(), w.detach())
        return len(jax.live_arrays()), len(gc.get_objects())

    calls(20)
    gc.collect()
    arrays, objects = calls(20)
    gc.collect()
    before = _resident()
    more_arrays, more_objects = calls(600)
    assert more_arrays <= arrays and more_objects < objects + 200
    assert _resident() < before + 16 * 2**20  # a leak of one (64, 64) float32 array per call would be twice as much


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_backward_keeps_the_settings_of_forward_on_another_thread():
    (x,) = _tensors((3,), dtype=torch.float64)
    seen = []
    fn = to_torch_function(lambda x: evo_jax.prefix_sum(x, axis=0) ** 2)
    with jax.enable_x64(True), evo_jax.backend("interpret"):
        y = fn(x)
    thread = threading.Thread(target=lambda: seen.append(torch.autograd.grad(y.sum(), x)[0]))
    thread.start()
    thread.join()
    prefix = x.detach().cumsum(0)
    torch.testing.assert_close(seen[0], (2 * prefix).flip(0).cumsum(0).flip(0), rtol=1e-12, atol=1e-12)


def test_residuals_are_tensors_that_torch_can_move():
    """What is held beside would not be freed by checkpointing, nor offloaded; a few KB may be."""
    x, w = _tensors((512, 32), (16, 32))
    moved = []
    fn = to_torch_function(lambda x, w: jnp.tanh(jnp.sin(x) @ w.T) * jnp.cos(x).mean())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t) or t.clone(), lambda t: t):
        y = fn(x, w)
    residuals = jax.tree.leaves(jax.vjp(lambda x, w: jnp.tanh(jnp.sin(x) @ w.T) * jnp.cos(x).mean(),
                                        *(jnp.asarray(t.detach().numpy()) for t in (x, w)))[1])  # fmt: skip
    assert len(moved) >= len([r for r in residuals if r.nbytes >= 2**14]) > 2
    same = torch.tanh(torch.sin(x) @ w.t()) * torch.cos(x).mean()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, w)), torch.autograd.grad(same.sum(), (x, w)))


def test_checkpointing_of_a_layer_computes_it_again():
    from evo_jax.interop import FlashAttention

    layer, calls = FlashAttention(64, 2), []

    def block(x):
        calls.append(1)
        return layer(x)[0]

    x = torch.randn(1, 100, 64, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(calls) == 2
    actual, x.grad = x.grad, None
    layer(x)[0].sum().backward()
    torch.testing.assert_close(actual, x.grad)


def test_checkpointing_of_torch_recomputes_it():
    calls = []
    fn = to_torch_function(_layer)
    x, w = _tensors((2, 3), (3, 3))

    def block(x):
        calls.append(1)
        return fn(torch.relu(x), w)

    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    actual = torch.autograd.grad(y.sum(), (x, w))
    torch.testing.assert_close(actual, torch.autograd.grad(torch.tanh(torch.relu(x) @ w).sum(), (x, w)))
    assert len(calls) == 2


def test_layouts_of_arguments_and_cotangents():
    fn = to_torch_function(_layer)
    x, w = (tensor.bfloat16() for tensor in _tensors((3, 5), (4, 5)))
    y = fn(x[:, ::2], w[:, :3].t().contiguous().t().t())
    torch.testing.assert_close(y, torch.tanh(x[:, ::2] @ w[:, :3].t()), rtol=0.02, atol=0.02)
    y.expand(2, 3, 4).sum().backward()
    assert y.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look
def test_torch_compile_breaks_its_graph_there():
    first, second = to_torch_function(_layer), to_torch_function(lambda x, w: _layer(x, w) + 1)
    graphs = []

    def model(x, w):
        x = first(torch.relu(x), w)
        return second(torch.relu(x), w).sum()

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    x, w = _tensors((2, 3), (3, 3))
    expected = torch.autograd.grad(model(x, w), (x, w))
    actual = torch.autograd.grad(torch.compile(model, backend=count)(x, w), (x, w))
    torch.testing.assert_close(actual, expected)
    assert len(graphs) >= 2


def test_the_benchmark_gates_and_reports_the_overhead(tmp_path, monkeypatch):
    shortest = {"tanh": benchmark.operations()["tanh"]}
    monkeypatch.setattr(benchmark, "operations", lambda: shortest)
    benchmark.main(["--rounds", "1", "--out", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["gate_failure"] is None and len(report["rows"]) == 4
    assert report["rows"][0]["overhead_us"].keys() == {"torch", "torch recorded"}
    assert report["rows"][1]["errors"].keys() == {"out", "gradient"}


@pytest.mark.parametrize("module", [arrays, function])
def test_examples_in_the_docstrings_print_what_they_say(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.gpu
def test_cuda_tensors_share_memory_and_follow_the_current_stream():
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    tensor = torch.arange(4096, device="cuda", dtype=torch.float32)
    array = from_torch(tensor, copy=False)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr() and jnp.array_equal(array, jnp.arange(4096.0))
    assert to_torch(array, copy=False).data_ptr() == tensor.data_ptr() != to_torch(array).data_ptr()
    fn = to_torch_function(_layer)
    x, w = (t.detach().cuda().requires_grad_() for t in _tensors((512, 512), (512, 512)))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(50):  # work is still queued when JAX is called, and when torch reads
                busy = torch.tanh(x @ w / (step + 10))
                actual = torch.autograd.grad(fn(busy, w / 20).square().sum(), (x, w), retain_graph=True)
                expected = torch.autograd.grad(torch.tanh(busy @ (w / 20)).square().sum(), (x, w))
                torch.testing.assert_close(actual, expected, rtol=1e-2, atol=5e-2)  # both may use TF32
    with pytest.raises((ValueError, RuntimeError), match="device"):
        fn(x, w.cpu())
