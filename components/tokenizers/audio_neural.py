"""Neural audio codecs from `transformers`: Higgs Audio v2, Mimi, DAC, EnCodec and XCodec2.

A codec gives K codes a frame. They are interleaved frame by frame, or with MusicGen's delay pattern (2306.05284), in which
codebook k comes k frames late, so that a frame's later, finer codes are not chosen together with its first:

    frames   c0(0) c1(0) c2(0)   c0(1) c1(1) c2(1)   ...
    delay    c0(0)   -     -     c0(1) c1(0)   -     c0(2) c1(1) c2(0)   ...     "-" is one more code of each codebook

Without a `path` the weights are random, of the shape that `config` says: a pipeline can be tried before anything is fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.data.clips import waveform
from components.tokenizers.clips import Clips
from components.tokenizers.pretrained import pretrained
from components.tokenizers.sinc import sinc_resample


@dataclass(frozen=True)
class Family:
    """What differs between codecs: their classes' name, where the sample rate stands, and how codes go in and out."""

    name: str
    rate: str
    encode: Callable[[Any, Tensor], Tensor]  # waves [1, 1, samples] -> codes [books, frames]
    decode: Callable[[Any, Tensor], Tensor]  # codes [books, frames] -> waves


FAMILIES = {
    "higgs": Family(
        "HiggsAudioV2TokenizerModel",
        "sample_rate",
        lambda m, x: m.encode(x).audio_codes[0],
        lambda m, c: m.decode(c[None]).audio_values,
    ),
    "mimi": Family("MimiModel", "sampling_rate", lambda m, x: m.encode(x).audio_codes[0], lambda m, c: m.decode(c[None])[0]),
    "dac": Family(
        "DacModel", "sampling_rate", lambda m, x: m.encode(x).audio_codes[0], lambda m, c: m.decode(audio_codes=c[None])[0]
    ),
    "encodec": Family(
        "EncodecModel",
        "sampling_rate",
        lambda m, x: m.encode(x, bandwidth=m.config.target_bandwidths[-1]).audio_codes[0, 0],
        lambda m, c: m.decode(c[None, None], [None])[0],
    ),
    "xcodec2": Family(
        "Xcodec2Model",
        "sampling_rate",
        lambda m, x: _xcodec2_codes(m, x),
        lambda m, c: m.decode(audio_codes=c[None]).audio_values,
    ),
}


DEFAULTS: dict[str, dict[str, Any]] = {  # where the class's own default config is not of the published shape
    "higgs": {  # 25 frames a second of 8 codebooks: 2 kbit/s
        "target_bandwidths": [0.5, 1, 1.5, 2],
        "acoustic_model_config": {
            "model_type": "dac",
            "downsampling_ratios": [8, 5, 4, 2, 3],
            "upsampling_ratios": [8, 5, 4, 2, 3],
        },
    }
}


class NeuralAudioTokenizer(Clips):
    """Mono audio, float in [-1, 1] at `sample_rate` Hz <-> codes.

    path:      a folder or a name on the hub; None is random weights
    family:    higgs, mimi, dac, encodec, xcodec2
    books:     codebooks kept, the coarsest first; None is all
    order:     "frames" or "delay"
    config:    for random weights: the arguments of the model's config; None is the published shape
    device:    where the model runs

    Raises ValueError for an unknown family or order, or more books than there are.
    """

    def __init__(
        self,
        path: str | None,
        family: Literal["higgs", "mimi", "dac", "encodec", "xcodec2"],
        books: int | None = None,
        order: Literal["frames", "delay"] = "frames",
        config: dict[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"audio tokenizer: family {family!r} is not one of {', '.join(FAMILIES)}")
        if order not in ("frames", "delay"):
            raise ValueError(f"audio tokenizer: order {order!r} is not one of frames, delay")
        self.family, self.order = family, order
        self.device: str = device
        self._own = FAMILIES[family]
        model = _class(family, self._own.name)
        settings = DEFAULTS.get(family, {}) if config is None else config
        built = model(model.config_class(**settings)) if path is None else pretrained(model, path)
        self.model: Any = built.to(device).eval().requires_grad_(False)
        if family == "encodec" and (self.model.config.normalize or self.model.config.chunk_length):
            raise ValueError("audio tokenizer: an EnCodec that normalises or cuts its clips (48 kHz) needs more than codes")
        self.sample_rate: int = int(getattr(self.model.config, self._own.rate))
        silence = self._codes(np.zeros(self.sample_rate, dtype=np.float32))
        if books is not None and not 1 <= books <= len(silence):
            raise ValueError(f"audio tokenizer: books must be in 1..{len(silence)}, got {books}")
        self.books: int = books or len(silence)
        self.frame_samples: int = int(getattr(self.model.config, "hop_length", None) or self.model.config.frame_size)

    @property
    def size(self) -> int:
        """Codes of a codebook."""
        config = self.model.config
        return int(np.prod(config.quantization_levels)) if self.family == "xcodec2" else int(config.codebook_size)

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (self.size + (self.order == "delay"),) * self.books

    def encode(self, raw: np.ndarray) -> Int[Tensor, " n"]:
        """Codes of a waveform. Raises ValueError for what is none (`components.data.clips.waveform`)."""
        return interleave(self._codes(waveform(raw, "audio tokenizer"))[: self.books], self.order, self.size)

    def frames_of(self, length: int) -> Int[Tensor, " length"]:
        """The frame that each position is a code of; in the delay pattern, a pad's is before the first or behind the last."""
        row, book = torch.arange(length) // self.books, torch.arange(length) % self.books
        return row - book if self.order == "delay" else row

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, " n"]) -> Float[np.ndarray, " samples"]:
        """The waveform of the complete frames among the codes."""
        frames = deinterleave(codes, self.books, self.order, self.size)
        if not frames.shape[1]:
            return np.zeros(0, dtype=np.float32)
        return self._own.decode(self.model, frames.to(self.device)).flatten().float().cpu().numpy()

    @torch.no_grad()
    def _codes(self, raw: np.ndarray) -> Int[Tensor, "books frames"]:
        hop = 1 if self.family == "xcodec2" else int(getattr(self.model.config, "hop_length", 1) or 1)
        padded = np.pad(raw, (0, -len(raw) % hop))
        return self._own.encode(self.model, torch.from_numpy(padded)[None, None].to(self.device)).long().cpu()

    def save(self, folder: Path) -> dict[str, Any]:
        self.model.save_pretrained(folder / "audio_tokenizer")
        return {
            "_component_": "components.tokenizers.audio_neural.NeuralAudioTokenizer",
            "path": "audio_tokenizer",
            "family": self.family,
            "books": self.books,
            "order": self.order,
        }


def interleave(codes: Int[Tensor, "books frames"], order: str, pad: int) -> Int[Tensor, " n"]:
    """The codes as one sequence; `pad` is the code that stands where the delay pattern has none."""
    if order == "delay":
        books, frames = codes.shape
        delayed = torch.full((books, frames + books - 1), pad)
        for k, own in enumerate(codes):
            delayed[k, k : k + frames] = own
        codes = delayed
    return codes.T.flatten()


def deinterleave(sequence: Int[Tensor, " n"], books: int, order: str, size: int) -> Int[Tensor, "books frames"]:
    """The inverse of `interleave`; what is no complete frame is left out, and a pad that stands for a code is code 0."""
    codes = sequence[: len(sequence) // books * books].view(-1, books).T
    if order == "delay":
        frames = max(codes.shape[1] - books + 1, 0)
        codes = torch.stack([own[k : k + frames] for k, own in enumerate(codes)])
    return torch.where(codes < size, codes, 0)


def _class(family: str, name: str) -> Any:
    """The codec's class. Higgs' module imports torchaudio, for one function: where that is not installed, ours stands in."""
    import transformers

    if family != "higgs" or importlib.util.find_spec("torchaudio") is not None:
        return getattr(transformers, name)
    stand_in = types.ModuleType("torchaudio")
    stand_in.__dict__["functional"] = types.SimpleNamespace(resample=sinc_resample)
    sys.modules["torchaudio"] = stand_in
    try:
        return getattr(
            importlib.import_module("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer"), name
        )
    finally:
        del sys.modules["torchaudio"]


def _xcodec2_codes(model: Any, waves: Float[Tensor, "1 1 samples"]) -> Int[Tensor, "1 frames"]:
    """XCodec2 also hears a mel spectrogram, with half a frame of silence around it.

    Its numpy extractor computes it, for which the codec was made; the one in transformers needs torchaudio.
    """
    from transformers import SeamlessM4TFeatureExtractor

    hop, rate = model.config.hop_length, model.config.sampling_rate
    padded = torch.nn.functional.pad(waves, (0, hop - waves.shape[-1] % hop))  # a sample at the least, as its own extractor
    heard = torch.nn.functional.pad(padded, (hop // 2, hop // 2))[0, 0].cpu().numpy()
    extract = SeamlessM4TFeatureExtractor(sampling_rate=rate)
    features = extract(heard, sampling_rate=rate, return_tensors="pt")["input_features"]
    return model.encode(input_values=padded, input_features=features.to(waves.device)).audio_codes[0]
