"""export: what other programs open, of any layout's checkpoint, and bit for bit what was saved."""

from __future__ import annotations

import functools
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ray_ckpt import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    FormatError,
    IntegrityError,
    StorageError,
    TrainState,
    UsageError,
    convert,
    export,
    inspect,
    load,
    save,
)
from ray_ckpt.storage import rewrite as rewriting
from tests.support import states
from tests.support.conversions import files_of, logits, save_layout, small_llama
from tests.support.foreign import weights
from tests.support.ranks import run_ranks
from tests.test_cli import call, data_of, flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*is deprecated")


def trained(**options: Any) -> tuple[TrainState, Any]:
    state, module = states.build("single", "adamw", seed=3, **options)
    states.train(state, module, steps=2)
    return state, module


def test_a_model_is_opened_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_llama()
    model.config.save_pretrained(tmp_path / "config")
    model.generation_config.save_pretrained(tmp_path / "config")
    (tmp_path / "config" / "tokenizer.json").write_text("{}")
    (tmp_path / "config" / "model.safetensors").write_text("no")
    save(TrainState(model, torch.optim.AdamW(model.parameters())), tmp_path / "run", step=1)
    for name, options in (("one", {}), ("many", {"max_shard_bytes": 10_000})):
        report = export(tmp_path / "run", tmp_path / name, to="safetensors", config=str(tmp_path / "config"), **options)
        assert (len(report.files) > 1) == (name == "many")
        opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not [keys for keys in info.values() if keys]
        assert torch.equal(logits(opened.eval()), logits(model))
        assert not torch.equal(logits(small_llama(seed=1)), logits(model))
        assert (tmp_path / name / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert set(index["weight_map"]) == {name for name in model.state_dict() if name != "lm_head.weight"}
    with safetensors.safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) for name in states.LAYOUTS])
def test_every_layout_gives_the_same_files(layout: str, tmp_path: Path) -> None:
    run_ranks(save_layout, states.LAYOUTS[layout], tmp_path, str(tmp_path / "run"), layout)
    export(tmp_path / "run", tmp_path / "weights", to="safetensors")
    export(tmp_path / "run", tmp_path / "state.pt", to="torch")
    export(tmp_path / "run", tmp_path / "stock", to="dcp")
    found = safetensors.torch.load_file(tmp_path / "weights" / "model.safetensors")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh, _ = states.build("single", "adamw", seed=4)
    load(fresh, tmp_path / "run")
    expected = fresh.model.state_dict()
    assert found.keys() == expected.keys() == state["model"].keys()
    assert not [name for name, value in expected.items() if not torch.equal(value, found[name])]
    taken, _ = states.build("single", "adamw", seed=5)
    taken.model.load_state_dict(state["model"])
    taken.optimizer.load_state_dict(state["optimizer"])
    assert states.differing([fresh.snapshot(0)], [taken.snapshot(0)]) == []
    other, _ = states.build("single", "adamw", seed=6)
    load(other, tmp_path / "stock")
    assert states.differing([fresh.snapshot(0)], [other.snapshot(0)]) == []


def test_a_torch_file_is_what_a_script_saves(tmp_path: Path) -> None:
    state, module = trained(step=2, counters={"tokens": 7})
    save(state, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "state.pt", to="torch")
    for mmap in (False, True):
        found = torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap)
        fresh, other = states.build("single", "adamw", seed=9)
        fresh.model.load_state_dict(found["model"])
        fresh.optimizer.load_state_dict(found["optimizer"])
        assert found["counters"] == {"tokens": 7, "step": 2}
    groups = state.optimizer.state_dict()["param_groups"]
    assert [group["params"] for group in found["optimizer"]["param_groups"]] == [group["params"] for group in groups]
    expected, state_of = state.optimizer.state_dict()["state"], found["optimizer"]["state"]
    assert state_of.keys() == expected.keys()
    assert all(torch.equal(state_of[n][key], expected[n][key]) for n in expected for key in expected[n])
    assert states.train(fresh, other, steps=2) == states.train(state, module, steps=2)


def test_schedulers_go_on_from_a_torch_file(tmp_path: Path) -> None:
    def made() -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        parts = [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 3)]
        return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])

    def step(model: Any, optimizer: Any, scheduler: Any) -> list[float]:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
        return [*scheduler.get_last_lr(), *model.weight.flatten().tolist()]

    one, other = made(), made()
    step(*one)
    save(TrainState(one[0], one[1], schedulers=one[2]), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "state.pt", to="torch")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    for each, part in zip(other, (found["model"], found["optimizer"], found["schedulers"]["0"]), strict=True):
        each.load_state_dict(part)
    assert [step(*one) for _ in range(6)] == [step(*other) for _ in range(6)]


def test_stock_dcp_reads_the_optimizer_of_a_dcp_export(tmp_path: Path) -> None:
    state, _ = trained()
    save(state, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "stock", to="dcp", max_shard_bytes=10_000)
    assert not (tmp_path / "stock" / "manifest.json").exists()
    fresh, _ = states.build("single", "adamw", seed=9)
    states.train(fresh, fresh.model, steps=1)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    target = {
        "model": fresh.model.state_dict(),
        "optim": get_optimizer_state_dict(fresh.model, fresh.optimizer, options=options),
    }
    dcp.load(target, checkpoint_id=tmp_path / "stock", no_dist=True)
    expected = {"model": state.model.state_dict(), "optim": state.state_dict()["optim"]}
    for section in target:
        tensors = {name: value for name, value in target[section].items() if isinstance(value, torch.Tensor)}
        assert tensors
        assert not [name for name, value in tensors.items() if not torch.equal(value, expected[section][name])]


def write_foreign(kind: str, path: Path) -> Path:
    """The model of `weights()`, as other programs write it, beside an optimizer or what they call a step."""
    model = weights()
    prefixed = {f"_orig_mod.{name}": value for name, value in model.items()}
    optimizer = {"state": {0: {"momentum": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    if kind == "stock DCP":
        dcp.save({"model": model, "step": 3}, checkpoint_id=path, no_dist=True)
    elif kind == "torchtitan":
        dcp.save({**model, "optimizer": optimizer, "train_state": {"step": 3}}, checkpoint_id=path, no_dist=True)
    elif kind == "accelerate":
        dcp.save({"model": model}, checkpoint_id=path / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": optimizer}, checkpoint_id=path / "optimizer_0", no_dist=True)
    elif kind == "Lightning":
        path.mkdir()
        path = path / "last.ckpt"
        torch.save({"state_dict": prefixed, "optimizer_states": [optimizer], "pytorch-lightning_version": "2"}, path)
    elif kind == ".pt":
        torch.save(model, path)
    elif kind == "safetensors":
        safetensors.torch.save_file(model, path)
    else:
        path.mkdir()
        safetensors.torch.save_file(model, path / "model.safetensors")
        torch.save(optimizer, path / "optimizer.pt")
        (path / "trainer_state.json").write_text('{"global_step": 3}')
    return path


FOREIGN = ("stock DCP", "torchtitan", "accelerate", "Lightning", ".pt", "safetensors", "Trainer")


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_others_wrote_is_exported_too(kind: str, tmp_path: Path) -> None:
    source = write_foreign(kind, tmp_path / "source")
    export(source, tmp_path / "weights", to="safetensors")
    found = safetensors.torch.load_file(tmp_path / "weights" / "model.safetensors")
    assert found.keys() == weights().keys()
    assert not [name for name, value in weights().items() if not torch.equal(value, found[name])]
    export(source, tmp_path / "state.pt", to="torch")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    below = state.get("model", state.get("state_dict", state))
    assert all(torch.equal(below[name], value) for name, value in weights().items())
    export(source, tmp_path / "stock", to="dcp")
    assert (tmp_path / "stock" / ".metadata").exists()


def test_empty_tensors_and_single_elements_are_exported(tmp_path: Path) -> None:
    state = {"empty": torch.zeros(0, 3), "first": torch.ones(2), "none": torch.zeros(0), "scalar": torch.tensor(2.0)}
    save(state, tmp_path / "run")
    for form in ("safetensors", "torch", "dcp"):
        export(tmp_path / "run", tmp_path / form, to=form)
    found = safetensors.torch.load_file(tmp_path / "safetensors" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    assert found["empty"].shape == (0, 3)


def test_tied_weights_of_a_file_are_written_once(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    torch.save({"embed.weight": shared, "head.weight": shared, "norm.weight": torch.ones(4)}, tmp_path / "tied.pt")
    report = export(tmp_path / "tied.pt", tmp_path / "weights", to="safetensors")
    assert sorted(safetensors.torch.load_file(tmp_path / "weights" / "model.safetensors")) == [
        "embed.weight",
        "norm.weight",
    ]
    assert report.left_out == ("head.weight: tied to embed.weight",)


@pytest.mark.parametrize("key", ["", "state_dict", "ours"])
def test_both_names_of_a_tied_weight_are_changed(tmp_path: Path, key: str) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    weights = {"module.embed.weight": shared, "module.head.weight": shared, "module.norm.weight": torch.ones(4)}
    source = tmp_path / ("run" if key == "ours" else "tied.pt")
    if key == "ours":
        save({"model": weights}, source)
    else:
        torch.save({key: weights} if key else weights, source)
    rename = [(r"\.weight$", ".gain"), ("^head", "lm_head")]
    export(source, tmp_path / "state.pt", to="torch", rename=rename)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    found = state[key.replace("ours", "model")] if key else state
    assert sorted(found) == ["embed.gain", "lm_head.gain", "norm.gain"]
    assert torch.equal(found["embed.gain"], shared)
    assert torch.equal(found["lm_head.gain"], shared)
    with pytest.raises(UsageError, match=r"would both be called 'tied\.weight'"):
        export(source, tmp_path / "other.pt", to="torch", rename=[("embed|head", "tied")])


def test_weights_are_cast_as_torch_does_and_names_changed(tmp_path: Path) -> None:
    state = {"model": {"a.weight": torch.randn(300, 70), "count": torch.arange(3), "scale": torch.rand(3).half()}}
    state["optim"] = {"state.a.weight.exp_avg": torch.randn(300, 70)}
    save(state, tmp_path / "run")
    rename = ("--rename", r"^a\.=layers.0.", "--rename", "scale=gain")
    found = data_of("export", tmp_path / "run", tmp_path / "weights", "--to", "safetensors", "--dtype", "bf16", *rename)
    assert sorted(found["cast"]) == ["gain", "layers.0.weight"]
    loaded = safetensors.torch.load_file(tmp_path / "weights" / "model.safetensors")
    assert torch.equal(loaded["layers.0.weight"], state["model"]["a.weight"].to(torch.bfloat16))
    assert torch.equal(loaded["count"], state["model"]["count"])
    export(tmp_path / "run", tmp_path / "stock", to="dcp", dtype="bf16")
    both = {
        "model": {"a.weight": torch.zeros(300, 70).bfloat16()},
        "optim": {"state.a.weight.exp_avg": torch.zeros(300, 70)},
    }
    dcp.load(both, checkpoint_id=tmp_path / "stock", no_dist=True)
    assert torch.equal(both["optim"]["state.a.weight.exp_avg"], state["optim"]["state.a.weight.exp_avg"])
    save({"model": {"a": torch.tensor([1.0, 1e6])}}, tmp_path / "large")
    with pytest.raises(UsageError, match=r"'a' has 1 elements that are too large for float16"):
        export(tmp_path / "large", tmp_path / "half", to="safetensors", dtype="fp16")
    assert list((tmp_path / "half").iterdir()) == []


def test_recorded_fingerprints_are_compared(tmp_path: Path) -> None:
    save({"model": {"w": torch.randn(300, 70)}}, tmp_path / "run", fingerprints=True)
    export(tmp_path / "run", tmp_path / "good", to="safetensors")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["fingerprints_2"]
    from ray_ckpt.format.manifest import Manifest

    found = Manifest.from_json((tmp_path / "run" / "manifest.json").read_bytes())
    object.__setattr__(
        found, "fingerprints", {name: text[:-1] + "xyz"[text[-1] == "x"] for name, text in found.fingerprints.items()}
    )
    (tmp_path / "run" / "manifest.json").write_text(found.to_json())
    with pytest.raises(FormatError, match="differs from the fingerprint in the source's record"):
        export(tmp_path / "run", tmp_path / "bad", to="safetensors")
    assert list((tmp_path / "bad").iterdir()) == []


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_an_empty_tensor_is_written_too(to: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = {"a": torch.ones(3), "b": torch.ones(shape), "c": torch.arange(2)}
    save({"model": model}, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out" / "x", to=to)
    convert(tmp_path / "out" / "x", tmp_path / "back")
    key = "" if to == "safetensors" else "model."
    found = {f"{key}{name}": torch.full_like(value, 7) for name, value in model.items()}
    load(found, tmp_path / "back")
    assert not [name for name, value in model.items() if not torch.equal(value, found[key + name])]


def test_what_is_read_ahead_comes_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor of many pieces, beside tensors of which many are one piece."""
    monkeypatch.setattr(rewriting, "BATCH_BYTES", 1 << 10)
    model = {"large": torch.randn(90, 70), **{f"small.{i}": torch.randn(7) for i in range(60)}, "none": torch.ones(0)}
    save({"model": model}, tmp_path / "run", fingerprints=True)
    export(tmp_path / "run", tmp_path / "weights", to="safetensors")
    found = safetensors.torch.load_file(tmp_path / "weights" / "model.safetensors")
    assert found.keys() == model.keys()
    assert not [name for name, value in model.items() if not torch.equal(value, found[name])]
    [chunk] = inspect(tmp_path / "run").manifest.tensors["model.small.59"].chunks
    data = bytearray((tmp_path / "run" / chunk.file).read_bytes())
    data[chunk.data_start] ^= 1
    (tmp_path / "run" / chunk.file).write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.small\.59"):
        export(tmp_path / "run", tmp_path / "other", to="safetensors")


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp"])
def test_damage_in_the_source_is_named_and_nothing_is_there(to: str, tmp_path: Path) -> None:
    save({"model": {"w": torch.randn(300, 70)}}, tmp_path / "run")
    flip(tmp_path / "run")
    with pytest.raises(IntegrityError, match="w"):
        export(tmp_path / "run", tmp_path / "out" / "x", to=to)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    save({"model": {"w": torch.ones(2), "v": torch.ones(2)}}, tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("mine")
    run = str(tmp_path / "run")
    for expected, message, target, options in (
        (UsageError, "give one of safetensors, torch, dcp", "a", {"to": "onnx"}),
        (UsageError, "has nothing below ema; it has model", "a", {"to": "dcp", "only": ["ema"]}),
        (UsageError, "only to bf16", "a", {"to": "dcp", "dtype": "int8"}),
        (UsageError, "is no dtype", "a", {"to": "dcp", "dtype": "b16"}),
        (UsageError, "would both be called", "a", {"to": "safetensors", "rename": [("w|v", "x")]}),
        (UsageError, "changes no name", "a", {"to": "safetensors", "rename": [("q", "x")]}),
        (UsageError, "no regular expression", "a", {"to": "safetensors", "rename": [("(", "x")]}),
        (UsageError, "has no config.json", "a", {"to": "safetensors", "config": run}),
        (UsageError, "is a directory", "full", {"to": "torch"}),
        (CheckpointExistsError, "holds model.safetensors already", "full", {"to": "safetensors"}),
    ):
        with pytest.raises(expected, match=message):
            export(run, str(tmp_path / target), **options)
    with pytest.raises(CheckpointNotFoundError):
        export(tmp_path / "nothing", str(tmp_path / "a"), to="dcp")
    assert files_of(tmp_path / "full") == {"model.safetensors": b"mine"}
    assert not (tmp_path / "a").exists() or list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("first", ["safetensors", "dcp"])
@pytest.mark.parametrize("then", ["safetensors", "dcp"])
def test_a_directory_takes_one_checkpoint(first: str, then: str, tmp_path: Path) -> None:
    save({"model": weights()}, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", to=first)
    before = files_of(tmp_path / "out")
    with pytest.raises(CheckpointExistsError, match="already; give another place"):
        export(tmp_path / "run", tmp_path / "out", to=then)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp", "ours"])
def test_a_full_disk_is_told_and_leaves_nothing(to: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for it, as it fails the same way."""
    save({"model": weights()}, tmp_path / "run")
    write = convert if to == "ours" else functools.partial(export, to=to)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*File too large"):
            write(tmp_path / "run", tmp_path / "out" / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_the_command_exports_and_imports(tmp_path: Path) -> None:
    save({"model": weights()}, tmp_path / "run", step=4)
    code, text = call(
        "export", tmp_path / "run", tmp_path / "w", "--to", "safetensors", "--step", 4, "--max-shard", "20KB"
    )
    assert code == 0
    assert "read back and found equal to" in text
    code, text = call("import", tmp_path / "w", tmp_path / "again", "--target-step", 9)
    assert code == 0
    assert call("diff", tmp_path / "again", tmp_path / "w")[0] == 0
    assert call("verify", tmp_path / "again", "--step", 9)[0] == 0
