"""How an adapter starts."""

import torch

from mdm.models import builders
from mdm.models.adapters import LoraSettings, add_lora


def test_a_starts_uniform_within_one_over_the_root_of_its_inputs():
    """B is 0, so nothing is changed; A as LoRALinear's own: a standard deviation of (3 inputs)^-1/2, here of 512 and more."""
    model = builders.nano(vocab_size=50, max_length=32, width=64, num_layers=2, num_heads=2)
    add_lora(model, LoraSettings(rank=8), generator=torch.Generator().manual_seed(0))
    found = {name: p for name, p in model.named_parameters() if "lora_a" in name}
    assert len(found) == 14
    for p in found.values():
        bound = p.shape[1] ** -0.5
        assert 0.9 * bound < p.abs().max() <= bound
        assert abs(p.std() / (bound / 3**0.5) - 1) < 0.15  # 5 standard errors of 512 uniform numbers: 0.1
