"""Device-side helpers of the linear attention kernels: a chunk's tokens and runs, feature maps, tiles of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _pallas as plk
from reference.online_softmax import LOG2_E


class Operand(NamedTuple):
    """Rows of an array (L, W), or (L, heads, W), each multiplied by its `scale` (L,) or (heads, L); None: by 1."""

    array: Any
    scale: Any = None


class Tokens(NamedTuple):
    """The tokens of one chunk. `run` is None where all belong to one run."""

    index: jax.Array  # (C,) token numbers
    inside: jax.Array  # (C,) index < L
    live: jax.Array  # (C,) inside and not masked
    run: Any  # (C,) numbers of the runs
    before: Any  # run of the token walked before this chunk, the chunk's own first at the start
    last: Any  # run of the token of this chunk walked last


class Columns(NamedTuple):
    """Column numbers, which exist, and whether they are the first: one program writes what all tiles know."""

    index: jax.Array
    ok: jax.Array
    first: Any


def columns(start: Any, size: int, width: int) -> Columns:
    index = start + plk.arange(size)
    return Columns(index, index < width, start == 0)


def parts_of(width: int, size: int) -> list[Columns]:
    """The columns of each part of a row."""
    return [columns(start, size, width) for start in range(0, width, size)]


def over_parts(step: Callable[[Columns, Any], Any], init: Any, width: int, size: int) -> Any:
    """Fold `step(columns, state)` over the parts of a row, in a loop: that keeps one of them in registers."""
    if width <= size:
        return step(columns(0, size, width), init)
    return lax.fori_loop(0, -(-width // size), lambda k, state: step(columns(k * size, size, width), state), init)


def tokens_of(rows_ref: Any, chunk: Any, size: int, length: int, reverse: bool) -> Tokens:
    """Those of chunk number `chunk`, of `size` tokens. A reverse walk comes from the chunk after it."""
    index = chunk * size + plk.arange(size)
    inside = index < length
    if rows_ref is None:
        return Tokens(index, inside, inside, None, None, None)
    rows = plk.load(rows_ref, (index,), inside)
    first, end = chunk * size, jnp.minimum((chunk + 1) * size, length)
    if reverse:
        before, last = jnp.minimum(end, length - 1), first
    else:
        before, last = jnp.maximum(first - 1, 0), end - 1
    before, last = (jnp.abs(plk.load(rows_ref, (place,), place < length)) for place in (before, last))
    return Tokens(index, inside, rows > 0, jnp.abs(rows), before, last)


@dataclass(frozen=True, slots=True)
class Rows:
    """phi of rows, read in parts: a whole tile of them is never held at once."""

    operand: Operand
    feature_map: str | None
    tokens: Tokens
    head: Any  # of several, or None
    sums: Any  # of a softmax

    def part(self, columns: Columns, dtype: Any) -> jax.Array:
        """(C, w), 0 for tokens that do not live and columns that do not exist."""
        x = load_tile(self.operand, self.tokens, self.head, columns)
        if self.feature_map is None:
            return x.astype(dtype)
        if self.feature_map == "softmax":
            highest, total = self.sums
            x = jnp.exp(jnp.minimum(x - highest, 0.0)) / total
        else:
            x = FEATURES[self.feature_map](x)
        return plk.narrowed(jnp.where(self.tokens.live[:, None] & columns.ok[None, :], x, 0.0), dtype)


def rows_of(operand: Operand, feature_map: str | None, tokens: Tokens, head: Any, width: int, size: int) -> Rows:
    """Rows of width `width`, to be read in parts; a softmax first needs their largest values and their sums."""
    if feature_map != "softmax":
        return Rows(operand, feature_map, tokens, head, None)

    def largest(part: Columns, highest: jax.Array) -> jax.Array:
        x = jnp.where(part.ok[None, :], load_tile(operand, tokens, head, part), -jnp.inf)
        return jnp.maximum(highest, x.max(1))

    highest = over_parts(largest, jnp.full(tokens.index.shape, -jnp.inf, jnp.float32), width, size)[:, None]

    def add(part: Columns, total: jax.Array) -> jax.Array:
        x = jnp.where(part.ok[None, :], load_tile(operand, tokens, head, part), -jnp.inf)
        return total + jnp.exp(x - highest).sum(1)

    total = over_parts(add, jnp.zeros(tokens.index.shape, jnp.float32), width, size)[:, None]
    return Rows(operand, feature_map, tokens, head, (highest, total))


def load_vector(ref: Any, tokens: Tokens, head: Any) -> jax.Array:
    """(C,) values of a vector over tokens, (L,) or, with a head, (heads, L); 0 where a token does not live."""
    index = (tokens.index,) if head is None else (jnp.full_like(tokens.index, head), tokens.index)
    return plk.load(ref, index, tokens.live)


def load_tile(operand: Operand, tokens: Tokens, head: Any, piece: Columns) -> jax.Array:
    """(C, w) float32 values as they are stored, times their scale; 0 where there is nothing to read."""
    row, column = tokens.index[:, None], piece.index[None, :]
    index = (row, column) if head is None else (row, jnp.full_like(row, head), column)
    x = plk.load(operand.array, index, tokens.live[:, None] & piece.ok[None, :]).astype(jnp.float32)
    return x if operand.scale is None else x * load_vector(operand.scale, tokens, head)[:, None]


def _elu(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0.0, x + 1.0, plk.exp2(LOG2_E * jnp.minimum(x, 0.0)))


def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0.0)


def _identity(x: jax.Array) -> jax.Array:
    return x


FEATURES: dict[str, Callable[[jax.Array], jax.Array]] = {"elu": _elu, "relu": _relu, "identity": _identity}


def slope(feature_map: str, x: jax.Array, d_phi: jax.Array) -> jax.Array:
    """The gradient of x from that of phi(x); softmax's is taken outside, since it couples the columns."""
    if feature_map == "elu":
        return d_phi * jnp.where(x > 0.0, 1.0, plk.exp2(LOG2_E * jnp.minimum(x, 0.0)))
    return jnp.where(x > 0.0, d_phi, 0.0) if feature_map == "relu" else d_phi
