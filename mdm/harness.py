"""Our models in EleutherAI's lm-evaluation-harness: its tasks, our likelihood and our samplers.

    HarnessModel(model, processor)      an `lm_eval.api.model.LM`: pass it to `lm_eval.simple_evaluate`

A continuation's log-likelihood given its context is minus its NELBO by Monte Carlo, as LLaDA evaluates (2502.09992), or exact,
token by token from left to right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from lm_eval.api.model import TemplateLM
from torch import Tensor
from tqdm import tqdm

from components.likelihood import nelbo, ordered
from components.samplers import Confidence, Sampler
from mdm.config import UserError
from mdm.editing import Edit
from mdm.generation import generate
from mdm.model import MaskedDiffusionModel
from mdm.processor import Processor


class HarnessModel(TemplateLM):
    """A text model as the harness sees it.

    likelihood:  "nelbo" (by `draws` masks) or "left_to_right" (exact, a forward pass a token)
    batch_size:  masked rows of a forward pass
    sampler:     of generation; None is the most confident token first, one a pass
    max_tokens:  generated where a task does not say how many

    Raises UserError for a model without text.
    """

    def __init__(
        self,
        model: MaskedDiffusionModel,
        processor: Processor,
        likelihood: str = "nelbo",
        draws: int = 128,
        batch_size: int = 32,
        sampler: Sampler | None = None,
        max_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if "text" not in processor.tokenizers:
            raise UserError(f"the harness needs a model of text; this one has {', '.join(processor.tokenizers)}")
        self.net, self.processor, self.likelihood, self.draws = model.eval(), processor, likelihood, draws
        self.rows, self.sampler, self.max_tokens, self.seed = batch_size, sampler, max_tokens, seed
        self.length = model.config.max_length - processor.overhead("text")

    @property
    def eot_token_id(self) -> int:
        return self.processor.vocabulary.end_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.processor.encode("text", string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for _, context, continuation in tqdm(requests, desc="log-likelihoods", disable=disable_tqdm):
            context = context[-max(self.length - len(continuation), 0) :] if len(continuation) < self.length else []
            continuation = continuation[-self.length :]
            tokens, scored = self.row(context, continuation)
            results.append((self.log_likelihood(tokens, scored), self.is_greedy(context, continuation)))
        return results

    def row(self, context: list[int], continuation: list[int]) -> tuple[Int[Tensor, "1 seq"], Bool[Tensor, "1 seq"]]:
        """The sequence of a request, and which of its positions are the continuation's."""
        sequence = self.processor.text_sequence(torch.tensor([*context, *continuation], dtype=torch.long))
        scored = sequence.maskable.clone()
        scored[scored.nonzero()[: len(context), 0]] = False
        device = self.net.embedding.weight.device
        return sequence.tokens[None].to(device), scored[None].to(device)

    def log_likelihood(self, tokens: Int[Tensor, "1 seq"], scored: Bool[Tensor, "1 seq"]) -> float:
        """Log-likelihood of the scored tokens given the others, in nats."""
        vocabulary = self.processor.vocabulary
        text = torch.full_like(tokens, vocabulary.ranges_of("text")[0])
        allowed = vocabulary.allowed(text)
        if self.likelihood == "left_to_right":
            each = ordered(self.net, tokens, vocabulary.mask_id, scored, allowed=allowed, batch_size=self.rows)
            return float(each.sum())
        bound = nelbo(self.net, tokens, vocabulary.mask_id, scored, allowed, self.draws, self.rows, self.seed)
        return -float(bound.nats)

    def is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        """Whether decoding, the most confident token first, gives the continuation."""
        return self.continued([context], len(continuation), Confidence(num_steps=len(continuation), temperature=0.0))[0] == [
            *continuation
        ]

    def continued(self, contexts: list[list[int]], length: int, sampler: Sampler) -> list[list[int]]:
        """The ids that go on with each context."""
        mask_id = self.processor.vocabulary.mask_id
        edits = []
        for context in contexts:
            ids = torch.tensor([*context, *[mask_id] * length], dtype=torch.long)
            edits.append({"text": Edit(ids, torch.arange(len(ids)) >= len(context))})
        made = generate(self.net, self.processor, "text", edits, sampler, 0.0, self.seed, self.rows)
        rows = []
        for k, context in enumerate(contexts):
            own = made.batch.maskable[k]
            rows.append(made.tokens[k][own][len(context) : len(context) + length].tolist())
        return rows

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in pieces of the model's length, each given nothing."""
        totals = []
        for request in tqdm(requests, desc="log-likelihoods of texts", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0])
            pieces = [ids[i : i + self.length] for i in range(0, len(ids), self.length)]
            totals.append(sum(self.log_likelihood(*self.row([], piece)) for piece in pieces))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut where a stop string begins, or at the end token."""
        texts = []
        for request in tqdm(requests, desc="generating", disable=disable_tqdm):
            prompt, options = request.args[0], dict(request.args[1])
            length = min(int(options.get("max_gen_toks", self.max_tokens)), self.length - 1)
            context = self.tok_encode(prompt)[-(self.length - length) :]
            sampler = self.sampler or Confidence(num_steps=length, temperature=float(options.get("temperature", 0.0)))
            ids = torch.tensor(self.continued([context], length, sampler)[0])
            text = self.processor.decode("text", ids)
            stops = options.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts
