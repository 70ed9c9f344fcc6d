import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from components.data.digits import digits
from components.tokenizers import Tokenizer
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer

CORPUS = ["a handwritten seven", "a spoken three", "the quick brown fox, naïve café — 東京 🙂\n\n  two  spaces"] * 20


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(CORPUS, 400)


def test_text_round_trips_exactly(text):
    for string in [*CORPUS[:3], "", "unseen: ÿ\x00\tZürich", " leading and trailing "]:
        assert text.decode(text.encode(string)) == string
        assert text.num_bytes(text.encode(string)) == len(string.encode())


def test_trained_ranks_merge_as_the_trainer_meant(text):
    """The trainer's own encoding is the oracle: tiktoken, from the exported ranks, finds the same tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from components.tokenizers.text import GPT2_PATTERN, _byte_of_character

    reference = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT2_PATTERN), behavior="isolated")
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reference.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    to_byte = _byte_of_character()
    for string in [*CORPUS[:3], "a handwritten fox spoken three cafés"]:
        expected = [bytes(to_byte[c] for c in token) for token in reference.encode(string).tokens]
        assert [text.encoding.decode_single_token_bytes(i) for i in text.encode(string).tolist()] == expected


def test_the_more_frequent_pair_is_merged_first():
    """ "ba" is learned before "ab", though it is behind it in the alphabet: so "aba" is a, ba."""
    trained = TextTokenizer.train(["ba"] * 50 + ["ab"] * 10, vocab_size=258)
    assert [trained.encoding.decode_single_token_bytes(i) for i in trained.encode("aba").tolist()] == [b"a", b"ba"]


def test_a_pattern_of_ones_own_is_saved(tmp_path):
    """Every character a piece: no pair is ever merged, and none when it is loaded again."""
    merged = TextTokenizer.train(["aaaa"] * 9, vocab_size=258)
    merged.save(tmp_path)
    alone = TextTokenizer.from_ranks(tmp_path / "text.tiktoken", r"[\s\S]")
    node = alone.save(tmp_path)
    again = TextTokenizer.from_ranks(tmp_path / node["path"], node["pattern"])
    assert len(again.encode("aaaa")) == len(alone.encode("aaaa")) == 4
    assert len(merged.encode("aaaa")) == 1


def test_frequent_words_are_one_token(text):
    assert len(text.encode("a handwritten seven")) == 3


def test_rank_files_reload(text, tmp_path):
    node = text.save(tmp_path)
    again = TextTokenizer.from_ranks(tmp_path / node["path"], node["pattern"])
    assert_close(again.encode(CORPUS[2]), text.encode(CORPUS[2]))
    assert again.codebooks == text.codebooks


@pytest.mark.parametrize(("patch", "levels"), [(1, 17), (2, 4), (4, 2)])
def test_images_that_have_the_levels_round_trip_exactly(patch, levels):
    tokenizer = GreyPatchTokenizer(8, patch, levels)
    grey = np.random.default_rng(0).integers(0, levels, (8, 8))
    image = Image.fromarray(np.rint(grey / (levels - 1) * 255).astype(np.uint8))
    codes = tokenizer.encode(image)
    assert len(codes) == tokenizer.num_tokens
    assert int(codes.max()) < tokenizer.codebooks[0]
    assert_close(np.asarray(tokenizer.decode(codes)), np.asarray(image))


def test_scanned_digits_are_lossless_as_pixels():
    tokenizer = GreyPatchTokenizer(8, 1, 17)
    for sample in digits("test")[:20]:
        assert_close(np.asarray(tokenizer.decode(tokenizer.encode(sample["image"]))), np.asarray(sample["image"]))


def test_audio_codes_and_bits_are_the_same_thing():
    g = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, n, (30,), generator=g) for n in Codec2Tokenizer.codebooks], dim=1).flatten()
    frames = Codec2Tokenizer.to_bytes(codes)
    assert len(frames) == 30 * 4
    assert_close(Codec2Tokenizer.from_bytes(frames), codes)


def test_audio_is_encoded_frame_by_frame_as_codec2_does():
    from pycodec2 import Codec2

    wave = np.sin(np.arange(3200) * 0.2).astype(np.float32) * 0.5
    codec = Codec2(700)
    pcm = np.rint(wave * 32767).astype(np.int16)
    expected = b"".join(codec.encode(pcm[i : i + 320]) for i in range(0, 3200, 320))
    codes = Codec2Tokenizer().encode(wave)
    assert Codec2Tokenizer.to_bytes(codes) == expected
    assert len(Codec2Tokenizer().decode(codes)) == 3200
    assert len(Codec2Tokenizer().decode(codes[:6])) == 320  # an unfinished frame is left out
    assert_close(Codec2Tokenizer().encode(wave), codes)  # no state leaks from clip to clip


def test_the_fields_of_a_frame_are_codec2s_two_of_the_spectrum_energy_and_pitch():
    """A vowel: the harmonics of a voice, shaped by three formants. What is said twice as loud, or an octave higher, is seen in
    the one field alone that codec2's source packs third (energy, 4 bits) or last (pitch, 6 bits)."""

    def fields(pitch, peak):
        t = np.arange(4000) / 8000
        wave = np.zeros(4000)
        for f in np.arange(pitch, 3500, pitch):
            gain = sum(1 / (1 + ((f - centre) / width) ** 2) for centre, width in ((700, 130), (1220, 70), (2600, 160)))
            wave += gain * np.cos(2 * np.pi * f * t)
        frames = Codec2Tokenizer().encode((peak * wave / np.abs(wave).max()).astype(np.float32)).view(-1, 4)
        return frames[4:-2].median(dim=0).values.tolist()  # a steady sound, but for its ends

    assert Codec2Tokenizer.codebooks == (512, 512, 16, 64)
    quiet, loud, louder = (fields(100, peak) for peak in (0.05, 0.2, 0.8))
    assert [a == b == c for a, b, c in zip(quiet, loud, louder, strict=True)] == [True, True, False, True]
    assert louder[2] - loud[2] == loud[2] - quiet[2] == 5  # 12 dB each, in steps of 2.4
    low, high, higher = (fields(pitch, 0.4)[3] for pitch in (80, 160, 320))
    assert all(20 <= step <= 23 for step in (high - low, higher - high))  # an octave each: 50 to 400 Hz are 63 steps
    decoded = [np.abs(Codec2Tokenizer().decode(torch.tensor(frame * 10))[800:]).max() for frame in (quiet, loud, louder)]
    assert decoded == pytest.approx([0.05, 0.2, 0.8], rel=0.4)  # a vocoder makes other phases, and so another peak


def test_all_are_tokenizers(text):
    for tokenizer in (text, GreyPatchTokenizer(8), Codec2Tokenizer()):
        assert isinstance(tokenizer, Tokenizer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: TextTokenizer.named("nope"), ValueError, "'nope' is not one of"),
        (lambda p: TextTokenizer.from_ranks(p / "absent"), FileNotFoundError, "rank file not found"),
        (lambda p: TextTokenizer.train(["x"], 10), ValueError, "at least 256"),
        (lambda p: GreyPatchTokenizer(8, 3), ValueError, "size 8 is not a multiple of patch = 3"),
        (lambda p: GreyPatchTokenizer(8).encode(Image.new("L", (9, 8))), ValueError, "expected 8x8 pixels, got 9x8"),
        (lambda p: Codec2Tokenizer().encode(np.zeros(0, np.float32)), ValueError, "waveform is empty"),
    ],
)
def test_mistakes_are_named(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_a_file_that_is_no_rank_file_is_named(tmp_path):
    (tmp_path / "x.tiktoken").write_text("hello world foo")
    with pytest.raises(ValueError, match=r"x\.tiktoken is not a tiktoken rank file"):
        TextTokenizer.from_ranks(tmp_path / "x.tiktoken")


def test_a_rank_file_is_read_anew_where_its_path_holds_another(tmp_path, monkeypatch):
    """tiktoken's own loader caches by path: a second run in the same folder would speak the tokens of the first one."""
    monkeypatch.chdir(tmp_path)
    for words in (["aaab aaab"] * 9, ["bbba bbba"] * 9):
        trained = TextTokenizer.train(words, vocab_size=259)
        trained.save(tmp_path)
        loaded = TextTokenizer.from_ranks("text.tiktoken")
        for word in ("aaab", "bbba"):
            assert loaded.encode(word).tolist() == trained.encode(word).tolist()
