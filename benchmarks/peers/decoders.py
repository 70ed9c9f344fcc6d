"""Others' cached decoders on one set of weights: Fast-dLLM's of whole rows, dLLM's of blocks, greedy, so many tokens a pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mdm.data.processor import Processor
from mdm.models.open_formats import FORMATS
from mdm.models.transformer import MaskedDiffusionModel

from . import llada
from .checkouts import bare_package, dtype_on, importing

Calls = dict[str, Callable[[], object]]


def of(
    p: Mapping[str, Any], ids: Int[Tensor, " prompt"], folder: Path, device: torch.device, made: dict[str, Tensor]
) -> tuple[MaskedDiffusionModel | None, Processor | None, Calls, list[str]]:
    """Our model with LLaDA's weights and its processor, what decodes with theirs, and what could not be had.

    made: where each call leaves the tokens that it generated
    """
    shape = {"d_model": p["width"], "n_heads": p["width"] // 64, "n_layers": p["num_layers"],
             "mlp_hidden_size": p["ffn_width"], "vocab_size": p["vocab"]}  # fmt: skip
    try:
        configuration, modelling, cached = llada.fast_dllm(folder)
        theirs, config = llada.random_weights(configuration, modelling, shape, p["prompt"] + p["new"] + 8, device)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        return None, None, {}, [f"Fast-dLLM, dLLM: {error}"]
    theirs.eval()
    models, processor = llada.ours(theirs, config, device, compiling=False)
    prompt, mask_id = ids[None].to(device), config.mask_token_id
    blocks = p["new"] // p["block"]
    settings = {"steps": p["steps"] * blocks, "gen_length": p["new"], "block_length": p["block"], "mask_id": mask_id}

    def whole_row(name: str, function: Any) -> Callable[[], object]:
        def call() -> None:
            made[name] = function(theirs, prompt, temperature=0.0, **settings)[0][0, p["prompt"] :].cpu()

        return call

    calls: Calls = {
        name: whole_row(name, function)
        for name, function in (
            ("Fast-dLLM, prefix cache", cached.generate_with_prefix_cache),
            ("Fast-dLLM, dual cache", cached.generate_with_dual_cache),
        )
    }
    unmeasured: list[str] = []
    try:
        calls["dLLM, blocks"] = in_blocks(p, prompt, theirs, folder, mask_id, made)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        unmeasured.append(f"dLLM: {error}")
    return models["eager"], processor, calls, unmeasured


def in_blocks(
    p: Mapping[str, Any], prompt: Tensor, theirs: Any, folder: Path, mask_id: int, made: dict[str, Tensor]
) -> Callable[[], object]:
    """dLLM's `BD3LMSampler` on its Llama that sees both ways, which LLaDA's weights fit: only the names differ."""
    root = folder / "dllm"
    with importing(root):
        for name in ("dllm", "dllm.core", "dllm.core.samplers", "dllm.pipelines", "dllm.pipelines.a2d"):
            # their own __init__ want trl and more
            bare_package(name, root.joinpath(*name.split(".")))
        modelling = importlib.import_module("dllm.pipelines.a2d.models.llama.modeling_llama")
        decoding = importlib.import_module("dllm.core.samplers.bd3lm")
    config = modelling.A2DLlamaConfig(
        vocab_size=p["vocab"], hidden_size=p["width"], intermediate_size=p["ffn_width"], num_hidden_layers=p["num_layers"],
        num_attention_heads=p["width"] // 64, num_key_value_heads=p["width"] // 64, rope_theta=theirs.config.rope_theta,
        rms_norm_eps=theirs.config.rms_norm_eps, max_position_embeddings=p["prompt"] + p["new"] + 8,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = modelling.A2DLlamaLMHeadModel(config).to(prompt.device, dtype_on(prompt.device)).eval()
    names, have = FORMATS["llama"].names, theirs.state_dict()
    model.load_state_dict(
        {
            names[ours].format(i=i): have[own.format(i=i)]
            for ours, own in FORMATS["llada"].names.items()
            for i in range(p["num_layers"])
        }
    )
    words = SimpleNamespace(mask_token_id=mask_id, pad_token_id=-1, bos_token_id=None, eos_token_id=None)
    sampler = decoding.BD3LMSampler(model=model, tokenizer=words)

    def call() -> None:
        out = sampler.sample(
            [prompt[0]], max_new_tokens=p["new"], block_size=p["block"], steps_per_block=p["steps"], temperature=0.0
        )
        made["dLLM, blocks"] = out[0, -p["new"] :].cpu()

    return call
