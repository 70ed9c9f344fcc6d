"""Scores of what a model generates: FID, Inception score, CLIP score, word and character errors, speaker similarity.

A scorer takes what was generated and the held-out samples whose parts were the prompts, and returns figures by name. The
networks behind it are the user's: a name on the hub, a local folder, or any object of theirs.

    scored:
      captions:
        task: text_to_image
        test: {_component_: components.data.sources.Jsonl, path: captions.jsonl}
        scorers:
          clip: {_component_: components.metrics.scorers.ClipScore, model: openai/clip-vit-base-patch16}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from components.files import in_one_line
from components.resampling import resample

Sample = Mapping[str, Any]


@runtime_checkable
class Scorer(Protocol):
    """Anything that is called like this is a scorer; nothing needs to inherit.

    It may have `generated`, the modality it looks at, and `reference`, what the held-out samples must hold: `missing` then
    finds a mistake before anything is generated.
    """

    def __call__(self, made: Sequence[Sample], given: Sequence[Sample]) -> dict[str, float]:
        """Figures by name.

        made:  what was generated, by modality; `sample_rate` beside audio, in Hz
        given: the sample whose parts were the prompt of each; what it holds of the generated modality is the reference
        """
        ...


def missing(scorer: Scorer, generated: Sequence[str], given: Sequence[Sample]) -> str | None:
    """What a scorer needs and will not get, in words; None where it lacks nothing."""
    wanted = getattr(scorer, "generated", None)
    if wanted is not None and wanted not in generated:
        return f"it looks at {wanted}, and the task generates {', '.join(generated)}"
    for key in getattr(scorer, "reference", ()):
        if any(key not in s for s in given):
            return f"it compares with `{key}`, and the samples of test have {', '.join(given[0])}"
    return None


class FrechetInceptionDistance:
    """Frechet distance between features of generated and of real images (1706.08500), by torchmetrics.

    feature: 64, 192, 768 or 2048, a layer of the Inception network of torch-fidelity (`pip install torch-fidelity`), or a
             module, uint8 `[batch, 3, height, width]` -> `[batch, features]`

    Its bias falls with the number of samples: compare figures of equal counts alone. 50,000 are usual.
    """

    generated: str = "image"
    reference: tuple[str, ...] = ("image",)

    def __init__(self, feature: Any = 2048) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance as Metric

        self.metric: Any = _metric(Metric, feature)

    def __call__(self, made: Sequence[Sample], given: Sequence[Sample]) -> dict[str, float]:
        if len(made) < 2:
            raise ValueError(f"a Frechet distance needs at least 2 images, got {len(made)}")
        self.metric.reset()
        for samples, real in ((given, True), (made, False)):
            for batch in _batches(samples):
                self.metric.update(batch, real=real)
        return {"fid": float(self.metric.compute())}


class InceptionScore:
    """exp of the mean divergence of p(class | image) from p(class) (1606.03498), by torchmetrics: its mean and deviation.

    feature: "logits_unbiased", of torch-fidelity's Inception network, or a module: uint8 images -> logits
    splits:  parts of the images whose scores are averaged
    """

    generated: str = "image"
    reference: tuple[str, ...] = ()

    def __init__(self, feature: Any = "logits_unbiased", splits: int = 10) -> None:
        from torchmetrics.image.inception import InceptionScore as Metric

        self.metric: Any = _metric(Metric, feature, splits=splits)

    def __call__(self, made: Sequence[Sample], given: Sequence[Sample]) -> dict[str, float]:
        self.metric.reset()
        for batch in _batches(made):
            self.metric.update(batch)
        mean, deviation = self.metric.compute()
        return {"inception_score": float(mean), "inception_score_std": float(deviation)}


class ClipScore:
    """100 x cosine between CLIP's features of a generated image and of its prompt, at least 0 (2104.08718), by torchmetrics.

    model: a CLIP model of transformers, on the hub or in a folder
    """

    generated: str = "image"
    reference: tuple[str, ...] = ("text",)

    def __init__(self, model: str) -> None:
        from torchmetrics.multimodal.clip_score import CLIPScore as Metric
        from transformers import CLIPModel, CLIPProcessor

        features, processor = _ClipFeatures(loaded(CLIPModel, model)), loaded(CLIPProcessor, model)
        self.metric: Any = Metric(lambda: (features, processor))

    @torch.no_grad()
    def __call__(self, made: Sequence[Sample], given: Sequence[Sample]) -> dict[str, float]:
        self.metric.reset()
        for image, prompt in zip(made, given, strict=True):
            self.metric.update([_pixels(image["image"])], [prompt["text"]])
        return {"clip_score": float(self.metric.compute())}


class _ClipFeatures(torch.nn.Module):
    """A CLIP model whose features are tensors: transformers 5 wraps them, and torchmetrics does not unwrap them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config

    def get_image_features(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(
        self, ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch features"]:
        return self.model.get_text_features(input_ids=ids, attention_mask=attention_mask).pooler_output


class WordErrors:
    """Word and character error rate, by torchmetrics, of lower-case text without punctuation.

    recogniser: clips and their sample rate -> texts, e.g. `Recogniser`; None scores generated text itself (speech to text)
    """

    def __init__(self, recogniser: Callable[[Sequence[np.ndarray], int], Sequence[str]] | None = None) -> None:
        self.recogniser = recogniser
        self.generated: str = "text" if recogniser is None else "audio"
        self.reference: tuple[str, ...] = ("text",)

    def __call__(self, made: Sequence[Sample], given: Sequence[Sample]) -> dict[str, float]:
        from torchmetrics.functional.text import char_error_rate, word_error_rate

        if self.recogniser is None:
            heard = [m["text"] for m in made]
        else:
            heard = self.recogniser([m["audio"] for m in made], made[0]["sample_rate"])
        heard, said = ([normalized(t) for t in texts] for texts in (heard, [g["text"] for g in given]))
        return {"wer": float(word_error_rate(heard, said)), "cer": float(char_error_rate(heard, said))}


def normalized(text: str) -> str:
    """Lower case, apostrophes kept, other punctuation and repeated blanks gone."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


class Recogniser:
    """A speech recogniser of transformers (Whisper, wav2vec 2.0, ...), on the hub or in a folder."""

    RATE = 16_000  # Hz, of every model of the pipeline's

    def __init__(self, model: str, batch_size: int = 16) -> None:
        from transformers import pipeline

        self.pipeline: Any = loaded(lambda m: pipeline("automatic-speech-recognition", model=m), model)
        self.batch_size = batch_size

    def __call__(self, clips: Sequence[np.ndarray], sample_rate: int) -> list[str]:
        heard = self.pipeline(
            [{"raw": resample(clip, sample_rate, self.RATE), "sampling_rate": self.RATE} for clip in clips],
            batch_size=self.batch_size,
        )
        return [line["text"] for line in heard]


class SpeakerSimilarity:
    """Mean cosine between the speaker embeddings of generated clips and of their references.

    model: an x-vector model of transformers (e.g. microsoft/wavlm-base-plus-sv), on the hub or in a folder
    """

    RATE = 16_000  # Hz

    generated: str = "audio"
    reference: tuple[str, ...] = ("audio", "sample_rate")

    def __init__(self, model: str) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

        self.model: Any = loaded(AutoModelForAudioXVector, model).eval()
        self.extract: Any = loaded(AutoFeatureExtractor, model)

    def __call__(self, made: Sequence[Sample], given: Sequence[Sample]) -> dict[str, float]:
        own, reference = (
            torch.stack([self.embedding(s["audio"], s["sample_rate"]) for s in samples]) for samples in (made, given)
        )
        return {"speaker_similarity": float(torch.cosine_similarity(own, reference).mean())}

    @torch.no_grad()
    def embedding(self, clip: np.ndarray, sample_rate: int) -> Float[Tensor, " features"]:
        """The speaker of a clip; clips go through one at a time, so that no padding is heard."""
        inputs = self.extract(resample(clip, sample_rate, self.RATE), sampling_rate=self.RATE, return_tensors="pt")
        return self.model(**inputs).embeddings[0]


def loaded(component: Any, model: str) -> Any:
    """Something of transformers from a name or a folder. Raises ValueError that names it where it cannot be loaded."""
    load = getattr(component, "from_pretrained", component)
    try:
        return load(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {model!r} cannot be loaded: {in_one_line(error)}") from error


def _metric(metric: Any, feature: Any, **settings: Any) -> Any:
    try:
        return metric(feature=feature, **settings)
    except ModuleNotFoundError as error:
        raise ImportError(f"torch-fidelity (for feature={feature!r}; or name a module of your own)") from error


def _pixels(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _batches(samples: Sequence[Sample], size: int = 32) -> list[UInt8[Tensor, "batch 3 height width"]]:
    """Images as batches; of one image each where their sizes differ."""
    images = [s["image"] for s in samples]
    step = size if len({image.size for image in images}) == 1 else 1
    return [torch.stack([_pixels(i) for i in images[k : k + step]]) for k in range(0, len(images), step)]
