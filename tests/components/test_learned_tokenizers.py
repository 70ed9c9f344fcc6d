"""Learned tokenizers with random weights of a small shape: codes in range, shapes, what they save loads to the same codes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from components.tokenizers import Tokenizer
from components.tokenizers.audio_neural import NeuralAudioTokenizer, deinterleave, interleave
from components.tokenizers.fsq import FSQAutoencoder, FSQConfig, FSQImageTokenizer, FSQMelTokenizer
from components.tokenizers.image_vq import MOVQ, VQImageTokenizer
from components.tokenizers.sinc import sinc_resample

IMAGES = {
    "vq": {
        **MOVQ, "block_out_channels": [32, 32], "layers_per_block": 1, "num_vq_embeddings": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "emu3": {
        "codebook_size": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [],
        "hidden_size": 32,
    },
    "chameleon": {
        "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 32, "embed_dim": 8,
        "latent_channels": 8, "resolution": 32,
    },
}  # fmt: skip
AUDIO = {
    "dac": {
        "encoder_hidden_size": 8, "decoder_hidden_size": 32, "n_codebooks": 3, "codebook_size": 16, "codebook_dim": 4,
        "hidden_size": 64,
    },
    "encodec": {
        "num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16, "target_bandwidths": [1.5],
        "num_lstm_layers": 1,
    },
    "mimi": {
        "num_filters": 4, "hidden_size": 32, "codebook_size": 16, "codebook_dim": 8, "num_quantizers": 4, "head_dim": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
        "vector_quantization_hidden_dimension": 8, "upsample_groups": 32,
    },
    "higgs": {
        "codebook_size": 16, "codebook_dim": 8, "target_bandwidths": [0.3],
        "acoustic_model_config": {
            "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 64, "hidden_size": 16,
            "downsampling_ratios": [8, 5, 4, 2, 3], "upsampling_ratios": [8, 5, 4, 2, 3],
        },
        "semantic_model_config": {
            "model_type": "hubert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
        },
    },
    "xcodec2": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 2, "encoder_hidden_size": 4, "quantization_dim": 64, "quantization_levels": [4, 4, 4],
        "semantic_model_config": {
            "model_type": "wav2vec2-bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32,
        },
    },
}  # fmt: skip
RATES = {"dac": 16000, "encodec": 24000, "mimi": 24000, "higgs": 24000, "xcodec2": 16000}


def reloaded(tokenizer, folder):
    node = tokenizer.save(folder)
    own = {k: v for k, v in node.items() if k != "_component_"}
    return type(tokenizer)(**{**own, "path": str(folder / own["path"])})


@pytest.mark.parametrize("family", IMAGES)
def test_image_codes_are_in_range_and_survive_saving(family, tmp_path):
    torch.manual_seed(0)
    tokenizer = VQImageTokenizer(None, 32, family, config=IMAGES[family])
    assert isinstance(tokenizer, Tokenizer)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    codes = tokenizer.encode(image)
    assert codes.shape == (tokenizer.num_tokens,) == (16 * 16,)
    assert tokenizer.codebooks == (32,)
    assert 0 <= codes.min() < codes.max() < 32
    again = reloaded(tokenizer, tmp_path)
    assert torch.equal(again.encode(image), codes)
    if family == "chameleon":
        with pytest.raises(ValueError, match="images can only be read"):
            tokenizer.decode(codes)
    else:
        assert (tokenizer.decode(codes).size, tokenizer.decode(codes).mode) == ((32, 32), "RGB")
        assert np.array_equal(np.asarray(again.decode(codes)), np.asarray(tokenizer.decode(codes)))


def test_the_codes_of_an_image_are_of_the_nearest_entries():
    """The oracle: the encoder's vectors, each compared with every entry of the codebook."""
    torch.manual_seed(0)
    tokenizer = VQImageTokenizer(None, 32, config=IMAGES["vq"])
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    vectors = tokenizer.model.encode(x).latents[0].permute(1, 2, 0).reshape(-1, 4)
    nearest = torch.cdist(vectors, tokenizer.model.quantize.embedding.weight).argmin(dim=1)
    assert (tokenizer.encode(image) == nearest).float().mean() > 0.99  # a tie may fall either way


@pytest.mark.parametrize("family", ["vq", "emu3"])
def test_pixels_of_minus_1_to_1_are_grey_levels_of_0_to_255(family, monkeypatch):
    """What the decoder gives: black, grey, white, and beyond; the first channel alone is looked at."""
    tokenizer = VQImageTokenizer(None, 32, family, config=IMAGES[family])
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).expand(1, 3, 1, 5)

    class Decoded(list):
        sample = pixels

    monkeypatch.setattr(tokenizer.model, "decode", lambda *args, **kwargs: Decoded(pixels))
    image = tokenizer.decode(torch.zeros(tokenizer.num_tokens, dtype=torch.long))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_movq_has_the_published_shape():
    with torch.device("meta"):
        from diffusers import VQModel

        model = VQModel(**MOVQ)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(67.8, abs=0.1)


@pytest.mark.parametrize("order", ["frames", "delay"])
@pytest.mark.parametrize("family", AUDIO)
def test_audio_codes_are_in_range_and_survive_saving(family, order, tmp_path):
    torch.manual_seed(0)
    tokenizer = NeuralAudioTokenizer(None, family, order=order, config=AUDIO[family])
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.sample_rate == RATES[family]
    wave = 0.1 * np.random.default_rng(0).standard_normal(int(0.63 * tokenizer.sample_rate)).astype(np.float32)
    codes = tokenizer.encode(wave)
    books = len(tokenizer.codebooks)
    assert len(codes) % books == 0
    assert ((codes.view(-1, books) >= 0) & (codes.view(-1, books) < torch.tensor(tokenizer.codebooks))).all()
    back = tokenizer.decode(codes)
    assert 0 <= len(back) - len(wave) <= 2 * tokenizer.frame_samples
    assert np.isfinite(back).all()
    assert torch.equal(reloaded(tokenizer, tmp_path).encode(wave), codes)
    assert len(tokenizer.decode(codes[: books - 1])) == 0  # no complete frame


def test_fewer_books_are_the_coarsest():
    torch.manual_seed(0)
    every = NeuralAudioTokenizer(None, "dac", config=AUDIO["dac"])
    few = NeuralAudioTokenizer(None, "dac", books=2, config=AUDIO["dac"])
    few.model = every.model
    wave = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    assert torch.equal(few.encode(wave).view(-1, 2), every.encode(wave).view(-1, 3)[:, :2])
    assert len(few.decode(few.encode(wave))) == len(every.decode(every.encode(wave)))


def test_the_delay_pattern_is_musicgens():
    """Codebook k comes k frames late; before its first and after its last code stands the pad (2306.05284, figure 1)."""
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert interleave(codes, "frames", 9).tolist() == [1, 4, 2, 5, 3, 6]
    assert interleave(codes, "delay", 9).tolist() == [1, 9, 2, 4, 3, 5, 9, 6]
    for order in ("frames", "delay"):
        assert torch.equal(deinterleave(interleave(codes, order, 9), 2, order, 9), codes)
    assert deinterleave(torch.tensor([1, 9, 9, 4, 3, 5, 9, 6]), 2, "delay", 9).tolist() == [[1, 0, 3], [4, 5, 6]]


@pytest.mark.parametrize(("rate", "to"), [(24000, 16000), (16000, 24000), (44100, 16000)])
def test_the_sinc_keeps_a_tone_and_removes_what_the_lower_rate_cannot_hold(rate, to):
    t = torch.arange(rate, dtype=torch.float64) / rate
    out = sinc_resample(torch.sin(2 * torch.pi * 440 * t), rate, to)
    assert len(out) == to
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(to, dtype=torch.float64) / to)
    assert_close(out[200:-200], expected[200:-200], rtol=0, atol=2e-3)  # six zeros: a ripple of 1e-3
    if to < rate:
        too_high = sinc_resample(torch.sin(2 * torch.pi * 0.9 * rate / 2 * t), rate, to)
        assert too_high[200:-200].abs().max() < 0.02


def test_the_sinc_is_its_formula():
    """Every output sample as the sum over all input samples that the docstring writes out, in float64."""
    rate, to, zeros = 24, 16, 6
    x = np.random.default_rng(0).standard_normal(60)
    cutoff = 0.99 * to
    expected = []
    for j in range(40):
        u = cutoff * (np.arange(60) / rate - j / to)
        window = np.where(np.abs(u) < zeros, np.cos(np.pi * u / (2 * zeros)) ** 2, 0.0)
        expected.append((x * cutoff / rate * np.sinc(u) * window).sum())
    found = sinc_resample(torch.from_numpy(x), rate, to)
    assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VQImageTokenizer(None, 33, config=IMAGES["vq"]), "size 33 is not a multiple of 2"),
        (
            lambda: VQImageTokenizer(None, 32, config=IMAGES["vq"]).encode(Image.new("RGB", (30, 32))),
            "expected 32x32 pixels, got 30x32",
        ),
        (lambda: NeuralAudioTokenizer(None, "dac", books=4, config=AUDIO["dac"]), r"books must be in 1\.\.3, got 4"),
        (
            lambda: NeuralAudioTokenizer(None, "dac", config=AUDIO["dac"]).encode(np.zeros(0, np.float32)),
            "the waveform is empty",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_learned_image_tokenizer_sees_what_a_viewer_sees():
    """Noise, shown as what it is: on its side by EXIF, in 16 bits, as transparent black on white, in CMYK."""
    torch.manual_seed(0)
    levels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    grey = Image.fromarray(levels)
    sideways = grey.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.info["exif"] = exif.tobytes()
    on_nothing = Image.merge("LA", (Image.new("L", (32, 32)), Image.fromarray(255 - levels)))
    fsq = FSQAutoencoder(FSQConfig(kind="image", patch=4, width=8, size=32)).eval()
    for tokenizer in (VQImageTokenizer(None, 32, config=IMAGES["vq"]), FSQImageTokenizer(fsq)):
        codes = tokenizer.encode(grey)
        assert len(codes.unique()) > 2
        for image in (
            sideways,
            Image.fromarray(levels.astype(np.uint16) * 257),
            on_nothing,
            grey.convert("RGB").convert("CMYK"),
        ):
            assert_close(tokenizer.encode(image), codes)


def test_a_learned_audio_tokenizer_hears_integers_as_the_floats_they_stand_for():
    torch.manual_seed(0)
    pcm = (np.random.default_rng(0).normal(0, 8000, 4000)).clip(-32768, 32767).astype(np.int16)
    fsq = FSQAutoencoder(FSQConfig(kind="mel", patch=2, width=8)).eval()
    for tokenizer in (NeuralAudioTokenizer(None, "dac", config=AUDIO["dac"]), FSQMelTokenizer(fsq)):
        codes = tokenizer.encode(pcm)
        assert len(codes.unique()) > 2
        assert_close(tokenizer.encode(pcm.astype(np.float64) / 32768), codes)
        for raw, why in (
            (pcm.reshape(-1, 2), "one dimension"),
            (np.full(4000, np.nan), "NaN"),
            (np.zeros(9, bool), "got bool"),
        ):
            with pytest.raises(ValueError, match=f"audio tokenizer: .*{why}"):
                tokenizer.encode(raw)
