"""Whether the settings of a generation go together, said before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.samplers import Blocks, Sampler
from components.samplers.any_noise.start import along
from components.samplers.guidance import Scale
from components.weightings import Noise
from mdm.generation.any_order import check_two_streams
from mdm.generation.canvas import CACHES
from mdm.models.transformer import ModelConfig


def check_settings(
    task: str,
    prompts: Sequence[Any],
    batch_size: int,
    cache: str,
    sampler: Sampler | None,
    scale: Scale | None,
    model: ModelConfig,
) -> str:
    """The cache that is meant. Raises ValueError for settings that make no sense, or do not go together."""
    if not prompts:
        raise ValueError(f"{task}: there is no prompt; a task that is given nothing takes one {{}} for each sample")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if cache not in ("auto", "exact", *CACHES):
        raise ValueError(f"cache {cache!r} is not one of auto, exact, {', '.join(CACHES)}")
    if not model.learned_orders and any(getattr(part, "reads_rates", False) for part in along(sampler, None)):
        raise ValueError(
            "LearnedRates asks when a position's turn is, and this model did not learn that: it is for one trained with "
            "model.orders=learned or learned_by_token"
        )
    if model.blocks:
        check_causal([sampler], model)
        return check_blocks(cache, scale)
    if getattr(sampler, "causal", False):
        own = "this one is of two streams: take InOrder" if model.two_streams else "this one sees the whole row"
        raise ValueError(f"{type(sampler).__name__} is for a model of blocks, and {own}")
    if model.two_streams:
        return check_two_streams(sampler, cache)
    if cache not in ("auto", "off") and model.learned_orders:
        raise ValueError(
            f"cache {cache!r} keeps what lies outside a block, and a model of learned orders says of the whole row when a "
            "position's turn is; set cache=off"
        )
    if cache == "exact":
        raise ValueError(
            "cache 'exact' is for a model of blocks or of two streams; this one sees the whole row, where every token changes "
            "what the others offer: set cache=off, or prefix or dual (approximate)"
        )
    cache = "off" if cache == "auto" else cache
    if cache != "off" and model.causal:
        raise ValueError(
            f"cache {cache!r} is for a model that sees the whole row, and an autoregressive one sees what lies before alone; "
            "set cache=off"
        )
    if cache != "off" and not isinstance(sampler, Blocks):
        raise ValueError(f"cache {cache!r} keeps what lies outside a block: the sampler has to be Blocks")
    if cache != "off" and isinstance(sampler, Blocks) and getattr(sampler.sampler, "goes_on", False):
        raise ValueError(
            f"cache {cache!r} tells a row's block by its first mask, and {type(sampler.sampler).__name__} may go on in a block "
            "without any; set cache=off"
        )
    return cache


def check_noise(generated: Sequence[str], noise: Mapping[str, Noise], cache: str, guidance_scale: Scale) -> None:
    """Raises ValueError for settings that count masks, where noise of other kinds leaves none or changes tokens again."""
    other = next((m for m in generated if m in noise), None)
    if other is None:
        return
    if cache not in ("off", "exact"):  # what is finished in a model of blocks changes no more
        raise ValueError(
            f"cache {cache!r} keeps what lies outside a block, and the model's {other}, trained with {noise[other].kernel}, "
            "may change there again; set cache=off"
        )
    if callable(guidance_scale):
        raise ValueError(
            f"guidance_scale changes with the share of masked tokens, and the model's {other} was trained with "
            f"{noise[other].kernel}, whose tokens are not told by it; give a number"
        )


def edits_unlearned(generated: Sequence[str], sampler: Sampler, model: ModelConfig) -> str | None:
    """What to say of a sampler that edits tokens of a model that saw masks alone, on one line; None where all is well."""
    if model.blocks_from_start and model.router == "sigmoid":
        return None  # LLaDA2: 2.1 was trained to edit, and its config does not tell it from 2.0
    for modality in generated:
        edits = any(getattr(part, "edit_threshold", 1) < 1 for part in along(sampler, None))
        if edits and modality not in model.noise:
            return (
                f"the model was trained to fill in masks of {modality}, never to replace a token that is wrong: what the "
                "sampler edits is a guess (edit_threshold=1 edits nothing; config quickstart_blocks_editing trains for it)"
            )
    return None


def check_causal(samplers: Sequence[Any], model: ModelConfig) -> None:
    """Raises ValueError for samplers that ask a model of blocks for the next token, where it never learned it."""
    asking = next((own for own in samplers if getattr(own, "causal", False)), None)
    if asking is not None and not model.causal:
        raise ValueError(
            f"{type(asking).__name__} asks the finished tokens for the next one, and this model did not learn that: it is for "
            "blocks trained with model.causal=true and loss.next_token"
        )


def check_blocks(cache: str, scale: Scale | None) -> str:
    """The cache that is meant, of a model of blocks. Raises ValueError for settings that it has no use for."""
    if cache in ("prefix", "dual"):
        raise ValueError(f"cache {cache!r} approximates what a model of blocks has exactly; set cache=exact, or off")
    if callable(scale):
        raise ValueError("guidance_scale changes with the share of masked tokens, which in blocks rises again; give a number")
    return "exact" if cache == "auto" else cache
