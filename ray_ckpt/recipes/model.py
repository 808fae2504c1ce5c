"""The model that the jobs train, and the contract of a user's own.

`--model pkg.module:factory` names a callable without arguments that returns a `torch.nn.Module` whose direct children
run in order (see `ray_ckpt.parallel.stages`) and that has

    sample_batch(batch_size, generator) -> (inputs, targets)   CPU tensors; dim 0 is the batch
    loss(outputs, targets) -> scalar                           optional: a mean over the batch; default mse_loss
    tp_plan() -> {module name: ParallelStyle}                  for layouts with tp: how it splits its modules

It runs in evaluation mode, so dropout is off and batch norm takes its running statistics. What else its forward and its
loss do must be deterministic, and must treat samples alone, or the micro-batches of a pipeline and one whole batch
would not give the same loss.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ray_ckpt.errors import UsageError
from ray_ckpt.parallel.stages import build_on_meta
from ray_ckpt.recipes.workload import Workload
from ray_ckpt.text import told

BATCHES_PER_EPOCH = 2
"""Few enough for the loss to fall within twenty steps."""


class PipelineModel(nn.Module):
    """`layers` square linear layers named `layer1`, `layer2`, ... with ReLU between. Learns to reverse its input.

    Shapes: `[batch, dim]` to `[batch, dim]`. The model of PyTorch's own pipeline checkpoint test (four of 500).
    """

    def __init__(self, dim: int = 500, layers: int = 4) -> None:
        super().__init__()
        self.dim = dim
        for number in range(1, layers + 1):
            self.add_module(f"layer{number}", nn.Linear(dim, dim))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # A pipeline stage holds some of the layers; only the very first takes its input as it is.
        for name, layer in self.named_children():
            hidden = layer(hidden if name == "layer1" else torch.relu(hidden))
        return hidden

    def sample_batch(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(batch_size, self.dim, generator=generator)
        return inputs, inputs.flip(-1)

    def tp_plan(self) -> dict[str, ParallelStyle]:
        """Columns and rows in turn. Each layer takes and gives whole activations, so that any may end a stage."""
        columns, rows = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
        return {name: rows if number % 2 else columns for number, (name, _) in enumerate(self.named_children())}


def build(workload: Workload) -> nn.Module:
    """The whole model on the meta device, in evaluation mode.

    Raises:
        UsageError: the factory cannot be imported, or what it returns does not keep the contract.
    """
    if workload.model is None:
        return build_on_meta(lambda: PipelineModel(workload.dim, workload.layers)).eval()
    factory = import_factory(workload.model)

    def make() -> nn.Module:
        try:
            return factory()
        except BaseException as error:
            if _is_ours_to_pass(error):
                raise
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"the model factory {workload.model!r} raised {told(error)} ({at.filename}:{at.lineno})"
            ) from error

    model = build_on_meta(make)
    if not callable(getattr(model, "sample_batch", None)):
        raise UsageError(
            f"{type(model).__name__} has no sample_batch(batch_size, generator) -> (inputs, targets): "
            "the job does not know what to train it on"
        )
    return model.eval()


@functools.lru_cache(maxsize=1)
def blueprint(workload: Workload) -> nn.Module:
    """The model as `build` makes it, made once in this process: for its batches and its parts. Nobody changes it."""
    return build(workload)


def batch(workload: Workload, model: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one step: the same on every rank and in every run, and again in every epoch."""
    generator = torch.Generator().manual_seed(workload.seed * BATCHES_PER_EPOCH + step % BATCHES_PER_EPOCH)
    inputs, targets = model.sample_batch(workload.batch_size, generator)
    return inputs, targets


def learning_rates(parts: Sequence[str]) -> dict[str, float]:
    """A learning rate for each part of the model, different for neighbors, so that mixing them up is noticed."""
    return {part: 1e-3 * (number % 4 + 1) for number, part in enumerate(parts)}


def loss_function(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return getattr(model, "loss", nn.functional.mse_loss)


def import_factory(spec: str) -> Callable[[], nn.Module]:
    """Import `pkg.module:factory`, also from the current directory.

    Raises:
        UsageError: there is no such module or attribute, or importing it fails.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute or "/" in module_name or module_name.endswith(".py"):
        raise UsageError(
            f"--model must look like pkg.module:factory, not {spec!r}; a file model.py in this directory is `model`"
        )
    try:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        factory = getattr(importlib.import_module(module_name), attribute)
    except BaseException as error:
        if _is_ours_to_pass(error):
            raise
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = (
                "; it is looked for in this directory and where Python looks, on every node: `ray job submit "
                "--working-dir DIR` takes a directory there"
            )
        raise UsageError(f"cannot import the model factory {spec!r}: {told(error)}{advice}") from error
    if not callable(factory):
        raise UsageError(f"the model factory {spec!r} is a {type(factory).__name__}, not a callable")
    return factory  # type: ignore[no-any-return]


def _is_ours_to_pass(error: BaseException) -> bool:
    """Whether it is no failure of the user's code: Ctrl-C, or SIGTERM as the job's handler raises it."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == signal.SIGTERM)
