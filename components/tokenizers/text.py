"""Text tokenizers: byte-pair encoding by tiktoken, from a named encoding, a rank file, or a corpus; or a `tokenizer.json`."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiktoken
import torch
from jaxtyping import Int
from torch import Tensor

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TextTokenizer:
    """Text <-> ids of a tiktoken encoding. Round trips are exact: the byte-level BPE covers every string."""

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
        tokenizer.train_from_iterator(corpus, trainer)
        # tiktoken merges by rank, lowest first: the trainer's ids are in the order of its merges, the bytes before them.
        to_byte = _byte_of_character()
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        ranks = {bytes(to_byte[c] for c in token): rank for rank, (token, _) in enumerate(by_id)}
        return cls(tiktoken.Encoding("trained", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (self.encoding.max_token_value + 1,)

    def encode(self, raw: str) -> Int[Tensor, " n"]:
        """Ids of a string; text that looks like a special token is text."""
        return torch.tensor(self.encoding.encode_ordinary(raw), dtype=torch.long)

    def decode(self, codes: Int[Tensor, " n"]) -> str:
        """The string; bytes that are not UTF-8 become U+FFFD. Ids that no rank has (gaps of an encoding) are skipped."""
        known = [c for c in codes.tolist() if c in self._ids]
        return self.encoding.decode(known, errors="replace")

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

    path: the file
    size: ids of the model, where it has more of them than the file; None is what the file has
    """

    def __init__(self, path: str, size: int | None = None) -> None:
        from tokenizers import Tokenizer

        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer file not found: {path}")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more particular
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        known = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if size is not None and size < known:
            raise ValueError(f"{path} has {known} ids, more than size = {size}")
        self.size = size or known

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (self.size,)

    def encode(self, raw: str) -> Int[Tensor, " n"]:
        """Ids of a string; special tokens that are written out in it are themselves, and none is added."""
        return torch.tensor(self.tokenizer.encode(raw, add_special_tokens=False).ids, dtype=torch.long)

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
        return {
            "_component_": "components.tokenizers.text.JsonTokenizer",
            "path": "tokenizer.json",
            "size": self.size,
        }


def _byte_of_character() -> dict[str, int]:
    """The byte behind each printable character that byte-level BPE (GPT-2) writes for it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
