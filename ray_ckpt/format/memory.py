"""The one guard before an address is used: whether a tensor's elements lie where its address says.

Saving, copying, digesting and reading into a tensor all go by its address. Some tensors have none (those of the meta
device, fake and functional ones, wrappers of other tensors), or their elements do not lie there by strides (sparse,
nested, quantized), or their storage was taken away (FSDP frees what it has gathered).
"""

from __future__ import annotations

import torch

from ray_ckpt.format.torch_internals import is_wrapper

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def fault(tensor: torch.Tensor) -> str:
    """Why the tensor's elements cannot be read or written at its address, as `is ...`; empty if they can be."""
    if type(tensor) in _PLAIN and tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested):
        # Nearly all are like this, and there may be many thousands of them.
        storage_bytes = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
        if tensor.data_ptr() and tensor.is_contiguous() and tensor.nbytes <= storage_bytes:
            return ""
    elif is_wrapper(tensor):
        return f"is a {type(tensor).__name__}, which has no elements of its own but those of the tensors it is made of"
    if tensor.is_meta:
        return "is on the meta device, where nothing has a value"
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
        return f"is {kind}: give the dense tensors that it consists of names of their own"
    if tensor.is_quantized:
        return "is a quantized tensor, whose scale its elements do not show: give int_repr() and the scale names"
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:
        return f"is a {type(tensor).__name__} without an address ({str(error).splitlines()[0][:100]})"
    if not address:
        return f"is a {type(tensor).__name__} of {tensor.nbytes} bytes without memory" if tensor.numel() else ""
    end = tensor.storage_offset() * tensor.itemsize + extent_bytes(tensor)
    if end > (held := tensor.untyped_storage().nbytes()):
        return f"is a tensor that ends at byte {end} of a storage of {held}: its memory was taken away"
    return ""


def extent_bytes(tensor: torch.Tensor) -> int:
    """Bytes from its first to its last element."""
    if tensor.is_contiguous():
        return tensor.nbytes
    if not tensor.numel():
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


def overlapping(tensor: torch.Tensor) -> str:
    """Why the tensor cannot be read into, as `has ...`: several elements lie in one place. Empty if none do."""
    if tensor.is_contiguous():
        return ""
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    reach = 0  # of the dims with smaller strides
    for stride, size in dims:
        if stride <= reach:
            return "has several elements in one place, as expanded tensors do: load into a clone of it"
        reach += (size - 1) * stride
    return ""
