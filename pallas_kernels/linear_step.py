"""One token of causal linear attention: the state is read once and written once."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _pallas as plk
from pallas_kernels import tuned
from pallas_kernels.launch import LinearStepLaunch, linear_step_launch
from pallas_kernels.linear_pass import Inputs, Plan
from pallas_kernels.linear_tile import FEATURES
from reference.linear import LinearSpec, LinearState


class Refs(NamedTuple):
    """What a program sees: its sequence, its key/value head and the query heads of it."""

    query: Any  # (1, G, D)
    key: Any  # (1, D)
    value: Any  # (1, V)
    state: Any  # LinearState or None
    rows: Any  # (1,) or None


class Outs(NamedTuple):
    out: Any  # (1, G, V)
    inverse: Any  # (G, 1) or None
    state: Any  # LinearState or None


def serves(inputs: Inputs, plan: Plan) -> bool:
    """Whether there is one token, that sees itself and the state."""
    return plan.spec.causal and inputs.query.shape[1] == inputs.key.shape[1] == 1


def forward(inputs: Inputs, plan: Plan, *, save: bool, keep_state: bool) -> tuple[jax.Array, Any, Any]:
    """(out, 1 / den (B, N, 1) if `save`, the state after the token, LinearState in float32, if `keep_state`)."""
    (batch, _, heads, _), (kv_heads, width), columns = inputs.query.shape, inputs.key.shape[2:], inputs.value.shape[3]
    default = linear_step_launch(width, columns, interpret=plan.interpret)
    launch = tuned.choose(plan.key("linear_step", inputs), default, {"num_warps": plan.num_warps})
    real: Any = LinearState
    types = Outs(
        jax.ShapeDtypeStruct((batch, 1, heads, columns), inputs.query.dtype),
        jax.ShapeDtypeStruct((batch, heads, 1), jnp.float32) if save else None,
        real(*(jax.ShapeDtypeStruct((batch, kv_heads, *s), jnp.float32) for s in ((width, columns), (width,))))
        if keep_state
        else None,
    )
    sequence, head, group = plk.Along(2), plk.Along(1), plk.Along(1, 1, heads // kv_heads)
    own = lambda x: plk.block(x, sequence, head, *(None,) * (x.ndim - 2))  # noqa: E731
    token = lambda x, at: plk.block(x, sequence, None, at, None)  # noqa: E731
    outs = plk.call(
        partial(_kernel, spec=plan.spec, launch=launch),
        Refs(*inputs),
        name="linear_step",
        grid=(-(-columns // launch.columns), kv_heads, batch),
        in_specs=(
            Refs(
                token(inputs.query, group),
                token(inputs.key, head),
                token(inputs.value, head),
                jax.tree.map(own, inputs.state),
                None if inputs.rows is None else plk.block(inputs.rows, sequence, None),
            ),
        ),
        out_specs=Outs(
            token(types.out, group),
            plk.block(types.inverse, sequence, group, None) if save else None,
            jax.tree.map(own, types.state),
        ),
        out_shape=types,
        num_warps=launch.num_warps,
        interpret=launch.interpret,
    )
    return outs.out, outs.inverse, outs.state


def _kernel(refs: Refs, outs: Outs, *, spec: LinearSpec, launch: LinearStepLaunch) -> None:
    """One block of columns of the values. All arithmetic is float32: there is nothing here for tensor cores."""
    tile, zero = plk.program_id(0), jnp.int32(0)
    (group, width), columns = refs.query.shape[1:], refs.value.shape[-1]
    d, v = plk.arange(launch.width), tile * launch.columns + plk.arange(launch.columns)
    wide, inside = d < width, v < columns
    live = None if refs.rows is None else plk.load_one(refs.rows, zero) > 0
    here = lambda ok: ok if live is None else ok & live  # noqa: E731
    phi = partial(_features, feature_map=spec.feature_map, wide=wide, live=live)
    key = phi(plk.load(refs.key, (jnp.zeros_like(d), d), here(wide)).astype(jnp.float32))
    value = plk.load(refs.value, (jnp.zeros_like(v), v), here(inside)).astype(jnp.float32)
    kv, z = key[:, None] * value[None, :], key
    pair, both = (d[:, None], v[None, :]), wide[:, None] & inside[None, :]
    if refs.state is not None:
        kv = kv + plk.load(refs.state.kv, pair, both).astype(jnp.float32)
        z = z + plk.load(refs.state.z, (d,), wide).astype(jnp.float32)
    if outs.state is not None:
        plk.store(outs.state.kv, pair, kv, both)
        plk.store(outs.state.z, (d,), z, wide & (tile == 0))

    def at_head(g: Any, _: Any) -> None:
        query = phi(plk.load(refs.query, (jnp.zeros_like(d), jnp.full_like(d, g), d), here(wide)).astype(jnp.float32))
        inverse = 1.0 / ((query * z).sum() + spec.eps)
        inverse = inverse if live is None else jnp.where(live, inverse, 0.0)
        out = (query[:, None] * kv).sum(0) * inverse
        plk.store(outs.out, (jnp.zeros_like(v), jnp.full_like(v, g), v), out, inside)
        if outs.inverse is not None:
            one = plk.arange(1)
            plk.store(outs.inverse, (one + g, one), inverse[None], (one + tile) == 0)

    jax.lax.fori_loop(0, group, at_head, None)


def _features(x: jax.Array, feature_map: str, wide: jax.Array, live: Any) -> jax.Array:
    """phi of one row, 0 in columns that do not exist and in a masked token's row."""
    if feature_map == "softmax":
        weights = jnp.exp(x - jnp.where(wide, x, -jnp.inf).max())
        phi = weights / jnp.where(wide, weights, 0.0).sum()
    else:
        phi = FEATURES[feature_map](x)
    return jnp.where(wide if live is None else wide & live, phi, 0.0)
