"""One protocol for every tokenizer: raw text, image, audio or whatever a sample is <-> integer codes.

text.py   tiktoken encodings, rank files, a small BPE trained from a corpus, and any tokenizer.json
image.py  grey levels of pixels or patches; image_vq.py: learned codes (MoVQ, any diffusers.VQModel, Emu3, Chameleon)
fsq.py    codes of an autoencoder that you train yourself, for images and for speech
audio.py  codec2 700C; audio_neural.py: Higgs Audio v2, Mimi, DAC, EnCodec, XCodec2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Anything with these members is a tokenizer; nothing needs to inherit.

    `codebooks`: the size of each codebook. Codes are interleaved frame by frame, so position i belongs to codebook
    i % len(codebooks); text and images have one.

    A tokenizer is all that the library knows of a modality. Files, looks, sounds and editing are further methods, each of which
    it may have: modality.py lists them, pictures.py and clips.py give them to one of images or of audio.
    """

    @property
    def codebooks(self) -> tuple[int, ...]: ...

    def encode(self, raw: Any) -> Int[Tensor, " n"]:
        """Codes of one sample, each smaller than its codebook."""
        ...

    def decode(self, codes: Int[Tensor, " n"]) -> Any:
        """The sample that the codes stand for."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the files it needs into `folder`; returns the `_component_` node that builds it again from there."""
        ...
