"""What is measured of models that generate in different orders: samples by decoder, likelihoods, and what training costs."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.learned_orders import expected_rank
from components.likelihood import ordered
from components.losses import bits_per_token
from components.maskers import NextToken
from components.orders import Permuted, Sequential, Strided
from components.samplers import Ancestral, Confidence, FirstHitting, InOrder, LearnedRates, Sampler
from components.tasks import find_task
from components.tokenizers.modality import Drawn, fixed_length
from components.types import Batch
from components.vocabulary import Vocabulary
from mdm.data.pipeline import MicroBatch, micro_batch, open_source
from mdm.data.processor import Processor
from mdm.data.settings import LossSettings
from mdm.data.validation import validation_batches
from mdm.evaluation.nelbo import forward_loss
from mdm.evaluation.order_likelihood import ordered_nats
from mdm.evaluation.order_loss import forward_exponents
from mdm.hardware import Hardware, hardware
from mdm.models.folder import load_model
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.studies.measures import Finished, Scored, training_steps
from mdm.training.meter import work


@dataclass(frozen=True)
class Orders(Scored):
    """Quality, passes and time of the orders that a model can generate in: MODALITY/FIGURE/DECODER, e.g. image/seconds/strided.

    An autoregressive model has one, from left to right. The others: a token a pass in a random order and from left to right,
    strided in so many streams, and in so many steps the surest first and ancestrally; where an order was learned, in that.

    streams: of `components.orders.Strided`: they have to divide the canvas
    """

    streams: int = 4
    steps: int = 8

    def __call__(self, run: Finished) -> dict[str, float]:
        with hardware(run.settings.device, run.settings.precision) as hw:
            model, processor = load_model(run.folder, hw.device)
            return self.decoded(run, model, processor, self.decoders(model.config), hw)

    def decoders(self, model: ModelConfig) -> dict[str, Sampler]:
        """The decoders of a model (its config), by name; the first ones draw from its own joint, a token a pass."""
        left: dict[str, Sampler] = {"left to right": InOrder(order=Sequential())}
        if model.causal:
            return left
        found: dict[str, Sampler] = {
            "random order": InOrder(order=Permuted()) if model.two_streams else FirstHitting(),
            **left,
            "strided": InOrder(order=Strided(self.streams)),
            f"confidence {self.steps}": Confidence(num_steps=self.steps),
            f"ancestral {self.steps}": Ancestral(num_steps=self.steps),
        }
        learned = {"learned order": LearnedRates(), f"learned order {self.steps}": LearnedRates(num_steps=self.steps)}
        return {**found, **(learned if model.learned_orders else {})}


@dataclass(frozen=True)
class Likelihoods:
    """left_to_right/TASK: bits per token from left to right, exactly, of the same held-out rows for every model.

    Of two streams beside it, what their one pass is worth: one_pass/TASK/passes and one_pass/TASK/seconds, the forward passes
    and the time that the *first* group's model takes for the same rows, over theirs.

    samples: rows of each task;  timed: of them, for the times
    """

    samples: int = 64
    timed: int = 32

    def __call__(self, run: Finished) -> dict[str, float]:
        cfg, found = run.settings, {}
        with hardware(cfg.device, cfg.precision) as hw:
            model, processor = load_model(run.folder, hw.device)
            vocabulary = processor.vocabulary
            sources = {name: open_source(s.validation, f"data.{name}.validation") for name, s in cfg.data.items()}
            plan = validation_batches(cfg.data, sources, processor, self.samples, self.samples)
            for task, batches in plan.items():
                nats = sum(self._nats(model, micro.noisy.clean, vocabulary, hw)[0].sum().item() for micro, _ in batches)
                found[f"left_to_right/{task}"] = bits_per_token(nats, sum(tokens for _, tokens in batches))
            if model.config.two_streams:
                first, _ = load_model(run.first, hw.device)
                for task, batches in plan.items():
                    rows = batches[0][0].noisy.clean.select(slice(self.timed))
                    one, many = (self._timed(m, rows, vocabulary, hw) for m in (model, first))
                    found |= {f"one_pass/{task}/passes": many[1] / one[1], f"one_pass/{task}/seconds": many[0] / one[0]}
        return found

    def _timed(self, model: MaskedDiffusionModel, batch: Batch, vocabulary: Vocabulary, hw: Hardware) -> tuple[float, int]:
        self._nats(model, batch.select(slice(2)), vocabulary, hw)  # warms up
        began = time.perf_counter()
        passes = self._nats(model, batch, vocabulary, hw)[1]
        return time.perf_counter() - began, passes

    def _nats(
        self, model: MaskedDiffusionModel, batch: Batch, vocabulary: Vocabulary, hw: Hardware
    ) -> tuple[Float[Tensor, " rows"], int]:
        """-log p of each row (on the CPU) from left to right, and the rows of the forward passes that it took."""
        model.eval()
        rows = len(batch.tokens)
        if model.config.two_streams:
            return ordered_nats(model, batch, vocabulary, Sequential()), rows
        if model.config.causal:
            micro = micro_batch(batch, NextToken(), LossSettings(reduction="token"), vocabulary)
            with torch.no_grad():
                return forward_loss(model, micro.to(hw.device), vocabulary, hw).nelbo.sum()[None].cpu(), rows
        passes: list[int] = []
        tokens, document = batch.tokens.to(hw.device), batch.document.to(hw.device)
        allowed = vocabulary.allowed(batch.id_range).to(hw.device)
        scored = batch.maskable.to(hw.device)
        of_rows = _Rows(model, document)
        log_p = ordered(of_rows, tokens, vocabulary.mask_id, scored, allowed=allowed, progress=passes.append)
        return -log_p.sum(dim=1).cpu(), sum(passes)


@dataclass(frozen=True)
class _Rows:
    """Tokens -> logits, of rows of which some may be padded."""

    model: MaskedDiffusionModel
    document: Int[Tensor, "rows seq"]

    def __call__(self, tokens: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows seq vocab"]:
        return self.model(tokens, self.document)

    def select(self, rows: Int[Tensor, " some"]) -> _Rows:
        return replace(self, document=self.document[rows])


@dataclass(frozen=True)
class LearnedOrder:
    """order/MODALITY/ranks: where in the order that was learned each position of a canvas comes on the average, 1 the first, of
    held-out samples; as JSON, a list for each row of an image or frame of speech. order/MODALITY/content: how much that depends
    on the sample, the standard deviation over samples, mean over positions. Of a model whose order is not learned: nothing.

    Each sample's ranks are the expected ones of its forward exponents, in closed form.
    """

    samples: int = 256

    def __call__(self, run: Finished) -> dict[str, Any]:
        cfg, found = run.settings, {}
        with hardware(cfg.device, cfg.precision) as hw, torch.no_grad():
            model, processor = load_model(run.folder, hw.device)
            if not model.config.learned_orders:
                return {}
            sources = {name: open_source(s.validation, f"data.{name}.validation") for name, s in cfg.data.items()}
            plan = validation_batches(cfg.data, sources, processor, self.samples, self.samples, model=model.config)
            for task, batches in plan.items():
                (modality,) = find_task(task).generated
                ranks = torch.cat([self._ranks(model, micro.to(hw.device)) for micro, _ in batches])
                rows = ranks.mean(dim=0).view(-1, columns(processor, modality, ranks.shape[1]))
                found[f"order/{modality}/ranks"] = json.dumps([[round(r, 3) for r in row] for row in rows.tolist()])
                found[f"order/{modality}/content"] = ranks.std(dim=0).mean().item()
        return found

    @staticmethod
    def _ranks(model: MaskedDiffusionModel, micro: MicroBatch) -> Float[Tensor, "samples positions"]:
        """Of the samples that fill the canvas."""
        noise = micro.noisy.arrivals
        assert noise is not None  # `validation_batches` has asked the model
        ranks = expected_rank(forward_exponents(model, micro, noise), noise.there)
        return ranks[noise.there.all(dim=1)].double().cpu()


def columns(processor: Processor, modality: str, positions: int) -> int:
    """Codebooks of a frame; of a square image its side."""
    tokenizer, side = processor.tokenizers[modality], math.isqrt(positions)
    square = isinstance(tokenizer, Drawn) and fixed_length(tokenizer) == side**2
    return side if square else len(tokenizer.codebooks)


@dataclass(frozen=True)
class TrainingWork:
    """training_flops: forward and backward, for a token of the data, of steps as the run draws them."""

    steps: int = 4

    def __call__(self, run: Finished) -> dict[str, float]:
        cfg = run.settings
        with hardware(cfg.device, cfg.precision) as hw:
            model, processor = load_model(run.folder, hw.device)
        steps: Sequence[list] = list(itertools.islice(training_steps(cfg, model, processor), self.steps))
        micros = [micro for step in steps for micro in step]
        tokens, pairs, logits = (sum(part) for part in zip(*(work(m, processor.vocabulary) for m in micros), strict=True))
        return {"training_flops": model.flops(tokens, pairs, logits) / sum(m.num_tokens for m in micros)}
