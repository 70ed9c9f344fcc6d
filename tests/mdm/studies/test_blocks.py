"""The block study concludes from its table alone: bounds, decoders, and the shares of the least noisy loss."""

import json

import pytest

from mdm.config import UserError
from mdm.studies import blocks

SIZES = {"whole": (16, 56), "half": (8, 28), "one": (1, 4)}  # of an image, of speech
BETTER = {"whole": 0.0, "half": 0.1, "one": 0.2}


def row(name, seed):
    image, audio = SIZES[name]
    off, better = 0.01 * (seed - 1), BETTER[name]
    found = {"cell": f"{name}_{seed}", "group": name, "status": "finished", "seed": seed, "loss": 3.0}
    found |= {"model.blocks": json.dumps({"text": 8, "image": image, "audio": audio})}
    found |= {"bits/text_to_image": 2.5 - better + off, "bits/text_to_speech": 4 - better + off}
    for modality, size in (("image", image), ("audio", audio)):
        found |= {f"{modality}/accuracy/real": 0.99}
        for decoder, passes in (("one a pass", 16.0), ("threshold 0.9", min(size, 8))):
            figures = {"accuracy": 0.5 + better + off, "frechet": 3.0, "distinct": 1.0, "forwards": passes, "seconds": 0.01}
            found |= {f"{modality}/{figure}/{decoder}": value for figure, value in figures.items()}
        variances = {"0-1": 2.0, "0.3-0.8": 2.0 if name == "one" else 1.0 + off, "0.5-1": 1.5}
        found |= {f"clipping/{modality}/{shares}": value for shares, value in variances.items()}
    return found


@pytest.fixture
def rows():
    return [row(name, seed) for name in SIZES for seed in range(3)]


def test_sizes_are_compared_with_the_first(rows):
    summary, finding = blocks.conclude(rows)
    assert (
        "Held-out bound in blocks of 8 (text), 16 (image), 56 (audio) (whole), bits per token: text to image 2.500" in finding
    )
    assert (
        "one, blocks of 8 (text), 1 (image), 4 (audio): text to image -0.200 +-0.008, text to speech -0.200 +-0.008." in finding
    )
    assert (
        "Blocks of 8: one a pass: accuracy 0.600 +-0.006, passes 16.0 +-0.0, seconds 0.0100 +-0.0000; threshold 0.9" in finding
    )
    assert "**Most accurate, image**: one a pass: blocks of 1, 0.700 +-0.006 (+0.200 +-0.008 against the first)" in finding
    assert summary["groups"]["half"]["decoders"]["audio"]["threshold 0.9"]["forwards"]["mean"] == 8
    assert blocks.draw(rows, summary)[:4] == b"\x89PNG"


def test_the_least_noisy_shares_are_those_of_each_size(rows):
    summary, finding = blocks.conclude(rows)
    found = {name: s["clipping"]["image"] for name, s in summary["groups"].items()}
    assert [found[name]["shares"] for name in SIZES] == ["0.3-0.8", "0.3-0.8", "0.5-1"]
    assert found["whole"]["ratio"] == {"mean": pytest.approx(0.5), "standard_error": pytest.approx(0.005 / 3**0.5), "seeds": 3}
    assert "image in blocks of 16: 0.3-0.8 (0.50 +-0.00x)" in finding
    for r in rows:
        r |= {k: 2.0 for k in r if k.startswith("clipping/image")}
    assert "image in blocks of 1: any shares" in blocks.conclude(rows)[1]


def test_what_is_missing_is_said_and_the_rest_is_drawn(rows):
    rows[4] |= {"status": "crashed", "loss": float("nan")}
    rows[8] = {k: v for k, v in rows[8].items() if not k.startswith("audio/")}
    summary, finding = blocks.conclude(rows)
    assert (summary["left_out"], summary["not_measured"]) == (["half_1"], ["one_2"])
    assert "Fewer than three seeds: no difference here is a finding." in finding
    assert blocks.draw(rows, summary)[:4] == b"\x89PNG"
    bare = [{k: v for k, v in r.items() if k.count("/") < 2} for r in rows]
    assert blocks.draw(bare, blocks.conclude(bare)[0])[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"groups\.whole: none of its runs finished"):
        blocks.conclude([{**r, "status": "diverged"} if r["group"] == "whole" else r for r in rows])
    with pytest.raises(UserError, match=r"groups\.one: it has no model\.blocks"):
        blocks.conclude([{**r, "model.blocks": None} if r["group"] == "one" else r for r in rows])
