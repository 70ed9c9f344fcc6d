"""Scorers against closed forms and the definitions, with networks small enough to make here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from components.metrics.geneval import COLOURS, ClipColours, Detector, Found, GenEval, crop, prompts, relations, surest
from components.metrics.scorers import (
    ClipScore,
    FrechetInceptionDistance,
    InceptionScore,
    Recogniser,
    SpeakerSimilarity,
    WordErrors,
    missing,
    normalized,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


class MeanColour(torch.nn.Module):
    """Features of an image: its mean red and blue, in [0, 1]."""

    num_features = 2

    def forward(self, images):
        return images[:, [0, 2]].float().mean(dim=(2, 3)) / 255


def plain(red, size=8, blue=0):
    return {"image": Image.new("RGB", (size, size), (int(red), 0, int(blue)))}


def test_frechet_distance_is_its_closed_form():
    """Of two normals in independent dimensions: sum of (difference of means)^2 + (difference of deviations)^2."""
    rng = np.random.default_rng(0)
    made, given = (
        [plain(*v[:1], blue=v[1]) for v in rng.normal(mean, deviation, (400, 2)).clip(0, 255).round()]
        for mean, deviation in ((100, 10), (160, 30))
    )
    features = [np.array([s["image"].getpixel((0, 0)) for s in samples])[:, [0, 2]] / 255 for samples in (made, given)]
    means, covariances = zip(*[(f.mean(axis=0), np.cov(f.T)) for f in features], strict=True)
    root = np.linalg.eigvals(covariances[0] @ covariances[1]) ** 0.5
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * root.sum()
    assert FrechetInceptionDistance(MeanColour())(made, given)["fid"] == pytest.approx(float(expected), rel=1e-3)
    assert FrechetInceptionDistance(MeanColour())(given, given)["fid"] == pytest.approx(0, abs=1e-5)
    mixed = [*made[:-2], plain(100, 8), plain(120, 16)]  # sizes may differ
    assert FrechetInceptionDistance(MeanColour())(mixed, given)["fid"] > 0.1


def test_inception_score_of_sure_and_balanced_classes_is_their_number():
    class Sure(torch.nn.Module):
        def forward(self, images):
            return 100 * torch.eye(4)[(images[:, 0, 0, 0] // 64).long()]

    made = [plain(64 * (i % 4)) for i in range(200)]
    found = InceptionScore(Sure(), splits=2)(made, made)
    assert found["inception_score"] == pytest.approx(4, rel=0.05)  # each split of 100 is nearly balanced


def test_torch_fidelity_is_asked_for_by_name():
    pytest.importorskip("torchmetrics")
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="torch-fidelity"):
            FrechetInceptionDistance(2048)


def test_word_and_character_errors_are_edit_distances():
    given = [{"text": "The cat, sat."}, {"text": "it's here"}]
    made = [{"text": "the cat sat"}, {"text": "it's a hero"}]
    found = WordErrors()(made, given)
    assert found["wer"] == pytest.approx(2 / 5)  # one word inserted, one replaced, of five
    assert found["cer"] == pytest.approx(3 / 20)  # "a " inserted and a letter replaced, of 20 characters
    assert normalized("  It's  A-Test! ") == "it's a test"
    heard = WordErrors(lambda clips, rate: ["the cat sat", f"it's {'here' if rate == 8000 else 'gone'}"])
    clips = [{"audio": np.zeros(10), "sample_rate": 8000}] * 2
    assert heard(clips, given) == {"wer": 0.0, "cer": 0.0}


def test_what_a_scorer_lacks_is_known_before_anything_is_generated():
    scorer = WordErrors()
    assert missing(scorer, ("text",), [{"text": "a"}]) is None
    assert missing(scorer, ("audio",), [{"text": "a"}]) == "it looks at text, and the task generates audio"
    assert missing(scorer, ("text",), [{"image": 0}]) == "it compares with `text`, and the samples of test have image"
    assert missing(lambda made, given: {}, ("text",), [{}]) is None


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """CLIP, a recogniser, a speaker model and a detector of transformers with random weights, each in a folder."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz-"
    ids = {c: i for i, c in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)])}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPConfig(
        text_config={**size, "vocab_size": len(ids), "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    tokenizer = transformers.CLIPTokenizer(vocab=ids, merges=[], model_max_length=64)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPModel(clip).save_pretrained(root / "clip")
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(root / "clip")

    listens = dict(
        **size, conv_dim=(8, 8, 8), conv_stride=(5, 4, 4), conv_kernel=(10, 3, 3), num_feat_extract_layers=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=29,
    )  # fmt: skip
    (root / "letters.json").write_text(json.dumps({c: i for i, c in enumerate(["<pad>", "<unk>", "|", *letters[:26].upper()])}))
    spelling = transformers.Wav2Vec2CTCTokenizer(
        str(root / "letters.json"),
        pad_token="<pad>",
        unk_token="<unk>",
        word_delimiter_token="|",
        bos_token=None,
        eos_token=None,
    )
    extract = transformers.Wav2Vec2FeatureExtractor()
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**listens, pad_token_id=0)).save_pretrained(root / "hears")
    spelling.save_pretrained(root / "hears")
    x_vector = transformers.WavLMConfig(**listens, tdnn_dim=(16, 16, 16, 16, 24), xvector_output_dim=12)
    transformers.WavLMForXVector(x_vector).save_pretrained(root / "speaker")
    for folder in ("hears", "speaker"):
        extract.save_pretrained(root / folder)

    names = {0: "cat", 1: "dog"}
    yolos = transformers.YolosConfig(
        **size, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=2, id2label=names,
        label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    transformers.YolosForObjectDetection(yolos).save_pretrained(root / "detects")
    transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(root / "detects")
    return root


def test_clip_score_is_the_cosine_of_the_models_own_features(networks):
    scorer = ClipScore(str(networks / "clip"))
    made, given = [plain(200, 40), plain(20, 40)], [{"text": "a red one"}, {"text": "a dark one"}]
    model, processor = (part for part in scorer.metric._modules.values()), scorer.metric.processor
    model = next(model).model
    cosines = []
    with torch.no_grad():
        for m, g in zip(made, given, strict=True):
            inputs = processor(text=[g["text"]], images=m["image"], return_tensors="pt")
            out = model(**inputs)
            cosines.append(float(torch.cosine_similarity(out.text_embeds, out.image_embeds)))
    assert scorer(made, given)["clip_score"] == pytest.approx(max(0, 100 * np.mean(cosines)), abs=1e-3)


def test_a_recogniser_and_a_speaker_model_hear_clips_of_any_rate(networks):
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=n).astype(np.float32) for n in (4000, 5000)]
    recogniser = Recogniser(str(networks / "hears"))
    heard = recogniser(clips, 8000)
    assert len(heard) == 2
    samples = [{"audio": c, "sample_rate": 8000, "text": t} for c, t in zip(clips, heard, strict=True)]
    assert WordErrors(recogniser)(samples, samples) == {"wer": 0.0, "cer": 0.0}
    speaker = SpeakerSimilarity(str(networks / "speaker"))
    assert speaker(samples, samples)["speaker_similarity"] == pytest.approx(1, abs=1e-5)
    other = [{"audio": np.sin(np.arange(6000) / 3).astype(np.float32), "sample_rate": 8000}] * 2
    assert speaker(samples, other)["speaker_similarity"] < 0.9999


def test_a_recogniser_hears_a_clip_at_its_own_rate(networks, monkeypatch):
    recogniser, heard = Recogniser(str(networks / "hears")), []
    monkeypatch.setattr(recogniser, "pipeline", lambda clips, batch_size: heard.extend(clips) or [{"text": ""}])
    recogniser([np.zeros(4000, dtype=np.float32)], 8000)
    assert [(len(clip["raw"]), clip["sampling_rate"]) for clip in heard] == [(8000, 16_000)]


def test_a_voice_is_the_same_at_half_the_rate(networks):
    """A tone of 1 kHz at 16 and at 8 kHz: the same sound, to what the resampling leaves at the ends."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / 16_000).astype(np.float32)
    speaker = SpeakerSimilarity(str(networks / "speaker"))
    same, half = ([{"audio": a, "sample_rate": r}] for a, r in ((tone, 16_000), (tone[::2], 8000)))
    faster = [{"audio": tone[::2], "sample_rate": 16_000}]
    alike, other = (1 - speaker(same, x)["speaker_similarity"] for x in (half, faster))
    assert alike < other / 10


def box(x, y, size=10):
    return (x, y, x + size, y + size)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (box(0, 40), {"left of"}),
        (box(80, 40), {"right of"}),
        (box(40, 0), {"above"}),
        (box(40, 80), {"below"}),
        (box(0, 0), {"left of", "above"}),
        (box(41, 40), set()),  # nearer than a tenth of their sizes
    ],
)
def test_where_a_box_lies_from_another(place, expected):
    assert relations(place, box(40, 40)) == expected


def test_geneval_counts_colours_places_and_excludes():
    image = Image.new("RGB", (100, 100), RED)
    image.paste(BLUE, (50, 0, 100, 100))
    found = [
        Found("cat", 0.95, box(10, 40)), Found("cat", 0.5, box(70, 40)), Found("dog", 0.9, box(80, 40)),
        Found("cup", 0.2, box(0, 0)),
    ]  # fmt: skip

    def colour(crop, label):
        return "red" if crop.getpixel((0, 0)) == RED else "blue"

    scorer = GenEval(lambda images, classes: [found] * len(images), colour)
    cat, dog = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}

    def holds(*include, exclude=(), tag="any"):
        prompt = {"tag": tag, "include": include, "exclude": exclude}
        return scorer([{"image": image}], [prompt])["score"] == 1

    assert holds(cat)
    assert holds({**cat, "count": 2})
    assert not holds({**cat, "count": 3})
    assert not holds({**cat, "count": 2}, tag="counting")  # the second is not sure enough to be counted
    assert not holds({"class": "cup", "count": 1})
    assert holds({**cat, "color": "red"}, {**dog, "color": "blue"})
    assert not holds({**cat, "count": 2, "color": "red"})  # the second lies on blue
    assert holds(cat, {**dog, "position": ["right of", 0]})
    assert not holds(cat, {**dog, "position": ["left of", 0]})
    assert not holds({"class": "cup", "count": 1}, {**dog, "position": ["right of", 0]})  # nothing to lie right of
    assert not holds(cat, exclude=[{**cat, "count": 2}])
    assert holds(cat, exclude=[{**cat, "count": 3}])
    each = scorer(
        [{"image": image}] * 3, [{"tag": t, "include": [c]} for t, c in (("a", cat), ("b", {**cat, "count": 3}), ("a", cat))]
    )
    assert each == {"score": 0.5, "a": 1.0, "b": 0.0}  # the mean over tags
    with pytest.raises(ValueError, match="GenEval needs `colours`"):
        GenEval(scorer.detector)([{"image": image}], [{"tag": "any", "include": [{**cat, "color": "red"}]}])


def test_geneval_takes_what_transformers_detects(networks, tmp_path):
    detector = Detector(str(networks / "detects"))
    (found,) = detector([Image.new("RGB", (40, 40))], ["cat"])
    assert {f.label for f in found} <= {"cat", "dog"}
    assert all(len(f.box) == 4 and 0 <= f.score <= 1 for f in found)
    assert surest(found, 2.0) == {f.label: [] for f in found}
    with pytest.raises(ValueError, match="task 'detect' is not one of"):
        Detector(str(networks / "detects"), task="detect")
    assert ClipColours(str(networks / "clip"))(Image.new("RGB", (40, 40), RED), "cat") in COLOURS
    mask = Image.new("L", (4, 4), 0)
    mask.paste(255, (0, 0, 2, 4))
    cut = crop(Image.new("RGB", (4, 4), RED), Found("cat", 1.0, (0, 0, 4, 2), mask))
    assert (cut.size, cut.getpixel((0, 0)), cut.getpixel((3, 0))) == ((4, 2), RED, (0x99,) * 3)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a cat", "tag": "one", "include": []}) + "\n")
    assert prompts(str(file))[0]["text"] == "a cat"
    file.write_text('{"prompt": "a cat", "tag": "one"}\n')
    with pytest.raises(ValueError, match="line 1 has no 'include'; it has prompt, tag"):
        prompts(str(file))
