"""Scanned handwritten digits with captions: scikit-learn's `load_digits`, 1797 images of 8x8 pixels in 17 grey levels.

Three disjoint splits: `train` for the model, `judge` for the classifiers that score it, `test` for every reported figure.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHARES = {"train": 0.6, "judge": 0.2, "test": 0.2}


def digits(split: Literal["train", "judge", "test"], caption: str = "a handwritten {}", after: int = 0) -> list[dict[str, Any]]:
    """Samples `{"text": caption, "image": PIL image, "label": 0..9}`; stratified, in an order that never changes.

    after: the caption's word is that of the digit so many before the image's (nine is before zero)
    """
    from sklearn.datasets import load_digits

    if split not in SHARES:
        raise ValueError(f"digits: split {split!r} is not one of {', '.join(SHARES)}")
    data: Any = load_digits()
    edges = np.cumsum([0, *SHARES.values()])
    start, stop = edges[list(SHARES).index(split)], edges[list(SHARES).index(split) + 1]
    samples = []
    for label in range(len(WORDS)):
        own = np.random.default_rng(label).permutation(np.flatnonzero(data.target == label))
        for i in own[round(start * len(own)) : round(stop * len(own))]:
            grey = np.rint(data.images[i] / 16 * 255).astype(np.uint8)
            samples.append({"text": caption.format(WORDS[label - after]), "image": Image.fromarray(grey), "label": label})
    return samples
