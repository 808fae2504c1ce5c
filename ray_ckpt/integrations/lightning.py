"""Checkpoints of ray_ckpt in the training loop of Lightning's `Trainer`."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

import ray_ckpt
from ray_ckpt.errors import UsageError
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.resolve import Target

__all__ = ["CheckpointCallback"]


class CheckpointCallback(Callback):
    """Saves from all processes at the end of epochs; a run that is started again goes on from the latest of them.

    Model, optimizers, schedulers, random generators and the loops' progress are saved. It is a callback and no
    `CheckpointIO`, as Lightning calls that on one process, with a state that was gathered there. Give the `Trainer`
    `enable_checkpointing=False`, unless Lightning's own files are wanted too.

    It does not save amid an epoch, as Lightning resumes there without skipping the batches that were trained on.

    Args:
        target: a `CheckpointStore`, or its path or URI, which all processes share. Steps are optimizer steps.
        every: number of epochs between saves.

    Raises:
        UsageError: `every` is less than 1.
        CheckpointError: in training, as `ray_ckpt.save` and `ray_ckpt.resume` do.

    Example::

        trainer = lightning.Trainer(callbacks=[CheckpointCallback("s3://bucket/run")])
        trainer.fit(module, data)
    """

    def __init__(self, target: Target, *, every: int = 1) -> None:
        if every < 1:
            raise UsageError(f"every={every}: the number of epochs between saves starts at 1")
        self._target = target
        self._every = every

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the latest step, if there is one."""
        ray_ckpt.resume(_train_state(trainer), self._target)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, when it is time."""
        if (trainer.current_epoch + 1) % self._every == 0:
            ray_ckpt.save(_train_state(trainer), self._target, trainer.global_step, overwrite=True)


def _train_state(trainer: Trainer) -> TrainState:
    return TrainState(
        trainer.strategy.model,
        trainer.optimizers,
        schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
        extra={"fit_loop": trainer.fit_loop},
        rng=True,
    )
