"""What every form of linear attention shares: its statics, its state, and the feature maps phi."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from reference.states import take_sequences


class LinearState(NamedTuple):
    """The sums over a run of tokens, per key/value head: kv (B, K, D, V) of phi(k) v^T, and z (B, K, D) of phi(k)."""

    kv: Array
    z: Array

    take = take_sequences


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What is computed: `feature_map` names one of FEATURE_MAPS, `eps` is added to the denominator."""

    feature_map: str = "elu"
    causal: bool = True
    eps: float = 1e-6


def elu_plus_one(x: Array) -> Array:
    """elu(x) + 1 as exp(x) below 0, which keeps its relative accuracy where expm1(x) + 1 cancels."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, jnp.zeros_like(x), x)))


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    return jax.nn.softmax(x, axis=-1)


def identity(x: Array) -> Array:
    """For callers who have applied a feature map of their own."""
    return x


FEATURE_MAPS = {"elu": elu_plus_one, "relu": jax.nn.relu, "softmax": softmax, "identity": identity}


def _pull_softmax(y: Array, d_y: Array, axis: int) -> Array:
    return y * (d_y - jnp.sum(y * d_y, axis=axis, keepdims=True))


# The chain rule through each map from its value y alone: (y, d_y, the axis of the head's width) -> d_x.
FEATURE_PULLS = {
    "elu": lambda y, d_y, axis: d_y * jnp.minimum(y, 1),
    "relu": lambda y, d_y, axis: jnp.where(y > 0, d_y, 0),
    "softmax": _pull_softmax,
    "identity": lambda y, d_y, axis: d_y,
}
