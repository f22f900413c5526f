"""from_torch and to_torch: which memory is shared, every layout and dtype exact, and what cannot cross."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the newest lane leaves torch out (gigabytes of CUDA)")
from evo_jax.interop import arrays, from_torch, to_torch  # noqa: E402

NARROW = ["float32", "bfloat16", "float16", "bool", "uint8", "int8", "int16", "int32", "complex64", "float8_e4m3fn"]
WIDE = ["float64", "int64", "complex128"]


def _aligned(*shape, dtype=torch.float32):
    """Numbers that differ, where XLA accepts the address: torch aligns a CPU tensor's storage to 64 bytes."""
    tensor = torch.arange(int(np.prod(shape))).reshape(shape).remainder(100).to(dtype)
    assert tensor.data_ptr() % 64 == 0
    return tensor


def _base():
    return _aligned(4, 6, 16)


LAYOUTS = {  # name: (view, whether it can share memory)
    "contiguous": (lambda t: t, True),
    "transposed": (lambda t: t[0].t(), True),
    "permuted": (lambda t: t.permute(2, 0, 1), True),
    "rows": (lambda t: t[1:3], True),
    "one row kept": (lambda t: t[:, 2:3][1:2], True),
    "columns": (lambda t: t[:, :, 2:7], False),
    "steps": (lambda t: t[:, ::2], False),
    "expanded": (lambda t: t[:1].expand(5, 6, 16), False),
    "broadcast scalar": (lambda t: t[0, 0, 0].expand(3, 4), False),
    "flipped": (lambda t: t.flip(1), True),
    "conjugate": (lambda t: torch.complex(t, t + 1).conj(), False),
    "imaginary of a conjugate": (lambda t: torch.complex(t, t + 1).conj().imag, False),
    "scalar": (lambda t: t[0, 0, 0], True),
    "requires grad": (lambda t: t.requires_grad_(), True),
    "tensor subclass": (torch.nn.Parameter, True),
}


def _numpy(tensor):
    return tensor.resolve_conj().resolve_neg().detach().numpy()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_arrives_with_its_values(name):
    view, shares = LAYOUTS[name]
    tensor = view(_base())
    array = from_torch(tensor)
    np.testing.assert_array_equal(np.asarray(array), _numpy(tensor), strict=True)
    assert (array.unsafe_buffer_pointer() == tensor.data_ptr()) == shares
    if shares:
        assert from_torch(tensor, copy=False).unsafe_buffer_pointer() == tensor.data_ptr()
    else:
        with pytest.raises(ValueError, match="copy=False, but a tensor of"):
            from_torch(tensor, copy=False)


def test_an_address_that_xla_refuses_is_a_copy():
    tensor = _aligned(65)[1:]
    np.testing.assert_array_equal(np.asarray(from_torch(tensor)), tensor.numpy())
    with pytest.raises(ValueError, match=r"data_ptr\(\) % 64=4"):
        from_torch(tensor, copy=False)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 0)])
def test_empty_arrays_cross(shape):
    array = from_torch(torch.zeros(shape, dtype=torch.float16), copy=False)
    assert (array.shape, array.dtype) == (shape, jnp.float16)
    assert to_torch(array).shape == shape and to_torch(array).dtype == torch.float16


def _crosses_exactly(name):
    tensor = _aligned(8, 16, dtype=getattr(torch, name))
    array = from_torch(tensor, copy=False)
    assert (array.dtype, array.unsafe_buffer_pointer()) == (jnp.dtype(name), tensor.data_ptr())
    again = to_torch(array, copy=False)
    assert (again.dtype, again.data_ptr()) == (tensor.dtype, tensor.data_ptr())
    handed = np.asarray(arrays.argument(tensor))
    assert handed.dtype == jnp.dtype(name)
    np.testing.assert_array_equal(np.asarray(array), handed)
    copied = to_torch(jnp.asarray(handed))
    assert copied.dtype == tensor.dtype and torch.equal(copied.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("name", NARROW)
def test_dtypes_cross_exactly_without_a_copy(name):
    _crosses_exactly(name)


@pytest.mark.parametrize("name", WIDE)
def test_wide_dtypes_cross_exactly_where_x64_is_on(name, x64):
    _crosses_exactly(name)
    tensor = torch.tensor([2**53 + 1 if name == "int64" else 1 + 2**-50]).to(getattr(torch, name))
    assert torch.equal(to_torch(from_torch(tensor)), tensor)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("cross", [from_torch, arrays.argument])
def test_wide_dtypes_are_never_cast_in_silence(name, cross):
    with pytest.raises(TypeError, match=rf"torch.{name} would lose bits.*jax_enable_x64"):
        cross(torch.ones(3, dtype=getattr(torch, name)))


def test_who_may_write_to_the_memory():
    tensor, array = torch.zeros(4), jnp.zeros(4)
    shared, private = from_torch(tensor), from_torch(tensor, copy=True)
    tensor.add_(1)
    assert shared.sum() == 4 and private.sum() == 0
    copied = to_torch(array).add_(1)
    assert copied.sum() == 4 and array.sum() == 0
    assert to_torch(array, copy=False).data_ptr() == array.unsafe_buffer_pointer()
    assert to_torch(array, copy=None).data_ptr() == array.unsafe_buffer_pointer()


def test_shared_memory_outlives_its_first_owner():
    array = from_torch(torch.full((1000,), 7.0))
    tensor = to_torch(jnp.full((1000,), 8.0), copy=False)
    gc.collect()
    others = [torch.zeros(1000) for _ in range(20)], [jnp.zeros(1000) + i for i in range(20)]
    assert array.sum() == 7000 and tensor.sum() == 8000 and len(others) == 2


def test_a_gradient_does_not_cross_by_itself():
    assert not to_torch(from_torch(torch.ones(2, requires_grad=True))).requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones(2), "a torch.Tensor is wanted, not ndarray"),
        (torch.ones(2).to_sparse(), "strided tensors only, not tensor.layout=torch.sparse_coo"),
        (torch.empty(2, dtype=torch.bits8), "JAX has no array for tensor.dtype=torch.bits8"),
    ],
)
def test_what_jax_cannot_hold(value, message):
    with pytest.raises(TypeError, match=message):
        from_torch(value)


def test_what_torch_cannot_hold():
    wrong: Any = np.ones(2)
    with pytest.raises(TypeError, match=r"jax\.Array is wanted, not ndarray"):
        to_torch(wrong)
    with pytest.raises(TypeError, match=r"jax.random.key_data\(key\)"):
        to_torch(jax.random.key(0))
    with pytest.raises(TypeError, match=r"torch has no tensor for array\.dtype=dtype"):
        to_torch(jnp.zeros(2, jnp.int4))
    with pytest.raises(TypeError, match=r"call to_torch outside of jax\.jit"):
        jax.make_jaxpr(to_torch)(jnp.zeros(2))


def test_a_device_that_jax_does_not_have():
    with pytest.raises(RuntimeError, match="a tensor on meta cannot go to JAX"):
        from_torch(torch.zeros(2, device="meta"))
    if not any(device.platform == "gpu" for device in jax.devices()):
        with pytest.raises(RuntimeError, match="the tensor is on cuda:0, and JAX has no cuda here"):
            arrays._device("cuda", 0)
