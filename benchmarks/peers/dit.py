"""Diffusion transformers that MDLM and UniDisc train: their model with their NELBO, logits everywhere, beside ours."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks.peers.checkouts import Suite, dtype_on, importing, script
from benchmarks.train import build, masked_only, random_batch, ways
from components.vocabulary import Vocabulary
from mdm.hardware import Hardware


def mdlm_training(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """MDLM's model with its NELBO beside ours; on a GPU in bf16."""
    stand_in = {} if importlib.util.find_spec("flash_attn") else flash_attn_by_pytorch()
    sys.modules.update(stand_in)
    try:
        dit = script(folder / "mdlm" / "models" / "dit.py")
    finally:
        for name in stand_in:  # others look for flash-attn too, and would call what is not there
            del sys.modules[name]

    def build_theirs(vocabulary: Vocabulary) -> tuple[Any, Callable[[Tensor], Tensor]]:
        shape = p["dit"]
        config = {"hidden_size": shape["width"], "cond_dim": 128, "n_blocks": shape["num_layers"],
                  "n_heads": shape["width"] // 64, "length": p["length"], "scale_by_sigma": True, "dropout": 0.1,
                  "tie_word_embeddings": False}  # fmt: skip
        model = dit.DIT({"model": config}, vocabulary.size).to(device)
        return model, lambda noisy: model(noisy, torch.ones(p["rows"], device=device))

    return beside(p, device, "MDLM's model", build_theirs)


def unidisc_training(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """UniDisc's model (no time input, PyTorch's attention) with the NELBO beside ours."""
    with importing(folder / "unidisc"):
        os.environ.setdefault("UNIDISC_FORCE_DISABLE_FA3", "1")
        dit = importlib.import_module("models.dit")

    def build_theirs(vocabulary: Vocabulary) -> tuple[Any, Callable[[Tensor], Tensor]]:
        shape = p["dit"]
        config = {
            "time_conditioning": False, "parameterization": "subs",
            "model": {"hidden_size": shape["width"], "cond_dim": 128, "n_blocks": shape["num_layers"],
                      "n_heads": shape["width"] // 64, "length": p["length"], "txt_length": p["length"], "img_length": 0,
                      "scale_by_sigma": True, "dropout": 0.1, "full_attention": True, "use_spda_attn": True,
                      "attn_type": "flash", "force_varlen_attn": False, "norm_type": "layernorm", "qk_norm": False,
                      "zero_linear_init": True, "modality_embed": False, "rope_2d": False,
                      "force_optimized_native_attn": False},
            "trainer": {"image_mode": "discrete", "multimodal_batches": False, "compile_flag_pos_emb": True},
            "data": {"require_sample_ids": False},
        }  # fmt: skip
        dtype = dtype_on(device)
        model = dit.DIT(config, vocabulary.size, shape["vocab"], vocabulary.mask_id, dtype=dtype).to(device)
        return model, model

    return beside(p, device, "UniDisc's model", build_theirs)


def beside(
    p: dict[str, Any],
    device: torch.device,
    name: str,
    build_theirs: Callable[[Vocabulary], tuple[Any, Callable[[Tensor], Tensor]]],
) -> Suite:
    """Forward and backward of a model with logits everywhere and the NELBO, and of ours: the same rows and masks."""
    vocabulary = Vocabulary.build({"text": (p["dit"]["vocab"],)}, ["text"], tasks=("text",))
    micro, _ = random_batch(vocabulary, p["rows"], p["length"], device)
    theirs, logits_fn = build_theirs(vocabulary)
    noisy, weight = micro.noisy, micro.noisy.weight

    def their_step() -> None:
        theirs.zero_grad()
        logits = logits_fn(noisy.noisy).float()
        logits[:, :, vocabulary.mask_id] = -1e6
        ce = cross_entropy(logits.transpose(1, 2), noisy.clean.tokens, reduction="none")
        (weight * noisy.mask * ce).mean().backward()

    hw = Hardware(device, 0, 1, device.type == "cuda")
    models = ways(build(vocabulary, {**p["dit"], "length": p["length"]}, device), device)
    variants = {name: their_step}
    variants |= {f"ours, {how}": masked_only(model, micro, vocabulary, hw) for how, model in models.items()}
    return variants, float(p["rows"] * p["length"]), dict


def flash_attn_by_pytorch() -> dict[str, ModuleType]:
    """The two functions of flash-attn that MDLM calls, for a machine that has none."""
    names = ("flash_attn", "flash_attn.layers", "flash_attn.layers.rotary", "flash_attn.flash_attn_interface")
    modules = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, own = name.rpartition(".")
        setattr(modules[parent], own, modules[name])
    vars(modules["flash_attn.layers.rotary"])["apply_rotary_emb_qkv_"] = rotate
    vars(modules["flash_attn.flash_attn_interface"])["flash_attn_varlen_qkvpacked_func"] = attend
    return modules


def rotate(
    qkv: Float[Tensor, "batch seq 3 heads channels"], cos: Float[Tensor, "seq half"], sin: Float[Tensor, "seq half"]
) -> Float[Tensor, "batch seq 3 heads channels"]:
    """Rotary positions of queries and keys: channel i turns with channel i + half."""
    first, second = qkv[:, :, :2].chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned, qkv[:, :, 2:]], dim=2)


def attend(
    qkv: Float[Tensor, "positions 3 heads channels"],
    boundaries: Int[Tensor, " rows_and_1"],
    length: int,
    dropout: float,
    causal: bool,
) -> Float[Tensor, "positions heads channels"]:
    """Attention within rows of one length, packed behind each other."""
    q, k, v = qkv.unflatten(0, (-1, length)).permute(2, 0, 3, 1, 4)
    return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal).transpose(1, 2).flatten(0, 1)
