"""Noise is a function of (seed, stream, index), and each of the three makes another."""

import pytest

from components.noise import STREAMS, sample_rng


def test_seed_purpose_and_sample_each_make_another_noise():
    """First numbers of 53 bits: that any two of 105 agree by chance has probability 6e-13."""
    keys = [(seed, stream, index) for seed in (0, 1, 2) for stream in STREAMS for index in range(5)]
    numbers = [sample_rng(*key).random() for key in keys]
    assert len(set(numbers)) == len(keys)
    assert [sample_rng(*key).random() for key in keys] == numbers  # whatever was drawn before


def test_a_purpose_that_does_not_exist_is_named_beside_those_that_do():
    with pytest.raises(ValueError, match="stream 'span' is not one of time, mask,"):
        sample_rng(0, "span", 0)
