"""One table of the library's own components: what a short name in a config stands for, and where what has moved is now.

    sampler=Confidence                         is  sampler={_component_: components.samplers.Confidence}
    mdm.oldroom.ImageJudge, in an old file     is  wherever ImageJudge is now

The first two parts of it are also all that a file which travels may name (see mdm/config/trust.py).
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
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
    name: f"components.schedules.{name}"
    for name in ("Linear", "LogLinear", "Polynomial", "Cosine", "MDLMCosine", "Geometric", "Truncated")
}
ORDERS = {
    name: f"components.orders.{name}" for name in ("Sequential", "Permuted", "ByBlock", "Strided", "Explicit", "Curriculum")
}
SAMPLERS = {
    name: f"components.samplers.{name}"
    for name in (
        "Ancestral", "ReMDM", "FirstHitting", "Confidence", "Threshold", "Factor", "EntropyBounded", "Editing", "Blocks",
        "PerModality", "Psi", "Gibbs", "LeastSureFirst", "SelfCorrect", "LeftToRight", "SelfSpeculation", "LinearScale",
        "InOrder", "LearnedRates",
    )
} | SCHEDULES | ORDERS  # fmt: skip
"""What a `defaults.yaml` may hold."""

NAMES = {
    **TOKENIZERS,
    **SAMPLERS,
    "TextTokenizer.train": "components.tokenizers.text.TextTokenizer.train",
    "TextTokenizer.named": "components.tokenizers.text.TextTokenizer.named",
    "saved_tokenizer": "mdm.data.processor.saved_tokenizer",
    **{
        name: f"components.maskers.{name}"
        for name in (
            "BernoulliMasker", "FixedCountMasker", "NextToken", "UniformTimes", "LowDiscrepancyTimes", "StratifiedTimes",
        )
    },
    "OrderMasker": "components.orders.OrderMasker",
    "LearnedOrderMasker": "components.learned_orders.LearnedOrderMasker",
    "KernelCorruption": "components.corruption.KernelCorruption",
    **{name: f"components.kernels.{name}" for name in ("Mask", "Uniform", "Hybrid", "HybridLogSNR")},
    **{name: f"components.data.sources.{name}" for name in ("Folder", "Jsonl", "hugging_face", "adapted")},
    "TokenShards": "components.data.shards.TokenShards",
    "digits": "components.data.digits.digits",
    "mnist": "components.data.digits.mnist",
    "spoken_words": "components.data.speech.spoken_words",
    "spoken_digits": "components.data.pairs.spoken_digits",
    "language_reference": "components.data.reference.language_reference",
    **{name: f"mdm.models.builders.{name}" for name in ("model", "pico", "nano", "small", "base", "mdm_3b")},
    **{name: f"mdm.evaluation.judges.{name}" for name in ("ImageJudge", "SpeechJudge")},
    **{
        name: f"components.metrics.scorers.{name}"
        for name in (
            "FrechetInceptionDistance", "InceptionScore", "ClipScore", "WordErrors", "Recogniser", "SpeakerSimilarity",
        )
    },
    **{name: f"components.metrics.geneval.{name}" for name in ("GenEval", "Detector", "ClipColours")},
    "geneval_prompts": "components.metrics.geneval.prompts",
    **{
        name: f"mdm.studies.measures.{name}"
        for name in ("TrainingGradient", "ImageQuality", "Passes", "Decoders", "ClippedCounts")
    },
    "TwoMasks": "mdm.studies.schedules.TwoMasks",
}  # fmt: skip
"""Every name that a config may use in short."""

OURS = ("components.", "mdm.")

MOVED = {
    **{
        f"mdm.{name}": f"mdm.models.{name}"
        for name in ("builders", "open_models", "adapters", "quantization", "memory", "weights")
    },
    **{f"mdm.{name}": f"mdm.data.{name}" for name in ("processor", "tokenizing")},
    **{f"mdm.{name}": f"mdm.training.{name}" for name in ("run", "optim", "checkpoint", "planner", "stopping", "trial")},
    **{f"mdm.{name}": f"mdm.generation.{name}" for name in ("canvas", "editing", "prompts", "defaults")},
    **{f"mdm.{name}": f"mdm.evaluation.{name}" for name in ("judges", "scored", "harness")},
    **{f"mdm.{name}": f"mdm.pages.{name}" for name in ("report", "comparison", "demo", "film", "media")},
    **{f"mdm.{name}": f"mdm.config.{name}" for name in ("names", "trust", "protocols")},
    **{f"mdm.{name}": f"components.metrics.{name}" for name in ("scorers", "geneval", "quality")},
    "mdm.model": "mdm.models.transformer",
    "mdm.data": "mdm.data.pipeline",
    "mdm.generation": "mdm.generation.generate",
    "mdm.evaluation": "mdm.evaluation.nelbo",
    "mdm.study": "mdm.studies.table",
    "mdm.sweep": "mdm.studies.inference.sweep",
    "mdm.runs": "mdm.studies.runs",
    "mdm.study_page": "mdm.studies.page",
    "mdm.graphs": "mdm.hardware",
}
"""Where a module of ours is now that was elsewhere in an earlier version: configs and saved runs may name it so."""


def full_path(name: str) -> str:
    """The dotted path of a name: of a short one, or of one of ours that has moved since it was written down."""
    if name in NAMES:
        return NAMES[name]
    if name.startswith(OURS) and name not in NAMES.values():
        module = ".".join(name.split(".")[:2])
        if module in MOVED and not _is_module(".".join(name.split(".")[:3])):
            moved = MOVED[module] + name.removeprefix(module)
            return moved if _exists(moved) else name
        parts = name.split(".")
        for last in (".".join(parts[-2:]), parts[-1]):
            if last in NAMES and not _exists(name):
                return NAMES[last]
    return name


def in_full(node: Any) -> Any:
    """A component's node, of a name that stands in its place; what is no name stays."""
    return {"_component_": node} if isinstance(node, str) else node


def up_to_date(node: Any) -> Any:
    """Settings with every name in full and where it is now: those of a run that was saved compare equal to the same today."""
    if isinstance(node, Mapping):
        return {key: up_to_date(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [up_to_date(value) for value in node]
    return full_path(node) if isinstance(node, str) and (node in NAMES or node.startswith(OURS)) else node


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


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


def close(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """A hint where a name is nearly one of the known ones; `least`: difflib's ratio, 1 is the same word."""
    match = difflib.get_close_matches(str(name), list(known), 1, least)
    return f" (did you mean {match[0]!r}?)" if match else ""


def close_file(path: Path) -> str:
    """A hint where a file or folder that is not there has nearly the name of one beside it."""
    try:
        beside = [other.name for other in path.parent.iterdir() if other.suffix == path.suffix]
    except OSError:  # the folder is not there either
        return ""
    return close(path.name, beside)


def named(node: Any) -> Iterator[str]:
    """The components that settings name, those inside others too."""
    if isinstance(node, Mapping):
        if isinstance(node.get("_component_"), str):
            yield node["_component_"]
        for value in node.values():
            yield from named(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from named(value)
