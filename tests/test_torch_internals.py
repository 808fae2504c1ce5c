"""What the product relies on of torch's private names, a test each: an upgrade that changes one fails here."""

from __future__ import annotations

import ast
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

import ray_ckpt
from ray_ckpt.format import torch_internals

PACKAGE = Path(ray_ckpt.__file__).parent
HOME = "torch_internals.py"
OF_OBJECTS = {"_local_tensor", "_apply", "_parameters", "_buffers", "_spec", "_version"}
"""Private attributes of tensors and modules, which nothing but their name tells from our own."""


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def private_names(path: Path) -> set[str]:
    """torch's names with a part that begins with one `_`, and private attributes of its objects."""
    found, attributes = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr in OF_OBJECTS and not own:
                attributes.add(node.attr)
    return {name for name in found if name.startswith("torch.") and "._" in name.replace(".__", ".")} | attributes


def test_they_are_named_in_their_home_alone() -> None:
    by_file = {path.name: private_names(path) for path in PACKAGE.rglob("*.py")}
    assert {name for name, found in by_file.items() if found} == {HOME}


def test_the_classes_of_typed_storages_have_names() -> None:
    """`torch.storage._dtype_to_storage_type_map`: names of classes below `torch`; dtypes since 2.3 have none."""
    assert torch_internals.STORAGE_TYPES[torch.bfloat16] == "BFloat16Storage"
    assert torch.uint16 not in torch_internals.STORAGE_TYPES
    assert all(hasattr(torch, name) for name in torch_internals.STORAGE_TYPES.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16])
def test_torch_saves_a_tensor_as_a_call_of_a_rebuild_function(dtype: torch.dtype) -> None:
    """`torch._utils._rebuild_tensor_v2` and `_v3`: what a pickle by `torch.save` names."""
    rebuild = torch_internals.rebuild_tensor_v2 if dtype.is_floating_point else torch_internals.rebuild_tensor_v3
    stream = io.BytesIO()
    torch.save(torch.zeros(2, 3, dtype=dtype), stream)
    assert f"{rebuild.__module__}\n{rebuild.__name__}\n".encode() in stream.getvalue()


def test_the_typed_tensor_classes_allocate_what_they_are_called_with() -> None:
    """`torch._tensor_classes`: what a pickle may not call."""
    assert torch.FloatTensor in torch_internals.TENSOR_CLASSES
    assert torch.FloatTensor(3).shape == (3,)


def test_a_box_of_a_tensor_is_a_view() -> None:
    """`torch.distributed._shard._utils.narrow_tensor_by_index`."""
    whole = torch.arange(12).reshape(3, 4)
    part = torch_internals.narrow(whole, (1, 2), (2, 2))
    assert part.tolist() == [[6, 7], [10, 11]]
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_dcp_keeps_a_place_as_file_offset_and_length(one_rank: None, tmp_path: Path) -> None:
    """`torch.distributed.checkpoint.filesystem._StorageInfo`: fields and pickled form."""
    dcp.save({"a": torch.ones(2)}, storage_writer=FileSystemWriter(tmp_path))
    metadata = FileSystemReader(tmp_path).read_metadata()
    assert isinstance(metadata, Metadata)
    info = metadata.storage_data[MetadataIndex("a", torch.Size([0]))]
    assert type(info) is torch_internals.StorageInfo
    same = torch_internals.StorageInfo(info.relative_path, info.offset, info.length)
    assert pickle.loads(pickle.dumps(same)) == same
    assert (tmp_path / same.relative_path).stat().st_size >= same.offset + same.length


def test_extensions_are_found_by_their_descriptors() -> None:
    """`torch.distributed.checkpoint._extension`: `ExtensionRegistry`, and the base class of stream transforms."""
    registry = torch_internals.ExtensionRegistry()
    (found,) = registry.from_descriptor_list([ZStandard().get_descriptor()])
    assert isinstance(found, torch_internals.StreamTransformExtension)
    with pytest.raises(ValueError, match="unknown"):
        registry.from_descriptor_list(["unknown"])


def test_nested_state_is_flattened_and_set_along_the_same_paths() -> None:
    """`_nested_dict.flatten_state_dict` and `_traverse.set_element`: dicts, and lists that hold tensors or dicts."""
    state = {"model": {"w": torch.ones(1)}, "groups": [{"lr": 0.1}, {"lr": 0.2}], "betas": [1, 2]}
    flat, paths = torch_internals.flatten_state_dict(state)
    assert sorted(flat) == ["betas", "groups.0.lr", "groups.1.lr", "model.w"]
    assert paths["groups.1.lr"] == ("groups", 1, "lr")
    again: dict[str, object] = {}
    for name, path in paths.items():
        torch_internals.set_element(again, path, flat[name])
    assert again == state


def test_dcp_plans_one_item_per_part_of_a_tensor() -> None:
    """`planner_helpers._create_write_items`: as the default planner does, ShardedTensors included."""
    (item,) = torch_internals.create_write_items("w", torch.ones(2, 3))
    planner = DefaultSavePlanner()
    planner.set_up_planner({"w": torch.ones(2, 3)}, is_coordinator=True)
    assert planner.create_local_plan().items == [item]
    assert item.tensor_data is not None
    assert item.tensor_data.chunk.sizes == torch.Size([2, 3])
    assert hasattr(torch_internals.ShardedTensor, "local_shards")


def test_a_dtensors_shard_and_its_place(one_rank: None) -> None:
    """`DTensor._local_tensor` and `tensor._utils.compute_local_shape_and_global_offset`."""
    mesh = init_device_mesh("cpu", (1,))
    whole = torch.arange(6.0).reshape(3, 2).requires_grad_()
    sharded = DTensor.from_local(whole, mesh, [Shard(0)])
    local = torch_internals.local_tensor(sharded)
    assert type(local) is torch.Tensor
    assert local.data_ptr() == whole.data_ptr()
    assert torch_internals.local_tensor(whole) is whole
    assert torch_internals.locate_shard(sharded) == ((3, 2), (0, 0))
    assert torch_internals.StridedShard(0, split_factor=2).split_factor == 2


def test_a_dtensor_is_made_of_the_very_local_tensor(one_rank: None) -> None:
    """`DTensor.__new__`, and `tensor._dtensor_spec`: `DTensorSpec` and `TensorMeta`."""
    mesh, local = init_device_mesh("cpu", (1,)), torch.arange(6.0).reshape(3, 2)
    made = torch_internals.placed(local, mesh, [Shard(0)], (3, 2))
    assert made._local_tensor is local
    usual = DTensor.from_local(local, mesh, [Shard(0)])
    assert (made.shape, made.stride(), made.placements) == (usual.shape, usual.stride(), usual.placements)
    assert torch.equal(made.full_tensor(), local)


def test_a_tensor_that_is_made_of_others_is_known() -> None:
    """`torch.utils._python_dispatch.is_traceable_wrapper_subclass`."""
    assert torch_internals.is_wrapper(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not torch_internals.is_wrapper(nn.Parameter(torch.ones(2)))


def test_wrappers_leave_no_trace_in_names() -> None:
    """`state_dict._get_fqns`: the names that DCP has for an entry of a wrapped module."""
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    assert isinstance(compiled, nn.Module)
    assert torch_internals.names_of(compiled, "_orig_mod.0.weight") == {"0.weight"}


def test_many_tensors_are_copied_by_one_call() -> None:
    """`torch._foreach_copy_`."""
    targets = [torch.zeros(2), torch.zeros(3)]
    torch_internals.copy_each(targets, [torch.ones(2), torch.full((3,), 2.0)])
    assert [target.tolist() for target in targets] == [[1, 1], [2, 2, 2]]


def test_tensors_of_a_module_are_replaced() -> None:
    """`nn.Module._apply`, `_parameters`, `_buffers`."""
    with torch.device("meta"):
        module = nn.BatchNorm1d(2)
    copied = torch_internals.with_own_tensors(module, lambda tensor: torch.zeros_like(tensor, device="cpu"))
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"cpu"}
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    torch_internals.replace_tensors(module, lambda tensor: torch.zeros_like(tensor, device="cpu"))
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    assert isinstance(module.weight, nn.Parameter)
    assert [torch_internals.has_entry(nn.Linear(2, 2, bias=False), name) for name in ("weight", "bias", "other")] == [
        True,
        True,
        False,
    ]
