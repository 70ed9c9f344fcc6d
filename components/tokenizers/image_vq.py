"""Learned image codes: MoVQ and every other `diffusers.VQModel`, and the tokenizers of Emu3 and Chameleon from `transformers`.

An encoder maps an image to a grid of vectors, each replaced by its nearest entry of a codebook; the codes go row by row.

    VQImageTokenizer("kandinsky-community/kandinsky-2-1", 256, subfolder="movq")     32 x 32 tokens of 16,384 codes
    VQImageTokenizer("path/to/emu3_vq", 512, family="emu3")

Without a `path` the weights are random, of the shape that `config` says: a pipeline can be tried before anything is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from components.data.images import square
from components.tokenizers.pictures import Pictures
from components.tokenizers.pretrained import pretrained

MOVQ: dict[str, Any] = {
    "norm_type": "spatial",
    "num_vq_embeddings": 16384,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "block_out_channels": (128, 256, 256, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}
"""The shape of Kandinsky's MoVQ (2209.09002), 67.8 M parameters: what random weights have if no config is given."""


class VQImageTokenizer(Pictures):
    """Square colour images <-> codes of a learned codebook, row by row.

    path:      a folder or a name on the hub; None is random weights
    size:      width and height of the images, in pixels
    family:    "vq" (diffusers.VQModel), "emu3", "chameleon" (whose decoder transformers lacks: it encodes only)
    subfolder: of the path
    config:    for random weights: the arguments of the model's config; None is MoVQ, or the family's own default
    device:    where the model runs

    Raises ValueError for a size that does not divide into the model's patches.
    """

    def __init__(
        self,
        path: str | None,
        size: int,
        family: Literal["vq", "emu3", "chameleon"] = "vq",
        subfolder: str | None = None,
        config: dict[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        if family not in ("vq", "emu3", "chameleon"):
            raise ValueError(f"image tokenizer: family {family!r} is not one of vq, emu3, chameleon")
        self.family = family
        self.size: int = size
        self.device: str = device
        self.model: Any = _build(family, path, subfolder, config).to(device).eval().requires_grad_(False)
        own = self.model.config
        levels = len(own.block_out_channels if family == "vq" else own.channel_multiplier)
        self.patch: int = 2 ** (levels - 1)
        if size < self.patch or size % self.patch:
            raise ValueError(f"image tokenizer: size {size} is not a multiple of {self.patch}, the pixels that are one token")
        sizes = {"vq": "num_vq_embeddings", "emu3": "codebook_size", "chameleon": "num_embeddings"}
        self.codebooks: tuple[int, ...] = (int(getattr(own, sizes[family])),)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return (self.size // self.patch) ** 2

    @torch.no_grad()
    def encode(self, raw: Image.Image) -> Int[Tensor, " n"]:
        """Codes of an image, as a viewer shows it. Raises ValueError where its size is another."""
        levels = torch.from_numpy(np.array(square(raw, self.size, "RGB"), dtype=np.float32)).to(self.device)
        x = (levels / 127.5 - 1).permute(2, 0, 1)[None]
        if self.family == "emu3":
            codes = self.model.encode(x, image_sizes=torch.tensor([[self.size, self.size]])).image_tokens[0]
        elif self.family == "chameleon":
            codes = self.model.encode(x).image_tokens
        else:
            codes = self.model.quantize(self.model.encode(x).latents)[2][2]
        return codes.flatten().long().cpu()

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, " n"]) -> Image.Image:
        """The image of `num_tokens` codes. Raises ValueError for a model without a decoder."""
        side = self.size // self.patch
        grid = codes.to(self.device).view(1, side, side)
        if self.family == "chameleon":
            raise ValueError("image tokenizer: transformers has no decoder for Chameleon's codes; images can only be read")
        if self.family == "emu3":
            pixels = self.model.decode(grid)[0]
        else:
            entry = self.model.quantize.get_codebook_entry(grid.flatten(), (1, side, side, self.model.config.vq_embed_dim))
            pixels = self.model.decode(entry, force_not_quantize=True).sample[0]
        return _to_image(pixels.float().cpu())

    def save(self, folder: Path) -> dict[str, Any]:
        self.model.save_pretrained(folder / "image_tokenizer")
        return {
            "_component_": "components.tokenizers.image_vq.VQImageTokenizer",
            "path": "image_tokenizer",
            "size": self.size,
            "family": self.family,
        }


def _to_image(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    return Image.fromarray(levels.numpy().astype(np.uint8))


def _build(family: str, path: str | None, subfolder: str | None, config: dict[str, Any] | None) -> Any:
    if family == "vq":
        from diffusers.models.autoencoders.vq_model import VQModel

        if path is None:
            return VQModel(**(MOVQ if config is None else config))
        return pretrained(VQModel, path, subfolder)
    import transformers

    model, settings = {
        "emu3": (transformers.Emu3VQVAE, transformers.Emu3VQVAEConfig),
        "chameleon": (transformers.ChameleonVQVAE, transformers.ChameleonVQVAEConfig),
    }[family]
    if path is None:
        return model(settings(**(config or {})))
    return pretrained(model, path, subfolder)
