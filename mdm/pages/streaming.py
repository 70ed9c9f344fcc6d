"""What a model of blocks has finished, written as it comes: speech into a WAV file that grows, a text to the terminal."""

from __future__ import annotations

import time
import wave
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from components.tokenizers.modality import Played
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.generate import Streamed

TERMINAL = "-"


class Stream:
    """Takes each `Streamed` block of one sample; `seconds` to the first that can be heard or read, and to the last.

    path: a .wav file for what is heard, or "-", the terminal, for text
    """

    def __init__(self, path: str, processor: Processor) -> None:
        self.path, self.processor = path, processor
        self.begun, self.first, self.last = time.perf_counter(), 0.0, 0.0
        self.written = 0  # samples, or letters
        self.file: wave.Wave_write | None = None
        self.raw: BinaryIO | None = None

    def __call__(self, part: Streamed) -> None:
        """Writes what has become known of the sample."""
        content: Any = self.processor.decode(part.modality, part.tokens)
        new = content[self.written :] if self.path == TERMINAL else self._heard(part.modality, content)
        if len(new) and not self.written:
            self.first = time.perf_counter() - self.begun
        self.written += len(new)
        if self.path == TERMINAL:
            print(new, end="\n" if part.last else "", flush=True)
        elif self.file is not None and self.raw is not None:
            self.file.writeframes((np.clip(new, -1, 1) * 32767).astype("<i2").tobytes())
            self.raw.flush()
        self.last = time.perf_counter() - self.begun
        if part.last and self.file is not None and self.raw is not None:
            self.file.close()
            self.raw.close()

    def _heard(self, modality: str, content: Any) -> np.ndarray:
        """The samples that are new."""
        tokenizer: Any = self.processor.tokenizers[modality]
        samples, rate = tokenizer.play(content)
        if self.file is None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self.raw = Path(self.path).open("wb")  # noqa: SIM115
            self.file = wave.open(self.raw, "wb")  # noqa: SIM115  (it is closed after the last block)
            self.file.setnchannels(1)
            self.file.setsampwidth(2)
            self.file.setframerate(rate)
        return samples[self.written :]

    def report(self) -> str:
        """When the first of it was there."""
        what = "text" if self.path == TERMINAL else "sound"
        if not self.written:
            return f"There is no {what}: the model ended it at once"
        where = "" if self.path == TERMINAL else f" Written to {self.path}."
        return f"The first {what} after {self.first:.2f} s of {self.last:.2f} s ({self.first / self.last:.2f} of it).{where}"


def check_stream(path: str, generated: tuple[str, ...], processor: Processor, blocks: bool) -> None:
    """Raises UserError where nothing can be streamed there."""
    if not blocks:
        raise UserError(f"stream={path}: only a model of blocks has anything finished before all is (docs/guides/blocks.md)")
    (modality, *others) = generated
    heard = isinstance(processor.tokenizers[modality], Played)
    if others or (not heard and modality != "text"):
        raise UserError(f"stream={path}: speech or text can be streamed; this task generates {', '.join(generated)}")
    if heard != (Path(path).suffix == ".wav") or (not heard and path != TERMINAL):
        raise UserError(f"stream={path}: {modality} goes to " + ("a .wav file" if heard else 'the terminal, "-"'))
