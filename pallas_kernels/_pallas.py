"""The only door to Pallas: the version seam, block specs, masked loads and stores."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

program_id = pl.program_id
_interpreted: ContextVar[bool] = ContextVar("interpreted", default=True)  # whether the kernel being traced will be


def call(
    kernel: Callable[..., None],
    *args: Any,
    name: str,
    grid: Sequence[int],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int = 1,
    interpret: bool = False,
    in_place: Sequence[tuple[jax.Array, int]] = (),
) -> Any:
    """Run `kernel(*args, out)` over `grid`, through Triton or in Pallas' interpreter; args and out may be pytrees.

    `in_place` pairs an argument with the number of the output leaf that takes over its memory. Compiler parameters
    are always given: without them JAX 0.10 lowers to Mosaic GPU instead of Triton.
    """
    leaves, in_tree = jax.tree.flatten(args)
    out_leaves, out_tree = jax.tree.flatten(out_shape)

    def flat_kernel(*refs: Any) -> None:
        token = _interpreted.set(interpret)
        try:
            kernel(*jax.tree.unflatten(in_tree, refs[: len(leaves)]), jax.tree.unflatten(out_tree, refs[len(leaves) :]))
        finally:
            _interpreted.reset(token)

    aliases = {next(i for i, leaf in enumerate(leaves) if leaf is array): out for array, out in in_place}
    launch = pl.pallas_call(
        flat_kernel,
        grid=tuple(grid),
        in_specs=jax.tree.leaves(in_specs),
        out_specs=jax.tree.leaves(out_specs),
        out_shape=out_leaves,
        name=name,
        interpret=interpret,
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )
    return jax.tree.unflatten(out_tree, _differentiated_once(launch, name)(*leaves))


def _differentiated_once(launch: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`launch` without a derivative of its own: the custom_vjp around each kernel has the first."""
    once = jax.custom_jvp(launch)

    @once.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"the kernel {name} has first derivatives only, in reverse mode; implementation='reference' has some others"
        )

    return once


def whole(array: Any) -> pl.BlockSpec:
    """Every program sees all of `array` (a block moves no data on Triton: it is pointer arithmetic)."""
    shape = tuple(array.shape)
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def per_group(array: Any, group_axis: int, repeat: int = 1) -> pl.BlockSpec:
    """A program sees `array[g // repeat]`, where g is its index along `group_axis` of the grid."""
    rest = tuple(array.shape[1:])

    def index(*ids: Any) -> tuple[Any, ...]:
        g = ids[group_axis]
        return (g if repeat == 1 else jax.lax.div(g, jnp.int32(repeat)), *((0,) * len(rest)))

    return pl.BlockSpec((None, *rest), index)


class Along(NamedTuple):
    """How a program finds its place on one axis of an array: its index along `grid_axis`, divided by `repeat`.

    There it sees one element and no axis, or, with a `size`, the block of that many elements.
    """

    grid_axis: int
    repeat: int = 1
    size: int | None = None


def block(array: Any, *axes: Along | int | None) -> pl.BlockSpec:
    """A program's own part of `array`; None stands for a whole axis, a number for one taken to be that long."""
    shape = tuple(
        n if a is None else a.size if isinstance(a, Along) else a for n, a in zip(array.shape, axes, strict=True)
    )

    def index(*ids: Any) -> tuple[Any, ...]:
        return tuple(
            0
            if not isinstance(a, Along)
            else ids[a.grid_axis]
            if a.repeat == 1
            else jax.lax.div(ids[a.grid_axis], jnp.int32(a.repeat))
            for a in axes
        )

    return pl.BlockSpec(shape, index)


def load(ref: Any, index: tuple[Any, ...], mask: Any, *, volatile: bool = False) -> jax.Array:
    """`ref[index]`, 0 where `mask` is False; a masked element is never read.

    A `volatile` one is read from memory each time, as where another program of the same grid may have written.
    """
    return pltriton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype), volatile=volatile)


def store(ref: Any, index: tuple[Any, ...], value: jax.Array, mask: Any) -> None:
    """`ref[index] = value` where `mask` is True, cast to the ref's dtype; nothing else is written."""
    # In the interpreter with x64 on, a start that is a Python number would be 64-bit, unlike the others.
    index = tuple(pl.ds(jnp.asarray(i.start, jnp.int32), i.size) if isinstance(i, pl.Slice) else i for i in index)
    pltriton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def arange(n: int) -> jax.Array:
    """0 .. n - 1 in int32, whatever x64 says: 64-bit indices cost registers."""
    return jnp.arange(n, dtype=jnp.int32)


def span(start: Any, size: int) -> Any:
    """An index of `size` elements from `start` on: cheaper than an array of numbers, and not to be mixed with one."""
    return pl.ds(start, size)


def load_one(ref: Any, *index: Any) -> jax.Array:
    """One element, by numbers known to lie within the array."""
    return pltriton.load(ref.at[tuple(jnp.asarray(i, jnp.int32) for i in index)])


def load_scalar(ref: Any) -> jax.Array:
    """The one element of a ref of shape (1,)."""
    return ref[0]


def exp2(x: jax.Array) -> jax.Array:
    """2**x in float32 by one instruction, within 2 units in the last place; results under 2**-126 are 0."""
    return jnp.exp2(x) if _interpreted.get() else _approximate("ex2", x)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x in float32 by one instruction, within 1 unit in the last place; 0 for |x| above 2**126."""
    return 1.0 / x if _interpreted.get() else _approximate("rcp", x)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 values in `dtype`. Two become bfloat16 in one instruction, where the compiler may find two slow ones."""
    if jnp.dtype(dtype) != jnp.bfloat16 or x.dtype != jnp.float32 or _interpreted.get():
        return x.astype(dtype)
    (out,) = pltriton.elementwise_inline_asm(
        "cvt.rn.bf16x2.f32 $0, $2, $1;",
        args=[x],
        constraints="=r,f,f",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)],
    )
    return out


def fma(a: jax.Array, b: Any, c: Any) -> jax.Array:
    """a * b + c in float32, rounded once where it is one instruction: the compiler never makes it of two."""
    if _interpreted.get():
        return a * b + c
    return _instruction("fma.rn.f32", a, *(jnp.broadcast_to(jnp.asarray(x, jnp.float32), a.shape) for x in (b, c)))


def _approximate(name: str, x: jax.Array) -> jax.Array:
    """What Triton makes of the same functions guards against subnormal numbers, with four more instructions."""
    return _instruction(f"{name}.approx.ftz.f32", x)


def _instruction(name: str, *args: jax.Array) -> jax.Array:
    """One instruction of PTX on float32 arrays of one shape."""
    (out,) = pltriton.elementwise_inline_asm(
        f"{name} {', '.join(f'${n}' for n in range(len(args) + 1))};",
        args=list(args),
        constraints=",".join(["=f", *["f"] * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return out


__all__ = [
    "Along",
    "arange",
    "block",
    "call",
    "exp2",
    "fma",
    "load",
    "load_one",
    "load_scalar",
    "narrowed",
    "per_group",
    "program_id",
    "reciprocal",
    "span",
    "store",
    "whole",
]
