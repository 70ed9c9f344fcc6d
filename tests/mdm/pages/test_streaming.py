"""Speech and text that are written as their blocks are finished, and what cannot be streamed."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch

from components.samplers import FirstHitting
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.generate import generate
from mdm.models import builders
from mdm.pages.streaming import Stream, check_stream


class Plain(Codec2Tokenizer):
    """Whose waveform is a function of its codes: codec2 draws the phase of unvoiced sounds anew in every call."""

    def decode(self, codes):
        frames = codes[: len(codes) // 4 * 4].view(-1, 4)
        return np.repeat((frames.double().mean(dim=1) / 2048).numpy(), self.frame_samples)


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a spoken nine and a longer text of many words"] * 20, vocab_size=300)
    tokenizers = {"text": text, "image": GreyPatchTokenizer(8, 2, 3), "audio": Plain()}
    return Processor.build(tokenizers, {"image": 16, "audio": 32})


@pytest.fixture(scope="module")
def model(processor):
    model = builders.nano(processor.vocabulary.size, 128, 32, 2, 2, blocks={"text": 4, "audio": 8})
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def test_speech_grows_in_its_file_and_is_in_the_end_what_the_whole_decodes_to(model, processor, tmp_path):
    path, lengths = tmp_path / "new" / "nine.wav", []
    stream = Stream(str(path), processor)

    def watched(part):
        stream(part)
        with wave.open(str(path)) as opened:
            lengths.append(opened.getnframes())

    made = generate(model, processor, "text_to_speech", [{"text": "a"}], FirstHitting(), 0.0, stop_at_end=False, stream=watched)
    assert len(lengths) == 4
    assert lengths == sorted(lengths)
    assert lengths[0] == 2 * Codec2Tokenizer.frame_samples
    with wave.open(str(path)) as opened:
        assert opened.getframerate() == Codec2Tokenizer.sample_rate
        heard = np.frombuffer(opened.readframes(10**6), "<i2")
    whole = np.asarray(made.outputs[0]["audio"])
    np.testing.assert_array_equal(heard, (np.clip(whole, -1, 1) * 32767).astype("<i2"))
    assert 0 < stream.first < stream.last
    assert "The first sound after" in stream.report()


def test_text_comes_to_the_terminal_as_it_is_finished(model, processor, capsys):
    stream = Stream("-", processor)
    made = generate(model, processor, "text", [{}], FirstHitting(), length=16, stream=stream)
    assert capsys.readouterr().out.strip() == made.outputs[0]["text"].strip()
    assert "The first text after" in stream.report() or "ended it at once" in stream.report()


def test_what_cannot_be_streamed_is_one_line(processor):
    for path, generated, blocks, line in (
        ("x.wav", ("audio",), False, "stream=x.wav: only a model of blocks has anything finished before all is"),
        ("x.wav", ("image",), True, "stream=x.wav: speech or text can be streamed; this task generates image"),
        ("x.wav", ("text", "audio"), True, "this task generates text, audio"),
        ("x.mp3", ("audio",), True, "stream=x.mp3: audio goes to a .wav file"),
        ("x.wav", ("text",), True, 'stream=x.wav: text goes to the terminal, "-"'),
        ("-", ("audio",), True, "stream=-: audio goes to a .wav file"),
    ):
        with pytest.raises(UserError, match=line):
            check_stream(path, generated, processor, blocks)
    check_stream("x.wav", ("audio",), processor, True)
    check_stream("-", ("text",), processor, True)
