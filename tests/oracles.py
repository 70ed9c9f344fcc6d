"""Slow, exact references on a tiny joint: 3 positions of 4 symbols, everything enumerated in float64."""

from __future__ import annotations

import itertools

import torch

LENGTH, SYMBOLS = 3, 4
MASK = SYMBOLS  # the mask token's id


def tiny_joint(seed: int = 0) -> torch.Tensor:
    """A joint distribution with strong dependence between positions, `[4, 4, 4]`."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, dtype=torch.float64, generator=g).mul(1.5).flatten().softmax(0).view(4, 4, 4)


def all_sequences() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))


def all_masks() -> torch.Tensor:
    """Every subset of positions, `[8, 3]`."""
    return torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))


def exact_conditionals(joint: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p(x_i | visible tokens) for noisy sequences `[batch, 3]`: `[batch, 3, 5]`, -inf at the mask token."""
    sequences, flat = all_sequences(), joint.flatten()
    agrees = ((tokens[:, None] == sequences[None]) | (tokens[:, None] == MASK)).all(-1).double() * flat
    logits = torch.full((*tokens.shape, SYMBOLS + 1), -torch.inf, dtype=torch.float64)
    for i in range(LENGTH):
        for v in range(SYMBOLS):
            logits[:, i, v] = agrees[:, sequences[:, i] == v].sum(1).log()
    return logits - agrees.sum(1).log()[:, None, None]


def perturbed_model(joint: torch.Tensor, seed: int = 1) -> dict[tuple[bool, ...], torch.Tensor]:
    """An imperfect model's cross-entropy for each (sequence, mask): `{mask: [64, 3]}`, 0 at visible positions."""
    g = torch.Generator().manual_seed(seed)
    sequences = all_sequences()
    out = {}
    for mask in all_masks():
        noisy = torch.where(mask, MASK, sequences)
        logits = exact_conditionals(joint, noisy)[..., :SYMBOLS]
        noise = torch.randn(logits.shape, dtype=torch.float64, generator=g) * 0.3
        # the same noisy input must get the same prediction, whichever sequence it came from
        keys, index = noisy.unique(dim=0, return_inverse=True)
        first = torch.stack([(index == k).nonzero()[0, 0] for k in range(len(keys))])
        log_p = (logits.clamp_min(-30) + noise[first][index]).log_softmax(-1)
        out[tuple(mask.tolist())] = -log_p.gather(-1, sequences[..., None])[..., 0] * mask
    return out


def exact_nelbo(joint: torch.Tensor, cross_entropy: dict) -> float:
    """The any-order bound in nats a sequence: the mean over counts k of L / k times the cross-entropy at k masks."""
    total = torch.zeros(64, dtype=torch.float64)
    for k in range(1, LENGTH + 1):
        masks = [m for m in cross_entropy if sum(m) == k]
        total += sum(cross_entropy[m].sum(-1) for m in masks) / len(masks) * (LENGTH / k) / LENGTH
    return float((joint.flatten() * total).sum())
