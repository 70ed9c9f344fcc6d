import pytest

from components.data.bad import BadSample, Refused
from components.data.indexed import Indexed, Iterated


class Letters(Indexed[str]):
    called = "letter"

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> str:
        if index == 2:
            raise BadSample("the third", "it is smudged")
        return "abcd"[index]


def test_a_slice_is_the_list_of_its_samples():
    assert Letters()[:2] == ["a", "b"]
    assert Letters()[3:0:-3] == ["d"]
    assert Letters()[4:] == []


def test_one_pass_over_it_draws_each_sample_once():
    drawn = iter(Letters())
    assert [next(drawn), next(drawn)] == ["a", "b"]
    with pytest.raises(BadSample, match="the third: it is smudged"):
        next(drawn)


def test_a_bad_sample_is_refused_by_what_it_is_called_where_a_setting_says_so():
    letters = Letters()
    letters.on_corrupt = "refuse"
    with pytest.raises(Refused, match=r"corrupt letter the third: it is smudged \(on_corrupt: skip leaves such letters out\)"):
        letters[2]


class Numbers:
    """Twelve numbers in four files, read one after the other."""

    num_shards = 4

    def __init__(self, numbers=range(12)):
        self.numbers, self.at = numbers, 0

    def shard(self, num_shards, index):
        return Numbers(self.numbers[index::num_shards])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = 0 if state is None else state["at"]

    def __iter__(self):
        while self.at < len(self.numbers):
            self.at += 1
            yield self.numbers[self.at - 1]


def convert(number, name):
    if number == 9:
        raise BadSample(name, "it is nine")
    return {"number": number, "name": name}


def test_a_part_of_a_stream_is_read_as_the_whole_is_and_names_its_rows():
    whole = Iterated(Numbers(), convert, "web", "refuse")
    assert whole.num_shards == 4
    assert Iterated(Numbers(), convert, "web", count=5).num_shards == 1  # a part would not know its share
    part = iter(whole.shard(4, 1))
    assert [next(part) for _ in range(2)] == [
        {"number": n, "name": f"web, part 1 of 4, sample {k}"} for k, n in enumerate((1, 5))
    ]
    with pytest.raises(Refused, match="corrupt sample web, part 1 of 4, sample 2: it is nine"):
        next(part)


def test_a_stream_goes_on_at_its_row_and_ends_at_its_count():
    first, again = (Iterated(Numbers(), convert, "web", count=5) for _ in range(2))
    rows = first.rows()
    assert [next(rows)[1] for _ in range(3)] == [f"web, sample {k}" for k in range(3)]
    again.load_state_dict(first.state_dict())
    assert list(again.rows()) == [(3, "web, sample 3"), (4, "web, sample 4")]
    again.load_state_dict(None)
    assert len(list(again)) == 5
