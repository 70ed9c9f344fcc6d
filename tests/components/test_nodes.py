"""Samples that cannot be used, on their way from a source to a batch."""

import errno
import itertools
import weakref

import pytest
import torch
from torch.testing import assert_close
from torchdata.nodes import Loader, Prefetcher

from components.data.bad import BadSample, Note, Noted, Refused, attempt
from components.data.draws.endless import Draws, Passing, Placed, Prepared, Streamed, with_notes
from components.data.draws.order import WholeOrder
from components.data.nodes import Lanes, MicroBatches, Mix, Stream
from components.data.packing import Packed
from components.data.sources import hugging_face
from components.maskers import BernoulliMasker
from components.sequences import task_sequence
from components.types import PAD_DOCUMENT


class Brought(list):
    """A user's own source, of which some samples are bad, each in another way."""

    def __init__(self, samples, bad=()):
        super().__init__(samples)
        ways = (lambda i: BadSample(f"{i}.png", "it is cut"), lambda i: OSError("cannot identify"), lambda i: KeyError("text"))
        self.bad = {index: ways[k % 3](index) for k, index in enumerate(bad)}

    def __getitem__(self, index):
        if index in self.bad:
            raise self.bad[index]
        return super().__getitem__(index)


def pipeline(vocabulary, bad=(), bad_texts=(), pairs=False, rank=0, world_size=1, size=12, micro=6):
    """Two modalities and packed text, 2 : 1."""

    def pair(sample, rng):
        parts = {"text": torch.tensor([sample % 7]), "image": vocabulary.to_global("image", torch.full((4,), sample % 5))}
        task = ["text_to_image", "image_to_text"][int(rng.integers(2))]
        return [task_sequence(vocabulary, task, parts, {"text": 2, "image": 4})]

    texts = Brought([torch.arange(n) % 7 for n in (5, 30, 11, 3, 9, 14)], bad_texts)

    def packed(lane):
        return Packed(draws(texts, 0, lane, 4), lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {}), length=24)

    samples = Brought(range(40), bad)
    streams = [
        Stream("pairs", Placed(Prepared(samples), WholeOrder(40, 1)), 2, pair, pairs=pairs),
        Stream("text", Lanes(4, packed), 1, lambda row, rng: row, length=24, pairs=pairs),
    ]
    return MicroBatches(Mix(streams, 0), size, micro // world_size, vocabulary.pad_id, rank, world_size)


def draws(samples, seed, lane=0, lanes=1):
    return Draws(Prepared(samples), WholeOrder(len(samples), seed), lanes, lane)


def plain(steps):
    """Steps as they can be compared."""
    return [[(name, b.tokens.tolist(), b.document.tolist(), list(notes)) for name, b, notes in step] for step in steps]


def exhaust(node, most=2000):
    for _ in range(most):
        next(node)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bad_sample_is_replaced_by_the_next_and_all_others_keep_their_index_their_order_and_their_mask(
    vocabulary, pairs, world_size
):
    """Over two epochs, on every rank: the same batches, but for the rows of three samples, which hold the ones behind them."""
    bad, masker, named, replaced = (3, 17, 30), BernoulliMasker(vocabulary.mask_id, pairs=pairs), set(), 0
    order = WholeOrder(40, 1)
    for rank in range(world_size):
        good, damaged = (pipeline(vocabulary, b, (), pairs, rank, world_size) for b in ((), bad))
        for _ in range(22 if pairs else 11):
            for (name, want, none), (other, found, notes) in zip(next(good), next(damaged), strict=True):
                assert (name, none) == (other, [])
                rows = (want.document.max(dim=1).values // (1 + pairs)).tolist()
                other_row = torch.tensor([name == "pairs" and order(r) in bad for r in rows])
                assert other_row.any() == bool(notes)
                replaced += int(other_row.sum())
                named |= {(note.stream, note.name, note.cut) for note in notes}
                want_noisy, noisy = masker(want), masker(found)
                for field in ("tokens", "document", "maskable", "id_range", "position"):
                    assert_close(getattr(found, field)[~other_row], getattr(want, field)[~other_row])
                for field in ("noisy", "mask", "weight"):
                    assert_close(getattr(noisy, field)[~other_row], getattr(want_noisy, field)[~other_row])
                assert_close(found.document, want.document)
                for r in other_row.nonzero()[:, 0].tolist():
                    nearest = next(order(rows[r] + k) for k in itertools.count(1) if order(rows[r] + k) not in bad)
                    text = found.tokens[r][found.modality[r] == vocabulary.modalities.index("text")]
                    assert int(text[0]) == nearest % 7
    assert named == {("pairs", "3.png", False), ("pairs", "sample 17", False), ("pairs", "sample 30", False)}
    assert replaced == 3 * 2 * (1 + pairs) + (2 if pairs else 1) * sum(order(r) in bad for r in range(80, 88))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_the_pipeline_resumes_at_the_very_next_sample_among_bad_ones(vocabulary, pairs, stop):
    make = lambda: Loader(Prefetcher(pipeline(vocabulary, (0, 3, 5, 17), (1, 4), pairs), 3))  # noqa: E731
    loader = make()
    steps = iter(loader)
    for _ in range(stop):
        next(steps)
    state = loader.state_dict()
    expected = plain(itertools.islice(steps, 6))
    again = make()
    again.load_state_dict(state)
    assert plain(itertools.islice(iter(again), 6)) == expected
    idle = pipeline(vocabulary, (0, 3, 5, 17), (1, 4), pairs)
    for _ in range(stop):
        next(idle)
    state = idle.state_dict()
    idle.reset(state)
    assert idle.state_dict() == state


def test_packing_passes_over_a_bad_document_and_the_row_tells_of_it(vocabulary):
    texts = [torch.full((n,), i) for i, n in enumerate((9, 14, 11, 8, 9))]
    row = lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {})  # noqa: E731
    node = Packed(draws(Brought(texts, (2,)), 0), row, 24)
    rows = [next(node) for _ in range(8)]
    packed = torch.cat([s.tokens[s.maskable] for r in rows for s in (r.sample if isinstance(r, Noted) else r)])
    source = draws(texts, 0)
    expected = torch.cat([d for d in (next(source) for _ in range(20)) if d[0] != 2])
    assert_close(packed, expected[: len(packed)])
    assert {(n.name, n.why) for r in rows if isinstance(r, Noted) for n in r.notes} == {("2.png", "it is cut")}


def test_what_ranks_find_is_together_what_one_process_finds(vocabulary):
    found = []
    for world_size in (1, 2):
        nodes = [pipeline(vocabulary, (0, 3, 5, 17), (1,), False, r, world_size) for r in range(world_size)]
        found.append({note for node in nodes for _ in range(8) for _, _, notes in next(node) for note in notes})
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_where_no_sample_can_be_used_the_run_ends_by_the_first_ones_name(vocabulary):
    with pytest.raises(ValueError, match=r"^data\.pairs: 80 samples in a row cannot be used; the first is "):
        next(pipeline(vocabulary, tuple(range(40))))
    few = pipeline(vocabulary, tuple(i for i in range(40) if i not in (2, 29)))
    made = [step for _ in range(4) for step in next(few)]
    assert len({note.name for _, _, notes in made for note in notes}) > 20
    assert all((b.document != PAD_DOCUMENT).any(1).all() for _, b, _ in made)


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (BadSample("b.wav", "it is silent"), "b.wav: it is silent"),
        (ValueError("no\ngood"), "sample 3: no good"),
        (OSError("image file is truncated"), "sample 3: OSError: image file is truncated"),
        (KeyError("text"), "sample 3: KeyError: 'text'"),
        (RuntimeError(), "sample 3: RuntimeError"),
    ],
)
def test_whatever_a_source_raises_is_a_bad_sample_with_a_name(raised, why):
    def draw():
        raise raised

    assert str(attempt(draw, str, "sample 3")) == why
    assert str(attempt(lambda: raised, str, "sample 3")) == why or not isinstance(raised, BadSample)


def test_what_is_the_machines_fault_or_refused_ends_the_run_with_the_samples_name():
    def draw():
        raise OSError(errno.EMFILE, "Too many open files")

    def refuse(sample):
        raise Refused("it is too long")

    with pytest.raises(Refused, match=r"sample 3: OSError: .*Too many open files"):
        attempt(draw, str, "sample 3")
    with pytest.raises(Refused, match="sample 3: it is too long"):
        attempt(lambda: 1, refuse, "sample 3")


def test_a_bad_sample_holds_on_to_nothing():
    class Big(list):
        pass

    seen = []

    def prepare(sample):
        held = Big()
        seen.append(weakref.ref(held))
        raise ValueError("too long")

    bad = attempt(lambda: 1, prepare, "sample 3")
    assert isinstance(bad, BadSample)
    assert seen[0]() is None


class Lines:
    """A stream of the user's own, without a name for its samples: some are bad, and one may end it."""

    def __init__(self, samples, breaks_at=None):
        self.samples, self.breaks_at, self.at = samples, breaks_at, 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = 0 if state is None else state["at"]

    def __iter__(self):
        while self.at < len(self.samples):
            if self.at == self.breaks_at:
                raise OSError("the disk is gone")
            self.at += 1
            yield self.samples[self.at - 1]
        self.at = 0


def test_a_streamed_sample_is_named_by_its_place_in_the_epoch_and_a_stream_that_breaks_by_where():
    samples = [BadSample("", "no caption") if i in (2, 9) else i for i in range(12)]
    node = Streamed(Lines(samples), seed=0, block_size=5)
    seen = [next(node) for _ in range(36)]  # three epochs
    assert sorted(i for i in seen if not isinstance(i, BadSample)) == sorted([i for i in range(12) if i not in (2, 9)] * 3)
    assert {str(i) for i in seen if isinstance(i, BadSample)} == {"sample 2: no caption", "sample 9: no caption"}
    lanes = Lanes(1, lambda lane: Passing(Streamed(Lines(samples, breaks_at=7), 0, block_size=5)))
    broken = MicroBatches(Mix([Stream("web", lanes, 1, lambda s, rng: [])], 0), 1, 1, 0)
    with pytest.raises(ValueError, match=r"^data\.web: the stream ended at sample 7: OSError: the disk is gone"):
        exhaust(broken)
    never = Streamed(Lines([BadSample("x", "y")] * 3), 0)
    with pytest.raises(ValueError, match="1000 samples in a row cannot be used; the first is x: y"):
        exhaust(never)


def test_a_bad_sample_is_replaced_by_the_next_of_its_lane():
    order = WholeOrder(40, 1)
    placed = Placed(Prepared(Brought(range(40), (order(9),))), order, lanes=4)
    assert placed(9).sample == order(13)


def test_streams_of_two_seeds_have_two_orders():
    one, other = ([next(node) for _ in range(20)] for node in (Streamed(Lines([*range(20)]), seed) for seed in (0, 1)))
    assert sorted(one) == sorted(other)
    assert one != other


def test_what_is_told_of_a_sample_comes_behind_what_was_left_out_before_it():
    left_out, cut = Note("a.png", "it is cut off"), Note("b.png", "it is long", cut=True)
    assert with_notes(Noted(7, [cut]), [left_out]) == Noted(7, [left_out, cut])
    assert with_notes(7, [left_out]) == Noted(7, [left_out])
    assert with_notes(7, []) == 7


def test_a_stream_whose_connection_breaks_goes_on_where_it_was(monkeypatch, capsys):
    """Twice, in the midst of a block and at its end; then for good."""
    monkeypatch.setattr("components.places.FIRST_PAUSE", 0.01)

    class Breaking(Lines):
        left = [3, 12, 14]

        def __iter__(self):
            for sample in super().__iter__():
                if self.left and sample == self.left[0]:
                    self.left.pop(0)
                    raise ConnectionResetError("reset by peer")
                yield sample

    whole, broken = (Streamed(kind([*range(30)]), seed=0, block_size=5) for kind in (Lines, Breaking))
    assert [next(broken) for _ in range(70)] == [next(whole) for _ in range(70)]
    assert Breaking.left == []
    said = "the stream does not answer (ConnectionResetError: reset by peer); it is tried for 600 seconds"
    assert said in capsys.readouterr().err
    monkeypatch.setenv("MDM_PATIENCE", "0")
    Breaking.left = [2]
    with pytest.raises(ValueError, match="the stream ended at sample 2: Unreachable: the stream does not answer"):
        next(Streamed(Breaking([*range(30)]), seed=0, block_size=5))


def test_a_streamed_dataset_survives_three_resumes_across_blocks_and_epochs(tmp_path):
    """30 captions in blocks of 8, three of them bad: stopped within blocks, at their ends, and in later epochs.

    It fails with datasets before 4.8.5, whose state forgets how far a batch of rows was read.
    """
    import datasets

    datasets.Dataset.from_dict({"text": [f"caption {i}" for i in range(30)]}).save_to_disk(str(tmp_path))

    def prepare(sample):
        if sample["text"] in ("caption 4", "caption 7", "caption 29"):
            raise ValueError("it is bad")
        return sample["text"]

    def node():
        return Streamed(hugging_face(str(tmp_path), streaming=True), seed=0, block_size=8, prepare=prepare)

    whole = node()
    expected = [str(next(whole)) for _ in range(130)]
    for epoch in range(4):
        seen = expected[30 * epoch : 30 * epoch + 30]
        assert sorted(seen) == sorted(f"sample {i}: it is bad" if i in (4, 7, 29) else f"caption {i}" for i in range(30)), epoch
    for stops in ((5, 8, 30), (8, 16, 24), (29, 60, 61), (1, 31, 100)):
        current, seen = node(), []
        for stop in stops:
            seen += [str(next(current)) for _ in range(stop - len(seen))]
            state = current.state_dict()
            [next(current) for _ in range(3)]  # what was drawn after the checkpoint is lost
            current = node()
            current.reset(state)
        seen += [str(next(current)) for _ in range(len(expected) - len(seen))]
        assert seen == expected, stops
