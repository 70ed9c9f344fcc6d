"""Quantized models, by torchao: the linear layers of the blocks in 8 or 4 bits, everything else in the model's own precision.

    quantize(model, "int8_weight_only")        in place; then generate, evaluate and compile as before

Embedding and unembedding stay as they are: only rows of them are ever multiplied. A quantized checkpoint is the same folder as
any other, with `quantization.json` beside; its safetensors hold the packed integers and scales, under WEIGHT.NAME.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import RMSNorm

from mdm.config import UserError
from mdm.hardware import multiplies_float8
from mdm.model import MaskedDiffusionModel

SCHEMES = {
    "int8_weight_only": "weights in int8, a scale for each row",
    "int8_dynamic": "weights in int8, activations too, quantized row by row as they come",
    "int4_weight_only": "weights in int4, a scale and a zero for every 32 of them",
    "float8_weight_only": "weights in float8 (e4m3), a scale for each row",
    "float8_dynamic": "weights and activations in float8 (CUDA, compute capability 8.9 or later)",
}
warnings.filterwarnings("ignore", message=".*version 1 of Int4WeightOnlyConfig.*")  # said at every use; the CPU has no other

GROUP = 32  # weights that share a scale in int4


def check_scheme(scheme: str, device: torch.device, key: str = "scheme") -> None:
    """Raises UserError for an unknown scheme, or one that the device cannot run."""
    if scheme not in SCHEMES:
        raise UserError(f"{key}: {scheme!r} is not one of {', '.join(SCHEMES)}")
    if scheme == "float8_dynamic" and not multiplies_float8(device):
        raise UserError(
            f"{key}: float8_dynamic needs a GPU of compute capability 8.9 or later; float8_weight_only runs anywhere"
        )


def _config(scheme: str, device: torch.device) -> Any:
    """torchao's config of a scheme. int4 is packed for the device: the CPU's layout exists in torchao's first version alone."""
    from torchao import quantization as ao
    from torchao.dtypes import Int4CPULayout

    if scheme == "int4_weight_only":
        if device.type == "cpu":
            return ao.Int4WeightOnlyConfig(group_size=GROUP, layout=Int4CPULayout(), use_hqq=True, version=1)
        return ao.Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq"
        )
    return {
        "int8_weight_only": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int8_dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2),
        "float8_weight_only": ao.Float8WeightOnlyConfig,
        "float8_dynamic": ao.Float8DynamicActivationFloat8WeightConfig,
    }[scheme]()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantized, by name: every linear layer of the blocks."""
    return {name: m for name, m in model.named_modules() if name.startswith("blocks.") and isinstance(m, nn.Linear)}


def in_dtype(model: MaskedDiffusionModel, dtype: torch.dtype) -> MaskedDiffusionModel:
    """A model in another precision, in place; norms keep their gains, and the rotations their table, in float32."""
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.float()
    model.restore_buffers()
    return model


def quantize(model: nn.Module, scheme: str) -> None:
    """Quantizes a model in place, on the device that it is on. Afterwards it only computes: it is not trained.

    Raises UserError where a scheme does not fit the device, or a layer's inputs do not divide into groups.
    """
    device = next(model.parameters()).device
    check_scheme(scheme, device)
    model.requires_grad_(False)
    for name, linear in linears(model).items():
        if scheme == "int4_weight_only" and linear.in_features % GROUP:
            raise UserError(f"scheme: int4_weight_only needs inputs in groups of {GROUP}; {name} has {linear.in_features}")
        _quantize_linear(linear, scheme)


def _quantize_linear(linear: nn.Linear, scheme: str) -> None:
    from torchao.quantization import quantize_

    quantize_(linear, _config(scheme, linear.weight.device))
    linear.weight.requires_grad_(False)


def dequantize(model: nn.Module) -> None:
    """The rounded weights as ordinary ones, in place: what a weight-only scheme computes, where its kernels are slow."""
    for linear in linears(model).values():
        linear.weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)


def _parts(value: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a quantized one is made of, by name."""
    inner = getattr(value, "__tensor_flatten__", None)
    if inner is None or type(value) in (Tensor, nn.Parameter):
        yield name, value
        return
    for attribute in inner()[0]:
        yield from _parts(getattr(value, attribute), f"{name}.{attribute}")


def flattened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of plain tensors: what safetensors can hold."""
    return {name: part for key, value in state.items() for name, part in _parts(value.detach(), key)}


def num_bytes(model: nn.Module) -> int:
    """Memory of the weights of the linear layers that are quantized, with their scales; of ordinary ones, of the weights."""
    found = (part for name, m in linears(model).items() for _, part in _parts(m.weight.detach(), name))
    return sum(part.numel() * part.element_size() for part in found)


@torch.no_grad()
def load_quantized(model: nn.Module, scheme: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Fills a model on the meta device from what `flattened` gave, layer by layer; it is quantized for the device of `state`.

    Raises ValueError naming a tensor that is missing, or too many, or of another shape.
    """
    left = dict(state)
    device = next(iter(state.values())).device
    for name, linear in linears(model).items():
        linear.to_empty(device=device)
        linear.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=dtype, device=device), requires_grad=False)
        _quantize_linear(linear, scheme)
        for key, part in _parts(linear.weight.detach(), f"{name}.weight"):
            if key not in left:
                raise ValueError(f"{key} is missing")
            if part.shape != left[key].shape or part.dtype != left[key].dtype:
                raise ValueError(f"{key} has shape {tuple(left[key].shape)}, and {tuple(part.shape)} is expected for {scheme}")
            part.copy_(left.pop(key))
    quantized = {f"{name}.weight" for name in linears(model)}
    missing, unexpected = model.load_state_dict(left, strict=False, assign=True)
    missing = [key for key in missing if key not in quantized]
    if missing or unexpected:
        raise ValueError(f"missing {', '.join(missing) or 'nothing'}; unexpected {', '.join(unexpected) or 'nothing'}")
    model.requires_grad_(False)
