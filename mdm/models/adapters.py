"""LoRA (2106.09685) and QLoRA (2305.14314) on our model: torchtune's `LoRALinear` in the place of its linear layers.

W x  ->  W x + (alpha / rank) B A x,    A and B trained, W as it is (QLoRA: kept in 4-bit NormalFloat)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torchtune.modules.peft import LoRALinear, get_merged_lora_ckpt

from components.blocks import NormedProjection
from mdm.config import UserError
from mdm.hardware import whole

BLOCK = 64  # weights that share a scale in NF4


@dataclass
class LoraSettings:
    """rank, alpha: see above. modules: which linear layers of a block. train: what is trained whole, by a part of its name"""

    rank: int = 8
    alpha: float = 16.0
    modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"])
    train: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Raises UserError."""
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(f"lora: rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")
        if not self.modules:
            raise UserError("lora.modules: name at least one, e.g. q_proj")


class NormedLoRA(LoRALinear):
    """LoRA in the place of a `NormedProjection`: its heads are normalised as before."""

    def __init__(self, projection: NormedProjection, settings: LoraSettings) -> None:
        bias = projection.bias is not None
        super().__init__(projection.in_features, projection.out_features, settings.rank, settings.alpha, use_bias=bias)
        self.heads, self.norm = projection.heads, projection.norm

    normed = NormedProjection.normed

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq out"]:
        return self.normed(super().forward(x))


def add_lora(
    model: nn.Module,
    settings: LoraSettings,
    quantize_base: bool = False,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> None:
    """Replaces the linear layers that `settings.modules` names, in place; all else is frozen, but for `settings.train`.

    quantize_base: QLoRA; the frozen weights of these layers are kept in NF4
    dtype:         of what is frozen, and what NF4 stands for: float32, or bfloat16 where the run multiplies that (autocast)

    Raises UserError for a name that no linear layer has, or parameters that none has.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")}
    unknown = set(settings.modules) - {name.rsplit(".", 1)[-1] for name in found}
    if unknown:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in found}))
        raise UserError(f"lora.modules: {', '.join(sorted(unknown))}: not among the model's linear layers {known}")
    model.requires_grad_(False)
    for name, linear in found.items():
        if name.rsplit(".", 1)[-1] in settings.modules:
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, name.rsplit(".", 1)[-1], _lora(linear, settings, quantize_base, dtype, generator))
    for part in settings.train:
        own = [p for name, p in model.named_parameters() if part in name]
        if not own:
            raise UserError(f"lora.train: no parameter has {part!r} in its name")
        for p in own:
            p.requires_grad_(True)
    for p in model.parameters():
        if not is_nf4(p):
            p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def is_nf4(value: Shaped[Tensor, "*shape"]) -> bool:
    return hasattr(value, "get_original_weight")


def _lora(
    linear: nn.Linear, settings: LoraSettings, quantize_base: bool, dtype: torch.dtype, generator: torch.Generator | None
) -> LoRALinear:
    weight, bias = linear.weight.detach().to(dtype), linear.bias
    if isinstance(linear, NormedProjection):
        layer = NormedLoRA(linear, settings)
    elif type(linear) is nn.Linear:
        layer = LoRALinear(
            linear.in_features, linear.out_features, settings.rank, settings.alpha, use_bias=bias is not None
        )  # quantized below: what it makes itself is thrown away
    else:  # its forward pass would be lost
        raise UserError(f"method: no LoRA is known for a layer of {type(linear).__name__}")
    if quantize_base:
        from torchao.dtypes.nf4tensor import to_nf4

        if weight.numel() % BLOCK:
            raise UserError(f"method: qlora needs weights in blocks of {BLOCK}, and one has the shape {tuple(weight.shape)}")
        scales = math.gcd(weight.numel() // BLOCK, 256)
        layer.weight = nn.Parameter(to_nf4(weight, block_size=BLOCK, scaler_block_size=scales), requires_grad=False)
        layer._quantize_base = True
    else:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    with torch.no_grad():
        layer.lora_a.weight.uniform_(-1, 1, generator=generator).mul_(weight.shape[1] ** -0.5)
        layer.lora_b.weight.zero_()
    return layer


def merged(model: nn.Module, settings: LoraSettings) -> dict[str, Tensor]:
    """The state dict of an ordinary model that computes the same: W + (alpha / rank) B A in the place of the three.

    In float32, whatever W is kept in. Of a sharded model all ranks take part.
    """
    state = {}
    for name, value in model.state_dict().items():
        plain = value.get_original_weight() if is_nf4(value) else whole(value)
        state[name] = plain.detach().cpu().float().clone()
    return get_merged_lora_ckpt(state, settings.rank, settings.alpha)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, alone. Of a sharded model all ranks take part."""
    return {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def num_bytes(parameters: Sequence[Tensor]) -> int:
    """Memory of parameters as they are kept (NF4: half a byte a weight, and its scales)."""
    total = 0
    for p in parameters:
        value: Any = p.data
        if hasattr(value, "quantized_data"):
            parts = (value.quantized_data, value.quantized_scalers, value.quantization_factor, value.nf4)
            total += sum(part.numel() * part.element_size() for part in parts)
        else:
            total += value.numel() * value.element_size()
    return total
