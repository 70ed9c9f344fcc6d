"""Judges of samples, on sounds and pictures that are made here."""

import numpy as np
import pytest

from components.data.digits import digits
from components.metrics.mel import log_mel
from components.metrics.quality import frechet
from components.tokenizers.image import GreyPatchTokenizer
from mdm.data.processor import Processor
from mdm.evaluation.judges import SAMPLE_RATE, ImageJudge, Judged, SpeechJudge, class_in_text, train_judge


def tone(pitch, seconds=0.3, peak=0.5):
    return (peak * np.sin(2 * np.pi * pitch * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)).astype(np.float32)


def test_a_text_names_a_class_where_it_names_one_alone():
    words = ("zero", "one", "two")
    assert [class_in_text(t, words) for t in ("a spoken two", "one or two", "nothing", "twofold")] == [2, -1, -1, -1]


def test_a_tone_lies_in_the_mel_band_of_its_pitch():
    """24 bands evenly spaced on 2595 log10(1 + f / 700) up to 4 kHz: band k is centred on (k + 1) / 25 of its top."""
    top = 2595 * np.log10(1 + 4000 / 700)
    for band in (3, 8, 13, 18, 22):
        centre = 700 * (10 ** (top * (band + 1) / 25 / 2595) - 1)
        assert log_mel(tone(centre).astype(float))[5:-5].mean(axis=0).argmax() == band


def test_a_clip_of_nothing_is_silence():
    assert log_mel(np.zeros(0)).tolist() == log_mel(np.zeros(640)).tolist()


def test_a_speech_judge_hears_what_is_said_and_not_how_loud():
    """Tones that rise, fall or stay, at 12 lengths each; then at a third of the loudness."""

    def glide(start, stop, seconds):
        n = int(seconds * SAMPLE_RATE)
        wave = np.sin(2 * np.pi * np.cumsum(np.linspace(start, stop, n)) / SAMPLE_RATE)
        return (wave + 0.1 * noise.standard_normal(n)).astype(np.float32)  # so that no band is empty

    noise = np.random.default_rng(0)
    kinds = ((300, 1500), (1500, 300), (800, 800))
    clips = [(glide(*kinds[k], 0.2 + 0.02 * i), k) for i in range(12) for k in range(3)]
    judge = SpeechJudge([{"audio": a, "label": k} for a, k in clips])
    quiet = [a / 3 for a, _ in clips]
    assert judge.classify(quiet).tolist() == [k for _, k in clips]
    loud, soft = judge.features([a for a, _ in clips]), judge.features(quiet)
    assert np.abs(loud - soft).max() < 0.05 * np.abs(loud).max()  # the floor of 1e-8 under the logarithm is not scaled


def test_real_samples_are_judged_by_their_labels_and_their_halves_differ():
    lossless = Processor.build({"image": GreyPatchTokenizer(8, 1, 17)}, {"image": 64})
    test = digits("test")[::3]
    judge = ImageJudge(digits("judge"))
    judged = Judged(judge, lossless, "image", test)
    real = judged.real()
    assert real["accuracy"] > 0.95
    order = np.random.default_rng(0).permutation(len(test))
    features = judge.features([s["image"] for s in test])
    assert real["frechet_of_halves"] == pytest.approx(frechet(features[order[::2]], features[order[1::2]]))
    assert real["frechet_of_halves"] > 0.1


def test_a_judge_that_learns_nothing_needs_no_samples():
    processor = Processor.build({"image": GreyPatchTokenizer(8, 1, 17)}, {"image": 64})
    assert isinstance(train_judge({"_component_": f"{__name__}.Counts"}, "judged.image.judge", processor, "image"), Counts)


class Counts:
    """Classifies without any training."""


def test_the_caption_names_the_digit_or_the_one_before_it():
    words = {s["label"]: s["text"] for s in digits("judge")}
    assert (words[0], words[7]) == ("a handwritten zero", "a handwritten seven")
    before = {s["label"]: s["text"] for s in digits("judge", after=1)}
    assert (before[0], before[7]) == ("a handwritten nine", "a handwritten six")
