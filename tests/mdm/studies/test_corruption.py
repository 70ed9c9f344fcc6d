"""The corruption study concludes from its table alone: means over seeds, the best sampler, passes saved, correction, gaps."""

import pytest

from mdm.config import UserError
from mdm.studies import corruption

PASSES = (1, 2, 4, 8, 16, 64)
NOISES = {"masks": 0.0, "uniform": 0.05, "hybrid 0.1": 0.12, "hybrid 0.3": 0.08, "mixed": 0.10}  # what one is better by


def accuracy(name, passes):
    """Masks have at 8 passes what hybrid 0.1 has at 2."""
    return {1: 0.2, 2: 0.4, 4: 0.46, 8: 0.52, 16: 0.6, 64: 0.7}[passes] + NOISES[name] * (passes < 16)


def row(name, seed):
    off = 0.01 * (seed - 1)
    found = {"cell": f"{name}_{seed}", "group": name, "status": "finished", "seed": seed, "loss": 3.0}
    found |= {f"bits/{task}": bits + NOISES[name] + off for task, bits in (("text_to_image", 2.5), ("text", 8.0))}
    samplers = ("ancestral",) if name == "uniform" else ("ancestral", "confidence")
    for n in PASSES:
        for s in samplers:
            better = 0.02 * (s == "confidence")
            for modality in ("image", "audio"):
                found[f"{modality}/accuracy/{n}/{s}"] = accuracy(name, n) + off - 0.02 * (len(samplers) > 1) + better
                found[f"{modality}/frechet/{n}/{s}"] = 4 / n + off
            found[f"text/ngram_bits/{n}/{s}"] = 10 - 0.1 * n**0.5 + off - better
            found[f"text/entropy_bits/{n}/{s}"] = 8.0 if s == "ancestral" else 5.0  # likely, and dull
            if n >= 4:
                gained = 0.03 if name.startswith("hybrid") else 0.001 * (seed - 1)
                found[f"image/accuracy/{n}/{s}+correct"] = found[f"image/accuracy/{n}/{s}"] + gained
                found[f"image/frechet/{n}/{s}+correct"] = 5 / n
    return found


@pytest.fixture
def rows():
    return [row(name, seed) for name in NOISES for seed in range(3)]


def test_the_best_noise_at_two_passes_is_compared_with_masks_at_more(rows):
    summary, finding = corruption.conclude(rows)
    error = 0.01 / 3**0.5
    best = summary["few_passes"]["image"]
    assert (best["group"], best["sampler"]) == ("hybrid 0.1", "confidence")
    assert best["accuracy"] == {"mean": pytest.approx(0.52), "standard_error": pytest.approx(error), "seeds": 3}
    assert [round(b["difference"], 6) for b in best["first"]] == [0.12, 0.06, 0, -0.08, -0.18]
    assert best["first"][0]["difference_error"] == pytest.approx(2**0.5 * error)
    assert (best["reached"], best["reached_by_mean"]) == (8, 8)
    assert "hybrid 0.1 (confidence), accuracy 0.520 +-0.006; masks (confidence) 0.400 +-0.006." in finding
    assert "within two standard errors of that takes 8 passes (0.520 +-0.006), 4x as many with masks." in finding
    assert "uniform: text to image +0.050 +-0.008, text +0.050 +-0.008." in finding
    assert "not comparable by tightness" in finding
    assert "**image at 64 passes**, against masks: uniform accuracy +0.000 +-0.008 (within noise)" in finding


def test_where_no_noise_is_ahead_at_two_passes_it_is_said(rows):
    for r in rows:
        if r["group"] != "masks":
            r |= {k: v - 0.12 for k, v in r.items() if k.startswith("image/accuracy/2/")}
    summary, finding = corruption.conclude(rows)
    assert summary["few_passes"]["image"]["reached"] == 2
    assert "The difference is +0.000 +-0.008 (within noise): no family saves passes here." in finding
    for r in rows:
        r |= {k: 0.9 + 0.01 * r["seed"] for k in r if k.startswith("image/accuracy/2/") and r["group"] == "mixed"}
    summary, finding = corruption.conclude(rows)
    assert summary["few_passes"]["image"]["reached"] is None
    assert "takes more than 64 passes with masks." in finding


def test_correction_is_compared_seed_by_seed_at_equal_passes(rows):
    summary, finding = corruption.conclude(rows)
    eight = summary["correction"]["image"]["hybrid 0.3"][1]
    assert eight["passes"] == 8
    assert eight["accuracy"] == {"difference": pytest.approx(0.03), "difference_error": pytest.approx(0, abs=1e-9)}
    assert "hybrid 0.3: accuracy +0.030 +-0.000, Frechet distance +0.25 +-0.01 at 4; " in finding  # 5/4 - 4/4
    assert "masks: within noise at 4, 8, 16, 64" in finding
    assert not summary["correction"]["audio"]["masks"]


def test_text_that_is_likely_and_dull_is_not_the_best(rows):
    summary, _ = corruption.conclude(rows)
    points = summary["groups"]["masks"]["quality"]["text"]["plain"]
    assert {p["sampler"] for p in points} == {"ancestral"}
    assert points[1]["ngram_bits"]["mean"] == pytest.approx(10 - 0.1 * 2**0.5)


def test_what_is_missing_is_said_and_the_rest_is_drawn(rows):
    rows[1] |= {"status": "crashed", "loss": float("nan")}
    rows[5] = {k: v for k, v in rows[5].items() if not k.startswith("audio/")}
    summary, finding = corruption.conclude(rows)
    assert (summary["left_out"], summary["not_measured"]) == (["masks_1"], ["uniform_2"])
    assert "Left out: masks_1." in finding
    assert "Not measured, or in part: uniform_2." in finding
    assert "Fewer than three seeds: no difference here is a finding." in finding
    assert summary["groups"]["uniform"]["quality"]["audio"]["plain"][0]["accuracy"]["seeds"] == 2
    assert corruption.draw(rows, summary)[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"groups\.masks: none of its runs finished"):
        corruption.conclude([{**r, "status": "diverged"} if r["group"] == "masks" else r for r in rows])


def test_runs_of_one_seed_and_runs_without_samples_have_a_figure_too(rows):
    for some in ([r for r in rows if r["seed"] == 0], [{k: v for k, v in r.items() if k.count("/") < 3} for r in rows]):
        summary, finding = corruption.conclude(some)
        assert corruption.draw(some, summary)[:4] == b"\x89PNG"
        assert "Held-out bound of masks, bits per token: text to image 2." in finding
