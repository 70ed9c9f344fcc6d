"""Tokenizers to train yourself: an autoencoder with finite scalar quantization (FSQ, 2309.15505), for images or speech.

    z = encoder(x),    each channel of z rounded to one of a few levels,    x' = decoder(z);    code = the levels as one number

There is no codebook to learn or to collapse: with levels (8, 5, 5) a token is one of 200 codes. Quantization is
vector-quantize-pytorch's, spectrograms and their inversion (Griffin-Lim) librosa's. `mdm run train_tokenizer` trains them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from components.data.clips import waveform
from components.data.images import square
from components.files import in_one_line, read_json
from components.tokenizers.clips import Clips
from components.tokenizers.pictures import Pictures

BUILTIN = "builtin:"
"""What a tokenizer that comes with the library is asked for by: builtin:mnist (32x32 pixels, 240 codes of 8x8)."""
MAX_CODES = 2**20
LARGEST = {
    "patch": 2**10,
    "books": 64,
    "width": 2**13,
    "channels": 4,
    "size": 2**13,
    "sample_rate": 2**18,
    "bands": 2**10,
    "hop": 2**14,
}
"""Beyond any tokenizer's: a config that says more is a mistake, or meant to take all memory."""


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """kind: images are two-dimensional, spectrograms one-dimensional with a channel for each band

    patch:    pixels (in both directions), or frames, of a token; a power of two
    levels:   of each quantized channel; books: groups of such channels, each a codebook
    width:    of the autoencoder's layers
    channels: of an image: 1 is grey, 3 colour; size: of an image, in pixels
    sample_rate, bands, hop: of a spectrogram: Hz, mel bands, samples between frames
    """

    kind: Literal["image", "mel"]
    patch: int
    levels: tuple[int, ...] = (8, 5, 5)
    books: int = 1
    width: int = 64
    channels: int = 1
    size: int = 8
    sample_rate: int = 8000
    bands: int = 40
    hop: int = 160

    def __post_init__(self) -> None:
        if not isinstance(self.patch, int) or self.patch < 1 or self.patch & (self.patch - 1):
            raise ValueError(f"FSQ tokenizer: patch must be a power of two, got {self.patch}")
        if self.kind == "image" and self.size % self.patch:
            raise ValueError(f"FSQ tokenizer: size {self.size} is not a multiple of patch = {self.patch}")
        if not self.levels or len(self.levels) > 20 or min(self.levels) < 2 or math.prod(self.levels) > MAX_CODES:
            raise ValueError(f"FSQ tokenizer: levels must be at least 2 each, and the codes at most 2^20; got {self.levels}")
        for name, largest in LARGEST.items():
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"FSQ tokenizer: {name} must be in 1..{largest}, got {getattr(self, name)!r}")


class Residual(nn.Module):
    """x + conv(silu(norm(x))), the norm over groups of channels."""

    def __init__(self, conv: type[nn.Module], width: int) -> None:
        super().__init__()
        self.branch: nn.Module = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), conv(width, width, 3, padding=1))

    def forward(self, x: Float[Tensor, "batch width ..."]) -> Float[Tensor, "batch width ..."]:
        return x + self.branch(x)


class FSQAutoencoder(nn.Module):
    """`[batch, channels, ...]` in [-1, 1] -> its reconstruction, and the codes `[batch, tokens, books]`."""

    def __init__(self, config: FSQConfig) -> None:
        from vector_quantize_pytorch import FSQ

        super().__init__()
        self.config = config
        conv = nn.Conv2d if config.kind == "image" else nn.Conv1d
        channels, width = config.channels if config.kind == "image" else config.bands, config.width
        steps = int(math.log2(config.patch))
        down = [m for _ in range(steps) for m in (Residual(conv, width), conv(width, width, 4, stride=2, padding=1))]
        up = [
            m
            for _ in range(steps)
            for m in (nn.Upsample(scale_factor=2), conv(width, width, 3, padding=1), Residual(conv, width))
        ]
        self.encoder: nn.Module = nn.Sequential(conv(channels, width, 3, padding=1), *down, Residual(conv, width))
        self.decoder: nn.Module = nn.Sequential(Residual(conv, width), *up, nn.SiLU(), conv(width, channels, 3, padding=1))
        self.fsq: Any = FSQ(list(config.levels), dim=width, num_codebooks=config.books, keep_num_codebooks_dim=True)

    def encode(self, x: Float[Tensor, "batch channels ..."]) -> tuple[Tensor, Int[Tensor, "batch tokens books"]]:
        """The quantized grid of vectors, and its codes."""
        h = self.encoder(x)
        quantized, codes = self.fsq(h.flatten(2).transpose(1, 2))
        return quantized.transpose(1, 2).reshape(h.shape), codes

    def decode(self, codes: Int[Tensor, "batch tokens books"]) -> Float[Tensor, "batch channels ..."]:
        """What the codes stand for."""
        h = self.fsq.indices_to_codes(codes).transpose(1, 2)
        side = self.config.size // self.config.patch
        return self.decoder(h.unflatten(2, (side, side)) if self.config.kind == "image" else h)

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> tuple[Tensor, Int[Tensor, "batch tokens books"]]:
        quantized, codes = self.encode(x)
        return self.decoder(quantized), codes

    def save(self, folder: Path) -> None:
        """Writes weights and config, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))
        safetensors.torch.save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> FSQAutoencoder:
        """Of a folder, or `builtin:NAME`: one that comes with the library. Raises FileNotFoundError where there is none."""
        if str(folder).startswith(BUILTIN):
            known = {f"{BUILTIN}{own.name}": own for own in sorted((Path(__file__).parent / "trained").iterdir())}
            if folder not in known:
                raise FileNotFoundError(f"the library has no FSQ tokenizer {folder}; it has {', '.join(known)}")
            folder = known[str(folder)]
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no FSQ tokenizer in {folder}; `mdm run train_tokenizer` writes one")
        raw = read_json(folder / "config.json")
        known = {f.name for f in fields(FSQConfig)}
        if "levels" not in raw or set(raw) - known:
            raise ValueError(f"{folder / 'config.json'} has {', '.join(raw)}; an FSQ tokenizer has {', '.join(sorted(known))}")
        if not isinstance(raw["levels"], list) or not all(type(level) is int for level in raw["levels"]):
            raise ValueError(f"{folder / 'config.json'}: levels must be whole numbers, got {raw['levels']!r}")
        config = FSQConfig(**{**raw, "levels": tuple(raw["levels"])})
        state = safetensors.torch.load_file(folder / "model.safetensors")
        least = (
            6 * config.width**2 * int(math.log2(config.patch))
        )  # a part of the weights, of which all are a few times as many
        if least > sum(w.numel() for w in state.values()):
            raise ValueError(f"{folder}: model.safetensors holds fewer numbers than config.json describes")
        model = cls(config)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights and config.json do not match: {in_one_line(error)}") from error
        return model.eval().requires_grad_(False)


class FSQImageTokenizer(Pictures):
    """Square images <-> one code a patch, row by row. path: what `mdm run train_tokenizer` wrote, or builtin:mnist"""

    def __init__(self, path: str | FSQAutoencoder) -> None:
        self.model: FSQAutoencoder = path if isinstance(path, FSQAutoencoder) else FSQAutoencoder.load(path)
        self.size: int = self.model.config.size
        self.patch: int = self.model.config.patch

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (math.prod(self.model.config.levels),) * self.model.config.books

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return (self.size // self.patch) ** 2 * self.model.config.books

    def pixels(self, raw: Image.Image) -> Float[Tensor, "channels size size"]:
        """As a viewer shows it, in [-1, 1]. Raises ValueError for another size."""
        own = square(raw, self.size, "L" if self.model.config.channels == 1 else "RGB")
        levels = torch.from_numpy(np.array(own, dtype=np.float32))
        return (levels / 127.5 - 1).view(self.size, self.size, -1).permute(2, 0, 1)

    @torch.no_grad()
    def encode(self, raw: Image.Image) -> Int[Tensor, " n"]:
        return self.model.encode(self.pixels(raw)[None])[1].flatten().long()

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, " n"]) -> Image.Image:
        """The image of `num_tokens` codes."""
        pixels = self.model.decode(codes.view(1, -1, self.model.config.books))[0]
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
        return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)

    def save(self, folder: Path) -> dict[str, Any]:
        self.model.save(folder / "image_fsq")
        return {"_component_": "components.tokenizers.fsq.FSQImageTokenizer", "path": "image_fsq"}


FLOOR_DB = 80.0
"""What is that far under the loudest is silence."""


class FSQMelTokenizer(Clips):
    """Mono audio <-> `books` codes for every `patch` frames of its mel spectrogram. path: as for images"""

    def __init__(self, path: str | FSQAutoencoder) -> None:
        self.model: FSQAutoencoder = path if isinstance(path, FSQAutoencoder) else FSQAutoencoder.load(path)
        self.sample_rate: int = self.model.config.sample_rate
        self.frame_samples: int = self.model.config.patch * self.model.config.hop

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (math.prod(self.model.config.levels),) * self.model.config.books

    def spectrogram(self, raw: np.ndarray) -> Float[Tensor, "bands frames"]:
        """Log-mel in [-1, 1]: from FLOOR_DB under full scale to full scale, completed to whole tokens.

        Raises ValueError for what is no waveform (`components.data.clips.waveform`).
        """
        import librosa

        wave = waveform(raw, "audio tokenizer")
        c = self.model.config
        power = librosa.feature.melspectrogram(y=wave, sr=c.sample_rate, n_fft=4 * c.hop, hop_length=c.hop, n_mels=c.bands)
        db = np.clip(10 * np.log10(np.maximum(power, 1e-10)), -FLOOR_DB / 2, FLOOR_DB / 2)
        frames = np.pad(db / (FLOOR_DB / 2), ((0, 0), (0, -db.shape[1] % c.patch)), constant_values=-1.0)
        return torch.from_numpy(frames.astype(np.float32))

    @torch.no_grad()
    def encode(self, raw: np.ndarray) -> Int[Tensor, " n"]:
        return self.model.encode(self.spectrogram(raw)[None])[1].flatten().long()

    @torch.no_grad()
    def decode_spectrogram(self, codes: Int[Tensor, " n"]) -> Float[Tensor, "bands frames"]:
        """The spectrogram of the complete frames among the codes."""
        books = self.model.config.books
        return self.model.decode(codes[: len(codes) // books * books].view(1, -1, books))[0].clamp(-1, 1)

    def decode(self, codes: Int[Tensor, " n"]) -> Float[np.ndarray, " samples"]:
        import librosa

        c = self.model.config
        if len(codes) < c.books:
            return np.zeros(0, dtype=np.float32)
        power = 10 ** (self.decode_spectrogram(codes).numpy() * (FLOOR_DB / 2) / 10)
        return librosa.feature.inverse.mel_to_audio(
            power, sr=c.sample_rate, n_fft=4 * c.hop, hop_length=c.hop, n_iter=32
        ).astype(np.float32)

    def save(self, folder: Path) -> dict[str, Any]:
        self.model.save(folder / "audio_fsq")
        return {"_component_": "components.tokenizers.fsq.FSQMelTokenizer", "path": "audio_fsq"}
