"""Quantized models, by torchao: the matrices of the blocks in 8 or 4 bits, everything else in the model's own precision.

    quantize(model, "int8_weight_only")        in place; then generate, evaluate and compile as before

Of a mixture, each expert's matrices are, and its router is not: a wrong choice of experts costs more than its few weights.
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

from components.moe import MixtureOfExperts
from mdm.config import UserError
from mdm.hardware import multiplies_float8
from mdm.models.transformer import MaskedDiffusionModel
from mdm.models.weights import KEPT

SCHEMES = {
    "int8_weight_only": "weights in int8, a scale for each row",
    "int8_dynamic": "weights in int8, activations too, quantized row by row as they come",
    "int4_weight_only": "weights in int4, a scale and a zero for every 32 of them",
    "float8_weight_only": "weights in float8 (e4m3), a scale for each row",
    "float8_dynamic": "weights and activations in float8 (CUDA, compute capability 8.9 or later)",
}
warnings.filterwarnings("ignore", message=".*version 1 of Int4WeightOnlyConfig.*")  # said at every use; the CPU has no other

GROUP = 32  # weights that share a scale in int4
ROWS = 16  # which int4 packs together


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
        int4: Any = ao.Int4WeightOnlyConfig  # it takes more than its types say: another layout, and its enums by name
        if device.type == "cpu":
            return int4(group_size=GROUP, layout=Int4CPULayout(), use_hqq=True, version=1)
        return int4(group_size=GROUP, int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq")
    return {
        "int8_weight_only": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int8_dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2),
        "float8_weight_only": ao.Float8WeightOnlyConfig,
        "float8_dynamic": ao.Float8DynamicActivationFloat8WeightConfig,
    }[scheme]()


def places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the weights lie that are quantized, by name: (module, attribute). Experts that are one tensor have one place."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        if not name.startswith("blocks."):
            continue
        if isinstance(module, nn.Linear) and not name.endswith(".router"):
            found[f"{name}.weight"] = (module, "weight")
        elif isinstance(module, MixtureOfExperts):
            for part in module.EXPERTS:
                own = getattr(module, part)
                if isinstance(own, nn.ParameterList):
                    found |= {f"{name}.{part}.{e}": (own, str(e)) for e in range(len(own))}
                else:
                    found[f"{name}.{part}"] = (module, part)
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are quantized, by name: of every linear layer of the blocks, and of every expert."""
    return {name: getattr(module, attribute) for name, (module, attribute) in places(model).items()}


def in_dtype(model: MaskedDiffusionModel, dtype: torch.dtype) -> MaskedDiffusionModel:
    """A model in another precision, in place; norms keep their gains, and the rotations their table, in float32."""
    norms = {id(p) for module in model.modules() if isinstance(module, RMSNorm) for p in module.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in norms else dtype)
    model.restore_buffers()
    return model


def quantize(model: nn.Module, scheme: str) -> None:
    """Quantizes a model in place, on the device that it is on. Afterwards it only computes: it is not trained.

    Raises UserError where a scheme does not fit the device, or a layer's inputs do not divide into groups.
    """
    device = next(model.parameters()).device
    check_scheme(scheme, device)
    model.requires_grad_(False)
    split_experts(model)
    for name, weight in weights(model).items():
        rows, inputs = weight.shape
        if scheme == "int4_weight_only" and (inputs % GROUP or rows % ROWS):
            raise UserError(
                f"scheme: int4_weight_only needs inputs in groups of {GROUP} and outputs in groups of {ROWS}; {name} has "
                f"{inputs} and {rows}"
            )
    for module, attribute in places(model).values():
        setattr(module, attribute, _quantized(getattr(module, attribute), scheme))


def split_experts(model: nn.Module) -> None:
    """Every expert's weights on their own, in place."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.split()


def _quantized(weight: Tensor, scheme: str) -> nn.Parameter:
    """A matrix, rounded and packed: torchao takes linear layers alone."""
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(layer, _config(scheme, weight.device))
    layer.weight.requires_grad_(False)
    return layer.weight


def dequantize(model: nn.Module) -> None:
    """The rounded weights as ordinary ones, in place: what a weight-only scheme computes, where its kernels are slow."""
    for module, attribute in places(model).values():
        value = getattr(module, attribute).dequantize()
        setattr(module, attribute, nn.Parameter(value, requires_grad=False))


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
    """Memory of the weights that are quantized, with their scales; of ordinary ones, of the weights."""
    found = (part for name, weight in weights(model).items() for _, part in _parts(weight.detach(), name))
    return sum(part.numel() * part.element_size() for part in found)


@torch.no_grad()
def load_quantized(model: nn.Module, scheme: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Fills a model on the meta device from what `flattened` gave, layer by layer; it is quantized for the device of `state`.

    Raises ValueError naming a tensor that is missing, or too many, or of another shape.
    """
    left = dict(state)
    device = next(iter(state.values())).device
    split_experts(model)
    for name, (module, attribute) in places(model).items():
        plain = torch.zeros(getattr(module, attribute).shape, dtype=dtype, device=device)
        packed = _quantized(plain, scheme)
        setattr(module, attribute, packed)
        for key, part in _parts(packed.detach(), name):
            if key not in left:
                raise ValueError(f"{key} is missing")
            if part.shape != left[key].shape or part.dtype != left[key].dtype:
                raise ValueError(f"{key} has shape {tuple(left[key].shape)}, and {tuple(part.shape)} is expected for {scheme}")
            part.copy_(left.pop(key))
    for key in set(left) & set(model.state_dict()):
        if left[key].dtype != dtype and not key.endswith(KEPT):  # gains keep theirs
            raise ValueError(f"{key} is of {left[key].dtype}, and {dtype} is expected")
    missing, unexpected = model.load_state_dict(left, strict=False, assign=True)
    packed_places = places(model)
    missing = [key for key in missing if key not in packed_places]
    if missing or unexpected:
        raise ValueError(f"missing {', '.join(missing) or 'nothing'}; unexpected {', '.join(unexpected) or 'nothing'}")
    model.requires_grad_(False)
