"""chunk_loop: a step over chunks of a sequence with a carry; saves only each chunk's start carry for the backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Tree = Any


class Step(NamedTuple):
    """`function(static, consts, carry, xs, aux, start) -> (carry, out)` on chunks of `size` tokens along `axis`.

    `backward` takes the same and the cotangents of (carry, out), and gives those of (consts, carry, xs); where it is
    None, JAX differentiates `function`.
    """

    function: Callable[..., tuple[Tree, Array]]
    static: Any
    size: int
    backward: Callable[..., tuple[Tree, Tree, Tree]] | None = None
    axis: int = 2  # of every array of `xs` and `aux` and of the output: (B, H, L, ...)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunk_loop(step: Step, consts: Tree, carry: Tree, xs: Tree, aux: Tree) -> Any:
    """The last carry and the outputs of all chunks. `aux` gets no gradient."""
    return _forward(step, consts, carry, xs, aux)[0]


def _forward(step, consts, carry, xs, aux):
    aux = lax.optimization_barrier(aux)  # a mask that is a constant must not turn a chunk into one: XLA on CPUs errs
    length = jax.tree.leaves(xs)[0].shape[step.axis]
    full, rest = divmod(length, step.size)

    def run(start, size, carry):
        chunk, aux_chunk = (slice_of(x, start, size, step.axis) for x in (xs, aux))
        return step.function(step.static, consts, carry, chunk, aux_chunk, start)

    out_like = jax.eval_shape(lambda carry: run(0, step.size if full else rest, carry), carry)[1]
    out = bits_of(jnp.zeros((*out_like.shape[: step.axis], length, *out_like.shape[step.axis + 1 :]), out_like.dtype))
    starts = jax.tree.map(lambda c: jnp.zeros((full, *c.shape), c.dtype), carry)

    def body(i, state):
        carry, starts, out = state
        starts = jax.tree.map(lambda s, c: lax.dynamic_update_index_in_dim(s, c, i, 0), starts, carry)
        carry, chunk = run(i * step.size, step.size, carry)
        return carry, starts, write(out, chunk, i * step.size, step.axis)

    last, starts, out = _repeat(full, body, (carry, starts, out))
    end = last
    if rest:
        end, chunk = run(full * step.size, rest, last)
        out = write(out, chunk, full * step.size, step.axis)
    return (end, from_bits(out, out_like.dtype)), (consts, starts, last, xs, aux)


def _backward(step, residuals, cotangents):
    consts, starts, last, xs, aux = residuals
    d_carry, d_out = cotangents
    full, rest = divmod(d_out.shape[step.axis], step.size)

    def pull(start, size, carry, d_carry):
        aux_chunk = slice_of(aux, start, size, step.axis)

        def run(consts, carry, xs):
            return step.function(step.static, consts, carry, xs, aux_chunk, start)

        xs_chunk, d_chunk = slice_of(xs, start, size, step.axis), slice_of(d_out, start, size, step.axis)
        if step.backward is not None:
            return step.backward(step.static, consts, carry, xs_chunk, aux_chunk, start, d_carry, d_chunk)
        _, vjp = jax.vjp(run, consts, carry, xs_chunk)
        return vjp((d_carry, d_chunk))

    d_consts = jax.tree.map(jnp.zeros_like, consts)
    d_xs = jax.tree.map(lambda x: bits_of(jnp.zeros_like(x)), xs)

    def add(state, start, size, carry):
        d_consts, d_carry, d_xs = state
        chunk_consts, d_carry, chunk_xs = pull(start, size, carry, d_carry)
        d_consts = jax.tree.map(jnp.add, d_consts, chunk_consts)
        chunk_xs = jax.tree.map(lambda x, c: c.astype(x.dtype), xs, chunk_xs)
        d_xs = jax.tree.map(lambda d, c: write(d, c, start, step.axis), d_xs, chunk_xs)
        return d_consts, d_carry, d_xs

    def body(k, state):
        i = full - 1 - k
        carry = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, i, 0, keepdims=False), starts)
        return add(state, i * step.size, step.size, carry)

    state = (d_consts, d_carry, d_xs)
    if rest:
        state = add(state, full * step.size, rest, last)
    d_consts, d_carry, d_xs = _repeat(full, body, state)
    return d_consts, d_carry, jax.tree.map(lambda x, d: from_bits(d, x.dtype), xs, d_xs), None


def _repeat(count, body, state):
    return lax.fori_loop(0, count, body, state) if count > 1 else body(0, state) if count else state


def slice_of(tree, start, size, axis):
    """Of every array of `tree` the `size` tokens from `start` on."""
    return jax.tree.map(lambda x: from_bits(lax.dynamic_slice_in_dim(bits_of(x), start, size, axis), x.dtype), tree)


def write(bits, chunk, start, axis):
    """An array, as bits_of gives it, with `chunk` in place of its tokens from `start` on."""
    return lax.dynamic_update_slice_in_dim(bits, bits_of(chunk), start, axis)


def bits_of(x):
    """bfloat16 as integers: XLA on CPUs has no bfloat16 slices, and would turn a whole array to float32 for each."""
    return _bits(x) if x.dtype == jnp.bfloat16 else x


@jax.custom_jvp
def _bits(x):
    return lax.bitcast_convert_type(x, jnp.uint16)


@_bits.defjvp
def _no_derivative(primals, tangents):
    """JAX's own is 0. Only a derivative of a derivative comes here: chunk_loop has the first."""
    raise NotImplementedError("a second derivative in bfloat16 is not available; cast the arrays to float32")


def from_bits(x, dtype):
    """The array of which bits_of gave `x`."""
    return lax.bitcast_convert_type(x, dtype) if dtype == jnp.bfloat16 else x


chunk_loop.defvjp(_forward, _backward)
