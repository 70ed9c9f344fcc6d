"""Judges of the quickstart's samples: classifiers of digits and of spoken words, trained on the `judge` splits alone.

They score what the model draws and says; their own accuracy on the held-out `test` splits is reported beside every score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.data.bad import usable
from components.metrics.mel import SAMPLE_RATE, log_mel
from components.metrics.quality import distinct, frechet
from mdm.config import instantiate
from mdm.data.processor import Processor
from mdm.generation.generate import Generated


class ImageJudge:
    """A support vector machine on the main components of pixels (scikit-learn)."""

    COMPONENTS = 64

    def __init__(self, samples: Sequence[dict]) -> None:
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        pixels = self._pixels([s["image"] for s in samples])
        self.components = PCA(min(self.COMPONENTS, *pixels.shape), random_state=0).fit(pixels)
        self.model = SVC(C=10.0, gamma="scale").fit(self.components.transform(pixels), _labels(samples))

    def classify(self, images: Sequence[Any]) -> np.ndarray:
        """The digit in each image."""
        return self.model.predict(self.features(images))

    def features(self, images: Sequence[Any]) -> np.ndarray:
        """What it classifies by, `[images, 64]`; Frechet distances are taken there."""
        return self.components.transform(self._pixels(images))

    @staticmethod
    def _pixels(images: Sequence[Any]) -> np.ndarray:
        return np.stack([np.asarray(i, dtype=float).ravel() / 255 for i in images])


class SpeechJudge:
    """A support vector machine on the log-mel spectrogram (scikit-learn).

    Spectrograms are stretched to one length and freed of their mean (the voice's timbre and loudness), so that the judge hears
    the word and not who says it, or how fast.
    """

    FRAMES = 20

    def __init__(self, samples: Sequence[dict]) -> None:
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        raw = self._spectra([s["audio"] for s in samples])
        self.scaler = StandardScaler().fit(raw)
        self.components = PCA(32, random_state=0).fit(self.scaler.transform(raw))
        self.model = SVC(C=10.0, gamma="scale").fit(self.scaler.transform(raw), _labels(samples))

    def classify(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """The digit spoken in each clip."""
        return self.model.predict(self.scaler.transform(self._spectra(clips)))

    def features(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        """The 32 main components of what it classifies by, `[clips, 32]`; Frechet distances are taken there."""
        return self.components.transform(self.scaler.transform(self._spectra(clips)))

    def _spectra(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        features = []
        for clip in clips:
            mel = log_mel(clip)
            at = np.linspace(0, len(mel) - 1, self.FRAMES)
            stretched = [np.interp(at, np.arange(len(mel)), band) for band in (mel - mel.mean(axis=0)).T]
            features.append(np.append(np.stack(stretched), 10 * len(clip) / SAMPLE_RATE))
        return np.stack(features)


def coded(samples: Sequence[dict], processor: Processor, modality: str) -> list[dict]:
    """Real samples as the tokenizer hands them back: what a perfect model could make."""
    return [{**s, modality: processor.decode(modality, processor.encode(modality, s[modality]))} for s in samples]


def train_judge(node: Mapping[str, Any], key: str, processor: Processor, modality: str) -> Any:
    """The judge of a config's node, trained on its `samples` (if any) as they are and as the tokenizer hands them back."""
    if "samples" not in node:
        return instantiate(node, key)
    training = list(usable(instantiate(node["samples"], f"{key}.samples")))
    own = {name: value for name, value in node.items() if name != "samples"}
    return instantiate(own, key, samples=[*training, *coded(training, processor, modality)])


def distance(judge: Any, made: Sequence[Any], real: Sequence[Any]) -> dict[str, float]:
    """The Frechet distance between what was made and held-out samples; none without features, or of few samples."""
    if not hasattr(judge, "features") or min(len(made), len(real)) < 2:
        return {}
    return {"frechet": frechet(judge.features(made), judge.features(real))}


class Judged:
    """Scores samples of known classes by a judge: accuracy, Frechet distance to held-out samples, share of distinct ones."""

    def __init__(self, judge: Any, processor: Processor, modality: str, test: Sequence[dict[str, Any]]) -> None:
        """test: held-out samples, seen as the tokenizer hands them back."""
        self.judge, self.modality = judge, modality
        self.labels = [s["label"] for s in test]
        self.items = [s[modality] for s in coded(test, processor, modality)]
        self.held_out = self.judge.features(self.items)

    def __call__(self, made: Generated, classes: Sequence[int]) -> dict[str, float]:
        """The figures of what was generated; classes: what was asked for."""
        outputs = [o[self.modality] for o in made.outputs]
        tokens = [row[m].tolist() for row, m in zip(made.tokens, made.batch.maskable, strict=True)]
        return {
            "forwards": made.forwards.double().mean().item(),
            "accuracy": accuracy(self.judge.classify(outputs), classes),
            "frechet": frechet(self.judge.features(outputs), self.held_out),
            "distinct": distinct(tokens),
        }

    def real(self) -> dict[str, float]:
        """The same of the held-out samples: the judge's accuracy, and the distance between their halves."""
        order = np.random.default_rng(0).permutation(len(self.held_out))
        halves = frechet(self.held_out[order[::2]], self.held_out[order[1::2]])
        return {"accuracy": accuracy(self.judge.classify(self.items), self.labels), "frechet_of_halves": halves}


def _labels(samples: Sequence[dict]) -> np.ndarray:
    return np.array([s["label"] for s in samples])


def accuracy(predicted: np.ndarray, labels: Sequence[int]) -> float:
    return float(np.mean(predicted == np.asarray(labels)))


def class_in_text(text: str, words: Sequence[str]) -> int:
    """Index of the one class word in a text; -1 where there is none, or more than one."""
    found = [i for i, word in enumerate(words) if word in text.split()]
    return found[0] if len(found) == 1 else -1
