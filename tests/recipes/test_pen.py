"""Pen strokes: a modality that is one file beside a config. Its words, its tokenizer, its judge."""

import importlib

import numpy as np
import pytest
import torch

from tests.recipes.conftest import ROOT


@pytest.fixture(scope="module")
def pen():
    pytest.importorskip("HersheyFonts", reason="needs hershey-fonts, of the extra `quickstart`")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(ROOT / "recipes" / "configs")
    yield importlib.import_module("pen")
    patch.undo()


@pytest.fixture(scope="module")
def words(pen):
    return {split: pen.written_words(split, hands=3) for split in pen.FONTS}


@pytest.fixture(scope="module")
def tokenizer(pen, words):
    return pen.PenTokenizer.train(words["train"], sizes=(64, 32))


def test_the_splits_share_no_font_and_a_seed_decides_every_hand(pen, words):
    fonts = [{s["font"] for s in samples} for samples in words.values()]
    assert len(set.union(*fonts)) == sum(map(len, fonts))
    first, again, other = (pen.written_words("test", hands=1, fonts=1, seed=seed)[3] for seed in (0, 0, 1))
    assert (first["text"], first["word"], first["label"]) == ("a written three", "three", 3)
    assert all(np.array_equal(a, b) for a, b in zip(first["pen"], again["pen"], strict=True))
    assert not np.allclose(first["pen"][0], other["pen"][0])
    with pytest.raises(ValueError, match="split 'dev' is not one of train, judge, test"):
        pen.written_words("dev")


def test_a_thick_letter_is_written_once(pen):
    """The outline of futuram's letters, and rowmant's three lines, are about as long as futural's single one."""
    ink = {f: sum(map(pen.length, pen.lettering(f, "seven"))) for f in ("futural", "futuram", "rowmant")}
    assert ink["futuram"] == pytest.approx(ink["futural"], rel=0.1)
    assert ink["rowmant"] < 1.3 * ink["futural"]  # with its serifs


def test_careful_hands_stay_near_the_font(pen):
    printed = np.concatenate(pen.lettering("futural", "one"))
    far = [
        np.abs(np.concatenate(pen.by_hand(pen.lettering("futural", "one"), np.random.default_rng(0), care)) - printed).max()
        for care in (0.0, 0.5, 1.0)
    ]
    assert far[0] > far[1] > far[2] == pytest.approx(0)


def test_a_writing_survives_its_codes(pen, words, tokenizer):
    """Every stroke of the decoded one ends on the ink of the original, to a seventh of an x, however long the word."""
    for sample in words["train"][::7]:
        codes = tokenizer.encode(sample["pen"])
        assert codes.dtype == torch.long
        assert len(codes) % 2 == 0
        assert all(c < size for c, size in zip(codes.tolist(), tokenizer.codebooks * (len(codes) // 2), strict=True))
        decoded = tokenizer.decode(codes)
        assert len(decoded) == len(sample["pen"])  # the pen is lifted as often
        ink = np.concatenate([pen.evenly(s, 60) for s in sample["pen"]]) - sample["pen"][0][0]
        ends = np.stack([s[-1] for s in decoded])
        assert np.median(np.linalg.norm(ends[:, None] - ink, axis=2).min(axis=1)) < 0.14


def test_the_second_code_refines_the_first(words, tokenizer):
    writing = words["train"][8]["pen"]
    _, targets = tokenizer._follow(writing)
    codes = tokenizer.encode(writing).view(-1, 2)
    coarse = tokenizer.coarse[codes[:, 0]]
    left, rest = targets - coarse, targets - coarse - tokenizer.fine[codes[:, 1]]
    assert (rest**2).mean() < 0.6 * (left**2).mean()


def test_a_tokenizer_is_the_same_once_it_was_saved(pen, words, tokenizer, tmp_path):
    node = tokenizer.save(tmp_path)
    assert node.pop("_component_") == "pen.PenTokenizer.load"
    loaded = pen.PenTokenizer.load(str(tmp_path / node.pop("path")), **node)
    writing = words["test"][5]["pen"]
    assert torch.equal(loaded.encode(writing), tokenizer.encode(writing))


@pytest.mark.parametrize("wrong", [[], [np.zeros((3, 3))], [np.zeros((0, 2))], [np.array([[0.0, np.nan]])]], ids=repr)
def test_what_is_no_writing_is_refused(tokenizer, wrong):
    with pytest.raises(ValueError, match="expected a list of strokes"):
        tokenizer.encode(wrong)


def test_a_dot_is_a_stroke_and_half_a_frame_is_none(tokenizer):
    dot = tokenizer.decode(tokenizer.encode([np.zeros((1, 2))]))
    assert len(dot) == 1
    assert np.abs(dot[0]).max() < 0.3
    assert tokenizer.decode(torch.tensor([3])) == []


def test_a_writing_is_an_svg_file(words, tokenizer, tmp_path):
    writing = words["test"][7]["pen"]
    tokenizer.write(writing, tmp_path / "word.svg")
    back = tokenizer.read(tmp_path / "word.svg")
    assert all(np.abs(a - b).max() < 1e-3 for a, b in zip(back, writing, strict=True))
    (tmp_path / "none.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"none\.svg: it holds no polyline"):
        tokenizer.read(tmp_path / "none.svg")
    (tmp_path / "bad.svg").write_text("seven")
    with pytest.raises(ValueError, match=r"bad\.svg: no SVG"):
        tokenizer.read(tmp_path / "bad.svg")


def test_a_half_made_writing_shows_what_is_known(tokenizer, words):
    codes = tokenizer.encode(words["train"][9]["pen"])
    known = torch.arange(len(codes)) < len(codes) // 4 * 2
    empty, half, whole = (
        np.asarray(tokenizer.partial(torch.where(k, codes, 10**6), k)).reshape(-1, 3).astype(int)
        for k in (known & False, known, known | True)
    )
    blue = [int((picture[:, 2] > picture[:, 0] + 40).sum()) for picture in (empty, half, whole)]
    dark = [int((picture.sum(axis=1) < 200).sum()) for picture in (empty, half, whole)]
    assert blue[0] > blue[1] > blue[2] == 0
    assert 0 == dark[0] < dark[1] < dark[2]
    drawn = np.asarray(tokenizer.draw(tokenizer.decode(codes))).reshape(-1, 3)
    assert np.abs(whole - drawn).mean() < 1  # but for the joints


def test_the_judge_reads_fonts_that_it_never_saw(pen, words, tokenizer):
    judge = pen.PenJudge(words["judge"])
    test = words["test"]
    coded = [tokenizer.decode(tokenizer.encode(s["pen"])) for s in test]
    labels = [s["label"] for s in test]
    assert np.mean(judge.classify([s["pen"] for s in test]) == labels) >= 0.9
    assert np.mean(judge.classify(coded) == labels) >= 0.8  # by small codebooks
    assert len(judge.classify([[]])) == 1  # nothing was written
