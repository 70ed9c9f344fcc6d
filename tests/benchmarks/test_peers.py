"""What stands in for flash-attn in MDLM's model: rotation and attention against their formulas, in float64."""

import torch

from benchmarks.peers.dit import attend, flash_attn_by_pytorch, rotate


def test_queries_and_keys_turn_by_their_positions_and_values_do_not():
    qkv = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64)
    angle = torch.arange(5)[:, None] / 10_000 ** (torch.arange(3, dtype=torch.float64) / 3)
    turned = rotate(qkv, angle.cos(), angle.sin())
    pairs = torch.complex(qkv[..., :3], qkv[..., 3:])  # channels i and i + 3 are one complex number
    for place, part in enumerate("qkv"):
        by = torch.polar(torch.ones_like(angle), angle if part != "v" else torch.zeros_like(angle))[:, None]
        expected = pairs[:, :, place] * by
        torch.testing.assert_close(turned[:, :, place], torch.cat([expected.real, expected.imag], dim=-1))


def test_attention_stays_within_its_row():
    qkv = torch.randn(2 * 5, 3, 4, 6, dtype=torch.float64)
    out = attend(qkv, torch.tensor([0, 5, 10]), 5, 0.0, causal=False)
    for row in (slice(0, 5), slice(5, 10)):
        q, k, v = qkv[row].unbind(1)
        weights = (torch.einsum("ihc,jhc->hij", q, k) / 6**0.5).softmax(dim=-1)
        torch.testing.assert_close(out[row], torch.einsum("hij,jhc->ihc", weights, v))


def test_they_are_where_mdlm_looks_for_them():
    modules = flash_attn_by_pytorch()
    assert modules["flash_attn"].layers.rotary.apply_rotary_emb_qkv_ is rotate
    assert modules["flash_attn"].flash_attn_interface.flash_attn_varlen_qkvpacked_func is attend
