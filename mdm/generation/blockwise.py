"""What block-by-block decoding sees of a model: the logits of each row's current block, over the ids that may stand there.

    cache exact   keys and values of finished blocks are kept: a pass computes the block, and once what has been finished before
    cache off     everything up to the block's end is computed in every pass

Both give the same logits to rounding: nothing that is finished sees what comes behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

from components.block_diffusion.cache import BlockCache
from components.block_diffusion.decoding import Task, sample_blocks
from components.block_diffusion.layout import WHOLE
from components.samplers import Blocks, PerModality, Sampler
from components.samplers.any_noise.start import along
from components.samplers.base import Sampled
from components.types import Batch
from components.visibility import FINISHED, NOISY, Places
from components.vocabulary import Vocabulary
from components.weightings import Noises
from mdm.data.corruption import layout_of
from mdm.generation.canvas import local_ids
from mdm.generation.checks import check_causal
from mdm.hardware import local
from mdm.models.transformer import MaskedDiffusionModel


class BlockwiseLogits:
    """The logits function of `sample_blocks`.

    block:   of each position, the same as the model was trained with
    ids:     the tokens that logits are of
    prompt, scale: classifier-free guidance: a second pass sees mask tokens where `prompt` is
    """

    def __init__(
        self,
        model: MaskedDiffusionModel,
        block: Int[Tensor, "rows seq"],
        ids: Int[Tensor, " ids"],
        cached: bool = True,
        prompt: Bool[Tensor, "rows seq"] | None = None,
        scale: float = 0.0,
    ) -> None:
        self.model, self.block, self.ids, self.scale = model, block, ids, scale
        self.prompt = prompt if scale else None
        self.cache: BlockCache | None = BlockCache(len(model.blocks)) if cached else None
        self.begin: list[int] = [0] * len(block)  # of each row, the first position that is in no cache
        self.unembedding: Callable[[], Tensor] = functools.cache(lambda: local(model.unembedding.weight)[ids])

    def __call__(
        self, tokens: Int[Tensor, "rows seq"], start: Sequence[int], stop: Sequence[int], width: int
    ) -> Float[Tensor, "rows width ids"]:
        """Logits of the positions from start to stop, and anything behind up to `width`."""
        device = tokens.device
        begin, first, last = (torch.tensor(v, device=device)[:, None] for v in (self.begin, start, stop))
        span = max(b - a for a, b in zip(self.begin, stop, strict=True))
        places = begin + torch.arange(span, device=device)
        copies = self.copies(tokens)
        seen = torch.cat([take(copy, places) for copy in copies])
        hidden = self._hidden(seen, places, first, last, max(stop), max(self.begin) + span, self._sees_all(start, stop))
        where = (first - begin + torch.arange(width, device=device)).clamp(max=span - 1).repeat(len(copies), 1)
        chosen = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = linear(chosen, self.unembedding()).float()
        if self.cache is not None:
            self.begin = list(start)
        return self.guided(logits)

    def copies(self, tokens: Int[Tensor, "rows seq"]) -> list[Int[Tensor, "rows seq"]]:
        """The rows, and under guidance the same without their prompt."""
        return [tokens] if self.prompt is None else [tokens, tokens.masked_fill(self.prompt, int(self.ids[-1]))]

    def guided(self, logits: Float[Tensor, "*copies width ids"]) -> Float[Tensor, "*rows width ids"]:
        """The logits of the copies as one."""
        if self.prompt is None:
            return logits
        conditional, unconditional = logits.chunk(2)
        return conditional + self.scale * (conditional - unconditional)

    def _sees_all(self, start: Sequence[int], stop: Sequence[int]) -> bool:
        """Whether this pass is of the same block alone in every row: it sees all that is kept, and no mask says so faster."""
        return self.cache is not None and self.begin == list(start) and len({*zip(start, stop, strict=True)}) == 1

    def _hidden(
        self, tokens: Tensor, places: Tensor, first: Tensor, last: Tensor, length: int, room: int, everything: bool
    ) -> Tensor:
        """Hidden states of the positions `places` of each row; those behind a row's `last` are anything, but numbers."""
        copies = len(tokens) // len(places)
        positions = places.clamp(max=self.block.shape[1] - 1).repeat(copies, 1)
        mask = None if everything else self._mask(places, first, last, length).repeat(copies, 1, 1)
        if self.cache is None:
            return self.model.hidden(tokens, mask, positions)
        same = len(set(self.begin)) == 1
        where = slice(self.begin[0], room) if same else places.repeat(copies, 1)
        with self.cache.attending(self.model.blocks, where, length, room):
            return self.model.hidden(tokens, mask, positions)

    def _mask(self, places: Tensor, first: Tensor, last: Tensor, length: int) -> Bool[Tensor, "rows some length"]:
        """Who sees whom."""
        keys = places if self.cache is None else torch.arange(length, device=places.device).expand(len(places), -1)
        mask = self.model.sees(self.known(places, places >= first), self.known(keys, keys >= first)) & (keys < last)[:, None]
        return mask | (places >= last)[..., None] & (keys == 0)[:, None]  # no softmax is over nothing

    def known(self, places: Int[Tensor, "rows some"], noisy: Bool[Tensor, "rows some"]) -> Places:
        """What the model's rule asks of positions."""
        block = take(pad(self.block, (0, 1), value=WHOLE), places)
        return Places(torch.zeros_like(places), places, block, torch.where(noisy, NOISY, FINISHED))

    def select(self, rows: Int[Tensor, " some"]) -> None:
        """Which of the rows go on."""
        if self.cache is not None:
            self.cache.select(rows if self.prompt is None else torch.cat([rows, rows + len(self.begin)]))
        self.block, self.begin = self.block[rows], [self.begin[i] for i in rows.tolist()]
        self.prompt = None if self.prompt is None else self.prompt[rows]


def take(values: Int[Tensor, "rows seq"], places: Int[Tensor, "rows some"]) -> Int[Tensor, "rows some"]:
    """The values at some positions; the last one's behind the end."""
    return values.gather(1, places.clamp(max=values.shape[1] - 1))


def block_samplers(
    sampler: Sampler, blocks: Mapping[str, int], modalities: Sequence[str], generated: Sequence[str]
) -> list[Sampler]:
    """What samples each modality's blocks: a sampler's own parts, or itself.

    Raises ValueError for `Blocks` of another length than the model's, of a modality that is generated.
    """
    each = sampler.samplers if isinstance(sampler, PerModality) else [sampler] * len(modalities)
    found = []
    for modality, own in zip(modalities, each, strict=False):
        if isinstance(own, Blocks):
            size = blocks.get(modality)
            if size != own.block_length and modality in generated:
                known = "generates it whole" if size is None else f"was trained in blocks of {size}"
                raise ValueError(f"Blocks: block_length {own.block_length}, but the model {known} ({modality})")
            own = own.sampler
        found.append(own)
    return found


def kind_of_logits(model: MaskedDiffusionModel, samplers: Sequence[Sampler]) -> type[BlockwiseLogits]:
    """What samplers are given logits by. Raises ValueError where they cannot go together, or the model cannot give them."""
    causal = [own for own in samplers if getattr(own, "causal", False)]
    for own in samplers:
        inner = [part for part in along(own, None) if part is not own and getattr(part, "causal", False)]
        if inner:
            raise ValueError(f"{type(inner[0]).__name__} cannot be inside {type(own).__name__}: its passes are others")
    if not causal:
        return BlockwiseLogits
    name = type(causal[0]).__name__
    if len(causal) < len(samplers):
        raise ValueError(f"{name} is for all that is generated, or nothing: its passes are others")
    check_causal(causal, model.config)
    from mdm.generation.drafts import CausalLogits, DraftLogits

    return DraftLogits if any(getattr(own, "drafts", False) for own in causal) else CausalLogits


def sample_in_blocks(
    model: MaskedDiffusionModel,
    vocabulary: Vocabulary,
    batch: Batch,
    prompt: Bool[Tensor, "rows seq"],
    generate: Bool[Tensor, "rows seq"],
    may_end: Bool[Tensor, "rows seq"],
    samplers: Sequence[Sampler],
    scale: float = 0.0,
    cached: bool = True,
    forbid: Sequence[int] = (),
    stop_at_end: bool = True,
    **options: Any,
) -> Sampled:
    """Fills the positions `generate` of a batch (on the CPU) with a model of blocks, see `sample_blocks`.

    may_end: where an end token may stand;  forbid: global ids that may not be generated;  options: of `sample_blocks`

    Raises ValueError for a modality without a sampler, and as `kind_of_logits` and `sample_blocks` do.
    """
    device = model.embedding.weight.device
    layout = layout_of(model.config, vocabulary)
    assert layout is not None
    ranges = len(vocabulary.ranges)
    table = vocabulary.allowed(torch.arange(ranges)).repeat(2, 1)  # the second time without an end token
    table[ranges:, vocabulary.end_id] = False
    table[:, list(forbid)] = False
    kinds = batch.id_range.clamp(min=0) + torch.where(may_end, 0, ranges)
    ids = local_ids(table[kinds[generate].unique()], vocabulary.mask_id)
    end = (ids == vocabulary.end_id).nonzero()[:, 0].tolist() if stop_at_end else []
    block = layout(batch)
    task = Task(batch.tokens, generate, block, batch.modality.clamp(min=0), kinds, table[:, ids], ids, end[0] if end else None)
    made = batch.modality[generate].unique().tolist()
    if max(made, default=0) >= len(samplers):
        raise ValueError(f"PerModality: {len(samplers)} samplers, and positions of modality {max(made)} to generate")
    used = [samplers[m] for m in made]
    kind = kind_of_logits(model, used)
    logits_fn = kind(model, block.to(device), ids.to(device), cached, prompt.to(device), scale)
    model.reach(batch.tokens.shape[1])
    return sample_blocks(
        samplers, logits_fn, task.to(device), noise=Noises.of(model.config.noise, vocabulary.modalities), **options
    )
