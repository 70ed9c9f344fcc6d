import pickle
from pathlib import Path

import numpy as np
import pytest

from components.data.bad import BadSample, drawn, name_of, usable


class Drawn:
    """Ten samples, of which 3 and 7 cannot be used."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in (3, 7):
            raise BadSample(f"{index}.png", "it is\ntruncated")
        return index


def test_a_bad_sample_is_one_line_and_survives_a_process_border():
    bad = pickle.loads(pickle.dumps(BadSample("a\nb.png", "it is\ntruncated")))
    assert (bad.name, str(bad)) == ("a\nb.png", "a b.png: it is truncated")


@pytest.mark.parametrize("source", [Drawn(), (s for s in [0, 1, 2, BadSample("3.png", "x"), 4])], ids=["indexed", "iterated"])
def test_a_bad_sample_keeps_its_place(source):
    samples = list(drawn(source))
    assert isinstance(samples[3], BadSample)
    assert samples[4] == 4


def test_usable_samples_come_in_the_order_asked_for_and_what_is_left_out_is_counted(capsys):
    assert list(usable(Drawn(), np.array([7, 2, 3, 9]))) == [2, 9]
    assert capsys.readouterr().out == "left out 2 bad samples, the first is 7.png: it is truncated\n"
    assert list(usable(iter([1, BadSample("a", "b"), 2]))) == [1, 2]
    assert list(usable([1, 2])) == [1, 2]
    assert capsys.readouterr().out == "left out 1 bad samples, the first is a: b\n"


def test_a_source_that_cannot_name_a_sample_ends_no_run():
    class Nameless(Drawn):
        def name_of(self, index):
            return [Path("a.png")][index]

    samples = list(drawn(Nameless()))
    assert [bad.name for bad in samples if isinstance(bad, BadSample)] == ["3.png", "7.png"]
    assert name_of(Nameless(), 0) == "a.png"
    assert name_of(Nameless(), 1) == "sample 1"
