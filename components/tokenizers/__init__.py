"""One protocol for every tokenizer: raw text, image or audio <-> integer codes.

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

    Who edits, or looks at what is half made, asks for more: of an image's, `size` and `patch` (pixels); of an audio's,
    `sample_rate`, `frame_samples`, and `frames_of(length)` where its codes do not come frame by frame.
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
