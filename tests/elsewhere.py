"""A device that is not there: its tensors hold their values on the CPU, and behave as a GPU's do.

An operation on tensors of two devices raises, and what would make Python wait for the device is counted. So a machine without a
GPU can tell whether code leaves a tensor behind, or waits where it must not. Kernels, memory and speed it cannot tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # what PyTorch believes: a device whose autograd needs no driver
MIXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::copy_", "aten::_to_copy"}
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}


class Elsewhere(Tensor):
    """A tensor of that device; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> list:
        waits.append("tolist")
        return self.here.tolist()


waits: list[str] = []


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the values; raises where a GPU would."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [isinstance(x, Elsewhere) for x in tensors]
    if any(away) and name not in MIXING and any(x.dim() > 0 for x, there in zip(tensors, away, strict=True) if not there):
        raise RuntimeError(f"{func}: tensors on two devices")
    target = kwargs.get("device")
    there = any(away) if target is None else torch.device(target).type == DEVICE.type
    by_mask = name in MIXING and any(x.dtype == torch.bool for x in tree_leaves(args[1:2]) if isinstance(x, Tensor))
    if any(away) and (name in WAITING or (by_mask and "index" in name) or (name == "aten::_to_copy" and not there)):
        waits.append(name)
    values = tree_map(lambda x: x.here if isinstance(x, Elsewhere) else x, (args, kwargs))
    if target is not None:
        values[1]["device"] = torch.device("cpu")
    out = func(*values[0], **values[1])
    if isinstance(out, Tensor) and out is values[0][0]:  # in place
        return args[0]
    return tree_map(lambda x: Elsewhere(x) if there and isinstance(x, Tensor) else x, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """`torch.tensor(..., device=...)` copies behind the dispatcher's back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            del kwargs["device"]
            return Elsewhere(func(*args, **kwargs))
        return func(*args, **kwargs)


@contextlib.contextmanager
def elsewhere() -> Iterator[list[str]]:
    """Within it DEVICE can be used; gives the list of what has made Python wait for it."""
    waits.clear()
    with _Operations(), _Constructors():
        yield waits


def move(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers there (`module.to` would swap the meta device's own tensors in)."""
    for own in module.modules():
        for name, parameter in own.named_parameters(recurse=False):
            setattr(own, name, nn.Parameter(Elsewhere(parameter.detach().clone()), parameter.requires_grad))
        for name, buffer in own.named_buffers(recurse=False):
            setattr(own, name, Elsewhere(buffer.clone()))
    return module
