"""What the settings of a run make of its sources: orders, lanes, and who reads what."""

import pytest

from components.data.bad import BadSample, Noted
from components.data.draws.order import ShardOrder, WholeOrder
from components.maskers import FixedCountMasker
from components.noise import seed_of
from components.tokenizers.text import TextTokenizer
from mdm.data import pipeline
from mdm.data.pipeline import streams, training_loader
from mdm.data.processor import Processor
from mdm.data.settings import LossSettings, StreamSettings


@pytest.fixture(scope="module")
def processor():
    return Processor.build({"text": TextTokenizer.train(["one two three"] * 5, vocab_size=260)}, {"text": 8})


def made(processor, source, seed=0, lanes=4, workers=0, **settings):
    """The stream of a source of text."""
    data = {"words": StreamSettings(tasks={"text": 1.0}, train={"_component_": "mine"}, **settings)}
    masker = {"words": FixedCountMasker(processor.vocabulary.mask_id)}
    (stream,) = streams(data, {"words": source}, processor, masker, seed, 0.0, lanes=lanes, workers=workers)
    return stream, masker


class Parts:
    """A stream of so many files, each of the same 40 lines after its own number."""

    def __init__(self, files, at=0):
        self.files, self.at = files, at

    @property
    def num_shards(self):
        return len(self.files)

    def shard(self, num_shards, index):
        return Parts(self.files[index::num_shards])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = 0 if state is None else state["at"]

    def __iter__(self):
        lines = [{"text": f"{file} {chr(97 + i)}"} for file in self.files for i in range(20)]
        while self.at < len(lines):
            self.at += 1
            yield lines[self.at - 1]


def test_a_stream_is_cut_by_its_files_and_every_lane_reads_its_own_in_an_order_of_its_own(processor):
    def said(node, count):
        return [processor.tokenizers["text"].decode(next(node)["text"]).strip() for _ in range(count)]

    stream, _ = made(processor, Parts([*range(6)]))
    assert stream.lanes == 4
    nodes = [stream.rows.open(lane) for lane in range(4)]
    assert [node.source.block_size for node in nodes] == [250] * 4  # together as many as one would draw from
    drawn = [said(node, len(range(lane, 6, 4)) * 20) for lane, node in enumerate(nodes)]
    for lane, found in enumerate(drawn):
        assert sorted(found) == sorted(f"{file} {chr(97 + i)}" for file in range(lane, 6, 4) for i in range(20))
    assert [line[2:] for line in drawn[2]] != [line[2:] for line in drawn[3]]
    assert made(processor, Parts([*range(3)]))[0].lanes == 3  # no more than there are files
    other, _ = made(processor, Parts([*range(6)]), seed=1)
    assert said(other.rows.open(0), 40) != drawn[0]


def test_what_cannot_be_used_is_passed_over_in_a_lane_of_a_stream(processor):
    class Bad(Parts):
        def __iter__(self):
            for line in super().__iter__():
                yield BadSample("the first", "it is smudged") if line["text"] == "0 a" else line

    stream, _ = made(processor, Bad([0]), lanes=1)
    lane = stream.rows.open(0)
    drawn = [next(lane) for _ in range(20)]  # into the next epoch
    assert [note.name for item in drawn if isinstance(item, Noted) for note in item.notes] == ["the first"]
    assert not any(isinstance(item, BadSample) for item in drawn)


class Shards:
    """120 samples in shards of ten, which are read."""

    shard_sizes = (10,) * 12

    def __init__(self, open_shards, lazy=False):
        self.open_shards, self.lazy = open_shards, lazy

    def __len__(self):
        return 120

    def __getitem__(self, index):
        return {"text": "one"}

    def lazily(self):
        return Shards(self.open_shards, lazy=True)


def test_shards_of_which_few_are_open_are_dealt_to_lanes(processor):
    few, _ = made(processor, Shards(2), seed=3)
    whole, _ = made(processor, Shards(None), seed=3)
    assert (few.lanes, whole.lanes) == (4, None)
    own = seed_of(3, "words")
    for stream, order in ((few, ShardOrder([10] * 12, 4, own, 2)), (whole, WholeOrder(120, own))):
        assert [stream.rows.order(place) for place in range(240)] == [order(place) for place in range(240)]


@pytest.mark.parametrize("best_fit", [None, 32])
def test_packed_shards_are_read_by_spans_and_packed_as_the_settings_say(processor, best_fit):
    stream, _ = made(processor, Shards(2), pack=32, best_fit=best_fit)
    lane = stream.rows.open(1)
    assert (lane.length, lane.best_fit) == (32, best_fit or 0)
    assert (lane.source.lane, lane.source.lanes) == (1, 4)
    assert isinstance(lane.source.order, ShardOrder)
    assert lane.source.prepared.samples.lazy


def test_workers_are_asked_for_what_is_read_as_it_is_drawn(processor, monkeypatch):
    asked = []

    class Watched(pipeline.Workers):
        def start(self):
            asked.append("start")

        def rows(self, key, dataset, prepare):
            asked.append(("rows", key))
            return super().rows(key, dataset, prepare)

        def prepared(self, key, samples, prepare):
            asked.append(("prepared", key))
            return super().prepared(key, samples, prepare)

    monkeypatch.setattr(pipeline, "Workers", Watched)
    stream, _ = made(processor, Parts([0]), workers=1)
    assert stream.rows.open(0).source.begin is not None
    made(processor, Shards(None), workers=1)
    made(processor, [{"text": "one"}], workers=1)
    assert asked == [("rows", "words"), "start", ("prepared", "words"), "start"]  # none are begun for what lies in memory


def test_the_size_of_a_step_is_asked_for_by_the_tokens_of_the_rows_before(processor):
    """Rows of 32 on the average three times as often as those of a canvas."""
    data = {
        "words": StreamSettings(tasks={"text": 1.0}, train={"_component_": "mine"}),
        "pages": StreamSettings(tasks={"text": 1.0}, train={"_component_": "mine"}, pack=32, weight=3),
    }
    masker = {name: FixedCountMasker(processor.vocabulary.mask_id) for name in data}
    source = [{"text": "one"}]
    mix = streams(data, dict.fromkeys(data, source), processor, masker, 0, 0.0)
    words, pages = (stream.positions for stream in mix)
    assert pages == 32 != words
    asked = []
    size = lambda seen: asked.append(seen) or 8  # noqa: E731
    steps = iter(training_loader(mix, masker, processor, size, 8, LossSettings(), 0, prefetch=0))
    for _ in range(3):
        next(steps)
    average = (words + 3 * 32) / 4
    assert list(dict.fromkeys(asked)) == [int(8 * k * average) for k in range(3)]
