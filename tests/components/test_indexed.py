import pytest

from components.data.bad import BadSample, Refused
from components.data.indexed import Indexed


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
