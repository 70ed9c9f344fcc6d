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
