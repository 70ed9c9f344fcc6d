"""How the parts of a sample become one token sequence per task, and how sequences become a batch.

    [task] ([begin:m] canvas of m [close:m]) for each modality m of the task, the given ones first

A *canvas* is the span of one modality. Where a modality may end early, the content is followed by the end
token, which also fills the canvas: the fill is visible, maskable and predicted, so the model chooses the length. Padding lies
outside, to make a rectangle: never attended, masked or scored. Prompts (given canvases) are never masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from components.tasks import find_task, name_of
from components.types import PAD_DOCUMENT, STRUCTURE, Batch
from components.vocabulary import Vocabulary


@dataclass(frozen=True)
class TokenSequence:
    """One sequence: the fields of `Batch` for a single document, and which positions are the (droppable) prompt."""

    tokens: Int[Tensor, " seq"]
    modality: Int[Tensor, " seq"]
    id_range: Int[Tensor, " seq"]
    maskable: Bool[Tensor, " seq"]
    prompt: Bool[Tensor, " seq"]

    def __len__(self) -> int:
        return len(self.tokens)


def task_sequence(
    vocabulary: Vocabulary,
    task: str,
    parts: Mapping[str, Int[Tensor, " n"]],
    canvas: Mapping[str, int],
    drop_prompt: bool = False,
) -> TokenSequence:
    """The sequence of one sample.

    parts:       global ids per modality; a generated modality that is absent becomes a canvas of masks, to be sampled
    canvas:      canvas length per modality; a present part whose modality is not in it gets its exact length, without fill
    drop_prompt: replace the given canvases by mask tokens (classifier-free guidance): neither predicted nor counted

    Raises ValueError where a prompt is absent or a part does not fit its canvas.
    """
    spec = find_task(task)
    pieces = [_structure(vocabulary, f"task:{name_of(spec)}")]
    for modality in spec.modalities:
        given = modality in spec.given
        if given and modality not in parts:
            raise ValueError(f"task {task}: it is given {modality}, and there is none")
        ids = _fill(vocabulary, modality, parts.get(modality), canvas.get(modality))
        if given and drop_prompt:
            ids = torch.full_like(ids, vocabulary.mask_id)
        flag = torch.full(ids.shape, given)
        pieces += [
            _structure(vocabulary, f"begin:{modality}"),
            TokenSequence(
                tokens=ids,
                modality=torch.full_like(ids, vocabulary.modalities.index(modality)),
                id_range=vocabulary.id_ranges(modality, len(ids)),
                maskable=~flag,
                prompt=flag,
            ),
            _structure(vocabulary, f"close:{modality}"),
        ]
    return TokenSequence(*(torch.cat([getattr(p, f) for p in pieces]) for f in TokenSequence.__dataclass_fields__))


def response_sequence(
    vocabulary: Vocabulary,
    prompt: Int[Tensor, " n"],
    response: Int[Tensor, " m"],
    length: int | None = None,
    drop_prompt: bool = False,
    ends: bool = True,
) -> TokenSequence:
    """Running text of which only the response is maskable, filled with end tokens to `length` (2502.09992, section 2.3).

    It is what `task_sequence` makes of both as one text, so that a model goes on with texts as it was taught to respond.

    ends: the response is followed by an end token; one that was cut to `length` is not

    Raises ValueError where the response, with its end token, does not fit.
    """
    if length is not None and len(response) + ends > length:
        raise ValueError(f"a response of {len(response)} tokens and its end do not fit canvas.text = {length}")
    filled = _fill(vocabulary, "text", response, length or len(response) + 1)
    given = torch.full_like(prompt, vocabulary.mask_id) if drop_prompt else prompt
    sequence = task_sequence(vocabulary, "text", {"text": torch.cat([given, filled])}, {})
    asked = sequence.maskable.nonzero()[: len(prompt), 0]
    sequence.maskable[asked], sequence.prompt[asked] = False, True
    return sequence


def _structure(vocabulary: Vocabulary, name: str) -> TokenSequence:
    """A task or boundary token; nothing where the vocabulary has none (a text model from elsewhere)."""
    ids = torch.tensor([vocabulary.special(name)] if vocabulary.has(name) else [], dtype=torch.long)
    no, none = torch.zeros(len(ids), dtype=torch.bool), torch.full((len(ids),), STRUCTURE)
    return TokenSequence(ids, none, none, no, no)


def overhead(vocabulary: Vocabulary, task: str) -> int:
    """Positions of a sequence of the task beside its canvases."""
    return sum(map(vocabulary.has, structure(task)))


def structure(task: str) -> list[str]:
    """Names of the special tokens beside the canvases of a task, if the vocabulary has them: one of the task, two a canvas."""
    spec = find_task(task)
    return [f"task:{name_of(spec)}", *(f"{edge}:{m}" for m in spec.modalities for edge in ("begin", "close"))]


def _fill(vocabulary: Vocabulary, modality: str, ids: Int[Tensor, " n"] | None, length: int | None) -> Int[Tensor, " length"]:
    """The part on its canvas: filled with end tokens where the modality may end early, all masks where it is absent."""
    if ids is None:
        if length is None:
            raise ValueError(f"canvas: {modality} is to be generated, so it needs a canvas length")
        return torch.full((length,), vocabulary.mask_id)
    if length is None or len(ids) == length:
        return ids
    if len(ids) > length or not vocabulary.may_end(modality):
        raise ValueError(f"canvas: {modality} of {len(ids)} tokens does not fit its canvas of {length}")
    return torch.cat([ids, torch.full((length - len(ids),), vocabulary.end_id)])


def collate(
    rows: Sequence[Sequence[TokenSequence]], indices: Sequence[Sequence[int]], pad_id: int, length: int | None = None
) -> Batch:
    """Rows of one (a pair) or several (a pack) sequences as a batch, padded on the right.

    indices: global sample index of each sequence
    length:  positions per row; None is the longest row

    A row without a sequence is padding; where all are, they have a few positions all the same.
    """
    longest = max(sum(len(s) for s in row) for row in rows)
    length = length or longest or 8
    if longest > length:
        raise ValueError(f"collate: a row of {longest} positions does not fit {length}")
    shape = (len(rows), length)
    out = Batch(
        tokens=torch.full(shape, pad_id),
        modality=torch.full(shape, STRUCTURE),
        id_range=torch.full(shape, STRUCTURE),
        maskable=torch.zeros(shape, dtype=torch.bool),
        document=torch.full(shape, PAD_DOCUMENT),
        position=torch.zeros(shape, dtype=torch.long),
    )
    for r, (row, row_indices) in enumerate(zip(rows, indices, strict=True)):
        start = 0
        for sequence, index in zip(row, row_indices, strict=True):
            span = slice(start, start + len(sequence))
            for name in ("tokens", "modality", "id_range", "maskable"):
                getattr(out, name)[r, span] = getattr(sequence, name)
            out.document[r, span] = index
            out.position[r, span] = torch.arange(len(sequence))
            start = span.stop
    return out


def content(batch: Batch, end_id: int) -> Bool[Tensor, "batch seq"]:
    """Maskable positions up to and including the first end token of their canvas: the tokens that bits per token count.

    Everything behind is end fill, whose NELBO counts (it carries the length) but which is no content.
    """
    end = (batch.tokens == end_id) & batch.maskable
    fill = torch.zeros_like(end)
    fill[:, 1:] = end[:, 1:] & end[:, :-1] & (batch.document[:, 1:] == batch.document[:, :-1])
    return batch.maskable & ~fill
