"""Names of foreign checkpoints and what they become: pure arithmetic on manifests."""

from __future__ import annotations

from typing import Any

import pytest

from ray_ckpt.errors import FormatError, StateMismatchError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, Manifest, ObjectEntry, TensorEntry
from ray_ckpt.format.translate import Translation, group_lists, may_be_foreign, translate
from ray_ckpt.format.wanted_names import Names, join_names

ADAM = ("exp_avg", "exp_avg_sq", "step")


def manifest(tensors: dict[str, tuple[int, ...]], objects: list[str] | None = None, attempt: str = "") -> Manifest:
    entries = {
        name: TensorEntry("float32", shape, (Chunk(Box.whole(shape), "f", 0, 1 << 20, None),))
        for name, shape in tensors.items()
    }
    return Manifest(entries, {name: ObjectEntry("f", 0, 1) for name in objects or []}, {"f": 1 << 20}, attempt)


def translated(saved: Manifest, lists: dict[str, Any], names: Names) -> Translation:
    assert sorted(group_lists(saved)) == sorted(lists)
    return translate(saved, lists, names)


TWO = Names(["a.weight", "b.weight"], [["a.weight", "b.weight"]])


@pytest.mark.parametrize("prefix", ["", "state_dict.", "model_state_dict.", "net.", "model.module."])
def test_the_model_is_found_below_any_prefix(prefix: str) -> None:
    saved = manifest({f"{prefix}a.weight": (3, 2), f"{prefix}b.weight": (2, 3), f"{prefix}b.extra": (1,)})
    found = translated(saved, {}, TWO).manifest
    assert sorted(found.tensors) == ["model.a.weight", "model.b.extra", "model.b.weight"]
    assert found.tensors["model.a.weight"].path == ("model", "a.weight")


def test_the_model_is_preferred_to_its_average_and_of_two_unknown_prefixes_neither_is_taken() -> None:
    tensors = {f"{prefix}{name}": (2, 2) for prefix in ("ema.", "model.") for name in TWO.model}
    assert translated(manifest(tensors), {}, TWO).manifest.tensors.keys() == tensors.keys()
    tensors = {f"{prefix}{name}": (2, 2) for prefix in ("student.", "teacher.") for name in TWO.model}
    with pytest.raises(StateMismatchError, match=r"several models that fit: below student\., teacher\."):
        translated(manifest(tensors), {}, TWO)


def test_a_flat_optimizer_below_another_name_is_renamed() -> None:
    """As torchtitan saves it."""
    saved = manifest(
        {"a.weight": (3, 2), "b.weight": (2, 3), "optimizer.state.a.weight.exp_avg": (3, 2)},
        ["optimizer.param_groups.a.weight.lr", "optimizer.param_groups.b.weight.lr", "lr_scheduler.last_epoch"],
    )
    translation = translated(saved, {}, TWO)
    found = translation.manifest
    assert translation.left_out == ["schedulers left out: lr_scheduler.last_epoch"]
    assert "optim.state.a.weight.exp_avg" in found.tensors
    assert sorted(found.objects) == [
        "optim.param_groups.a.weight.lr",
        "optim.param_groups.b.weight.lr",
    ]


def test_names_of_our_own_checkpoint_are_not_translated() -> None:
    saved = manifest(
        {"model.a.weight": (3, 2), "model.b.weight": (2, 3)}, ["optim.param_groups.a.weight.lr"], attempt="0" * 12
    )
    assert not may_be_foreign(saved)
    assert translate(saved, {}, TWO).manifest is saved


def test_tied_weights_that_share_their_bytes_are_one() -> None:
    saved = manifest({"a.weight": (3, 2), "b.weight": (2, 3)})
    place = saved.tensors["a.weight"].chunks
    elsewhere = (Chunk(Box.whole((3, 2)), "f", 64, 1 << 10, None),)
    further = {"tied": TensorEntry("float32", (3, 2), place), "other": TensorEntry("float32", (3, 2), elsewhere)}
    saved = Manifest({**saved.tensors, **further}, {}, saved.files)
    found = translated(saved, {}, TWO).manifest
    assert sorted(found.tensors) == ["model.a.weight", "model.b.weight", "model.other"]


def indexed(order: list[str], groups: list[list[int]], shapes: dict[str, tuple[int, ...]]) -> Manifest:
    tensors = {f"model.{name}": shape for name, shape in shapes.items()}
    tensors |= {f"optim.state.{n}.{key}": shapes[name] for n, name in enumerate(order) for key in ADAM[:2]}
    objects = [f"optim.param_groups.{number}.{key}" for number in range(len(groups)) for key in ("lr", "params")]
    return manifest(tensors, objects)


def test_indices_follow_the_optimizer_and_param_names_win() -> None:
    shapes = {"a.weight": (3, 2), "b.weight": (3, 2)}
    saved = indexed(["b.weight", "a.weight"], [[0], [1]], shapes)
    lists = {"optim.param_groups.0.params": [0], "optim.param_groups.1.params": [1]}
    names = Names(list(shapes), [["b.weight"], ["a.weight"]])
    found = translated(saved, lists, names).manifest
    # The same chunk, under the name that its number stands for.
    assert found.tensors["optim.state.b.weight.exp_avg"].chunks == saved.tensors["optim.state.0.exp_avg"].chunks
    assert found.objects["optim.param_groups.b.weight.lr"].file == "f"
    named = Manifest(
        saved.tensors,
        {**saved.objects, **{f"optim.param_groups.{n}.param_names": ObjectEntry("f", 0, 1) for n in (0, 1)}},
        saved.files,
    )
    lists |= {"optim.param_groups.0.param_names": ["a.weight"], "optim.param_groups.1.param_names": ["b.weight"]}
    assert "optim.state.a.weight.exp_avg" in translated(named, lists, names).manifest.tensors


def test_stages_that_each_know_their_own_part_make_up_the_order_of_the_model() -> None:
    of_ranks = [Names(["a.weight", "c.weight"], [["a.weight", "c.weight"]]), Names(["b.weight"], [["b.weight"]])]
    names = join_names(of_ranks)
    assert names is not None
    assert not names.is_order_known
    shapes = {"a.weight": (1, 2), "b.weight": (3, 4), "c.weight": (5, 6)}
    saved = indexed(list(shapes), [[0, 1, 2]], shapes)
    found = translated(saved, {"optim.param_groups.0.params": [0, 1, 2]}, names).manifest
    assert all(found.tensors[f"optim.state.{name}.exp_avg"].shape == shape for name, shape in shapes.items())
    assert join_names([TWO, TWO]) == Names(tuple(TWO.model), TWO.groups)


def test_a_state_that_has_another_shape_than_its_parameter_gives_a_wrong_order_away() -> None:
    shapes = {"a.weight": (3, 2), "b.weight": (2, 3)}
    saved = indexed(["b.weight", "a.weight"], [[0, 1]], shapes)
    with pytest.raises(StateMismatchError, match=r"number 0 would be 'a\.weight' of shape \[3, 2\]"):
        translated(saved, {"optim.param_groups.0.params": [0, 1]}, TWO)


def test_stages_that_saved_under_the_same_indices_are_refused() -> None:
    saved = indexed(["a.weight"], [[0]], {"a.weight": (3, 2)})
    with pytest.raises(StateMismatchError, match="load the model alone"):
        translated(saved, {"optim.param_groups.0.params": [0]}, TWO)


def test_unlisted_parameters_with_state_mean_that_groups_have_collided() -> None:
    tensors = {f"model.{name}": (2, 2) for name in TWO.model}
    tensors |= {f"optim.state.{name}.exp_avg": (2, 2) for name in TWO.model}
    saved = manifest(tensors, ["optim.param_groups.0.lr", "optim.param_groups.0.params"])
    found = translated(saved, {"optim.param_groups.0.params": ["b.weight"]}, TWO)
    assert "do not list a.weight" in found.lost
    assert found.manifest.objects == {}, "what is left of the groups is a mixture, and is not handed on"
    assert "optim.state.a.weight.exp_avg" in found.manifest.tensors


@pytest.mark.parametrize("members", ["weights", [1.5], [0, "a"], {"a": 1}, [0, 0], [True]])
def test_members_that_are_not_a_list_of_indices_are_refused(members: Any) -> None:
    saved = indexed(["a.weight"], [[0]], {"a.weight": (3, 2)})
    with pytest.raises(FormatError):
        translated(saved, {"optim.param_groups.0.params": members}, TWO)


@pytest.mark.parametrize("number", ["first", "9" * 5000, "\u0663", ""])
def test_groups_of_others_may_be_called_anything(number: str) -> None:
    shapes = {"a.weight": (3, 2), "b.weight": (3, 2)}
    saved = indexed(list(shapes), [[0, 1]], shapes)
    objects = {
        **saved.objects,
        **{f"optim.param_groups.{number}.{key}": ObjectEntry("f", 0, 1) for key in ("lr", "params")},
    }
    odd = Manifest(saved.tensors, objects, saved.files)
    found = translate(odd, {"optim.param_groups.0.params": [0, 1]}, Names(list(shapes), [list(shapes)]))
    assert "optim.param_groups.a.weight.lr" in found.manifest.objects
