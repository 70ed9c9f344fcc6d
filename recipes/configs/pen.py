"""Handwriting as a modality: words as the path of a pen. All that the library is told of it is here, in a file of yours.

    mdm cp quickstart_pen my/pen.yaml          this file comes with its config
    mdm run quickstart --config my/pen.yaml

A writing is a list of strokes. A stroke is an array `[points, 2]` of x (to the right) and y (downwards), in heights of the
letter x; between two strokes the pen is lifted. The words come from the vector fonts of the package `hershey-fonts`.

    written_words, written_and_spoken    the data: samples with a "pen"
    PenTokenizer                         a writing <-> two codes for every four steps of the pen
    PenJudge                             reads what is drawn
"""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from components.data.digits import WORDS
from components.data.speech import spoken_words
from components.tokenizers.modality import MASKED

Stroke = Float[np.ndarray, "points 2"]
Writing = list[Stroke]
Split = Literal["train", "judge", "test"]

# ---- data ----

FONTS = {  # sans serif, script, italic, roman and gothic: no font is in two splits
    "train": ("futural", "cursive", "timesi", "rowmant", "gothgbt"),
    "judge": ("scriptc", "timesr", "gothitt"),
    "test": ("futuram", "timesib"),
}
X_HEIGHT = 14  # of the fonts, in their units


def written_words(split: Split, hands: int = 24, fonts: int | None = None, care: float = 0.0, seed: int = 0) -> list[dict]:
    """Samples `{"text": "a written seven", "pen": writing, "label": 0..9, "word", "font"}`, the same for the same seed.

    hands: how many people write every word in every font
    fonts: only the first of the split's; None is all
    care:  how near to the font they stay, from 0 to 1 (as printed)
    """
    if split not in FONTS:
        raise ValueError(f"written_words: split {split!r} is not one of {', '.join(FONTS)}")
    samples = []
    for font in FONTS[split][:fonts]:
        for label, word in enumerate(WORDS):
            for hand in range(hands):
                rng = np.random.default_rng([seed, *font.encode(), label, hand])
                pen = by_hand(lettering(font, word), rng, care)
                samples.append({"text": f"a written {word}", "pen": pen, "label": label, "word": word, "font": font})
    return samples


def written_and_spoken(split: Split, hands: int = 4, voices: int | None = None, seed: int = 0) -> list[dict]:
    """Samples with an "audio" too: each clip beside `hands` writings of its word, drawn once.

    voices: only the first of the split's; None is all
    """
    rng, by_label = np.random.default_rng(seed), [[] for _ in WORDS]
    for sample in written_words(split, seed=seed):
        by_label[sample["label"]].append(sample)
    return [
        {**clip, **by_label[clip["label"]][i]}
        for clip in spoken_words(split, voices=voices)
        for i in rng.choice(len(by_label[clip["label"]]), size=hands, replace=False)
    ]


@functools.cache
def lettering(font: str, word: str) -> Writing:
    """A word in a font, every line of it once: thick letters are outlines, and a pen follows one of the two sides."""
    writing, ink = [], np.zeros((0, 4))
    for points in _letters(font).strokes_for_text(word):
        line = np.array(list(points), dtype=float).reshape(-1, 2) / X_HEIGHT
        if length(line) == 0:
            continue
        path = evenly(line, max(3, round(length(line) / 0.05)))
        heading = np.gradient(path, axis=0)
        heading /= np.linalg.norm(heading, axis=1, keepdims=True) + 1e-9
        near = np.linalg.norm(path[:, None] - ink[:, :2], axis=2) < 0.18
        drawn = (near & (np.abs(heading @ ink[:, 2:].T) > 0.75)).any(axis=1)  # beside ink of the same direction
        ink = np.concatenate([ink, np.concatenate([path, heading], axis=1)])
        edges = np.flatnonzero(np.diff(np.concatenate([[True], drawn, [True]])))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            stroke = path[start:stop]
            if writing and np.linalg.norm(stroke[0] - writing[-1][-1]) < 0.07:  # the pen is not lifted
                writing[-1] = np.concatenate([writing[-1], stroke])
            elif stop - start >= 3:  # a smaller one is a speck
                writing.append(stroke)
    return writing


@functools.cache
def _letters(font: str) -> Any:
    from HersheyFonts import HersheyFonts

    return HersheyFonts(load_default_font=font)


def by_hand(writing: Writing, rng: np.random.Generator, care: float) -> Writing:
    """As somebody might write it: slanted, larger, wider, not quite level, and in waves."""
    slant, size, width, turn = rng.uniform(care - 1, 1 - care, size=4) * (0.25, 0.15, 0.15, 0.07)
    level = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shape = np.exp(size) * level @ np.array([[np.exp(width), -slant], [0, np.exp(-width)]])
    height, period, phase = rng.uniform(0, 0.06 * (1 - care), 2), rng.uniform(1.5, 4, 2), rng.uniform(0, 2 * np.pi, 2)
    return [(s + height * np.sin(2 * np.pi * s[:, ::-1] / period + phase)) @ shape.T for s in writing]


def length(stroke: Stroke) -> float:
    return float(np.linalg.norm(np.diff(stroke, axis=0), axis=1).sum())


def evenly(stroke: Stroke, steps: int) -> Stroke:
    """The stroke in so many steps of one length: `steps + 1` points."""
    way = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(stroke, axis=0), axis=1))])
    at = np.linspace(0, way[-1], steps + 1)
    return np.stack([np.interp(at, way, stroke[:, axis]) for axis in (0, 1)], axis=1)


# ---- tokenizer ----

STEPS = 4  # of the pen in a frame
LIFT = 3.0  # what a lifted pen weighs beside distances: enough that no code takes the one for the other
INK = (20, 20, 30)
SCALE, WIDTH, HEIGHT = 18, 200, 64  # of a picture, in pixels
SVG = "http://www.w3.org/2000/svg"


class PenTokenizer:
    """Writings <-> two codes a frame, by residual vector quantization.

        frame = (lifted, start, point 1 .. point 4), from where the pen is     coarse[code 1] + fine[code 2]

    A stroke is a whole number of frames of about one length, so that the pen is lifted between frames only. A frame begins
    where the *decoded* pen is: it corrects the errors of those before it.

    coarse, fine: the codebooks;  frame: the length of a frame, in x-heights
    """

    suffix = ".svg"

    def __init__(self, coarse: Float[np.ndarray, "codes 11"], fine: Float[np.ndarray, "codes 11"], frame: float) -> None:
        self.coarse, self.fine, self.frame = coarse, fine, frame

    @classmethod
    def train(cls, samples: Sequence[dict], sizes: Sequence[int] = (256, 64), frame: float = 1.0) -> PenTokenizer:
        """Codebooks of these sizes: k-means of the frames, then of what the first one leaves (scikit-learn)."""
        from sklearn.cluster import MiniBatchKMeans

        none = np.zeros((0, 3 + 2 * STEPS))
        tokenizer = cls(none, none, frame)
        for _ in range(2):  # then again, of frames that begin where the first codebooks bring the pen
            residual, books = np.concatenate([tokenizer._follow(s["pen"])[1] for s in samples]), []
            for size in sizes:
                means = MiniBatchKMeans(size, batch_size=4096, max_iter=30, random_state=0).fit(residual)
                books.append(means.cluster_centers_)
                residual = residual - means.cluster_centers_[means.labels_]
            tokenizer = cls(books[0], books[1], frame)
        return tokenizer

    @property
    def codebooks(self) -> tuple[int, ...]:
        return len(self.coarse), len(self.fine)

    def encode(self, raw: Writing) -> Int[Tensor, " n"]:
        """Codes of a writing, frame by frame. Raises ValueError for what is none."""
        if not raw or any(np.ndim(s) != 2 or np.shape(s)[1] != 2 or not np.size(s) or not np.isfinite(s).all() for s in raw):
            raise ValueError("pen tokenizer: expected a list of strokes, each an array [points, 2] of finite numbers")
        return torch.tensor(self._follow(raw)[0], dtype=torch.long).flatten()

    def _follow(self, writing: Writing) -> tuple[list[tuple[int, int]], Float[np.ndarray, "frames 11"]]:
        """The codes of each frame, and what they stand for. Without codebooks yet, the pen is where it should be."""
        codes, frames, pen = [], [], writing[0][0]  # where on the paper a writing begins is not told
        for stroke in writing:
            count = max(1, round(length(stroke) / self.frame))
            points = evenly(stroke, count * STEPS)
            for i in range(0, count * STEPS, STEPS):
                start = points[0] if i == 0 else pen
                frames.append(np.concatenate([[LIFT * (i == 0)], start - pen, (points[i + 1 : i + STEPS + 1] - pen).ravel()]))
                if not len(self.coarse):
                    pen = points[i + STEPS]
                    continue
                distance = ((self.coarse - frames[-1]) ** 2).sum(axis=1)
                best = np.argsort(distance)[:8]  # the nearest alone may leave more than the second codebook can mend
                left = frames[-1] - self.coarse[best]
                errors = ((left[:, None] - self.fine) ** 2).sum(axis=2)
                one, two = np.unravel_index(errors.argmin(), errors.shape)
                codes.append((int(best[one]), int(two)))
                pen = pen + self.coarse[best[one], -2:] + self.fine[two, -2:]
        return codes, np.array(frames)

    def decode(self, codes: Int[Tensor, " n"]) -> Writing:
        """The writing of the complete frames among the codes, from (0, 0) on."""
        pen, writing = np.zeros(2), []
        for one, two in codes[: len(codes) // 2 * 2].reshape(-1, 2).tolist():
            lifted, way = self._way(pen, self.coarse[one] + self.fine[two])
            if lifted or not writing:
                writing.append(way)
            else:
                writing[-1] = np.concatenate([writing[-1], way[1:]])
            pen = way[-1]
        return writing

    @staticmethod
    def _way(pen: np.ndarray, frame: np.ndarray) -> tuple[bool, Stroke]:
        """Whether the pen is lifted before a frame, and the points that it then goes through."""
        lifted, way = bool(frame[0] > LIFT / 2), pen + frame[1:].reshape(-1, 2)
        return lifted, way if lifted else np.concatenate([pen[None], way[1:]])

    def save(self, folder: Path) -> dict[str, Any]:
        np.savez(folder / "pen.npz", coarse=self.coarse, fine=self.fine)
        return {"_component_": f"{__name__}.PenTokenizer.load", "path": "pen.npz", "frame": self.frame}

    @classmethod
    def load(cls, path: str, frame: float) -> PenTokenizer:
        with np.load(path) as books:
            return cls(books["coarse"], books["fine"], frame)

    # Beside its codes, a modality may have files, pictures, and films of how it is made

    def write(self, raw: Writing, path: Path) -> None:
        """An SVG file, a line for each stroke."""
        every = np.concatenate([*raw, np.zeros((1, 2))])
        box = " ".join(f"{v:.3f}" for v in (*(every.min(axis=0) - 1), *(np.ptp(every, axis=0) + 2)))
        lines = (f'<polyline points="{" ".join(f"{x:.3f},{y:.3f}" for x, y in stroke)}"/>' for stroke in raw)
        style = 'fill="none" stroke="black" stroke-width="0.1"'
        path.write_text(f'<svg xmlns="{SVG}" viewBox="{box}"><g {style}>{"".join(lines)}</g></svg>')

    def read(self, path: Path) -> Writing:
        """The polylines of an SVG file, in the size that they were written in. Raises ValueError where there is none."""
        try:
            lines = ElementTree.parse(path).iter(f"{{{SVG}}}polyline")
            strokes = [np.array(line.get("points", "").replace(",", " ").split(), dtype=float).reshape(-1, 2) for line in lines]
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"{path}: no SVG with polylines in it ({error})") from error
        if not strokes:
            raise ValueError(f"{path}: it holds no polyline")
        return strokes

    def draw(self, raw: Writing) -> Image.Image:
        """The writing on a sheet of paper, as large for every word."""
        return _sheet(raw, [INK] * len(raw))

    def partial(self, codes: Int[Tensor, " n"], known: Bool[Tensor, " n"]) -> Image.Image:
        """A writing so far: of a frame whose second code is unknown, its coarse shape; an unknown one is a blue step."""
        pen, ways, colours = np.zeros(2), [], []
        step = np.outer(np.arange(STEPS + 1) / STEPS, self.coarse[:, -2:].mean(axis=0) * (1, 0))
        for (one, two), (first, second) in zip(codes.reshape(-1, 2).tolist(), known.reshape(-1, 2).tolist(), strict=True):
            fine = self.fine[two] if second else 0
            ways.append(self._way(pen, self.coarse[one] + fine)[1] if first else pen + step)
            colours.append(INK if first else MASKED)
            pen = ways[-1][-1]
        return _sheet(ways, colours)


def _sheet(strokes: Writing, colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Lines on paper, from its left margin on; smaller where they would not fit."""
    fine, margin = 4, 4  # drawn larger, for smooth edges
    size = np.array([WIDTH, HEIGHT])
    sheet = Image.new("RGB", tuple(size * fine), "white")
    if strokes:
        pen, every = ImageDraw.Draw(sheet), np.concatenate(strokes)
        low, high = every.min(axis=0), every.max(axis=0)
        scale = min(SCALE, *((size - 2 * margin) / np.maximum(high - low, 1e-6)))
        corner = np.array([margin, HEIGHT / 2 - (high - low)[1] / 2 * scale])
        for stroke, colour in zip(strokes, colours, strict=True):
            line = (corner + (stroke - low) * scale) * fine
            pen.line(line.ravel().tolist(), fill=colour, width=6, joint="curve")
    return sheet.resize(tuple(size), Image.Resampling.LANCZOS)


# ---- judge ----


class PenJudge:
    """A support vector machine on a blurred picture of the writing, whatever its size and place (scikit-learn)."""

    ROWS, COLUMNS = 20, 40

    def __init__(self, samples: Sequence[dict]) -> None:
        from sklearn.svm import SVC

        writings, labels = [s["pen"] for s in samples], [s["label"] for s in samples]
        self.model = SVC(C=10.0, gamma="scale").fit(self.features(writings), labels)

    def classify(self, writings: Sequence[Writing]) -> np.ndarray:
        """The digit whose word is written."""
        return self.model.predict(self.features(writings))

    def features(self, writings: Sequence[Writing]) -> np.ndarray:
        """What it classifies by, `[writings, pixels]`; Frechet distances are taken there."""
        from scipy.ndimage import gaussian_filter

        pictures = np.zeros((len(writings), self.ROWS, self.COLUMNS))
        for picture, writing in zip(pictures, writings, strict=True):
            if writing:  # where a canvas ends at once, nothing was written
                ink = np.concatenate([evenly(s, max(2, round(length(s) * 14))) for s in writing])
                low, high = ink.min(axis=0), ink.max(axis=0)
                place = 2 + (ink - low) / np.maximum(high - low, 0.5) * (self.COLUMNS - 5, self.ROWS - 5)
                x, y = np.rint(place).astype(int).T
                picture[y, x] = 1
                picture[:] = gaussian_filter(picture, 1.6)
        return pictures.reshape(len(writings), -1)
