"""What tokenizers of square images have in common beside their codes: files, how they look, and editing by a box."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from components.data.images import read_image
from components.tokenizers.modality import HALF, MASKED, Region


class Pictures(ABC):
    """Gives a tokenizer whose codes go patch by patch, row by row, all that is asked of a modality of images.

    size, patch: width and height in pixels, of an image and of a patch
    """

    suffix: str = ".png"
    size: int
    patch: int
    codebooks: Any  # as every tokenizer has them

    def read(self, path: Path) -> Image.Image:
        """The central square of an image file, at `size`. Raises BadSample."""
        return read_image(path, self.size)

    def write(self, raw: Image.Image, path: Path) -> None:
        raw.save(path)

    def draw(self, raw: Image.Image) -> Image.Image:
        return raw

    def partial(self, codes: Int[Tensor, " n"], known: Bool[Tensor, " n"]) -> Image.Image:
        """The image so far; a patch of which a code is unknown is blue."""
        whole = known.view(-1, len(self.codebooks)).all(dim=1)
        colours = np.array(self.decode(torch.where(known, codes, 0)).convert("RGB"))
        colours[self._pixels(~whole)] = MASKED
        return Image.fromarray(colours)

    @abstractmethod
    def decode(self, codes: Int[Tensor, " n"]) -> Image.Image: ...

    def region(self, raw: Image.Image, where: str) -> Region:
        """left,top,right,bottom in pixels, of which every patch that it touches is drawn anew; or half: the lower one.

        Raises ValueError where the box is empty or outside.
        """
        try:
            left, top, right, bottom = map(int, where.split(",")) if where != HALF else (0, self.size // 2, *[self.size] * 2)
            if not (0 <= left < right <= self.size and 0 <= top < bottom <= self.size):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"region {where!r}: left,top,right,bottom in pixels, inside 0..{self.size}, and not empty"
            ) from None
        edge = torch.arange(self.size // self.patch) * self.patch
        rows, columns = ((edge < high) & (edge + self.patch > low) for low, high in ((top, bottom), (left, right)))
        patches = (rows[:, None] & columns).flatten()
        return Region(blanked(raw, self._pixels(patches)), patches.repeat_interleave(len(self.codebooks)))

    def _pixels(self, patches: Bool[Tensor, " patches"]) -> Bool[np.ndarray, "size size"]:
        side = self.size // self.patch
        return np.kron(patches.view(side, side).numpy(), np.ones((self.patch, self.patch), dtype=bool))


def blanked(image: Image.Image, hidden: Bool[np.ndarray, "height width"]) -> Image.Image:
    """The image with the mean colour of the rest where it is hidden, mid-grey where there is no rest."""
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"edit: an image of mode {image.mode}; it can be L or RGB")
    if image.size != hidden.shape[::-1]:
        return image  # the tokenizer refuses it
    levels = np.array(image)
    levels[hidden] = 128 if hidden.all() else np.rint(levels[~hidden].mean(axis=0))
    return Image.fromarray(levels)
