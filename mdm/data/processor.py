"""Raw samples <-> token sequences: the tokenizers, the vocabulary and the canvas lengths, kept together.

It is saved beside the weights, so that a model can always be spoken to in the tokens it was trained on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from components.copies import copied
from components.files import read_json, require
from components.places import AnyPath, is_remote, listing, place, publish, within
from components.sequences import TokenSequence, overhead, response_sequence, task_sequence
from components.tasks import find_task, formed
from components.tokenizers import Tokenizer
from components.tokenizers.modality import check_answers, fixed_length, is_words, may_end
from components.vocabulary import Vocabulary
from mdm.config import UserError, instantiate, one_line
from mdm.config.errors import said
from mdm.config.names import TOKENIZERS
from mdm.config.trust import check_travelled, trust_saved

PROCESSOR = "processor.json"


def _own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """A learned tokenizer keeps its precision where the model beside it runs in bfloat16: codes must be those of training."""
    for device in ("cpu", "cuda"):
        method = torch.autocast(device, enabled=False)(method)
    return method


@dataclass(frozen=True)
class Processor:
    """tokenizers and canvas: by modality. A modality without a canvas (packed text) has the length of its content."""

    vocabulary: Vocabulary
    tokenizers: Mapping[str, Tokenizer]
    canvas: Mapping[str, int]

    @classmethod
    def build(cls, tokenizers: Mapping[str, Tokenizer], canvas: Mapping[str, int], tasks: Sequence[str] = ()) -> Processor:
        """Lays out the vocabulary, with a token for every task that these modalities form.

        tasks: of the run, where they are not among those that every vocabulary knows (components/tasks.py)

        Raises ValueError where a canvas is of an unknown modality or an impossible length.
        """
        check_canvas(tokenizers, canvas)
        vocabulary = Vocabulary.build(_codebooks(tokenizers), _ending(tokenizers), formed(tokenizers, tasks))
        return cls(vocabulary, dict(tokenizers), dict(canvas))

    def grown(self, tokenizers: Mapping[str, Tokenizer], canvas: Mapping[str, int], tasks: Sequence[str] = ()) -> Processor:
        """This processor with further modalities and tasks, and canvases of other lengths: its ids keep their meaning.

        A text model from elsewhere, which knows no task tokens, gets none before it gets another modality.

        Raises ValueError for a modality that it has, and as `build` does.
        """
        every, lengths = {**self.tokenizers, **tokenizers}, {**self.canvas, **canvas}
        vocabulary, asked = self.vocabulary, formed(every, tasks)
        if not tokenizers:
            asked = [name for name in asked if name in tasks and vocabulary.tasks]
        if tokenizers or set(asked) - set(vocabulary.tasks):
            vocabulary = vocabulary.grown(_codebooks(tokenizers), _ending(tokenizers), asked)
        check_canvas(every, lengths)
        return Processor(vocabulary, every, lengths)

    def stretched(self, task: str, length: int | None) -> dict[str, int]:
        """The canvases of a task whose generated one has this length: its words, else the one modality of open length.

        Raises ValueError where there is no such one, or codes of that length do not fill whole frames.
        """
        if length is None:
            return dict(self.canvas)
        made = find_task(task).generated
        free = [m for m in made if fixed_length(self.tokenizers[m]) is None]
        own = [m for m in free if is_words(self.tokenizers[m])] or free
        if len(own) != 1:
            why = "each with a length of its own" if own else "whose length is fixed"
            raise ValueError(f"length={length}: task {task} generates {' and '.join(made)}, {why}")
        check_canvas(self.tokenizers, {own[0]: length})
        return {**self.canvas, own[0]: length}

    @_own_precision
    def encode(self, modality: str, raw: Any) -> Int[Tensor, " n"]:
        """Global ids of one sample, or of its codes where it was tokenized before.

        Raises ValueError where they are no codes of the modality's codebooks, frame by frame.
        """
        codes = raw if isinstance(raw, Tensor) else self.tokenizers[modality].encode(raw)
        self.vocabulary.check_codes(modality, codes)
        return self.vocabulary.to_global(modality, codes)

    @_own_precision
    def decode(self, modality: str, ids: Int[Tensor, " n"]) -> Any:
        """What a canvas holds, up to its first end token."""
        ends = (ids == self.vocabulary.end_id).nonzero()
        ids = ids[: int(ends[0])] if len(ends) else ids
        frame = len(self.tokenizers[modality].codebooks)
        ids = ids[: len(ids) // frame * frame]
        return self.tokenizers[modality].decode(self.vocabulary.to_codes(modality, ids.cpu()))

    def encode_sample(self, sample: Mapping[str, Any]) -> dict[str, Int[Tensor, " n"]]:
        """The parts of a sample that have a tokenizer, as global ids. Raises ValueError as `check_rate` does."""
        self.check_rate(sample)
        return {m: self.encode(m, sample[m]) for m in self.tokenizers if m in sample}

    def check_rate(self, sample: Mapping[str, Any]) -> None:
        """Raises ValueError for a sample of another sample rate than its tokenizer's."""
        rate = sample.get("sample_rate")
        for modality, tokenizer in self.tokenizers.items():
            wanted = getattr(tokenizer, "sample_rate", None)
            if modality in sample and None not in (rate, wanted) and rate != wanted:
                raise ValueError(
                    f"{modality} at {rate} Hz, but the {modality} tokenizer takes {wanted} Hz; set sample_rate of the source, "
                    "or wrap it in components.data.sources.adapted"
                )

    def sequence(
        self,
        task: str,
        parts: Mapping[str, Int[Tensor, " n"]],
        drop_prompt: bool = False,
        canvas: Mapping[str, int] | None = None,
    ) -> TokenSequence:
        """The sequence of a sample of a task, every part on its canvas (`canvas`, where other lengths are wanted)."""
        return task_sequence(self.vocabulary, task, parts, self.canvas if canvas is None else canvas, drop_prompt)

    def response(self, sample: Mapping[str, Any], drop_prompt: bool = False) -> TokenSequence:
        """The sequence of `{"prompt", "text"}`: the text is the response to the prompt, on the text's canvas."""
        prompt, text = (self.encode("text", sample[part]) for part in ("prompt", "text"))
        return response_sequence(self.vocabulary, prompt, text, self.canvas.get("text"), drop_prompt)

    def text_sequence(self, ids: Int[Tensor, " n"]) -> TokenSequence:
        """A span of running text at its exact length."""
        return task_sequence(self.vocabulary, "text", {"text": ids}, {})

    def overhead(self, task: str) -> int:
        """Positions of a sequence of the task beside its canvases."""
        return overhead(self.vocabulary, task)

    def text_room(self, row: int) -> int:
        """Tokens of running text that fit into a row of so many positions."""
        return row - self.overhead("text")

    def text_document(self, sample: Mapping[str, Any]) -> Int[Tensor, " n"]:
        """The ids of a text sample with the end token, ready to be packed."""
        return torch.cat([self.encode("text", sample["text"]), torch.tensor([self.vocabulary.end_id])])

    def save(self, folder: str | AnyPath) -> None:
        """Writes vocabulary.json, processor.json and the tokenizers' own files."""
        if is_remote(folder):
            with tempfile.TemporaryDirectory() as made:
                self.save(made)
                for file in listing(made):
                    publish(place(folder) / str(within(Path(made), file)), file.read_bytes())
            return
        folder = Path(str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        self.vocabulary.save(folder / "vocabulary.json")
        nodes = {m: _saved(m, t, folder) for m, t in self.tokenizers.items()}
        trust_saved(nodes)
        (folder / PROCESSOR).write_text(json.dumps({"tokenizers": nodes, "canvas": dict(self.canvas)}, indent=1))

    @classmethod
    def load(cls, folder: str | AnyPath, trust: bool = False) -> Processor:
        """Reads what `save` wrote. trust: build what it names, whatever that is (see mdm/config/trust.py).

        Raises FileNotFoundError naming what is missing, ValueError for what does not fit together, UserError for a tokenizer
        that is not the library's own.
        """
        folder = copied(folder)
        for name in ("vocabulary.json", PROCESSOR):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: is it a recipe's output_dir, or its model/ folder?")
        saved = read_json(folder / PROCESSOR)
        require(saved, folder / PROCESSOR, tokenizers=dict, canvas=dict)
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        if set(saved["tokenizers"]) != set(vocabulary.modalities):
            raise ValueError(
                f"{folder}: {PROCESSOR} has tokenizers of {', '.join(saved['tokenizers'])}, and vocabulary.json the modalities "
                f"{', '.join(vocabulary.modalities)}"
            )
        tokenizers = {modality: saved_tokenizer(str(folder), modality, trust) for modality in saved["tokenizers"]}
        for modality, tokenizer in tokenizers.items():
            sizes = tuple(vocabulary.ranges[i].size for i in vocabulary.ranges_of(modality))
            if sizes != tuple(tokenizer.codebooks):
                raise ValueError(
                    f"{folder}: the {modality} tokenizer has codebooks of {tokenizer.codebooks}, vocabulary.json says {sizes}"
                )
        require(saved["canvas"], folder / PROCESSOR, **dict.fromkeys(saved["canvas"], int))
        check_canvas(tokenizers, saved["canvas"])
        return cls(vocabulary, tokenizers, saved["canvas"])


def _saved(modality: str, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """The node that a tokenizer is built from again. Raises UserError where it gives none that can be written down."""
    try:
        node = tokenizer.save(folder)
        if not isinstance(node, dict) or not isinstance(node.get("_component_"), str):
            raise ValueError(f"it gives {node!r}, and not the _component_ that builds it again")
        json.dumps(node)
    except OSError:  # the folder's, not the tokenizer's
        raise
    except Exception as error:
        raise UserError(f"tokenizers.{modality} cannot be saved: {said(error)}") from error
    return node


def check_canvas(tokenizers: Mapping[str, Tokenizer], canvas: Mapping[str, int]) -> None:
    """Raises ValueError for what cannot be of a tokenizer, a canvas that has none, or whose codes do not fill it."""
    for modality, tokenizer in tokenizers.items():
        try:
            check_answers(tokenizer)
        except ValueError as error:
            raise ValueError(f"tokenizers.{modality}: {error}") from error
    for modality, length in canvas.items():
        if modality not in tokenizers:
            raise ValueError(f"canvas.{modality}: there is no tokenizers.{modality}; there are {', '.join(tokenizers)}")
        frame = len(tokenizers[modality].codebooks)
        if length < 1 or length % frame:
            raise ValueError(f"canvas.{modality} must be a positive multiple of {frame} (codebooks), got {length}")
        whole = fixed_length(tokenizers[modality])
        if whole is not None and length != whole:
            raise ValueError(f"canvas.{modality} = {length}, and its tokenizer makes {whole} tokens of each")


def _codebooks(tokenizers: Mapping[str, Tokenizer]) -> dict[str, tuple[int, ...]]:
    return {modality: tokenizer.codebooks for modality, tokenizer in tokenizers.items()}


def _ending(tokenizers: Mapping[str, Tokenizer]) -> list[str]:
    """The modalities whose canvases may end early."""
    return [modality for modality, tokenizer in tokenizers.items() if may_end(tokenizer)]


def saved_tokenizer(path: str, modality: str, trust: bool = False) -> Tokenizer:
    """The tokenizer of a modality that a folder holds: a model's, or of token shards.

    Raises FileNotFoundError, ValueError, and UserError for one that is not the library's own, unless `trust` is set.
    """
    folder = copied(path)
    file = folder / PROCESSOR
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no {PROCESSOR}: is it a recipe's output_dir, its model/, or token shards?")
    saved = read_json(file)
    require(saved, file, tokenizers=dict)
    nodes = saved["tokenizers"]
    if modality not in nodes:
        raise ValueError(f"{path} has no tokenizer of {modality}; it has {', '.join(nodes)}")
    key = f"tokenizers.{modality}"
    node = check_travelled(nodes[modality], key, file, TOKENIZERS, trust)
    with one_line(f"{file}: {key}"):
        return instantiate(node, key)
