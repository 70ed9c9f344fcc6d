"""Figures of merit against closed forms, and the choice that a sweep makes."""

import json
import math

import numpy as np
import pytest

from components.metrics.quality import NGram, distinct, frechet, unigram_entropy
from mdm.config import UserError
from mdm.studies.grid import alternatives
from mdm.studies.inference import sweep


def test_frechet_distance_of_known_gaussians():
    """Samples whitened to have their moments exactly: |m|^2 + sum (s_a - s_b)^2 for covariances with common axes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    a = x * [1, 2, 3] @ turn
    b = x * [2, 2, 1] @ turn + [1, 0, -2]
    assert frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        frechet(a[:1], b)


def test_frechet_distance_sees_a_loss_of_diversity_that_accuracy_does_not():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 4))
    assert frechet(np.repeat(real[:1], 400, axis=0), real) > 10 * frechet(rng.normal(size=(400, 4)), real)


def test_distinct_and_entropy_by_hand():
    assert distinct([[1, 2], [1, 2], [2, 1], [3, 3]]) == 0.75
    assert unigram_entropy([[0, 1], [2, 3]]) == 2.0
    assert unigram_entropy([[0, 0, 0, 1]]) == pytest.approx(0.811278, abs=1e-6)


def test_the_ngram_model_is_a_distribution_and_reads_its_own_text_best():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 6, 40).tolist() for _ in range(5)]
    model = NGram(documents, vocab_size=8)
    for history in ((), (3,), (3, 1), (7, 7), (1, 2, 3, 4)):
        assert sum(model.probability(w, history) for w in range(8)) == pytest.approx(1.0, abs=1e-12)
    assert model.bits(documents) < model.bits([rng.integers(0, 8, 40).tolist() for _ in range(5)])
    by_hand = NGram([[0, 1, 0]], vocab_size=2, order=2)
    unigram = (2 + 2 * 0.5) / (3 + 2)  # c(0) = 2 of 3, two kinds
    assert by_hand.probability(0, (1,)) == pytest.approx((1 + 1 * unigram) / (1 + 1))
    assert by_hand.bits([[0]]) == pytest.approx(-math.log2(unigram))


def test_lists_anywhere_in_a_setting_are_swept():
    entry = {"sampler": {"_component_": "x.A", "n": [1, 2], "inner": {"p": [3, 4]}}, "guidance_scale": [0, 1]}
    found = list(alternatives(entry))
    assert len(found) == 8
    assert found[0] == {"sampler": {"_component_": "x.A", "n": 1, "inner": {"p": 3}}, "guidance_scale": 0}
    assert len({json.dumps(f) for f in found}) == 8


def cell(forwards, accuracy, frechet, name="A"):
    setting = {"sampler": {"_component_": f"x.{name}"}}
    return {"setting": setting, "forwards": forwards, "accuracy": accuracy, "frechet": frechet, "distinct": 1.0}


def test_the_choice_is_the_fewest_forwards_at_the_quality_of_one_token_a_step():
    base = sweep.reference([cell(16, 0.99, 5.0), cell(16, 0.985, 4.0), cell(16, 0.90, 1.0)])
    assert base["frechet"] == 4.0  # a lower distance at lost accuracy does not count
    cells = [cell(2, 0.99, 4.5), cell(3, 0.96, 2.0), cell(4, 0.97, 4.3), cell(4, 0.97, 4.2), cell(5, 1.0, 1.0)]
    assert sweep.best(cells, base) is cells[3]
    assert sweep.best([], base) is base


def test_a_sweep_goes_on_where_it_stopped_and_refuses_another(tmp_path):
    of = {"checkpoint": "a", "samples": 3, "seed": 0}
    setting = {"sampler": {"_component_": "x.A", "n": 1}}
    sweep.Cells(tmp_path, of).add("image", setting, {"forwards": 2.0})
    again = sweep.Cells(tmp_path, of)
    assert again.get("image", {"sampler": {"n": 1, "_component_": "x.A"}})["forwards"] == 2.0
    assert again.get("audio", setting) is None
    old = {"sampler": {"_component_": "Confidence"}, "guidance_scale": {"_component_": "mdm.judges.ImageJudge"}}
    again.add("image", old, {"forwards": 3.0})
    new = {"sampler": {"_component_": "components.samplers.Confidence"}, "guidance_scale": {"_component_": "ImageJudge"}}
    assert sweep.Cells(tmp_path, of).get("image", new)["forwards"] == 3.0  # whatever a name was when the cell was measured
    with pytest.raises(UserError, match="a sweep of another checkpoint"):
        sweep.Cells(tmp_path, {**of, "seed": 1})
