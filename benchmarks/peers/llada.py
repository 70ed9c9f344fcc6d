"""LLaDA's architecture: its reference decoding and Fast-dLLM's caches, the loss of its guidelines and dLLM's trainer, and ours.

Weights are random, and the same in each: ours are loaded from a checkpoint of theirs.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, models

from components.maskers import BernoulliMasker, LowDiscrepancyTimes
from components.samplers import Blocks, Confidence
from components.sequences import collate
from components.types import Batch, NoisyBatch
from components.vocabulary import Vocabulary
from mdm.data.pipeline import MicroBatch, micro_batch
from mdm.data.processor import Processor
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import forward_loss
from mdm.generation.editing import Edit
from mdm.generation.generate import generate
from mdm.hardware import Hardware
from mdm.models.folder import load_model
from mdm.models.open_formats import find_format
from mdm.models.transformer import MaskedDiffusionModel

from ..train import ways
from .checkouts import Suite, bare_package, dtype_on, importing, script


def sampling(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """Greedy decoding of equal weights, one token a pass: LLaDA's loop and Fast-dLLM's caches, and ours."""
    configuration, modelling, cached = fast_dllm(folder)
    theirs, config = random_weights(configuration, modelling, p["sampled"], p["prompt"] + p["new"] + 8, device)
    reference = script(folder / "LLaDA" / "generate.py")
    mask_id = config.mask_token_id
    theirs.eval()
    models, processor = ours(theirs, config, device, sampling=True)
    ids = torch.randint(0, mask_id - 1, (p["prompt"],), generator=torch.Generator().manual_seed(0))
    prompt = ids[None].to(device)
    settings = {"steps": p["new"], "gen_length": p["new"], "block_length": p["block"], "temperature": 0.0, "mask_id": mask_id}
    variants: dict[str, Callable[[], object]] = {}
    made: dict[str, torch.Tensor] = {}

    def of_theirs(name: str, function: Any) -> None:
        def call() -> None:
            out = function(theirs, prompt, **settings)
            made[name] = (out[0] if isinstance(out, tuple) else out)[0, p["prompt"] :].cpu()

        variants[name] = call

    def of_ours(name: str, model: Any, cache: str) -> None:
        whole = torch.cat([ids, torch.full((p["new"],), mask_id)])
        edit = {"text": Edit(whole, torch.arange(len(whole)) >= p["prompt"])}
        sampler = Blocks(Confidence(num_steps=p["block"], temperature=0.0), p["block"])

        def call() -> None:
            out = generate(model, processor, "text", [edit], sampler, 0.0, cache=cache, stop_at_end=False)
            made[name] = out.tokens[0][out.batch.maskable[0]][-p["new"] :].cpu()

        variants[name] = call

    of_theirs("LLaDA's generate", reference.generate)
    of_theirs("Fast-dLLM, prefix cache", cached.generate_with_prefix_cache)
    of_theirs("Fast-dLLM, dual cache", cached.generate_with_dual_cache)
    for cache in ("off", "prefix", "dual"):
        for how, model in models.items():
            of_ours(f"ours, {how}, cache {cache}", model, cache)

    def agreement() -> dict[str, float]:
        """The share of equal tokens; compiled and recorded passes may round otherwise."""
        same = {"off": "LLaDA's generate", "prefix": "Fast-dLLM, prefix cache", "dual": "Fast-dLLM, dual cache"}
        return {
            f"same tokens: ours, {how}, cache {cache}, and {peer}": float(
                (made[f"ours, {how}, cache {cache}"] == made[peer]).double().mean()
            )
            for how in models
            for cache, peer in same.items()
        }

    return variants, float(p["new"]), agreement


def training(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """A step of LLaDA's model with the loss of its guidelines, and of ours."""
    configuration, modelling, _ = fast_dllm(folder)
    theirs, config = random_weights(configuration, modelling, p["trained"], p["length"], device)
    models, processor = ours(theirs, config, device)
    masker = BernoulliMasker(config.mask_token_id, times=LowDiscrepancyTimes(group=p["rows"]))
    micro = masked(text_rows(p, processor), masker, processor).to(device)
    noisy = micro.noisy

    def loss() -> torch.Tensor:
        logits = theirs(input_ids=noisy.noisy).logits
        ce = torch.nn.functional.cross_entropy(logits[noisy.mask], noisy.clean.tokens[noisy.mask], reduction="none")
        return (ce * noisy.weight[noisy.mask]).sum() / micro.denominator

    return steps("LLaDA's model and loss", theirs, loss, models, micro, processor.vocabulary, device)


def dllm_training(p: dict[str, Any], folder: Path, device: torch.device) -> Suite:
    """A step of dLLM's copy of LLaDA's model by its trainer's `compute_loss`, and of ours with the masks that it drew."""
    root = folder / "dllm"
    with importing(root):
        for name in ("dllm", "dllm.core", "dllm.pipelines", "dllm.utils"):  # their own __init__ want trl and more
            bare_package(name, root.joinpath(*name.split(".")))
        mdlm = importlib.import_module("dllm.core.trainers.mdlm")
        configuration = importlib.import_module("dllm.pipelines.llada.models.configuration_llada")
        modelling = importlib.import_module("dllm.pipelines.llada.models.modeling_llada")
    theirs, config = random_weights(configuration, modelling, p["trained"], p["length"], device)
    models, processor = ours(theirs, config, device)
    drawn: dict[str, torch.Tensor] = {}

    class Recording(mdlm.MDLMTrainer):
        def _compute_loss_weights(self, t: torch.Tensor, inputs: dict[str, Any], masked_mask: torch.Tensor) -> torch.Tensor:
            weight = super()._compute_loss_weights(t, inputs, masked_mask=masked_mask)
            drawn.update(mask=masked_mask, weight=weight * masked_mask)
            return weight

    tokenizer = SimpleNamespace(padding_side="right", mask_token_id=config.mask_token_id)
    with tempfile.TemporaryDirectory() as output:
        cpu = device.type == "cpu"
        settings = mdlm.MDLMConfig(output_dir=output, report_to="none", eval_strategy="no", use_cpu=cpu, bf16=not cpu)
        trainer = Recording(model=theirs, args=settings, processing_class=tokenizer)
    batch = text_rows(p, processor)
    ids = batch.tokens.to(device)

    def loss() -> torch.Tensor:
        torch.manual_seed(0)  # the same masks every time
        return trainer.compute_loss(theirs, {"input_ids": ids, "labels": ids})

    with torch.no_grad():
        loss()
    mask, weight = drawn["mask"].cpu(), drawn["weight"].cpu()
    noisy = NoisyBatch(batch, batch.tokens.masked_fill(mask, config.mask_token_id), mask, weight)
    micro = masked(batch, lambda _: noisy, processor).to(device)
    return steps("dLLM's MDLMTrainer", theirs, loss, models, micro, processor.vocabulary, device)


def steps(
    name: str,
    theirs: Any,
    loss: Callable[[], torch.Tensor],
    models: dict[str, MaskedDiffusionModel],
    micro: MicroBatch,
    vocabulary: Vocabulary,
    device: torch.device,
) -> Suite:
    """Forward and backward by a loss of theirs, and by ours.

    Theirs computes logits over all ids, the mask token's too; ours rules that out, and by its share the losses differ.
    """
    losses: dict[str, torch.Tensor] = {}
    hw = Hardware(device, 0, 1, False)

    def step(name: str, model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            value = loss()
            value.backward()
            losses[name] = value.detach()

        return call

    def our_loss(model: MaskedDiffusionModel) -> Callable[[], torch.Tensor]:
        return lambda: forward_loss(model, micro, vocabulary, hw).loss / micro.denominator

    variants = {name: step(name, theirs, loss)}
    variants |= {f"ours, {how}": step(f"ours, {how}", model, our_loss(model)) for how, model in models.items()}

    def agreement() -> dict[str, float]:
        return {f"loss: ours / {name}": float(losses["ours, eager"] / losses[name])}

    return variants, float(micro.num_tokens), agreement


def text_rows(p: dict[str, Any], processor: Processor) -> Batch:
    """Rows of random text."""
    ids = torch.randint(0, p["trained"]["vocab_size"] - 3, (p["rows"], p["length"]), generator=torch.Generator().manual_seed(0))
    indices = [[i] for i in range(p["rows"])]
    return collate([[processor.text_sequence(row)] for row in ids], indices, processor.vocabulary.pad_id)


def masked(batch: Batch, masker: Any, processor: Processor) -> MicroBatch:
    """The batch as a step of ours takes it; the loss is a mean over all of its tokens."""
    return micro_batch(batch, masker, LossSettings(reduction="token"), processor.vocabulary)


def fast_dllm(folder: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """Fast-dLLM's copy of LLaDA's configuration and modelling code, and its decoding."""
    fast = folder / "Fast-dLLM" / "llada"
    with importing(fast):
        configuration = importlib.import_module("model.configuration_llada")
        modelling = importlib.import_module("model.modeling_llada")
        return configuration, modelling, script(fast / "generate.py")


def random_weights(
    configuration: ModuleType, modelling: ModuleType, shape: dict[str, int], length: int, device: torch.device
) -> tuple[Any, Any]:
    """LLaDA's model with random weights, for sequences of a length at the most, and its config."""
    mask_id = shape["vocab_size"] - 2
    config = configuration.LLaDAConfig(
        **shape, n_kv_heads=shape["n_heads"], activation_type="silu", block_type="llama", rope=True,
        layer_norm_type="rms", max_sequence_length=length, rope_theta=500_000.0, embedding_size=shape["vocab_size"],
        weight_tying=False, include_bias=False, include_qkv_bias=False, mask_token_id=mask_id, eos_token_id=mask_id - 1,
        pad_token_id=mask_id - 1, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, alibi=False,
        rms_norm_eps=1e-5, scale_logits=False, init_device=str(device),
    )  # fmt: skip
    torch.manual_seed(0)
    inner = modelling.LLaDAModel(modelling.create_model_config_from_pretrained_config(config), init_params=True)
    theirs = modelling.LLaDAModelLM(config, inner).to(device, dtype_on(device))
    with torch.no_grad():
        theirs.model.transformer.ff_out.weight[mask_id] = 0  # ours never draws the mask token; so theirs will not either
    return theirs, config


def ours(
    theirs: Any, config: Any, device: torch.device, sampling: bool = False, compiling: bool = True
) -> tuple[dict[str, MaskedDiffusionModel], Processor]:
    """Our model with their weights, as a checkpoint of theirs loads, in each way that this machine can run it."""
    with tempfile.TemporaryDirectory() as folder:
        state = {k: v.detach().cpu().contiguous().clone() for k, v in theirs.state_dict().items()}
        safetensors.torch.save_file(state, Path(folder) / "model.safetensors")
        named = {"architectures": ["LLaDAModelLM"], "model_type": "llada"}
        form = find_format(named, folder)
        kept = {*form.keys.values(), *form.requires, *form.instead, "mask_token_id", "eos_token_id", "pad_token_id"}
        said = {key: value for key, value in config.to_dict().items() if key in kept}  # and none of transformers' own defaults
        (Path(folder) / "config.json").write_text(json.dumps({**said, **named}, default=str))
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size - 3)}, unk_token="w0"))
        words.save(str(Path(folder) / "tokenizer.json"))
        model, processor = load_model(folder, device)
    model.to(dtype_on(device))
    return ways(model, device, sampling) if compiling else {"eager": model}, processor
