"""Encoding and decoding by every tokenizer that needs no download, in tokens a second; learned ones with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Result, interleaved, rows

PRESETS = {
    "smoke": {"documents": 20, "images": 8, "vq_images": 0, "clips": 4, "neural_clips": 0, "warmup": 1, "repeats": 2},
    "cpu": {"documents": 200, "images": 200, "vq_images": 1, "clips": 50, "neural_clips": 2, "warmup": 1, "repeats": 3},
    "gpu": {"documents": 200, "images": 200, "vq_images": 16, "clips": 50, "neural_clips": 16, "warmup": 2, "repeats": 5},
}


def run(preset: str) -> Result:
    p, unmeasured = PRESETS[preset], []
    work = [text(p["documents"]), images(p["images"])]
    try:
        work.append(speech(p["clips"]))
    except ImportError as error:
        unmeasured.append(f"codec2: {error}")
    if p["vq_images"]:
        try:
            work += learned(p["vq_images"], p["neural_clips"])
        except ImportError as error:
            unmeasured.append(f"MoVQ and Higgs: {error}")
    found = [
        row
        for name, variants, tokens in work
        for row in rows(interleaved(variants, p["warmup"], p["repeats"]), tokens, group=name)
    ]
    return Result("tokenizers", preset, "tokens/s", p, found, {}, unmeasured)


Work = tuple[str, Mapping[str, Callable[[], object]], int]


def both(name: str, tokenizer: Any, items: list[Any]) -> Work:
    """Encoding and decoding of items, and their tokens."""
    codes = [tokenizer.encode(item) for item in items]
    variants = {
        "encode": lambda: [tokenizer.encode(item) for item in items],
        "decode": lambda: [tokenizer.decode(c) for c in codes],
    }
    return name, variants, sum(len(c) for c in codes)


def text(count: int) -> Work:
    from components.data.reference import language_reference
    from components.tokenizers.text import TextTokenizer

    documents = [s["text"] for s in language_reference("train")][:count]
    return both("text, BPE of 1024", TextTokenizer.train(documents, vocab_size=1024), documents)


def images(count: int) -> Work:
    from components.tokenizers.image import GreyPatchTokenizer

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)]
    return both("image, grey patches", GreyPatchTokenizer(size=8, patch=2, levels=3), pictures)


def speech(count: int) -> Work:
    from components.tokenizers.audio import Codec2Tokenizer

    return both("speech, codec2", Codec2Tokenizer(), noise(count, 8000))


def learned(pictures: int, clips: int) -> list[Work]:
    from components.tokenizers.audio_neural import NeuralAudioTokenizer
    from components.tokenizers.image_vq import VQImageTokenizer

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    big = [Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(pictures)]
    movq = both("image, MoVQ 256 px", VQImageTokenizer(path=None, size=256), big)
    return [movq, both("speech, Higgs 24 kHz", NeuralAudioTokenizer(path=None, family="higgs"), noise(clips, 24_000))]


def noise(count: int, rate: int) -> list[np.ndarray]:
    """Clips of half a second."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, rate // 2).astype(np.float32) for _ in range(count)]
