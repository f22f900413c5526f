"""Arrays sharded over Explicit axes of a mesh, whose types say so: each device computes its own sequences and heads.

XLA's partitioner, which divides what is sharded over Auto axes, cannot look into a kernel, and would gather its arrays.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Entry = Any  # of a PartitionSpec: a mesh axis, several, or None


def by_shards(op: str, run: Callable[..., Any], arrays: tuple[Any, ...], axes: tuple[Any, ...], results: Any) -> Any:
    """`run(*arrays)`, within jax.shard_map where the type of an array says that it is sharded.

    `axes` and `results` are prefixes, as pytrees, of `arrays` and of what `run` returns. Each of their strings names
    the first axes of an array: those of one letter are divided alike, "." and axes without a name are not. "k",
    key/value heads, are divided as "h", query heads, unless there is but one. "s" may be sharded, and is gathered.
    Where an array has a "t", `run` is also told the mesh axes that those are divided over, or None, as `over`.

    Raises:
        ValueError: an array that is sharded along an axis that cannot be divided, or otherwise than another.
    """
    mesh, divided = _division(op, arrays, axes)
    if any("t" in name for name in jax.tree.leaves(axes)):
        over = divided.get("t")
        run = partial(run, over=None if over is None or _devices(mesh, over) == 1 else over)
    if mesh is None:
        return run(*_in_context(arrays))
    explicit = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    specs = _mapped(partial(_spec, divided), axes, arrays)

    def on_each(*parts: Any) -> Any:
        return run(*_mapped(_gathered, axes, specs, parts))

    return jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=specs,
        out_specs=jax.tree.map(lambda name: P(*(divided.get(letter) for letter in name)), results),
        axis_names=set(explicit),
        check_vma=False,  # JAX cannot know what a kernel makes of what varies between devices
    )(*_placed(mesh, divided, arrays, axes))


def alike(op: str, arrays: tuple[Any, ...], axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """`arrays`, divided as by_shards would: those that are not sharded as the others are."""
    return _placed(*_division(op, arrays, axes), arrays, axes)


def placed_as(arrays: Any, types: Any) -> Any:
    """`arrays` sharded as `types` says, a pytree of what jax.eval_shape gives: a loop wants one type for a value."""

    def placed(x: Any, like: Any) -> Any:
        same = like.sharding is None or _entries(x) == tuple(like.sharding.spec)
        return x if same else jax.reshard(x, like.sharding)

    return jax.tree.map(placed, arrays, types)


def gathered(x: Any, axis: int) -> Any:
    """`x` with all of `axis` on each device, as what runs along it needs."""
    own = jax.typeof(x).sharding
    if own.spec[axis] is None:
        return x
    return jax.reshard(x, NamedSharding(own.mesh, P(*(None if n == axis else e for n, e in enumerate(own.spec)))))


def is_sharded(x: Any) -> bool:
    """Whether the type of `x` says that it is."""
    return any(_entries(x))


def without_last(x: Any) -> NamedSharding | None:
    """Where the last axis of `x` is divided: how a product is sharded that sums over it."""
    own = jax.typeof(x).sharding
    return None if own.spec[-1] is None else NamedSharding(own.mesh, P(*own.spec[:-1], None))


def _placed(
    mesh: Any, divided: dict[str | None, Entry], arrays: tuple[Any, ...], axes: tuple[Any, ...]
) -> tuple[Any, ...]:
    def placed(name: str, x: Any) -> Any:
        spec = _spec(divided, name, x)
        return x if mesh is None or _entries(x) == tuple(spec) else jax.reshard(x, NamedSharding(mesh, spec))

    return _mapped(placed, axes, arrays)


def _in_context(arrays: Any) -> Any:
    """`arrays` on the context's mesh of Explicit axes where they are on none: what a function makes there is on it."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = AxisType.Explicit in mesh.axis_types

    def placed(x: Any) -> Any:
        return jax.reshard(x, NamedSharding(mesh, P())) if explicit and jax.typeof(x).sharding.mesh.empty else x

    return jax.tree.map(placed, arrays)


def _mapped(function: Callable[..., Any], axes: tuple[Any, ...], *arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of each array, with the string that names its axes."""
    return jax.tree.map(lambda name, *parts: jax.tree.map(partial(function, name), *parts), axes, *arrays)


def _gathered(name: str, spec: P, x: jax.Array) -> jax.Array:
    for axis, (letter, entry) in enumerate(zip(name, spec, strict=False)):
        if letter == "s" and entry is not None and x.shape[axis]:
            x = jax.lax.all_gather(x, entry, axis=axis, tiled=True)
    return x


def _spec(divided: dict[str | None, Entry], name: str, x: Any) -> P:
    return P(*(divided.get(letter, own) for letter, own in zip(_letters(name, x.shape), _entries(x), strict=True)))


def _division(op: str, arrays: tuple[Any, ...], axes: tuple[Any, ...]) -> tuple[Any, dict[str | None, Entry]]:
    """(the mesh, None if nothing is sharded; what axes of each letter are divided over)."""
    leaves: list[tuple[str, Any]] = []
    _mapped(lambda name, x: leaves.append((name, x)), axes, arrays)
    mesh, divided = None, {}
    for name, x in leaves:
        for axis, (letter, entry) in enumerate(zip(_letters(name, x.shape), _entries(x), strict=True)):
            if entry is None:
                continue
            mesh = jax.typeof(x).sharding.mesh
            if letter == "s":
                continue
            if letter is not None and divided.setdefault(letter, entry) != entry:
                raise ValueError(
                    f"{op}: arrays are sharded over the mesh axes {divided[letter]!r} and {entry!r} along axes that go "
                    f"together (axis {axis} of an array of shape {x.shape}); jax.reshard one of them"
                )
            if letter is None and x.shape[axis] and _devices(mesh, entry) > 1:
                raise ValueError(
                    f"{op}: an array of shape {x.shape} is sharded over the mesh axes {entry!r} along axis {axis}, "
                    "which cannot be divided among devices; jax.reshard it"
                )
    for name, x in leaves:
        used = [axis for entry in _spec(divided, name, x) if entry is not None for axis in _names(entry)]
        if len(set(used)) < len(used):
            raise ValueError(
                f"{op}: other arrays want an array of shape {x.shape} sharded as {_spec(divided, name, x)}, over one "
                "mesh axis twice; jax.reshard some of them"
            )
        for letter, size in zip(_letters(name, x.shape), x.shape, strict=True):
            if (entry := divided.get(letter)) is not None and size % _devices(mesh, entry):
                raise ValueError(
                    f"{op}: {size} of an array of shape {x.shape} cannot be divided among the mesh axes {entry!r}"
                )
    grouped = any(x.shape[name.index("k")] > 1 for name, x in leaves if "k" in name)
    return mesh, divided | ({"k": divided["h"]} if grouped and "h" in divided else {})


def _letters(name: str, shape: tuple[int, ...]) -> list[str | None]:
    """What divides each axis; None for nothing."""
    letters = name.ljust(len(shape), ".")
    return [None if x == "." or n <= 1 else "h" if x == "k" else x for x, n in zip(letters, shape, strict=True)]


def _entries(x: Any) -> tuple[Entry, ...]:
    return tuple(jax.typeof(x).sharding.spec)


def _names(entry: Entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _devices(mesh: Any, entry: Entry) -> int:
    return prod(mesh.shape[axis] for axis in _names(entry))
