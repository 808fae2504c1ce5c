"""What others save beside model and optimizer, under our names: schedulers, counters, gradient scalers, data loaders.

    name ── section_of ──> Side: what it is, and our name of it where it has one

    lr_scheduler. ...  scheduler. ...  lr_schedulers.<n>. ...   schedulers.<name of the n-th>. ...
    step  global_step  epoch  train_state. ...  trainer_state. ...   counters. ...
    scaler. ...  grad_scaler. ...  native_amp_scaling_state. ...     scaler.state. ...
    dataloader. ...  dl_state_dict. ...                              dataloader. ...  dataloader.$rank<n>. ...
    rng_state_<n>. ...  random_states_<n>. ...  rng.<n>. ...         rng.$rank<n>.python, .numpy, .torch, .cuda
    custom_checkpoint_<n>. ...                                       extra.$others.custom_checkpoint_<n>. ...
    extra_state. ...                                                 what it is without that, as verl writes it

torchtitan, Lightning, accelerate, transformers' `Trainer`, verl, and scripts by hand write these. What the state that
is loaded into does not want of them is left out, and named: it is not the model's, nor the optimizer's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from ray_ckpt.format import foreign_generators
from ray_ckpt.format.foreign_generators import Generator

__all__ = ["OF_OTHERS", "OF_RANK", "Side", "section_of", "wanted_objects", "wanted_schedulers"]

_STEP = ("global_step", "step")

_COUNTERS = re.compile(r"(?:(?:train_state|trainer_state)\.)?([A-Za-z_]\w*)")

_ROOT_COUNTERS = frozenset({"step", "global_step", "epoch", "iteration", "iter", "num_steps", "global_steps"})

_SCHEDULERS = re.compile(r"(?:lr_schedulers|schedulers)\.([0-9]{1,4})\.(.+)")

_SCHEDULER = re.compile(r"(?:lr_scheduler|scheduler|lr_scheduler_state_dict|scheduler_state_dict|sched)\.(.+)")

_NO_SCHEDULERS = re.compile(r"lr_schedulers?|schedulers?")
"""An empty list, or None."""

_SCALER = re.compile(r"(?:scaler|grad_scaler|scaler_state_dict|native_amp_scaling_state)\.(.+)")

_LOADER = re.compile(r"(?:dataloader|data_loader|dl_state_dict)\.(?:rank([0-9]{1,7})\.)?(.+)")

_EXTRA = re.compile(r"extra_state\.(?:rank([0-9]{1,7})\.)?(.+)")
"""verl's, with the rank where ranks differ."""

_LIGHTNING = "pytorch-lightning_version"
"""Lightning's checkpoints hold this, and then the following."""

_OF_LIGHTNING = re.compile(
    rf"(?:{_LIGHTNING}|loops|callbacks|hparams\w*|hyper_parameters|datamodule_\w+|MixedPrecision|\w+DataModule)(?:\..*)?"
)

_TRAINER = re.compile(r"(?:trainer_state|train_state|sampler)\..*")

_REGISTERED = re.compile(r"(custom_checkpoint_[0-9]+)\..+")
"""Objects that were registered with accelerate, by their numbers."""

OF_RANK = "$rank"
"""With the number of a rank, what lies above the state of its data loader and of its generators: unlike ours it has no
record."""


OF_OTHERS = "$others"
"""What lies above the state of objects among the extra ones, where it has no record, unlike ours."""


class Side(NamedTuple):
    """Something beside model and optimizer."""

    what: str
    """Kind of thing, as the report calls it."""
    ours: str = ""
    """Our name of it; empty when it has none."""


def wanted_schedulers(others: Iterable[str]) -> list[str]:
    """Names of the schedulers in the state that is loaded into."""
    found = (re.fullmatch(r"schedulers\.(.+)\.kind", name) for name in others)
    return list(dict.fromkeys(match[1] for match in found if match and "._schedulers." not in match[1]))


def wanted_objects(others: Iterable[str]) -> set[str]:
    """Where the state that is loaded into takes registered objects from."""
    found = (re.fullmatch(r"extra\.(custom_checkpoint_[0-9]+)", name) for name in others)
    return {f"extra.{OF_OTHERS}.{match[1]}" for match in found if match}


def section_of(name: str, schedulers: Sequence[str], saved: Collection[str]) -> Side | None:
    """What a saved name is; None when it is nothing of these.

    Args:
        schedulers: names of those in the state that is loaded into.
        saved: all names in the checkpoint.
    """
    if match := _EXTRA.fullmatch(name):
        if generator := foreign_generators.find(match[2], of_verl=True):
            return _generator(generator._replace(rank=match[1]))
        side = section_of(match[2], schedulers, saved) or Side("bookkeeping")
        return side._replace(ours="") if match[1] else side
    if match := _SCHEDULERS.fullmatch(name) or _SCHEDULER.fullmatch(name):
        number = int(match[1]) if match.re is _SCHEDULERS else 0
        place = schedulers[number] if number < len(schedulers) else None
        return Side("schedulers", f"schedulers.{place}.{match[match.re.groups]}" if place is not None else "")
    if _NO_SCHEDULERS.fullmatch(name):
        return Side("schedulers")
    if match := _SCALER.fullmatch(name):
        return Side("a gradient scaler", f"scaler.state.{match[1]}")
    if match := _LOADER.fullmatch(name):
        place = f"{OF_RANK}{match[1]}.{match[2]}" if match[1] else match[2]
        return Side("a data loader", f"dataloader.{place}")
    if (match := _COUNTERS.fullmatch(name)) and ("." in name or name in _ROOT_COUNTERS):
        return Side("counters", f"counters.{'step' if match[1] in _STEP else match[1]}")
    if generator := foreign_generators.find(name):
        return _generator(generator)
    if match := _REGISTERED.fullmatch(name):
        return Side(f"registered objects (extra={{'{match[1]}': ...}} takes one)", f"extra.{OF_OTHERS}.{name}")
    if _TRAINER.fullmatch(name) or (_LIGHTNING in saved and _OF_LIGHTNING.fullmatch(name)):
        return Side("bookkeeping")
    return None


def _generator(generator: Generator) -> Side:
    if not generator.kind:
        return Side("random generators")
    rank = "" if generator.rank is None else f"{OF_RANK}{generator.rank}."
    return Side("random generators (rng=True takes them)", f"rng.{rank}{generator.kind}")
