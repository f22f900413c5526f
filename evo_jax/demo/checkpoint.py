"""Checkpoints of the demo, by orbax: the newest two training states of a run, and the way back from the newest."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from evo_jax.demo.settings import DemoError
from evo_jax.demo.train import TrainState

_FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints under `out`; a context manager, so that orbax's threads end with it.

    Raises:
        DemoError: there are none and `fresh` is False.
    """

    def __init__(self, out: Path, *, fresh: bool):
        self.folder = (out / _FOLDER).absolute()
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not self.folder.is_dir():
            raise DemoError(self._missing())
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def _missing(self) -> str:
        return f"there is no checkpoint in {str(self.folder)!r}; a run of the demo (without --resume) makes them"

    def save(self, state: TrainState) -> None:
        """Keep `state` under its own step; nothing to do where that step is there already."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state._asdict()), force=True)

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, in the structure and on the device of `like`: arrays, or shapes for the default device.

        Raises:
            DemoError: there is none.
        """
        step = self._manager.latest_step()
        if step is None:
            raise DemoError(self._missing())
        target = jax.tree.map(_on_device, like._asdict())
        return TrainState(**self._manager.restore(step, args=ocp.args.StandardRestore(target)))


def _on_device(x: Any) -> Any:
    """Shape, dtype and place of `x`."""
    place = x.sharding if isinstance(x, jax.Array) else jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
