"""Less memory for the same step: blocks recomputed in the backward pass, activations kept in the machine's memory, float8.

None of it changes what is computed, but for float8, whose matrix products are rounded.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mdm.config import UserError
from mdm.hardware import multiplies_float8

CHECKPOINTING = ("full", "selective")
FLOAT8 = ("tensorwise", "rowwise")


def check_memory(checkpointing: str | None, offloading: bool, float8: str | None, device: str) -> None:
    """Raises UserError for an unknown setting, or one that the device cannot run."""
    if checkpointing not in (None, *CHECKPOINTING):
        raise UserError(f"activation_checkpointing: {checkpointing!r} is not one of null, {', '.join(CHECKPOINTING)}")
    if float8 not in (None, *FLOAT8):
        raise UserError(f"float8: {float8!r} is not one of null, {', '.join(FLOAT8)}")
    cuda = device != "cpu" and torch.cuda.is_available()
    if offloading and not cuda:
        raise UserError("activation_offloading: true moves activations from a GPU to the machine's memory; there is no GPU")
    if float8 and not multiplies_float8(torch.device("cuda" if cuda else "cpu")):
        raise UserError(f"float8: {float8} needs a GPU of compute capability 8.9 or later; set float8=null")


def checkpoint_blocks(blocks: nn.ModuleList, mode: str | None) -> None:
    """Computes blocks again in the backward pass, in place: all of each ("full"), or what is no product ("selective").

    full: least memory, a third more time. selective: products and attention are kept, norms, rotations and SwiGLU's gate are
    computed again, which costs little.
    """
    context: dict[str, Any] = {}
    if mode == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    for i, block in enumerate(blocks):
        if mode is not None:
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False, **context)


_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
)


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def offloaded(enabled: bool) -> contextlib.AbstractContextManager:
    """Around a forward pass: its activations wait in the machine's memory for the backward pass (torchtune's)."""
    if not enabled:
        return contextlib.nullcontext()
    from torchtune.training import OffloadActivations

    return OffloadActivations()


def to_float8(blocks: nn.ModuleList, recipe: str | None, emulate: bool = False) -> None:
    """Replaces the blocks' linear layers by torchao's float8 ones, in place: weights stay in float32, products are float8.

    recipe:  "tensorwise" (a scale for each tensor: fastest) or "rowwise" (for each row: closer to bfloat16); None leaves them
    emulate: compute the same without float8 hardware, slowly: for tests
    """
    if recipe is None:
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=_divisible)


def _divisible(module: nn.Module, name: str) -> bool:
    """float8 products come in tiles of 16; other layers stay as they are."""
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0
