import base64
import json
import pickle
import random

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image
from torch.testing import assert_close

from components.data.digits import digits
from components.templates import fill
from components.tokenizers import Tokenizer
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import GPT2_PATTERN, LONGEST_RUN, JsonTokenizer, TextTokenizer, cut

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


LONG = {
    "spaces": " " * 10**6 + "end",
    "letters": "a" * 10**6,
    "emoji": "\U0001f642" * 250_000,  # a million bytes
    "base64": base64.b64encode(random.Random(0).randbytes(750_000)).decode(),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_million_characters_on_end_are_encoded_and_come_back(text, kind):
    ids = text.encode(LONG[kind])
    assert text.decode(ids) == LONG[kind]
    if kind != "spaces":  # there tiktoken needs no help
        assert ids.tolist() == text.encoding.encode_ordinary(LONG[kind])


@pytest.mark.parametrize("kind", ["spaces", "letters", "base64"])
def test_a_million_characters_on_end_may_be_trained_on(kind):
    trained = TextTokenizer.train([*CORPUS, LONG[kind]], 300)
    assert trained.decode(trained.encode(CORPUS[0])) == CORPUS[0]


def test_ids_are_tiktokens_up_to_the_longest_run(text):
    """And beyond it those of the pieces: cut behind so many characters of white space, wherever they stand."""
    run = (" \n\t\u3000" * LONGEST_RUN)[:LONGEST_RUN]
    for raw in (f"a{run}b", f"{run}{run[1:]}".replace("\t", "x"), "a b " * LONGEST_RUN, run):
        assert text.encode(raw).tolist() == text.encoding.encode_ordinary(raw)
    pieces = [f"a{run}", run, "  b"]
    assert list(cut("".join(pieces), LONGEST_RUN, r"\s")) == pieces
    assert text.encode("".join(pieces)).tolist() == [i for p in pieces for i in text.encoding.encode_ordinary(p)]


def test_training_is_what_it_was_where_no_run_is_long():
    """The oracle is the trainer itself, on the corpus as it is; its merges are the ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    letters = random.Random(0)
    corpus = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=2000)) for _ in range(20)] + ["a" * 1000, " " * 1000]
    reference = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(GPT2_PATTERN), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    reference.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    for document in corpus:
        assert TextTokenizer.train(corpus, 400).encode(document).tolist() == reference.encode(document).ids


def test_a_panic_of_tiktoken_is_a_mistake_of_one_text():
    """It is no Exception: who skips what cannot be read would die of it."""
    pattern = r"(?:\p{L}|\d)+(?!\S)|."  # backtracks in letters, which are not cut
    ranks = {bytes([b]): b for b in range(256)}
    greedy = TextTokenizer(tiktoken.Encoding("greedy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))
    assert greedy.encode("ab").tolist() == [97, 98]
    with pytest.raises(ValueError, match="tiktoken cannot split a text of 1000000 characters"):
        greedy.encode("ab" * 500_000)


NO_TEXT = {
    "expected a string, got NoneType": None,
    "expected a string, got bytes": b"a",
    "expected a string, got int": 3,
    "expected a string, got list": ["a", "b"],
    r"half a surrogate pair, '.ud800' at 2, is no character": "ab\ud800",
}


@pytest.mark.parametrize("message", NO_TEXT)
def test_what_is_no_text_is_named(text, json_tokenizer, message):
    for encode in (text.encode, json_tokenizer().encode, lambda raw: TextTokenizer.train(iter([raw]), 300)):
        with pytest.raises(ValueError, match=message):
            encode(NO_TEXT[message])


@pytest.fixture
def json_tokenizer(tmp_path):
    """A function: a byte-level tokenizer.json with a template's tokens, a mask that is not special, and what is changed."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    def make(change=lambda t: None, **settings):
        own = Tokenizer(models.BPE())
        own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        own.train_from_iterator(CORPUS, trainer)
        own.add_special_tokens(["<|user|>", "<|end|>"])
        own.add_tokens([AddedToken("<|mask|>", special=False), AddedToken("<think>", special=False)])
        change(own)
        own.save(str(tmp_path / "tokenizer.json"))
        if "reserved" in settings:
            settings["reserved"] = [own.token_to_id(t) for t in settings["reserved"]]
        return JsonTokenizer(str(tmp_path / "tokenizer.json"), **settings)

    return make


LITERALS = ["say <|end|> or <|user|>", "<|mask|>", "<|mask|><|end|>", "a<|mask|>b <|end|", " <|end|> "]


@pytest.mark.parametrize("copied", ["as made", "pickled", "saved"])
def test_control_tokens_in_a_text_are_text(json_tokenizer, copied, tmp_path):
    """A mask in a text would be a target that no model may predict; an end would cut what follows."""
    own = json_tokenizer(reserved=["<|mask|>"])
    if copied == "pickled":
        own = pickle.loads(pickle.dumps(own))
    if copied == "saved":
        node = own.save(tmp_path)
        own = JsonTokenizer(**{**{k: v for k, v in node.items() if k != "_component_"}, "path": str(tmp_path / node["path"])})
    assert own.control == {t: own.id_of(t) for t in ("<|user|>", "<|end|>", "<|mask|>")}
    for literal in LITERALS:
        ids = own.encode(literal)
        assert not {*own.control.values()} & {*ids.tolist()}
        assert own.decode(ids) == literal
        assert own.num_bytes(ids) == len(literal.encode())
    assert own.encode("<think>").tolist() == [own.id_of("<think>")]  # the file calls it a token of texts


def test_control_tokens_are_read_where_that_is_asked_for(json_tokenizer, tmp_path):
    own = json_tokenizer(parse_special=True, reserved=["<|mask|>"])
    assert own.save(tmp_path)["parse_special"]
    for one in (own, pickle.loads(pickle.dumps(own))):
        assert one.encode("<|mask|><|end|>").tolist() == [one.id_of("<|mask|>"), one.id_of("<|end|>")]
        assert one.encode(fill("<|user|>{}", "<|end|>")).tolist() == [one.id_of("<|user|>"), one.id_of("<|end|>")]


def test_a_control_token_that_is_a_word_of_the_vocabulary_becomes_what_unknown_words_are(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "[MASK]": 1, "?": 2, "#": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    own = JsonTokenizer(str(tmp_path / "tokenizer.json"), reserved=[1, 2, 3, 77])  # 77: a model's id without a word
    assert own.save(tmp_path)["reserved"] == [1, 2, 3, 77]
    for one in (own, JsonTokenizer(str(tmp_path / "tokenizer.json"), reserved=own.save(tmp_path)["reserved"])):
        assert one.encode("a [MASK] b").tolist() == [0, 2, 2, 2]
        assert one.encode(fill("[MASK] {}", "[MASK]")).tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="'#' is a control token, and there is no other that spells it"):
        own.encode("a #")


def test_limits_in_a_tokenizer_file_cut_nothing_and_are_not_saved(json_tokenizer, tmp_path):
    def limit(own):
        own.enable_truncation(8)
        own.enable_padding(length=600, pad_token="<|end|>", pad_id=own.token_to_id("<|end|>"))

    own = json_tokenizer(limit)
    assert own.decode(own.encode(CORPUS[2] * 5)) == CORPUS[2] * 5
    assert own.encode("a").tolist() == [own.id_of("a")]
    own.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None
    assert saved["padding"] is None


def test_a_post_processor_adds_no_token(json_tokenizer):
    from tokenizers import processors

    def frame(own):
        ends = [(t, own.token_to_id(t)) for t in ("<|user|>", "<|end|>")]
        own.post_processor = processors.TemplateProcessing(single="<|user|> $A <|end|>", special_tokens=ends)

    own = json_tokenizer(frame)
    assert own.encode("a").tolist() == own.encode(fill("{}", "a")).tolist() == [own.id_of("a")]


def test_a_million_spaces_pass_a_tokenizer_file(json_tokenizer):
    own = json_tokenizer()
    assert own.decode(own.encode(LONG["spaces"])[-4:]).endswith(" end")


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
