"""A conversation with a text model: its turns in the model's own template, an answer to be unmasked behind them.

    chat = Chat(processor, own_template(processor), room=processor.text_room(model.config.max_length), length=64)
    asked = chat.ask("What is masked diffusion?")
    made = generate(model, processor, "text", [{"text": asked.edit}])
    chat.keep(asked, chat.answer(asked, made.tokens[0], made.batch), seed=0, sampler="Threshold")

A conversation that has become too long goes on: its oldest exchanges are left out of what the model is given, not of `lines`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from components.block_diffusion.layout import Layout
from components.templates import Templated, fill
from components.types import Batch
from mdm.config import UserError
from mdm.config.errors import said
from mdm.data.processor import Processor
from mdm.generation.editing import Edit
from mdm.generation.prompts import CHAT, continuation

AS_IT_IS = "{}"  # a template that adds nothing


@dataclass(frozen=True)
class Asked:
    """A question ready for `generate`.  left_out: oldest exchanges that there was no room for"""

    question: str
    edit: Edit
    left_out: int


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.  first: the exchange that the model's view began with;  how: seed, sampler, ..."""

    question: str
    answer: str
    first: int
    how: Mapping[str, Any]


@dataclass
class Chat:
    """template: "chat" is the checkpoint's own; else what is made of each question, "{}" in it, exchanges on lines of their own
    room:        positions that question, answer and what went before may take together; None, of a model of blocks: no limit
    length:      tokens of an answer, at the most
    """

    processor: Processor
    template: str
    room: int | None
    length: int
    exchanges: list[Exchange] = field(default_factory=list)

    def ask(self, question: str) -> Asked:
        """The conversation with a new question, and masks for its answer; the oldest exchanges go where the room ends.

        Raises UserError where the question alone is too long, or the template fails.
        """
        count = 0
        for first in range(len(self.exchanges) + 1):
            try:
                edit = continuation(self.processor, self._text(first, question), self.length)
            except ValueError as error:  # of the tokenizer
                raise UserError(said(error)) from error
            count = len(edit.tokens) - self.length
            if self.room is None or len(edit.tokens) <= self.room:
                return Asked(question, edit, first)
        raise UserError(
            f"a question of {count} tokens and an answer of length={self.length} do not fit into the model's {self.room} "
            "positions; ask in fewer words, or start with a smaller length"
        )

    def answer_ids(self, asked: Asked, tokens: Int[Tensor, " seq"], batch: Batch) -> Int[Tensor, " answer"]:
        """What stands behind the question in a row of `generate`, finished or not, up to the end of the text or of the turn.

        batch: what that row was made of, one row
        """
        own = batch.maskable[0] & (batch.modality[0] == self.processor.vocabulary.modalities.index("text"))
        ids = tokens[own][int((~asked.edit.region).sum()) :]
        ends = torch.isin(ids, torch.tensor([self.processor.vocabulary.end_id, *self._turn_ends])).nonzero()
        return ids[: int(ends[0])] if len(ends) else ids

    def begun(self, tokens: Int[Tensor, " seq"], batch: Batch, layout: Layout) -> Int[Tensor, " seq"]:
        """A row of blocks on its way, as it would be if it ended with the block that is being unmasked.

        batch: what that row was made of, one row
        """
        block, left = layout(batch)[0], tokens == self.processor.vocabulary.mask_id
        if not bool(left.any()):
            return tokens
        return torch.where(block <= block[left][0], tokens, self.processor.vocabulary.end_id)

    def answer(self, asked: Asked, tokens: Int[Tensor, " seq"], batch: Batch) -> str:
        """The answer of a finished row of `generate`, as words; the blank before it too, where it goes on with a sentence."""
        return str(self.processor.decode("text", self.answer_ids(asked, tokens, batch)))

    def keep(self, asked: Asked, answer: str, **how: Any) -> None:
        """Makes the exchange a part of the conversation.  how: it was sampled, for `lines`"""
        self.exchanges.append(Exchange(asked.question, answer, asked.left_out, how))

    def lines(self) -> list[dict[str, Any]]:
        """A line for each answer, as `Jsonl` reads instructions: prompt and text; and all that the model was given, and how.

        messages: question and answer, behind the exchanges that the model was given before them
        """
        return [
            {"prompt": e.question, "text": e.answer, "messages": messages(self.exchanges[e.first : i + 1]), **e.how}
            for i, e in enumerate(self.exchanges)
        ]

    def check(self) -> None:
        """Raises UserError for a template that takes no question, or that fails, or where there is no such."""
        if self.template != CHAT and "{}" not in self.template:
            raise UserError(f"template: {self.template!r} must hold {{}}, where the question stands, or be {CHAT}")
        self.ask("?")
        _ = self._turn_ends

    def _text(self, first: int, question: str) -> str:
        """What the model goes on with: the exchanges from `first` on, and the question."""
        if self.template == CHAT:
            return rendered(self.processor, [*messages(self.exchanges[first:]), {"role": "user", "content": question}], True)
        text = Templated("")
        for exchange in self.exchanges[first:]:
            text = text + fill(self.template, exchange.question) + exchange.answer + "\n"
        return text + fill(self.template, question)

    @cached_property
    def _turn_ends(self) -> list[int]:
        """The control token that the checkpoint's template writes behind an answer, as a global id: there an answer ends."""
        if self.template != CHAT:
            return []
        shown = Exchange("a question", "an answer", 0, {})
        text = rendered(self.processor, messages([shown]), False)
        tokenizer: Any = self.processor.tokenizers["text"]
        behind = tokenizer.encode(text[text.rfind(shown.answer) + len(shown.answer) :]).tolist()
        found = torch.tensor([i for i in behind if i in {*tokenizer.control.values()}][:1], dtype=torch.long)
        return self.processor.vocabulary.to_global("text", found).tolist()


def messages(exchanges: list[Exchange]) -> list[dict[str, str]]:
    """Exchanges as chat templates take them."""
    pairs = ((e.question, e.answer) for e in exchanges)
    return [{"role": role, "content": c} for pair in pairs for role, c in zip(("user", "assistant"), pair, strict=True)]


def rendered(processor: Processor, turns: list[dict[str, str]], answers: bool) -> Templated:
    """Messages by the checkpoint's chat template.  answers: ready for the next answer. Raises UserError."""
    tokenizer: Any = processor.tokenizers["text"]
    try:
        if not hasattr(tokenizer, "chat"):
            raise ValueError("the model's text tokenizer has no chat template")
        return tokenizer.chat(turns, add_generation_prompt=answers)
    except ImportError as error:
        raise UserError(f"template={CHAT}: it needs transformers; pip install 'trimodal-mdm[hub]'") from error
    except ValueError as error:
        raise UserError(f"template={CHAT}: {error}") from error


def own_template(processor: Processor) -> str:
    """The checkpoint's own chat template, where it has one; else a question is gone on with as it is."""
    return CHAT if getattr(processor.tokenizers["text"], "chat_template", None) is not None else AS_IT_IS
