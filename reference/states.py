"""What every cache and state of decoding can do: have its sequences chosen and put in another order."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

NOWHERE = 2**30  # the length of a sequence that there is not: no cache has room for more

State = TypeVar("State")


def take_sequences(self: State, indices: Any) -> State:
    """The same of sequences `indices` (B',), integers: a batch reordered, as beam search does, repeated or cut.

    Raises:
        ValueError: indices of another rank, or out of range where they are known; a traced one out of range gives a
            sequence all of whose later outputs are NaN. TypeError: another dtype.
    """
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"take: indices.dtype={indices.dtype.name} must be an integer dtype")
    if indices.ndim != 1:
        raise ValueError(f"take: indices.shape={indices.shape} must be (B',), one number per sequence")
    batch = jax.tree.leaves(self)[0].shape[0]
    if not isinstance(indices, Tracer):
        wrong = np.asarray(indices)[(np.asarray(indices) < 0) | (np.asarray(indices) >= batch)]
        if wrong.size:
            raise ValueError(f"take: indices holds {wrong[0]} and must hold 0 to {batch - 1}")

    def of(x: jax.Array) -> jax.Array:
        nothing, places = NOWHERE if jnp.issubdtype(x.dtype, jnp.integer) else jnp.nan, jax.typeof(x).sharding
        given = {"out_sharding": places} if any(places.spec) else {}  # that of a type over Explicit axes of a mesh
        chosen = jnp.where(indices < 0, batch, indices)
        return x.at[chosen].get(mode="fill", fill_value=nothing, **given)

    return jax.tree.map(of, self)
