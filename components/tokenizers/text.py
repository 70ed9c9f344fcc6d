"""Text tokenizers: byte-pair encoding by tiktoken, from a named encoding, a rank file, or a corpus; or a `tokenizer.json`."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
import torch
from jaxtyping import Int
from torch import Tensor

from components.templates import ChatTemplate, Templated

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

LONGEST_RUN = 100_000
"""Characters of white space on end, beyond which they are cut: tiktoken's regex, which backtracks in them, panics at 10^6."""

LONGEST_TRAINED = 1_000
"""Characters with or without white space on end that BPE is trained on as one; its time grows with their square."""


class TextTokenizer:
    """Text <-> ids of a tiktoken encoding. Round trips are exact: the byte-level BPE covers every string.

    The ids are tiktoken's, for texts without white space of more than LONGEST_RUN characters on end: that is cut to so many.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    @classmethod
    def named(cls, name: str) -> TextTokenizer:
        """A tiktoken encoding by name, e.g. "cl100k_base" or "o200k_base" (downloaded once by tiktoken).

        Raises ValueError, listing the known ones, for another name.
        """
        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"text encoding {name!r} is not one of {', '.join(tiktoken.list_encoding_names())}")
        return cls(tiktoken.get_encoding(name))

    @classmethod
    def from_ranks(cls, path: str | Path, pattern: str = GPT2_PATTERN) -> TextTokenizer:
        """A rank file as tiktoken writes them: a line per token, base64 bytes and rank.

        Raises FileNotFoundError, and ValueError where it is no rank file; both name it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tiktoken rank file not found: {path}")
        try:
            # not tiktoken's load_tiktoken_bpe: it remembers the file of a path, and a path may hold another one by now
            pairs = (line.split() for line in path.read_bytes().splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            return cls(tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} is not a tiktoken rank file: {error}") from error

    @classmethod
    def train(cls, corpus: Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN) -> TextTokenizer:
        """A byte-level BPE trained on a corpus (by Hugging Face `tokenizers`), exported to tiktoken ranks.

        Raises ValueError for a vocabulary too small to hold the 256 bytes.
        """
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        if vocab_size < 256:
            raise ValueError(f"text.vocab_size must be at least 256, one for each byte; got {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        short = (piece for text in corpus for piece in cut(as_text(text), LONGEST_TRAINED, r"\s", r"\S"))
        tokenizer.train_from_iterator(short, trainer)
        # tiktoken merges by rank, lowest first: the trainer's ids are in the order of its merges, the bytes before them.
        to_byte = _byte_of_character()
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        ranks = {bytes(to_byte[c] for c in token): rank for rank, (token, _) in enumerate(by_id)}
        return cls(tiktoken.Encoding("trained", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (self.encoding.max_token_value + 1,)

    def encode(self, raw: Any) -> Int[Tensor, " n"]:
        """Ids of a string; text that looks like a special token is text. Raises ValueError for what is no text."""
        try:
            pieces = [self.encoding.encode_ordinary(piece) for piece in cut(as_text(raw), LONGEST_RUN, r"\s")]
        except BaseException as error:  # tiktoken panics where the pattern needs too much memory, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"text tokenizer: tiktoken cannot split a text of {len(raw)} characters: {error}") from None
        return torch.tensor([i for piece in pieces for i in piece], dtype=torch.long)

    def decode(self, codes: Int[Tensor, " n"]) -> str:
        """The string; bytes that are not UTF-8 become U+FFFD. Ids that no rank has (gaps of an encoding) are skipped."""
        known = self._ids
        return self.encoding.decode([c for c in codes.tolist() if c in known], errors="replace")

    def num_bytes(self, codes: Int[Tensor, " n"]) -> int:
        """Bytes of the text that the ids stand for."""
        return sum(len(self.encoding.decode_single_token_bytes(c)) for c in codes.tolist())

    @property
    def _ids(self) -> set[int]:
        if not hasattr(self, "_known"):
            self._known = {*self.encoding._mergeable_ranks.values(), *self.encoding._special_tokens.values()}
        return self._known

    def save(self, folder: Path) -> dict[str, Any]:
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        lines = (base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks)
        (folder / "text.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
        return {
            "_component_": "components.tokenizers.text.TextTokenizer.from_ranks",
            "path": "text.tiktoken",
            "pattern": self.encoding._pat_str,
        }


class JsonTokenizer:
    """Text <-> ids of a `tokenizer.json`, the format of Hugging Face `tokenizers` and of every open model.

    Control tokens (those that the file calls special, and `reserved`) are never read out of a text: who writes "<|end|>"
    means seven characters. A template's are (`components.templates`), and all of them with `parse_special`. Where the
    characters have no other tokens, they become what unknown text becomes. The file's own `truncation` and `padding` are left
    out, here and where it is saved. What lies beside it of a chat template is kept beside it.

    path:          the file
    size:          ids of the model, where it has more of them than the file; None is what the file has
    parse_special: read control tokens out of every text
    reserved:      ids that no text may hold: a model's mask, pad and end
    """

    def __init__(self, path: str, size: int | None = None, parse_special: bool = False, reserved: Sequence[int] = ()) -> None:
        from tokenizers import Tokenizer

        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer file not found: {path}")
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more particular
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.named: int = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if size is not None and size < self.named:
            raise ValueError(f"{path} has {self.named} ids, more than size = {size}")
        self.size: int = size or self.named
        self.parse_special: bool = parse_special
        self.reserved: frozenset[int] = frozenset()
        self.chat_template: ChatTemplate | None = ChatTemplate.beside(path)
        self.reserve(reserved)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.tokenizer.encode_special_tokens = True  # which the library forgets when it is copied

    def reserve(self, ids: Iterable[int]) -> None:
        """Makes control tokens of these ids, so that no text holds one. An id that has no token in the file is in no text."""
        from tokenizers import AddedToken

        self.reserved |= {*ids}
        tokens = [token for i in sorted(self.reserved) if (token := self.tokenizer.id_to_token(i)) is not None]
        added = {a.content: a for a in self.tokenizer.get_added_tokens_decoder().values()}
        for token in tokens:
            self.tokenizer.add_special_tokens([added.get(token, AddedToken(token, normalized=False))])
        self.tokenizer.encode_special_tokens = True
        self.control: dict[str, int] = {a.content: i for i, a in self.tokenizer.get_added_tokens_decoder().items() if a.special}
        self.__dict__.pop("_parsing", None)

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (self.size,)

    def encode(self, raw: Any) -> Int[Tensor, " n"]:
        """Ids of a string; no token is added. Raises ValueError for what is no text."""
        text = as_text(raw)
        if self.parse_special:
            ids = self._parsing.encode(text, add_special_tokens=False).ids
        else:
            ids = self._templated(raw) if isinstance(raw, Templated) else self._ordinary(text)
        return torch.tensor(ids, dtype=torch.long)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> Templated:
        """Messages (`{"role", "content"}`) by the chat template of the checkpoint, ready for `encode`.

        Raises ValueError where it has none, or the template fails.
        """
        if self.chat_template is None:
            raise ValueError("chat template: there is neither chat_template.jinja nor one in tokenizer_config.json")
        return self.chat_template.render(messages, self.control, add_generation_prompt, continue_final_message)

    def _ordinary(self, text: str) -> list[int]:
        """Ids of a text without control tokens."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        if self.reserved.isdisjoint(found.ids):
            return found.ids
        ids: list[int] = []
        for i, (start, stop) in zip(found.ids, found.offsets, strict=True):
            word, middle = text[start:stop], (start + stop) // 2
            if i not in self.reserved or word.strip().lower() != (self.tokenizer.id_to_token(i) or "").lower():
                ids.append(i)
            elif len(word) > 1:  # a word of the vocabulary proper: by its parts
                ids += self._ordinary(text[start:middle]) + self._ordinary(text[middle:stop])
            else:
                raise ValueError(f"text tokenizer: {word!r} is a control token, and there is no other that spells it")
        return ids

    def _templated(self, text: Templated) -> list[int]:
        """Ids of a text with the control tokens that are the template's."""
        found = self._parsing.encode(str(text), add_special_tokens=False)
        control, theirs = {*self.control.values()}, []
        for i, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if i in control:
                own = str(text)[start:stop]  # with the white space that such a token may take to itself
                begin = start + len(own) - len(own.lstrip())
                theirs.append((i, start, stop, text.holds(begin, begin + len(own.strip()))))
        if all(own for *_, own in theirs):
            return found.ids
        ids, at = [], 0
        for i, start, stop, own in theirs:
            if own:
                ids += [*self._ordinary(str(text)[at:start]), i]
                at = stop
        return ids + self._ordinary(str(text)[at:])

    @cached_property
    def _parsing(self) -> Any:
        """The same tokenizer, which reads control tokens out of a text."""
        return type(self.tokenizer).from_str(self.tokenizer.to_str())

    def decode(self, codes: Int[Tensor, " n"]) -> str:
        """The string, special tokens left out. Ids that the file does not have are skipped."""
        return self.tokenizer.decode([c for c in codes.tolist() if self.tokenizer.id_to_token(c) is not None])

    def num_bytes(self, codes: Int[Tensor, " n"]) -> int:
        """Bytes of the text that the ids stand for."""
        return len(self.decode(codes).encode())

    def id_of(self, token: str) -> int | None:
        """The id of a token as it is written, e.g. "<|mask|>"; None where there is none."""
        return self.tokenizer.token_to_id(token)

    def save(self, folder: Path) -> dict[str, Any]:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        if self.chat_template is not None:
            self.chat_template.save(folder)
        return {
            "_component_": "components.tokenizers.text.JsonTokenizer",
            "path": "tokenizer.json",
            "size": self.size,
            "parse_special": self.parse_special,
            "reserved": sorted(self.reserved),
        }


def cut(text: str, longest: int, *classes: str) -> Iterator[str]:
    """The text in pieces: after so many characters of one of the classes (of a regex) on end, again and again."""
    at = 0
    if len(text) > longest:
        for run in re.finditer("|".join(f"(?<!{c}){c}{{{longest + 1},}}+" for c in classes), text):
            for stop in range(run.start() + longest, run.end(), longest):
                yield text[at:stop]
                at = stop
    yield text[at:]


def as_text(raw: Any) -> str:
    """A plain string. Raises ValueError for anything else, and for one that UTF-8 cannot write."""
    if not isinstance(raw, str):
        raise ValueError(f"text tokenizer: expected a string, got {type(raw).__name__}")
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        half = ascii(raw[error.start])
        raise ValueError(f"text tokenizer: half a surrogate pair, {half} at {error.start}, is no character") from None
    return str(raw)


def _byte_of_character() -> dict[str, int]:
    """The byte behind each printable character that byte-level BPE (GPT-2) writes for it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
