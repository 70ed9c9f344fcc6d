"""Texts that a template makes: control tokens that the template writes are control tokens, what a user writes in it is text.

    fill("<|user|>{}<|end|>", "say <|end|>")      the second <|end|> ends the turn, the first is text
    ChatTemplate.beside("model/tokenizer.json").render([{"role": "user", "content": "say <|end|>"}], control=["<|end|>"])

Both make a `Templated`: a str like any other, which knows whose its characters are; a tokenizer that has control tokens asks.
A chat template is a program (Jinja) that comes with a checkpoint: it runs in the sandbox of `transformers`, which reads and
writes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Templated(str):
    """A text, and the spans (start, stop) of it that are not the template's: in those no control token is meant.

    Joined to another text, or cut, it stays one: what is joined to it is not the template's.
    """

    plain: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, plain: Iterable[tuple[int, int]] = ()) -> Templated:
        self = super().__new__(cls, text)
        self.plain = tuple((start, stop) for start, stop in plain if start < stop)
        return self

    @classmethod
    def of(cls, pieces: Iterable[str]) -> Templated:
        """The template's pieces and a user's, in turns: the first is the template's."""
        text, plain = "", []
        for i, piece in enumerate(pieces):
            if i % 2:
                plain.append((len(text), len(text) + len(piece)))
            text += piece
        return cls(text, plain)

    def __add__(self, other: str) -> Templated:
        theirs = other.plain if isinstance(other, Templated) else [(0, len(other))]
        return Templated(str(self) + str(other), [*self.plain, *((a + len(self), b + len(self)) for a, b in theirs)])

    def __getitem__(self, index: Any) -> str:
        cut = super().__getitem__(index)
        if not isinstance(index, slice) or index.step not in (None, 1):
            return cut
        start, stop, _ = index.indices(len(self))
        return Templated(cut, [(max(a, start) - start, min(b, stop) - start) for a, b in self.plain])

    def holds(self, start: int, stop: int) -> bool:
        """Whether what stands there is the template's alone."""
        return all(stop <= a or b <= start for a, b in self.plain)


def fill(template: str, prompt: str) -> Templated:
    """The template with the prompt at every "{}"."""
    first, *rest = template.split("{}")
    return Templated.of([first, *(piece for after in rest for piece in (prompt, after))])


@dataclass(frozen=True)
class ChatTemplate:
    """source: a chat template as `transformers` has them (Jinja); tokens: what it may name, e.g. {"bos_token": "<s>"}"""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def beside(cls, path: str | Path) -> ChatTemplate | None:
        """That of the folder of a `tokenizer.json`: in chat_template.jinja, or tokenizer_config.json; None where it has none.

        Raises ValueError, naming it, for a file that is damaged.
        """
        folder, found = Path(path).parent, {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                try:
                    found |= dict(json.loads((folder / name).read_text(encoding="utf-8")))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{folder / name} is not a JSON object: {error}") from error
        source = found.get("chat_template")
        if isinstance(source, list):  # several with names
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if not isinstance(source, str):
            return None
        tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items() if k.endswith("_token")}
        return cls(source, {k: v for k, v in tokens.items() if isinstance(v, str)})

    def save(self, folder: Path) -> None:
        """Writes tokenizer_config.json, as `transformers` reads it."""
        (folder / "tokenizer_config.json").write_text(json.dumps({**self.tokens, "chat_template": self.source}, indent=1))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        control: Iterable[str],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Templated:
        """The chat of `{"role", "content"}` messages as one text; what their strings hold of `control` stays text.

        Raises ValueError for a template that fails, or wants what it must not.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        literal = re.compile("|".join(re.escape(c) for c in sorted(control, key=len, reverse=True)) or "(?!)")
        said = [value for message in messages for value in message.values() if isinstance(value, str)]
        written = sorted({found for value in said for found in literal.findall(value)})
        # while it renders, a character that nobody uses stands for each control token that a user wrote
        used = set(self.source).union(*said)
        free = (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in used)
        stand_in = dict(zip(written, free, strict=False))
        hidden = [
            {key: literal.sub(lambda m: stand_in[m[0]], v) if isinstance(v, str) else v for key, v in message.items()}
            for message in messages
        ]
        names: dict[str, Any] = {**self.tokens}
        try:
            text = render_jinja_template(
                [hidden],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **names,
            )[0][0]
        except Exception as error:  # whatever a stranger's program does
            raise ValueError(f"chat template: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
        if not written:
            return Templated(text)
        back = {character: token for token, character in stand_in.items()}
        pieces = re.split(f"([{''.join(back)}])", text)
        return Templated.of(back.get(piece, piece) for piece in pieces)
