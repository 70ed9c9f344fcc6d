"""Audio tokenizer: codec2 in its mode 700C, a vocoder for speech without learned weights of ours.

28 bits per 40 ms frame = four fields = four codebooks: two 9-bit stages of a vector quantizer of the spectrum, 4 bits of
energy, 6 bits of pitch. 25 frames, 100 tokens, 700 bits a second. Codes <-> bits is exact; speech <-> codes is a vocoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.data.clips import waveform
from components.tokenizers.clips import Clips

FIELD_BITS = (9, 9, 4, 6)
FRAME_BYTES = 4
FRAME_SAMPLES = 320


class Codec2Tokenizer(Clips):
    """Mono speech at 8 kHz, float in [-1, 1] <-> codes interleaved frame by frame."""

    sample_rate = 8000
    frame_samples = FRAME_SAMPLES
    codebooks: tuple[int, ...] = tuple(2**bits for bits in FIELD_BITS)

    def encode(self, raw: np.ndarray) -> Int[Tensor, " n"]:
        """Codes of a waveform, its last frame completed with silence.

        Raises ValueError for what is no waveform (`components.data.clips.waveform`).
        """
        wave = waveform(raw, "audio tokenizer")
        padded = np.pad(wave, (0, -len(wave) % FRAME_SAMPLES))
        pcm = np.rint(np.clip(padded, -1, 1) * 32767).astype(np.int16)
        codec = _codec()
        return self.from_bytes(b"".join(codec.encode(frame) for frame in pcm.reshape(-1, FRAME_SAMPLES)))

    def decode(self, codes: Int[Tensor, " n"]) -> Float[np.ndarray, " samples"]:
        """The waveform of the complete frames among the codes."""
        frames = self.to_bytes(codes[: len(codes) // len(FIELD_BITS) * len(FIELD_BITS)])
        if not frames:
            return np.zeros(0, dtype=np.float32)
        codec = _codec()
        starts = range(0, len(frames), FRAME_BYTES)
        return np.concatenate([codec.decode(frames[i : i + FRAME_BYTES]) for i in starts]).astype(np.float32) / 32768

    @staticmethod
    def from_bytes(frames: bytes) -> Int[Tensor, " n"]:
        """The fields of packed 4-byte frames; the last four bits of a frame are unused."""
        word = np.frombuffer(frames, dtype=">u4").astype(np.int64)
        fields, left = [], 8 * FRAME_BYTES
        for bits in FIELD_BITS:
            left -= bits
            fields.append(word >> left & (2**bits - 1))
        return torch.from_numpy(np.stack(fields, axis=1).reshape(-1))

    @staticmethod
    def to_bytes(codes: Int[Tensor, " n"]) -> bytes:
        """The inverse of `from_bytes`."""
        word, left = 0, 8 * FRAME_BYTES
        for bits, field in zip(FIELD_BITS, codes.numpy().reshape(-1, len(FIELD_BITS)).T, strict=True):
            left -= bits
            word = word | field.astype(np.int64) << left
        return np.asarray(word, dtype=">u4").tobytes()

    def save(self, folder: Path) -> dict[str, Any]:
        return {"_component_": "components.tokenizers.audio.Codec2Tokenizer"}


def _codec() -> Any:
    """A fresh codec: it keeps state from frame to frame, which must not leak from one clip into the next."""
    from pycodec2 import Codec2  # pyright: ignore[reportAttributeAccessIssue] (compiled, without stubs)

    return Codec2(700)
