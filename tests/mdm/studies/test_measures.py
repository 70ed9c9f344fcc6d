"""What a study measures of a finished run: the samplers of a number of passes, and what is refused."""

import pytest
import torch

from components.block_diffusion import BlockMasker, Layout
from components.kernels import Hybrid, Uniform
from components.maskers import FixedCountMasker
from components.samplers import Confidence, SelfCorrect
from components.types import Batch
from components.weightings import Noise
from mdm.studies.measures import Passes, block_losses


def test_the_samplers_are_those_that_the_noise_goes_with_and_corrections_share_the_passes():
    measure = Passes("text", [], correct=3)
    assert list(measure._samplers(2, Noise())) == ["ancestral", "confidence"]
    assert list(measure._samplers(2, Noise(Uniform()))) == ["ancestral", "least sure"]
    five = measure._samplers(5, Noise(Hybrid(0.1)))
    names = ["ancestral", "confidence", "least sure"]
    assert list(five) == [*names, *(f"{name}+correct" for name in names)]
    corrected = five["confidence+correct"]
    assert corrected == SelfCorrect(Confidence(num_steps=2), passes=3, tokens=3, temperature=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "text_to_image"}, "task 'text_to_image' is to be image or audio of a caption, with `training`"),
        ({"task": "image_to_text", "training": [{}]}, "task 'image_to_text'"),
        ({"task": "joint_text_image"}, "task 'joint_text_image'"),
        ({"task": "text", "samples": 1}, "Passes: samples are at least 2; got 1"),
        ({"task": "text", "passes": []}, r"passes are at least 1 and correct at least 0; got \[\], 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Passes(**{"test": [], **settings})


def test_the_losses_of_blocks_are_means_over_all_positions_of_each():
    """Blocks of 4 in rows of 6: the second one has 2 positions."""
    noisy = BlockMasker(FixedCountMasker(9), Layout({"text": 4}, ["text"]))(Batch.of(torch.zeros(3, 6, dtype=torch.long), 0))
    masked, length, loss = block_losses(noisy, noisy.weight, 0)
    assert length.tolist() == [4, 2] * 3
    assert masked.tolist() == [int(noisy.mask[r, part].sum()) for r in range(3) for part in (slice(4), slice(4, 6))]
    assert loss.tolist() == pytest.approx([1.0] * 6)  # k masked positions weigh L / k each
    assert block_losses(noisy, noisy.weight, 1).shape == (3, 0)
