import json

import pytest
import torch
from torch.testing import assert_close

from components.vocabulary import Vocabulary


def test_ranges_are_contiguous_and_disjoint(vocabulary):
    start = 0
    for r in vocabulary.ranges:
        assert r.start == start
        start = r.stop
    ids = [vocabulary.special(name) for name in vocabulary.specials]
    assert ids == list(range(start, vocabulary.size))


def test_codes_round_trip_through_the_shared_space(vocabulary):
    codes = torch.tensor([3, 2, 0, 1])
    ids = vocabulary.to_global("audio", codes)
    assert_close(vocabulary.to_codes("audio", ids), codes)
    ranges = vocabulary.id_ranges("audio", 4)
    assert all(vocabulary.ranges[r].start <= i < vocabulary.ranges[r].stop for r, i in zip(ranges, ids, strict=True))


def test_only_the_range_and_where_it_may_the_end_token_are_allowed(vocabulary):
    for i, r in enumerate(vocabulary.ranges):
        allowed = vocabulary.allowed(torch.tensor([i]))[0]
        assert allowed[r.start : r.stop].all()
        assert int(allowed.sum()) == r.size + (r.modality in ("text", "audio"))
        assert bool(allowed[vocabulary.end_id]) == (r.modality in ("text", "audio"))
    logits = vocabulary.restrict(torch.zeros(1, vocabulary.size), torch.tensor([0]))
    assert logits[0, vocabulary.mask_id] == float("-inf")
    assert not vocabulary.allowed(torch.tensor([-1]))[0, vocabulary.mask_id]


def test_what_is_added_follows_the_ids_there_are():
    """Behind the specials too, which lie after the ranges of a model of ours, and inside the text's of one from elsewhere."""
    for old in (Vocabulary.build({"text": (7,)}, ["text"], tasks=("text",)), Vocabulary.of_text(size=9, mask=8, pad=7, end=6)):
        new = old.grown({"audio": (4, 3)}, ["audio"], tasks=("text", "text_to_speech"))
        assert new.ranges[: len(old.ranges)] == old.ranges
        assert all(new.special(name) == old.special(name) for name in old.specials)
        added = [i for r in new.ranges[len(old.ranges) :] for i in range(r.start, r.stop)]
        added += [new.special(name) for name in new.specials if name not in old.specials]
        assert added == list(range(old.size, new.size))


def test_save_and_load_as_json(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text())["ranges"][0]["name"] == "text"
    assert Vocabulary.load(tmp_path / "v.json") == vocabulary
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a vocabulary"):
        Vocabulary.load(tmp_path / "bad.json")


def test_mistakes_are_named(vocabulary):
    with pytest.raises(ValueError, match="no special token 'nope'"):
        vocabulary.special("nope")
    with pytest.raises(ValueError, match="no modality 'video'; it has text, image, audio"):
        vocabulary.ranges_of("video")
    with pytest.raises(ValueError, match="codebook sizes of at least 1"):
        Vocabulary.build({"text": (0,)}, ["text"])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([3, 9, 4, 0]), r"pen: code 4 at 2 is not in 0\.\.3"),
        (torch.tensor([-1, 0]), r"pen: code -1 at 0 is not in 0\.\.3"),
        (torch.tensor([0, 10]), r"pen: code 10 at 1 is not in 0\.\.9"),
        (torch.tensor([0, 1, 2]), "pen: 3 codes are no whole frames of 2"),
        (torch.ones(2), r"pen: codes are a tensor \[n\] of whole numbers, got torch.float32 \[2\]"),
        (torch.ones(2, 2, dtype=torch.long), r"pen: codes are .*, got torch.int64 \[2, 2\]"),
        ([1, 2], r"pen: codes are .*, got list"),
    ],
)
def test_codes_are_those_of_their_codebooks_in_whole_frames(codes, message):
    vocabulary = Vocabulary.build({"text": (3,), "pen": (4, 10)}, ["pen"])
    vocabulary.check_codes("pen", torch.tensor([3, 9, 0, 0]))
    vocabulary.check_codes("pen", torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=f"^{message}$"):
        vocabulary.check_codes("pen", codes)


@pytest.mark.parametrize(
    "change", [("task:text_to_pen", "task:../../x"), ("task:text_to_pen", "task:text_to_image"), ("pen", "../x")]
)
def test_a_vocabulary_of_names_that_are_none_is_refused(tmp_path, change):
    path = tmp_path / "vocabulary.json"
    Vocabulary.build({"text": (3,), "pen": (4,)}, ["pen"], ["text_to_pen"]).save(path)
    assert Vocabulary.load(path).tasks == ("text_to_pen",)
    path.write_text(path.read_text().replace(f'"{change[0]}"', f'"{change[1]}"'))
    with pytest.raises(ValueError, match="is not a vocabulary written by"):
        Vocabulary.load(path)
