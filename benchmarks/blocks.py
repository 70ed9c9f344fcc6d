"""Decoding a text of 512 tokens: what block diffusion gains by its exact cache, beside caches that approximate and peers.

One set of random weights of LLaDA's architecture, greedy, so many tokens a pass. Seen as a model of blocks (causal between
them) and as one that sees whole rows: their tokens differ, and what is compared inside each is the share of tokens that a cache
leaves as they are without it. With --checkouts, from the same weights: Fast-dLLM's caches of whole rows, dLLM's block decoder.

Then a text of eight times the model's length: the time of a block against what is finished before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.samplers import Blocks, Confidence
from components.tokenizers.text import TextTokenizer
from mdm.data.processor import Processor
from mdm.generation.editing import Edit
from mdm.generation.generate import generate
from mdm.models import builders
from mdm.models.transformer import MaskedDiffusionModel

from .measure import Result, interleaved, rows

Made = dict[str, Tensor]


def run(preset: str, p: Mapping[str, Any], checkouts: str | None) -> Result:
    """Rows and figures of a preset."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made: Made = {}
    variants: dict[str, Callable[[], object]] = {}
    unmeasured: list[str] = []
    ids = torch.randint(0, p["vocab"] - 3, (p["prompt"],), generator=torch.Generator().manual_seed(0))
    whole, processor = None, None
    if checkouts is None:
        unmeasured.append("Fast-dLLM, dLLM: no --checkouts")
    else:
        from .peers import decoders

        whole, processor, theirs, unmeasured = decoders.of(p, ids, Path(checkouts), device, made)
        variants |= theirs
    if whole is None or processor is None:
        whole, processor = plain(p, device)
    blocks = in_blocks(whole, p["block"])
    for name, model, caches in (("whole row", whole, ("off", "prefix", "dual")), ("blocks", blocks, ("off", "exact"))):
        for cache in caches:
            variants[f"{name}, cache {cache}"] = call(f"{name}, cache {cache}", model, processor, ids, p, cache, made)
    timings = interleaved(variants, p["warmup"], p["repeats"])
    more = {name: {"same": same(made, name)} for name in variants}
    figures: dict[str, Any] = {f"same_tokens: {name}": own["same"] for name, own in more.items()}
    ours = timings["blocks, cache exact"].median
    figures["exact_over_off"] = timings["blocks, cache off"].median / ours
    figures["exact_over_dual"] = timings["whole row, cache dual"].median / ours
    peers = [t.median for name, t in timings.items() if "dLLM" in name]
    if peers:
        figures["exact_over_fastest_peer"] = min(peers) / ours
    figures |= slope(processor, p, device)
    return Result("sample", preset, "new tokens/s", dict(p), rows(timings, p["new"], more), figures, unmeasured)


def same(made: Made, name: str) -> float:
    """The share of tokens that are those of our own decoding without a cache, of the same kind of model."""
    kind = "blocks" if name.startswith(("blocks", "dLLM")) else "whole row"
    return float((made[name] == made[f"{kind}, cache off"]).double().mean())


def in_blocks(model: MaskedDiffusionModel, size: int) -> MaskedDiffusionModel:
    """The same weights, as a model of blocks counted from the start."""
    config = replace(model.config, blocks={"text": size}, blocks_from_start=True)
    with torch.device("meta"):
        own = MaskedDiffusionModel(config)
    own.load_state_dict(model.state_dict(), assign=True)
    own.restore_buffers()
    return own.eval()


def plain(p: Mapping[str, Any], device: torch.device) -> tuple[MaskedDiffusionModel, Processor]:
    """A model of ours of that shape."""
    processor = Processor.build({"text": TextTokenizer.train(["the text of a prompt"], vocab_size=300)}, {})
    size, length = max(p["vocab"], processor.vocabulary.size), p["prompt"] + p["new"] + 8
    model = builders.model(size, length, p["width"], p["num_layers"], p["width"] // 64)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(device).eval(), processor


def call(
    name: str, model: MaskedDiffusionModel, processor: Processor, ids: Tensor, p: Mapping[str, Any], cache: str, made: Made
) -> Callable[[], None]:
    """Our decoding of the text behind a prompt."""
    ids = ids.clamp(max=processor.vocabulary.ranges[0].size - 1)
    tokens = torch.cat([ids, torch.zeros(p["new"], dtype=torch.long)])
    edit = {"text": Edit(tokens, torch.arange(len(tokens)) >= p["prompt"])}
    sampler = Blocks(Confidence(num_steps=p["steps"], temperature=0.0), p["block"])

    def run_once() -> None:
        out = generate(model, processor, "text", [edit], sampler, 0.0, cache=cache, stop_at_end=False)
        made[name] = out.tokens[0][out.batch.maskable[0]][-p["new"] :].cpu()

    return run_once


def slope(processor: Processor, p: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of a block against the positions finished before it, in a text of eight times the model's length."""
    size = processor.vocabulary.size
    model = builders.model(size, p["trained"], p["width"], p["num_layers"], p["width"] // 64, blocks={"text": p["block"]})
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device).eval()
    sampler = Confidence(num_steps=p["steps"], temperature=0.0)
    seconds: list[list[float]] = []
    for _ in range(p["repeats"]):
        times = [time.perf_counter()]
        generate(
            model, processor, "text", [{}], sampler, 0.0, length=8 * p["trained"], stop_at_end=False,
            stream=lambda _, times=times: times.append(time.perf_counter()),
        )  # fmt: skip
        seconds.append(np.diff(times).tolist())
    per_block = np.array([statistics.median(own) for own in zip(*seconds, strict=True)])[1:] * 1e3  # the first has no cache
    context = p["block"] * (1 + np.arange(len(per_block)))
    per_position, at_none = np.polyfit(context, per_block, 1)
    left = per_block - (at_none + per_position * context)
    return {
        "block_ms": float(at_none),
        "block_ms_per_1000_positions": float(per_position * 1000),
        "block_r2_of_a_line": float(1 - left.var() / per_block.var()),
        "block_ms_first_eighth": float(np.median(per_block[: len(per_block) // 8])),
        "block_ms_last_eighth": float(np.median(per_block[-(len(per_block) // 8) :])),
    }
