"""Tokenizers trained by the recipe: they reconstruct better than before, use their codes, and train a model."""

import json

import numpy as np
import pytest
import torch

from components.data.digits import digits
from components.data.speech import spoken_words
from components.tokenizers import Tokenizer
from components.tokenizers.fsq import FSQAutoencoder, FSQConfig, FSQImageTokenizer, FSQMelTokenizer
from mdm.config import UserError, find_config
from tests.recipes.conftest import in_process


def test_an_image_tokenizer_learns_and_is_loaded_back(tmp_path, run, config):
    small = ["train.split=test", "tokenizer.width=32", "steps=120", "device=cpu", f"output_dir={tmp_path}"]
    in_process("train_tokenizer", find_config("train_tokenizer"), *small)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    tokenizer = FSQImageTokenizer(str(tmp_path / "tokenizer"))
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.codebooks, tokenizer.num_tokens, metrics["tokens_per_sample"]) == ((200,), 16, 16)
    test = digits("test")
    error = np.mean(
        [(np.asarray(tokenizer.decode(tokenizer.encode(s["image"])), float) - np.asarray(s["image"], float)) ** 2 for s in test]
    )
    assert metrics["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.05)
    mean = np.mean([np.asarray(s["image"], float) for s in test], axis=0)
    blank = np.mean([(mean - np.asarray(s["image"], float)) ** 2 for s in test])
    assert error < blank / 3  # the mean image is the best that no code can do
    assert 0.1 < metrics["codes_used"] <= 1
    assert (tmp_path / "reconstructions.png").is_file()
    node = f"{{_component_: components.tokenizers.fsq.FSQImageTokenizer, path: {tmp_path / 'tokenizer'}}}"
    out = [f"tokenizers.image={node}", f"output_dir={tmp_path / 'model'}", "tokens=500"]
    run("run", "pretrain", "--config", config, *out)
    made = ["task=text_to_image", "prompt=a handwritten two", "count=1", f"output_dir={tmp_path / 'made'}"]
    run("generate", f"checkpoint={tmp_path / 'model'}", *made)


def test_a_speech_tokenizer_learns_and_is_loaded_back(tmp_path):
    small = ["train.split=test", "train.voices=1", "validation.voices=1", "tokenizer.width=32", "steps=60", "device=cpu"]
    in_process("train_tokenizer", find_config("train_tokenizer_speech"), *small, f"output_dir={tmp_path}")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    tokenizer = FSQMelTokenizer(str(tmp_path / "tokenizer"))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.codebooks == (1000, 1000)
    clip = spoken_words("test", voices=1)[0]["audio"]
    codes = tokenizer.encode(clip)
    real = tokenizer.spectrogram(clip)
    assert len(codes) == real.shape[1]  # two codes for two frames
    one, more = (len(tokenizer.encode(np.zeros(n * tokenizer.frame_samples, np.float32))) for n in (10, 25))
    assert more - one == 15 * 2
    assert 0 < metrics["mel_distance_db"] < 40 * float((real - real.mean()).abs().mean())
    assert len(tokenizer.decode(codes)) == pytest.approx(len(clip), abs=400)
    node = tokenizer.save(tmp_path / "saved")
    assert torch.equal(FSQMelTokenizer(str(tmp_path / "saved" / node["path"])).encode(clip), codes)


def test_codes_are_the_levels_read_as_one_number():
    """Each channel of a quantized vector has its own few levels, and every code a vector of its own."""
    model = FSQAutoencoder(FSQConfig(kind="image", patch=2, levels=(4, 3), width=16)).eval()
    every = model.fsq.indices_to_codes(torch.arange(12).view(1, 12, 1))
    assert len(every[0].unique(dim=0)) == 12
    x = torch.rand(5, 1, 8, 8) * 2 - 1
    quantized, codes = model.encode(x)
    assert torch.allclose(model.fsq.indices_to_codes(codes).transpose(1, 2), quantized.flatten(2), atol=1e-6)
    assert torch.allclose(model.decode(codes), model(x)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tokenizer.patch=3", "tokenizer: FSQ tokenizer: patch must be a power of two, got 3"),
        ("tokenizer.patch=16", "size 8 is not a multiple of patch = 16"),
        ("tokenizer.depth=2", "tokenizer: .*'depth'.*; it has kind, patch, levels"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("train={_component_: components.data.reference.language_reference, split: test}", "train: the samples have no image"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, word, message):
    with pytest.raises(UserError, match=message):
        in_process("train_tokenizer", find_config("train_tokenizer"), f"output_dir={tmp_path}", "device=cpu", word)


def test_a_spectrogram_is_decoded_on_the_scale_it_was_encoded_on(monkeypatch):
    """Were the autoencoder perfect, a tone would come back as loud as it was, and silence silent."""
    tokenizer = FSQMelTokenizer(FSQAutoencoder(FSQConfig(kind="mel", patch=2, width=8)))
    for loudness in (1.0, 0.1):
        tone = (loudness * np.sin(2 * np.pi * 1000 * np.arange(3200) / 8000)).astype(np.float32)
        monkeypatch.setattr(tokenizer, "decode_spectrogram", lambda codes, tone=tone: tokenizer.spectrogram(tone))
        heard = tokenizer.decode(torch.zeros(20, dtype=torch.long))[800:2400]
        assert np.sqrt(np.mean(heard**2)) == pytest.approx(loudness / 2**0.5, rel=0.2)
    assert tokenizer.spectrogram(np.zeros(1600, dtype=np.float32)).max() == -1.0
