"""What every cache and state of decoding can do: have its sequences chosen and put in another order."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def take_sequences(self: State, indices: Any) -> State:
    """The same of sequences `indices` (B',), integers: a batch reordered, as beam search does, repeated or cut."""
    return jax.tree.map(lambda x: jnp.take(x, jnp.asarray(indices), axis=0), self)
