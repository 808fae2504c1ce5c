"""Key maps for transformers' models whose names differ between their files and memory, from their own conversions.

    names in the files, the model's conversions ── transformers' own code, on symbols instead of tensors ──> key map

Since version 5 transformers fuses experts and projections while it loads. Its conversions run here on symbols that
write down what is done to them (`symbols.py`), so that whatever they do by joining, splitting and transposing is done
by `load` as well, and anything else is refused by its name.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_ckpt.errors import RayCkptError, UsageError
from ray_ckpt.format.manifest import TensorEntry
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.integrations.symbols import Deferred, Symbol
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
    found = _converted(model, _tensors(target))
    return {f"{_SECTION}{wanted}": _in_section(saved) for wanted, saved in found.items() if saved != Saved(wanted)}


def _tensors(target: str | os.PathLike[str] | Storage) -> dict[str, TensorEntry]:
    """The model's tensors, by their names in the files."""
    manifest = CheckpointReader(target).read_manifest()
    is_ours = manifest.has_own_names
    return {
        name.removeprefix(_SECTION) if is_ours else name: entry
        for name, entry in manifest.tensors.items()
        if not is_ours or name.startswith(_SECTION)
    }


def _converted(model: PreTrainedModel, tensors: Mapping[str, TensorEntry]) -> dict[str, Saved]:
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
    for name in sorted(tensors, key=_natural):
        renamed, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = name, None
        if renamed not in wanted:
            continue
        if pattern is None:
            made[renamed] = Saved(name)
        else:
            converter = waiting.setdefault(renamed, copy.deepcopy(of_pattern[pattern]))
            symbol = Symbol(Saved(name), tensors[name].shape, parse_dtype(tensors[name].dtype))
            converter.add_tensor(renamed, name, pattern, Deferred(symbol))
    for renamed, converter in waiting.items():
        converter.operations = [_Named(operation, renamed) for operation in converter.operations]
        converted = converter.convert(renamed, model=model, config=model.config)
        made |= {name: _unwrapped(name, symbol) for name, symbol in converted.items()}
    return made


class _Named:
    """One operation of a conversion, whose failure says which it was."""

    def __init__(self, operation: Any, wanted: str) -> None:
        self._operation = operation
        self._wanted = wanted

    def convert(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._operation.convert(*args, **kwargs)
        except Exception as error:  # what is transformers' own may do anything with a symbol
            reason = str(error) if isinstance(error, RayCkptError) else f"{type(error).__name__}: {error}"
            raise UsageError(
                f"transformers makes {self._wanted!r} by {type(self._operation).__name__}, which a key map cannot "
                f"({reason}): let transformers load the files, and save the model from there"
            ) from error


def _unwrapped(name: str, symbol: Any) -> Saved:
    several = symbol if isinstance(symbol, list) else [symbol]
    if len(several) != 1 or not isinstance(several[0], Symbol):
        kinds = ", ".join(type(each).__name__ for each in several)
        raise UsageError(f"transformers makes {name!r} of {len(several)} tensors ({kinds}), which a key map cannot")
    return several[0].saved


def _in_section(saved: Saved) -> str | Saved:
    """Under the names that `load` gives them. What is only renamed is a name."""
    renamed = saved.renamed(lambda name: f"{_SECTION}{name}")
    return renamed if renamed.operation else renamed.name


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Expert 2 comes before expert 10, as transformers sorts."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
