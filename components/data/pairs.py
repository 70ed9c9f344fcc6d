"""Spoken digits beside handwritten ones: every clip of a word with an image of the same digit, for tasks between the two."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from components.data.digits import mnist
from components.data.speech import spoken_words


def spoken_digits(
    split: Literal["train", "judge", "test"],
    images: int = 1,
    voices: int | None = None,
    caption: str = "a handwritten {}",
    warped: int = 0,
) -> list[dict[str, Any]]:
    """Samples `{"text", "image", "audio", "label", "voice"}`: each clip beside `images` images of its digit.

    voices: only the first of the split's; None is all. Which images is drawn once, the same in every process.
    warped: copies of each image to draw from beside it (see components/data/digits.py)
    """
    by_label: list[list[dict[str, Any]]] = [[] for _ in range(10)]
    for sample in mnist(split, caption, warped=warped):
        by_label[sample["label"]].append(sample)
    rng = np.random.default_rng(0)
    samples = []
    for clip in spoken_words(split, voices=voices):
        own = by_label[clip["label"]]
        samples += [{**clip, **own[i]} for i in rng.choice(len(own), size=images, replace=False)]
    return samples
