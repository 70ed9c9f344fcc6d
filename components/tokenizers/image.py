"""Image tokenizer without weights: the grey levels of a patch, read as the digits of one number.

    code = sum_k level_k * levels^k    over the patch's pixels k, level in 0 .. levels - 1

patch = 1 is a token per pixel: lossless for an image that has no more than `levels` evenly spaced grey levels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from components.data.images import square
from components.tokenizers.pictures import Pictures


class GreyPatchTokenizer(Pictures):
    """Square grey images <-> one code a patch, row by row.

    size:   width and height of the image, in pixels
    patch:  width and height of a patch, in pixels
    levels: grey levels kept, evenly spaced from black to white
    """

    def __init__(self, size: int, patch: int = 1, levels: int = 256) -> None:
        if not 1 <= patch <= size or size % patch:
            raise ValueError(f"image tokenizer: size {size} is not a multiple of patch = {patch}")
        if levels < 2 or levels > 256 or patch * patch * math.log2(levels) > 20:
            raise ValueError(
                f"image tokenizer: {levels} levels in {patch}x{patch} patches; levels must be 2..256 and the codes at most 2^20"
            )
        self.size: int = size
        self.patch: int = patch
        self.levels: int = levels

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (self.levels ** (self.patch * self.patch),)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return (self.size // self.patch) ** 2

    def encode(self, raw: Image.Image) -> Int[Tensor, " n"]:
        """Codes of an image, as a viewer shows it, in grey. Raises ValueError where its size is another."""
        grey = np.asarray(square(raw, self.size, "L"), dtype=np.float64)
        level = np.rint(grey / 255 * (self.levels - 1)).astype(np.int64)
        side = self.size // self.patch
        patches = level.reshape(side, self.patch, side, self.patch).transpose(0, 2, 1, 3).reshape(side * side, -1)
        return torch.from_numpy(patches @ self._place_values)

    def decode(self, codes: Int[Tensor, " n"]) -> Image.Image:
        """The image of `num_tokens` codes."""
        side = self.size // self.patch
        level = codes.numpy()[:, None] // self._place_values % self.levels
        grey = level.reshape(side, side, self.patch, self.patch).transpose(0, 2, 1, 3).reshape(self.size, self.size)
        return Image.fromarray(np.rint(grey / (self.levels - 1) * 255).astype(np.uint8))

    @property
    def _place_values(self) -> np.ndarray:
        return self.levels ** np.arange(self.patch * self.patch, dtype=np.int64)

    def save(self, folder: Path) -> dict[str, Any]:
        return {
            "_component_": "components.tokenizers.image.GreyPatchTokenizer",
            "size": self.size,
            "patch": self.patch,
            "levels": self.levels,
        }
