"""Checkpoints of ray_ckpt in the training loop of transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import ray_ckpt
from ray_ckpt.state.train_state import TrainState
from ray_ckpt.storage.resolve import Target

__all__ = ["CheckpointCallback"]


class CheckpointCallback(TrainerCallback):
    """Saves a step of ours whenever the `Trainer` saves; a run that it resumes goes on from there, in any layout.

    Model, optimizer, scheduler and random generators are ours to save. The `Trainer` keeps its own directories, for its
    place in the data among others: set `save_only_model=True`, so that it does not write the optimizer a second time.

    Args:
        target: a `CheckpointStore`, or its path or URI, which all processes share. Steps have the `Trainer`'s numbers.

    Raises:
        CheckpointError: in training, as `ray_ckpt.save` and `ray_ckpt.load` do. A run that resumes at a step which the
            store lacks ends with a `CheckpointNotFoundError` before it trains.

    Example::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[CheckpointCallback("s3://bucket/run")])
        trainer.train(resume_from_checkpoint="output/checkpoint-100")  # and step 100 of ours
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._is_amid_epoch = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the step at which the `Trainer` resumes."""
        if state.global_step > 0:
            ray_ckpt.load(_train_state(kwargs), self._target, state.global_step)
            self._is_amid_epoch = float(state.epoch or 0) % 1 != 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Once more the random generators: since the load, batches that were trained on were drawn and skipped."""
        if self._is_amid_epoch:
            self._is_amid_epoch = False
            ray_ckpt.load(_train_state(kwargs), self._target, state.global_step, only=("rng",))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save a step. It replaces one of that number, of a run that went on without it."""
        ray_ckpt.save(_train_state(kwargs), self._target, state.global_step, overwrite=True)


def _train_state(given: dict[str, Any]) -> TrainState:
    """What the `Trainer` hands to its callbacks."""
    return TrainState(given["model"], given["optimizer"], schedulers=given["lr_scheduler"], rng=True)
