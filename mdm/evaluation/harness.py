"""Our models in EleutherAI's lm-evaluation-harness: its tasks, our likelihood and our samplers.

    HarnessModel(model, processor)      an `lm_eval.api.model.LM`: pass it to `lm_eval.simple_evaluate`

A continuation's log-likelihood given its context is minus its NELBO by Monte Carlo, as LLaDA evaluates (2502.09992), or exact,
token by token from left to right.

What does not fit the model is cut, and counted by task in `notes`: a context or prompt loses its beginning; but before a prompt
does, the answer is made shorter, down to one token (or one block, where the sampler goes by blocks).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from lm_eval.api.model import TemplateLM
from torch import Tensor

from components.likelihood import corrupted_nelbo, nelbo, ordered
from components.maskers import LowDiscrepancyTimes
from components.progress import Bar
from components.samplers import Ancestral, Confidence, Sampler
from components.types import STRUCTURE, Batch
from mdm.config import UserError
from mdm.data.corruption import bound_corruption
from mdm.data.processor import Processor
from mdm.evaluation.block_likelihood import autoregressive_nats, block_nelbo
from mdm.evaluation.order_likelihood import any_order_nelbo, ordered_nats
from mdm.evaluation.order_loss import order_nelbo
from mdm.generation.editing import Edit
from mdm.generation.generate import generate
from mdm.models.transformer import MaskedDiffusionModel

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The harness's names of how long an answer may be; the first of them that is there holds."""


@dataclass(frozen=True)
class Asked:
    """How a task wants its answers: the keys that the harness's own models take, under one name each.

    length:  tokens at the most; unknown: the keys that nothing here understands
    """

    length: int
    temperature: float
    top_p: float
    top_k: int | None
    until: list[str]
    unknown: dict[str, Any]

    @classmethod
    def of(cls, options: dict[str, Any], default_length: int, prompt: int) -> Asked:
        """From a request's options; null is as good as absent. prompt: its tokens, which `max_length` counts in.

        Raises ValueError for a value that is no number, or negative.
        """
        given = {key: value for key, value in options.items() if value is not None}
        until = given.pop("until", [])
        lengths = [given.pop(key) for key in LENGTHS if key in given]
        whole = given.pop("max_length", None)
        length = int(lengths[0]) if lengths else default_length if whole is None else max(int(whole) - prompt, 0)
        if length < 0:
            raise ValueError(f"max_gen_toks must be at least 0, got {length}")
        sampled = given.pop("do_sample", None)
        temperature = float(given.pop("temperature", 1.0 if sampled else 0.0))
        return cls(
            length=length,
            temperature=0.0 if sampled is False else temperature,
            top_p=float(given.pop("top_p", 1.0)),
            top_k=int(given.pop("top_k", 0)) or None,
            until=[stop for stop in ([until] if isinstance(until, str) else until) if stop],
            unknown=given,
        )


class HarnessModel(TemplateLM):
    """A text model as the harness sees it.

    likelihood:  "nelbo" (by `draws` masks) or "left_to_right" (exact, a forward pass a token)
    batch_size:  masked rows of a forward pass
    sampler:     of generation, by its own settings; None is the most confident token first, one a pass, by those of the task
    max_tokens:  generated where a task does not say how many
    notes:       by task, how often something was cut or left out, and how many tokens that were

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
        self.notes: dict[str, Counter[str]] = defaultdict(Counter)

    @property
    def eot_token_id(self) -> int:
        return self.processor.vocabulary.end_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached requests apart by."""
        return f"{type(self.processor.tokenizers['text']).__name__}-{self.processor.vocabulary.digest()}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the checkpoint's own chat template: its control tokens are ids, whatever the messages say is text.

        Raises UserError for a model without one.
        """
        chat = getattr(self.processor.tokenizers["text"], "chat", None)
        if chat is None:
            raise UserError("apply_chat_template: this model's tokenizer has no chat template")
        try:
            return chat(chat_history, add_generation_prompt, continue_final_message=not add_generation_prompt)
        except ValueError as error:
            raise UserError(f"apply_chat_template: {error}") from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.processor.encode("text", string).tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations given contexts. Where a context is empty, an end token stands for it.

        A continuation that has no token of its own (it is empty, or merged into the context's last one) is certain: 0, greedy.
        """
        encoded = []
        for request in requests:
            context, continuation = request.args
            with naming(request):
                alone = [self.prefix_token_id], self.tok_encode(continuation)
                encoded.append((request, *(self._encode_pair(context, continuation) if context else alone)))
        return self._loglikelihood_tokens(encoded, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for request, context, continuation in Bar(requests, desc="log-likelihoods", disable=disable_tqdm):
            note = self.notes[task_of(request)]
            if not continuation:
                note["continuations without a token"] += 1
                results.append((0.0, True))
                continue
            continuation = last(continuation, self.length, note, "continuation")
            context = last(context, self.length - len(continuation), note, "context")
            with naming(request):
                value = self.log_likelihood(*self.row(context, continuation))
                results.append((value, self.is_greedy(context, continuation)))
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
        if self.likelihood == "left_to_right" and "text" in self.net.config.noise:
            kernel = self.net.config.noise["text"].kernel
            raise UserError(f"likelihood: left_to_right fills in masks, and text was trained with {kernel}; take nelbo")
        zeros = torch.zeros_like(tokens)
        place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        inside = allowed.gather(-1, tokens[..., None])[..., 0]  # all else is structure
        modality = torch.where(inside, vocabulary.modalities.index("text"), STRUCTURE)
        batch = Batch(tokens, modality, text, scored, zeros, place).to("cpu")
        if self.net.config.two_streams:
            if self.likelihood == "left_to_right":
                return -float(ordered_nats(self.net, batch, vocabulary))
            return -float(any_order_nelbo(self.net, batch, vocabulary, self.draws, self.rows, self.seed).nats)
        if self.net.config.blocks:
            if self.likelihood == "left_to_right":
                return -float(autoregressive_nats(self.net, batch, vocabulary))
            return -float(block_nelbo(self.net, batch, vocabulary, self.draws, self.rows, self.seed).nats)
        if self.likelihood == "left_to_right":
            each = ordered(self.net, tokens, vocabulary.mask_id, scored, allowed=allowed, batch_size=self.rows)
            return float(each.sum())
        if self.net.config.learned_orders:
            return -float(order_nelbo(self.net, batch, vocabulary, self.draws, self.rows, self.seed).nats)
        noise = self.net.config.noise
        if "text" in noise:  # the bound of its own noise
            corrupted = bound_corruption(noise, vocabulary, LowDiscrepancyTimes(self.draws), self.seed)
            net = lambda z: self.net(z.to(tokens.device)).cpu()  # noqa: E731
            return -float(corrupted_nelbo(net, batch, corrupted, vocabulary, self.draws, self.rows).nats)
        bound = nelbo(self.net, tokens, vocabulary.mask_id, scored, allowed, self.draws, self.rows, self.seed)
        return -float(bound.nats)

    def is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        """Whether decoding, the most confident token first, gives the continuation."""
        greedy = self.default_sampler(len(continuation), temperature=0.0)
        return self.continued([context], len(continuation), greedy)[0] == [*continuation]

    def default_sampler(self, length: int, **drawing: Any) -> Sampler:
        """The most confident token first, one a pass; of a model whose noise ends in no masks, as many ancestral steps."""
        noise = self.net.config.noise.get("text")
        kind = Confidence if noise is None or noise.kernel.ends_masked else Ancestral
        return kind(num_steps=length, **drawing)

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
        for request in Bar(requests, desc="log-likelihoods of texts", disable=disable_tqdm):
            with naming(request):
                ids = self.tok_encode(request.args[0])
                pieces = [ids[i : i + self.length] for i in range(0, len(ids), self.length)]
                if len(pieces) > 1:
                    self.notes[task_of(request)].update({"texts in pieces": 1, "pieces": len(pieces)})
                totals.append(float(sum(self.log_likelihood(*self.row([], piece)) for piece in pieces)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut where a stop string begins, or at the end token."""
        texts = []
        for request in Bar(requests, desc="generating", disable=disable_tqdm):
            prompt, options = request.args
            note = self.notes[task_of(request)]
            with naming(request):
                context = self.tok_encode(prompt)
                asked = Asked.of(options, self.max_tokens, len(context))
                note.update(f"{key}={value!r} unknown" for key, value in asked.unknown.items())
                length = self.answer_length(asked.length, len(context), note)
                context = last(context, self.length - length, note, "prompt")
                own = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
                sampler = self.sampler or self.default_sampler(max(length, 1), **own)
                ids = self.continued([context], length, sampler)[0] if length else []
            texts.append(self.until(ids, asked.until))
        return texts

    def answer_length(self, asked: int, prompt: int, note: Counter[str]) -> int:
        """How long an answer to a prompt of so many tokens is: as asked for, or what the prompt leaves of the model."""
        block = getattr(self.sampler, "block_length", 1)
        length = min(asked, max(self.length - prompt, block))
        if length < asked:
            length -= length % block
            note.update({"answers shortened": 1, "answer tokens lost": asked - length})
        return length

    def until(self, ids: list[int], stops: Sequence[str]) -> str:
        """The text up to the first of the stops. One that is a special token is looked for among the ids: no text shows it."""
        tokenizer: Any = self.processor.tokenizers["text"]
        vocabulary = self.processor.vocabulary
        known = [tokenizer.id_of(stop) for stop in stops] if hasattr(tokenizer, "id_of") else []
        codes = [torch.tensor([code]) for code in known if code is not None]
        special = {vocabulary.to_global("text", code).item() for code in codes if not tokenizer.decode(code)}
        length = next((place for place, token in enumerate(ids) if token in special), len(ids))
        text = self.processor.decode("text", torch.tensor(ids[:length], dtype=torch.long))
        for stop in stops:
            text = text.split(stop)[0]
        return text


def last(ids: list[int], room: int, note: Counter[str], what: str) -> list[int]:
    """The last ids that there is room for; what is lost is noted."""
    lost = max(len(ids) - room, 0)
    if lost:
        note.update({f"{what}s cut": 1, f"{what} tokens lost": lost})
    return ids[lost:]


def task_of(request: Any) -> str:
    """The name of a request's task."""
    return getattr(request, "task_name", None) or "unnamed"


@contextmanager
def naming(request: Any) -> Iterator[None]:
    """An error names the task and the document it came from, as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{task_of(request)}, document {getattr(request, 'doc_id', None)}: {error}") from error
