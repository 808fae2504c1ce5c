"""Key maps for transformers' models whose names differ between their files and memory, from their own conversions.

    names in the files, the model's conversions ── transformers' own code, on symbols instead of tensors ──> key map

Since version 5 transformers fuses experts and projections while it loads. Its conversions run here on symbols that
write down what is done to them, so that whatever they do by joining, splitting and transposing is done by `load` as
well, and anything else is refused by its name.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ray_ckpt.errors import UsageError
from ray_ckpt.format.saved import Saved
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.files import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["key_map"]

_SECTION = "model."


def key_map(model: PreTrainedModel, target: str | os.PathLike[str] | Storage) -> dict[str, str | Saved]:
    """The key map by which `load` fills a model from files that transformers would convert, such as those on the Hub.

    Each rank loads what it needs of the joined tensors, in any layout; the optimizer's state, where there is any under
    the names in the files, follows.

    Args:
        model: may be on the meta device.
        target: a safetensors file, a directory of them, or any checkpoint whose model has the files' names.

    Returns:
        Wanted name -> what it is made of, for each of the model's tensors whose name or form differs. Names in the
        files that the model does not know stay as they are, so that a strict load names them.

    Raises:
        UsageError: this version of transformers has no conversions, or one does more than join, split and transpose.
        CheckpointNotFoundError, FormatError, UnsafeCheckpointError: the target cannot be read.

    Example::

        model = AutoModelForCausalLM.from_config(config)
        load(TrainState(model), path, key_map=key_map(model, path))
    """
    found = _converted(model, sorted(_names(target), key=_natural))
    return {f"{_SECTION}{wanted}": _in_section(saved) for wanted, saved in found.items() if saved != Saved(wanted)}


def _names(target: str | os.PathLike[str] | Storage) -> Iterable[str]:
    """Names of the model's tensors."""
    manifest = CheckpointReader(target).read_manifest()
    is_ours = manifest.has_own_names
    return [
        name.removeprefix(_SECTION) if is_ours else name
        for name in manifest.tensors
        if not is_ours or name.startswith(_SECTION)
    ]


def _converted(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Saved]:
    """Name in the model -> what transformers makes it of, for the names that the model has."""
    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError as error:
        raise UsageError("transformers before version 5 has no conversions to make a key map of") from error

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = model.state_dict()
    made: dict[str, Saved] = {}
    waiting: dict[str, Any] = {}
    for name in names:
        renamed, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = name, None
        if renamed not in wanted:
            continue
        if pattern is None:
            made[renamed] = Saved(name)
        else:
            converter = waiting.setdefault(renamed, copy.deepcopy(of_pattern[pattern]))
            converter.add_tensor(renamed, name, pattern, _Deferred(_Symbol(Saved(name))))
    for renamed, converter in waiting.items():
        converted = converter.convert(renamed, model=model, config=model.config)
        made |= {name: _unwrapped(symbol) for name, symbol in converted.items()}
    return made


def _unwrapped(symbol: Any) -> Saved:
    symbol = symbol[0] if isinstance(symbol, list) else symbol
    if not isinstance(symbol, _Symbol):
        raise UsageError(f"transformers converts to a {type(symbol).__name__}, which a key map cannot")
    return symbol.saved


def _in_section(saved: Saved) -> str | Saved:
    """Under the names that `load` gives them. What is only renamed is a name."""
    renamed = saved.renamed(lambda name: f"{_SECTION}{name}")
    return renamed if renamed.operation else renamed.name


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Expert 2 comes before expert 10, as transformers sorts."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


# ------------------------------------------------------------------------------------------------------------ symbols


class _Deferred:
    """How transformers takes a tensor that has still to be read."""

    def __init__(self, symbol: _Symbol) -> None:
        self._symbol = symbol

    def __call__(self) -> _Symbol:
        return self._symbol


class _Symbol:
    """Stands for a tensor, and writes down what torch is asked to do with it."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        make = _FUNCTIONS.get(function)
        if make is None:
            raise UsageError(
                f"transformers converts by {function.__name__}, which a key map cannot: let it load itself"
            )
        return make(*args, **(kwargs or {}))

    def contiguous(self) -> _Symbol:
        return self

    def transpose(self, dim0: int, dim1: int) -> _Symbol:
        return _Symbol(self.saved.transpose(dim0, dim1))

    def __getattr__(self, name: str) -> Any:
        raise UsageError(f"transformers converts by .{name} of a tensor, which a key map cannot: let it load itself")


def _cat(tensors: Sequence[_Symbol], dim: int = 0) -> _Symbol:
    return _Symbol(Saved.cat([each.saved for each in tensors], dim))


def _stack(tensors: Sequence[_Symbol], dim: int = 0) -> _Symbol:
    return _Symbol(Saved.stack([each.saved for each in tensors], dim))


def _chunk(tensor: _Symbol, chunks: int, dim: int = 0) -> tuple[_Symbol, ...]:
    return tuple(map(_Symbol, tensor.saved.chunk(chunks, dim)))


def _split(tensor: _Symbol, sizes: Sequence[int], dim: int = 0) -> tuple[_Symbol, ...]:
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return tuple(_Symbol(tensor.saved.narrow(dim, start, size)) for start, size in zip(starts, sizes, strict=True))


_FUNCTIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.chunk: _chunk,
    torch.split: _split,
    torch.transpose: lambda tensor, dim0, dim1: tensor.transpose(dim0, dim1),
}
