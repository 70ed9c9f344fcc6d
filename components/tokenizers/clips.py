"""What tokenizers of waveforms have in common beside their codes: files, how they sound, and editing by a span."""

from __future__ import annotations

import math
import wave
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.data.clips import read_audio, waveform
from components.tokenizers.modality import HALF, Region


class Clips(ABC):
    """Gives a tokenizer of mono audio all that is asked of a modality of clips.

    sample_rate: samples a second;  frame_samples: of a frame, which is a code of each codebook
    """

    suffix: str = ".wav"
    sample_rate: int
    frame_samples: int
    codebooks: Any  # as every tokenizer has them

    def read(self, path: Path) -> Float[np.ndarray, " samples"]:
        """An audio file, mono at `sample_rate`. Raises BadSample."""
        return read_audio(path, self.sample_rate)

    def write(self, raw: np.ndarray, path: Path) -> None:
        write_wav(path, self.play(raw)[0], self.sample_rate)

    def play(self, raw: np.ndarray) -> tuple[Float[np.ndarray, " samples"], int]:
        return waveform(raw) if len(raw) else np.zeros(0, dtype=np.float32), self.sample_rate

    def frames_of(self, length: int) -> Int[Tensor, " length"]:
        """The frame that each position is a code of."""
        return torch.arange(length) // len(self.codebooks)

    @abstractmethod
    def encode(self, raw: np.ndarray) -> Int[Tensor, " n"]: ...

    def region(self, raw: np.ndarray, where: str) -> Region:
        """start-stop in seconds, of which every frame that it touches is made anew; start- goes on to a new end; or half.

        Raises ValueError where the span is empty or outside the clip.
        """
        rate, per_frame, seconds = self.sample_rate, self.frame_samples, len(raw) / self.sample_rate
        try:
            first, last = where.split("-") if where != HALF else (seconds / 2, "")
            start, stop = float(first or 0), float(last) if last else None
            if not 0 <= start < (seconds if stop is None else min(stop, seconds)) or not (stop or 0) < 1e9:
                raise ValueError
        except ValueError:
            raise ValueError(f"region {where!r}: start-stop in seconds, inside 0-{seconds:.2f}, not empty") from None
        begin = min(round(start * rate), len(raw) - 1) // per_frame
        end = None if stop is None else max(math.ceil(round(stop * rate) / per_frame), begin + 1)
        silenced = np.array(raw)
        silenced[begin * per_frame : None if end is None else end * per_frame] = 0
        frame = self.frames_of(len(self.encode(silenced)))
        codes = frame >= begin
        return Region(silenced, codes if end is None else codes & (frame < end), open_end=end is None)


def write_wav(file: str | Path | BinaryIO, audio: np.ndarray, sample_rate: int) -> None:
    """Mono 16-bit PCM, by the standard library: no package is needed to write it."""
    with wave.open(str(file) if isinstance(file, Path) else file, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(sample_rate)
        opened.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
