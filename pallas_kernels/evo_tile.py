"""Device-side helpers shared by the forward and backward Evo kernels: rows, tiles, dot products, LayerNorm."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _pallas as plk
from pallas_kernels.launch import Launch
from reference.online_softmax import LOG2_E

DEN_EPS = 1e-8
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Geometry:
    """Statics of one call: L, D, what a masked token means, the dtypes, and the launch."""

    length: int
    width: int
    causal: bool
    absent: bool  # a masked token is as if it were not there (else: only its own y is zero)
    accum: str  # dtype of both prefix sums
    dot_dtype: str  # "bfloat16" or "float32"
    dot_precision: str  # "bf16", "tf32" or "tf32x3"
    launch: Launch

    @property
    def chunk(self) -> int:
        return self.launch.block_m

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def block(self) -> int:
        return self.launch.block_d

    @property
    def blocks(self) -> int:
        return -(-self.width // self.block)

    @property
    def carries(self) -> int:
        """Rows of a carry table: one per chunk, or the one total of the non-causal form."""
        return self.chunks if self.causal else 1

    @property
    def repeats(self) -> int:
        return self.launch.repeats


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one chunk: where they are, which exist, and what their mean divides by."""

    index: jax.Array  # (C,) token numbers
    local: jax.Array  # (C,) the same, counted from the first token of the segment (of the sequence, in the forward)
    inside: jax.Array  # (C,) index < L
    live: jax.Array  # (C,) inside and not masked
    used: jax.Array  # (C,) whose v and query are read: `live`, or all inside where masked tokens were zeroed before
    count: jax.Array  # (C,) float32 divisor of the running mean


def chunk_rows(rows_ref: Any, chunk: Any, geo: Geometry, first: Any = None, reverse: bool = False) -> Rows:
    """Rows of chunk `chunk` of the segment whose first chunk is `first`, or of the whole sequence (None).

    `reverse` lists them from last to first, so that a cumsum down them is a suffix sum.
    """
    step = plk.arange(geo.chunk)
    local = chunk * geo.chunk + (geo.chunk - 1 - step if reverse else step)
    index = local if first is None else first * geo.chunk + local
    all_exist = rows_ref is None and first is None and geo.length % geo.chunk == 0
    inside = jnp.ones((geo.chunk,), bool) if all_exist else index < geo.length
    if rows_ref is None:
        count = (index + 1).astype(jnp.float32) if geo.causal else jnp.full((geo.chunk,), geo.length, jnp.float32)
        return Rows(index, local, inside, inside, inside, count)
    signed = plk.load(rows_ref, (index,), inside)
    live = inside & jnp.logical_not(signed < 0)
    count = jnp.where(inside, jnp.abs(signed), 1.0)
    return Rows(index, local, inside, live, live if geo.absent else inside, count)


def columns(block: Any, geo: Geometry) -> tuple[jax.Array, jax.Array]:
    """Column numbers of a block and which of them exist."""
    index = block * geo.block + plk.arange(geo.block)
    return index, index < geo.width if geo.width % geo.block else jnp.ones((geo.block,), bool)


def load_tile(ref: Any, index: jax.Array, mask: jax.Array, block: Any, geo: Geometry) -> jax.Array:
    """(C, w) float32 tile of rows `index` (0 where `mask` is False) and of column block `block`."""
    column, ok = columns(block, geo)
    return plk.load(ref, (index[:, None], column[None, :]), mask[:, None] & ok[None, :]).astype(jnp.float32)


def store_tile(ref: Any, index: jax.Array, mask: jax.Array, block: Any, value: jax.Array, geo: Geometry) -> None:
    """Write a (C, w) tile, cast to the ref's dtype."""
    column, ok = columns(block, geo)
    plk.store(ref, (index[:, None], column[None, :]), value, mask[:, None] & ok[None, :])


def load_columns(ref: Any, block: Any, geo: Geometry) -> jax.Array:
    """(w,) float32 piece of a (D,) vector."""
    column, ok = columns(block, geo)
    return plk.load(ref, (column,), ok).astype(jnp.float32)


def load_carry(ref: Any, chunk: Any, block: Any, geo: Geometry) -> jax.Array:
    """(w,) piece of a row of a carry table: that of the chunk, or the only one of the non-causal form."""
    column, ok = columns(block, geo)
    return plk.load(ref, (jnp.minimum(chunk, ref.shape[0] - 1), column), ok)


def store_carry(ref: Any, chunk: Any, block: Any, value: jax.Array, geo: Geometry) -> None:
    """Write a (w,) piece of row `chunk` of a table of totals."""
    column, ok = columns(block, geo)
    plk.store(ref, (chunk, column), value, ok)


@dataclass(frozen=True, slots=True)
class Held:
    """A column block of a (D, D) kernel, loaded before the chunks that it is for: its row blocks."""

    blocks: list[jax.Array]


def hold(params: Any, block: Any, geo: Geometry) -> Any:
    """The parameters for a program of several chunks: of kernels, column block `block` is loaded here.

    Vectors stay where they are, lest they fill registers.
    """
    if geo.repeats == 1:
        return params

    def held(ref: Any) -> Any:
        return Held([load_weight(ref, k, block, geo) for k in range(geo.blocks)]) if len(ref.shape) == 2 else ref

    return jax.tree.map(held, params)


def each_chunk(step: Callable[[Any], None], program: Any, geo: Geometry) -> None:
    """step(chunk) for the chunks of program number `program`."""
    first = program * geo.repeats

    def turn(chunk: Any, nothing: tuple[()]) -> tuple[()]:
        step(chunk)
        return nothing

    if geo.repeats == 1:
        step(first)
    else:
        lax.fori_loop(first, jnp.minimum(first + geo.repeats, geo.chunks), turn, ())


def load_weight(ref: Any, row_block: Any, column_block: Any, geo: Geometry) -> jax.Array:
    """(w, w) block of a (D, D) kernel, in the dtype of the dot products."""
    if isinstance(ref, Held):
        return ref.blocks[row_block]
    (row, row_ok), (column, column_ok) = columns(row_block, geo), columns(column_block, geo)
    block = plk.load(ref, (row[:, None], column[None, :]), row_ok[:, None] & column_ok[None, :])
    return block.astype(geo.dot_dtype)


def prefix(carry_ref: Any, chunk: Any, block: Any, tile: jax.Array, geo: Geometry, exact: bool = False) -> jax.Array:
    """carry + running sum of `tile` down its rows (causal), or the total at every row, in the accumulation dtype.

    `exact`: the values of `tile` are those of the dtype of the dot products.
    """
    carry = load_carry(carry_ref, chunk, block, geo)[None, :]
    if not geo.causal:
        return jnp.broadcast_to(carry, tile.shape)
    if geo.dot_dtype == "bfloat16" and geo.accum == "float32" and geo.width <= 128:  # wider rows would spill on A100
        return carry + _sums_down(tile, exact, geo)
    return carry + jnp.cumsum(tile.astype(geo.accum), axis=0)


def _sums_down(tile: jax.Array, exact: bool, geo: Geometry) -> jax.Array:
    """Running sums down the rows by a product with a triangle of ones; a scan takes twice the instructions.

    Three parts of 8 bits are all of a float32; one is, of an `exact` tile. What is not finite shows in all rows.
    """
    place = plk.arange(geo.chunk)
    ones = (place[:, None] >= place[None, :]).astype(jnp.float32)
    return reduce(add, reversed([dot(ones, part, geo) for part in _parts(tile, 1 if exact else 3, geo)]))


def dot(a: jax.Array, b: jax.Array, geo: Geometry, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 matrix product of two tiles over axes `contract`, operands in the dtype of the dot products.

    The interpreter has neither bf16 dots nor TF32: there, operands rounded alike are multiplied in float32.
    """
    a, b = a.astype(geo.dot_dtype), b.astype(geo.dot_dtype)
    precision: Any = None
    if geo.launch.interpret:
        a, b, precision = a.astype(jnp.float32), b.astype(jnp.float32), lax.Precision.HIGHEST
    elif geo.dot_precision == "tf32":
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32
    elif geo.dot_precision == "tf32x3":
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def over_blocks(step: Callable[[Any, Any], Any], init: Any, geo: Geometry) -> Any:
    """Fold `step(block, state)` over the column blocks; no loop where there is one, or where kernels are held."""
    if geo.blocks == 1 or geo.repeats > 1:
        return reduce(lambda state, block: step(block, state), range(geo.blocks), init)
    return lax.fori_loop(0, geo.blocks, step, init)


def sign(x: jax.Array) -> jax.Array:
    """-1, 0 or 1."""
    return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


def zeros(geo: Geometry) -> jax.Array:
    """A float32 (C, w) accumulator."""
    return jnp.zeros((geo.chunk, geo.block), jnp.float32)


def linear(
    tile_of: Callable[[Any], jax.Array], kernel: Any, bias: Any, block: Any, geo: Geometry, exact: bool = False
) -> jax.Array:
    """(C, w) column block of a @ kernel + bias, where `tile_of(k)` is column block k of a.

    `exact`: of a as it is in float32 (exact_dot).
    """

    def step(k: Any, acc: jax.Array) -> jax.Array:
        a, b = tile_of(k), load_weight(kernel, k, block, geo)
        return exact_dot(a, b, geo, acc) if exact else acc + dot(a, b, geo)

    if geo.blocks == 1:  # sums that start from the bias: an instruction less, but in a loop they would spill on A100
        return step(0, jnp.broadcast_to(load_columns(bias, block, geo)[None, :], (geo.chunk, geo.block)))
    return over_blocks(step, zeros(geo), geo) + load_columns(bias, block, geo)[None, :]


def exact_dot(a: jax.Array, b: jax.Array, geo: Geometry, acc: jax.Array) -> jax.Array:
    """acc + a @ b of a float32 `a` to 16 bits or more; one product would round it to the dot products' 8 or 11."""
    parts = _parts(a, 1 if geo.dot_precision == "tf32x3" else 2, geo)
    return reduce(lambda sums, part: sums + dot(part, b, geo), parts, acc)


def _parts(a: jax.Array, count: int, geo: Geometry) -> Iterator[jax.Array]:
    """float32 values as sums of so many, each but the last of as many bits as dot products take: 8, or TF32's 11.

    Bits are cut off, not rounded: a GPU converts single numbers as slowly as it takes exponentials. Each part is made
    when the product before it is: all at once they take registers.
    """
    mask = jnp.int32(-(2**16) if geo.dot_dtype == "bfloat16" else -(2**13))
    for _ in range(count - 1):
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(a, jnp.int32) & mask, jnp.float32)
        yield high
        a = a - high
    yield a


def linear_transposed(tile_of: Callable[[Any], jax.Array], kernel: Any, block: Any, geo: Geometry) -> jax.Array:
    """(C, w) column block of z @ kernel^T, where `tile_of(k)` is column block k of z."""

    def step(k: Any, acc: jax.Array) -> jax.Array:
        return acc + dot(tile_of(k), load_weight(kernel, block, k, geo), geo, (1, 1))

    return over_blocks(step, zeros(geo), geo)


def sigmoid(x: jax.Array) -> jax.Array:
    return plk.reciprocal(1.0 + plk.exp2(-LOG2_E * x))


def normalise(y: jax.Array, width: int, ok: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_hat, 1/std) of LayerNorm over the `width` columns for which `ok`; the others of `y` are 0."""
    centred = jnp.where(ok[None, :], y - (y.sum(1) / width)[:, None], 0.0)
    inverse = lax.rsqrt((centred * centred).sum(1) / width + NORM_EPS)
    return centred * inverse[:, None], inverse
