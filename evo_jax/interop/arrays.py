"""Arrays across the border of torch and JAX, by dlpack: whose memory they are, and no silent cast."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer

_WIDE = (torch.float64, torch.int64, torch.uint64, torch.complex128)
_torch: Any = torch  # of what it does not declare
_BFLOAT16 = np.dtype(jnp.bfloat16)


def from_torch(tensor: torch.Tensor, *, copy: bool | None = None) -> jax.Array:
    """Return `tensor`'s values as a JAX array of its shape and dtype, on its device.

    A compact tensor (contiguous, or a permutation of one) whose data starts at an address that XLA accepts shares
    its memory with the result: JAX holds that memory alive, and takes it for constant. So do not write to the tensor
    while the array, or a computation that was given it, lives; `copy=True` gives an array of its own. Every other
    layout (steps, expanded axes, conjugate views) is copied once. The result is detached: gradients cross by
    to_torch_function().

    Args:
        tensor: (any shape) of a dtype that both know; on the CPU, or on a CUDA device that JAX has too.
        copy: None shares memory where it can, True never does, False raises where it cannot.

    Raises:
        TypeError: a 64-bit dtype while jax_enable_x64 is off, a dtype that JAX lacks, or not a strided tensor.
        ValueError: `copy=False` and a layout that needs a copy. RuntimeError: a device that JAX does not have, or
            a tensor inside of a transform of torch.func.

    >>> import torch
    >>> from evo_jax.interop import from_torch
    >>> tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    >>> print(from_torch(tensor.T))
    [[0 3]
     [1 4]
     [2 5]]
    """
    check_tensor(tensor)
    plain = tensor.detach().resolve_conj().resolve_neg()
    if copy or not _is_compact(plain):
        plain = plain.clone(memory_format=torch.contiguous_format)
    array = _imported(plain)
    if copy is False and tensor.numel() and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise ValueError(
            f"copy=False, but a tensor of {tuple(tensor.shape)=}, {tensor.stride()=} and {tensor.data_ptr() % 64=} "
            "cannot share its memory with JAX: drop copy=False, or give a contiguous tensor"
        )
    return array


def to_torch(array: jax.Array, *, copy: bool | None = True) -> torch.Tensor:
    """Return `array`'s values as a torch tensor of its shape and dtype, on its device; a copy is contiguous.

    The result is a copy by default, for torch may write to it and JAX takes its arrays for constant. `copy=False`
    shares the memory: then write to the tensor only if no JAX array or computation will read that memory again, and
    on CUDA let no tensor go before its stream has done with it, as JAX may use the memory anew at once. The tensor
    needs no gradient: gradients cross by to_torch_function().

    Args:
        array: (any shape) on one device, the CPU or CUDA; not traced.
        copy: True never shares memory; False always does, and raises where it cannot; None shares where it can.

    Raises:
        TypeError: not a JAX array, a traced one, or a dtype that torch lacks. ValueError: an array on several devices.

    >>> import jax.numpy as jnp
    >>> from evo_jax.interop import to_torch
    >>> to_torch(jnp.arange(3, dtype=jnp.float32)).add_(1)
    tensor([1., 2., 3.])
    """
    _check_array(array)
    tensor = exported(array)
    if copy:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if tensor.is_cuda:  # else JAX could free `array`, and use its memory anew, before torch has read it
            torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def argument(tensor: torch.Tensor) -> Any:
    """What a jitted function is called with for `tensor`, which nobody writes to until that call is over.

    On the CPU this is a numpy array: XLA runs a small program on it at once, where an array imported by dlpack first
    wakes another thread, which costs 100 us. Where JAX would bring numpy arrays to a GPU, dlpack keeps its place.
    """
    check_tensor(tensor)
    if tensor.device.type != "cpu" or jax.default_backend() != "cpu":
        return from_torch(tensor)
    if tensor.dtype is torch.bfloat16:  # which torch does not show to numpy
        return tensor.detach().view(torch.int16).numpy().view(_BFLOAT16)
    try:
        return tensor.numpy(force=True)
    except TypeError:  # numpy lacks the dtype
        return from_torch(tensor)


def exported(array: jax.Array) -> torch.Tensor:
    """The tensor that shares `array`'s memory, once torch's current stream may read it."""
    try:
        return torch.from_dlpack(array)
    except (BufferError, jax.errors.JaxRuntimeError) as error:
        raise TypeError(f"torch has no tensor for {array.dtype=} on {array.sharding}: {error}") from error


def check_tensor(tensor: torch.Tensor) -> None:
    """Raise unless JAX can hold `tensor` exactly, where it is."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"a torch.Tensor is wanted, not {type(tensor).__name__}")
    if tensor.dtype in _WIDE and not jax.enable_x64.value:
        raise TypeError(
            f"{tensor.dtype} would lose bits while JAX works in 32: switch 64 bits on by "
            "jax.config.update('jax_enable_x64', True), or cast the tensor, as by .float(), .int() or .bool()"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"JAX holds strided tensors only, not {tensor.layout=}: give tensor.to_dense()")
    if _torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _torch._is_functional_tensor(tensor):
        raise RuntimeError("a tensor inside of a transform of torch.func has no memory that JAX could read")
    if tensor.is_quantized:
        raise TypeError(f"JAX has no {tensor.dtype=}: give tensor.dequantize()")
    _device(tensor.device.type, tensor.device.index)


def _check_array(array: jax.Array) -> None:
    if isinstance(array, Tracer):
        raise TypeError("a traced array has no values yet: call to_torch outside of jax.jit, jax.grad and jax.vmap")
    if not isinstance(array, jax.Array):
        raise TypeError(f"a jax.Array is wanted, not {type(array).__name__}")
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError(f"torch has no {array.dtype}: for a random key give jax.random.key_data(key)")
    if len(array.devices()) != 1:
        raise ValueError(f"torch holds a tensor on one device, not on {array.sharding}: gather it by jax.device_put")


@functools.lru_cache(maxsize=64)
def _device(kind: str, index: int | None) -> Any:
    """JAX's device of torch's name."""
    known = {"cpu": "cpu", "cuda": "cuda"}
    name = kind if index is None else f"{kind}:{index}"
    if kind not in known:
        raise RuntimeError(f"a tensor on {name} cannot go to JAX: move it to the CPU or to a CUDA device")
    try:
        devices = jax.local_devices(backend=known[kind])
    except RuntimeError as error:
        raise RuntimeError(
            f"the tensor is on {name}, and JAX has no {kind} here ({error}): install jax[cuda13], or call tensor.cpu()"
        ) from error
    found = [d for d in devices if kind == "cpu" or d.local_hardware_id == (index or 0)]
    if not found:
        raise RuntimeError(f"the tensor is on {name}, and JAX has only {devices}")
    return found[0]


def _imported(tensor: torch.Tensor) -> jax.Array:
    try:
        return jax.dlpack.from_dlpack(tensor)
    except (BufferError, TypeError, jax.errors.JaxRuntimeError) as error:
        raise TypeError(f"JAX has no array for {tensor.dtype=}, {tuple(tensor.shape)=}: {error}") from error


def _is_compact(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side, in any order of the axes."""
    if tensor.is_contiguous():
        return True
    axes = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    sizes = itertools.accumulate((size for _, size in axes), lambda a, b: a * b, initial=1)
    return all(step == size for (step, _), size in zip(axes, sizes, strict=False))
