"""One table of the library's own components: what a short name in a config stands for, and where what has moved is now.

    sampler=Confidence                         is  sampler={_component_: components.samplers.Confidence}
    mdm.oldroom.ImageJudge, in an old file     is  wherever ImageJudge is now

The first two parts of it are also all that a file which travels may name (see mdm/trust.py).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

TOKENIZERS = {
    "TextTokenizer.from_ranks": "components.tokenizers.text.TextTokenizer.from_ranks",
    "JsonTokenizer": "components.tokenizers.text.JsonTokenizer",
    "GreyPatchTokenizer": "components.tokenizers.image.GreyPatchTokenizer",
    "VQImageTokenizer": "components.tokenizers.image_vq.VQImageTokenizer",
    "FSQImageTokenizer": "components.tokenizers.fsq.FSQImageTokenizer",
    "FSQMelTokenizer": "components.tokenizers.fsq.FSQMelTokenizer",
    "Codec2Tokenizer": "components.tokenizers.audio.Codec2Tokenizer",
    "NeuralAudioTokenizer": "components.tokenizers.audio_neural.NeuralAudioTokenizer",
}
"""What a model's folder, or one of token shards, may hold: tokenizers as they were saved."""

SCHEDULES = {
    name: f"components.schedules.{name}" for name in ("Linear", "LogLinear", "Polynomial", "Cosine", "Geometric", "Truncated")
}
SAMPLERS = {
    name: f"components.samplers.{name}"
    for name in (
        "Ancestral", "ReMDM", "FirstHitting", "Confidence", "Threshold", "EntropyBounded", "Blocks", "PerModality",
        "LinearScale",
    )
} | SCHEDULES  # fmt: skip
"""What a `defaults.yaml` may hold."""

NAMES = {
    **TOKENIZERS,
    **SAMPLERS,
    "TextTokenizer.train": "components.tokenizers.text.TextTokenizer.train",
    "TextTokenizer.named": "components.tokenizers.text.TextTokenizer.named",
    "saved_tokenizer": "mdm.processor.saved_tokenizer",
    **{
        name: f"components.maskers.{name}"
        for name in (
            "BernoulliMasker", "FixedCountMasker", "NextToken", "UniformTimes", "LowDiscrepancyTimes", "StratifiedTimes",
        )
    },
    **{name: f"components.data.sources.{name}" for name in ("Folder", "Jsonl", "hugging_face", "adapted")},
    "TokenShards": "components.data.shards.TokenShards",
    "digits": "components.data.digits.digits",
    "spoken_words": "components.data.speech.spoken_words",
    "spoken_digits": "components.data.pairs.spoken_digits",
    "language_reference": "components.data.reference.language_reference",
    **{name: f"mdm.builders.{name}" for name in ("model", "pico", "nano", "small", "base", "mdm_3b")},
    **{name: f"mdm.judges.{name}" for name in ("ImageJudge", "SpeechJudge")},
    **{
        name: f"mdm.scorers.{name}"
        for name in (
            "FrechetInceptionDistance", "InceptionScore", "ClipScore", "WordErrors", "Recogniser", "SpeakerSimilarity",
        )
    },
    **{name: f"mdm.geneval.{name}" for name in ("GenEval", "Detector", "ClipColours")},
    "geneval_prompts": "mdm.geneval.prompts",
    **{name: f"mdm.studies.measures.{name}" for name in ("TrainingGradient", "ImageQuality")},
    "TwoMasks": "mdm.studies.schedules.TwoMasks",
}  # fmt: skip
"""Every name that a config may use in short."""

OURS = ("components.", "mdm.")


def full_path(name: str) -> str:
    """The dotted path of a name: of a short one, or of one of ours that has moved since it was written down."""
    if name in NAMES:
        return NAMES[name]
    if name.startswith(OURS) and name not in NAMES.values():
        parts = name.split(".")
        for last in (".".join(parts[-2:]), parts[-1]):
            if last in NAMES and not _exists(name):
                return NAMES[last]
    return name


def _exists(path: str) -> bool:
    """Whether one of our own dotted paths still leads somewhere."""
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[split:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


def close(name: str, known: Iterable[str]) -> str:
    """A hint where a name is nearly one of the known ones."""
    match = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {match[0]!r}?)" if match else ""
