"""Tuning a learning rate, and runs of their own processes: what failed, what diverged, what is finished already."""

import math

import pytest

from mdm.config import UserError
from mdm.studies.runs import Runs, tune, vertex, write_csv


def parabola(best):
    asked = []

    def losses(rates):
        asked.extend(rates)
        return {r: 1 + math.log2(r / best) ** 2 for r in rates}

    return losses, asked


@pytest.mark.parametrize("best", [1e-3, 1.3e-3, 4e-2, 1e-5])
def test_the_grid_grows_until_its_best_is_inside_and_no_rate_is_asked_twice(best):
    losses, asked = parabola(best)
    found = tune(losses, 1e-3)
    chosen = min(found, key=lambda r: found[r])
    assert min(found) < chosen < max(found)
    assert abs(math.log2(chosen / best)) <= 0.5
    assert len(asked) == len(set(asked))
    assert vertex(found) == pytest.approx(best)


def test_a_diverged_neighbour_does_not_spoil_the_vertex():
    assert vertex({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}) == 2e-3


def test_a_best_that_is_nowhere_near_is_an_error():
    with pytest.raises(UserError, match="the best learning rate lies outside"):
        tune(lambda rates: {r: -r for r in rates}, 1.0)


def test_a_table_of_rows_with_different_figures(tmp_path):
    write_csv(tmp_path / "t.csv", [{"a": 1, "b": 2}, {"a": 3, "c": 4}])
    assert (tmp_path / "t.csv").read_text().split() == ["a,b,c", "1,2,", "3,,4"]


def test_a_folder_of_other_runs_is_refused(tmp_path):
    Runs(tmp_path, "pretrain_pico", {"tokens": 100}).close()
    Runs(tmp_path, "pretrain_pico", {"tokens": 100}).close()
    with pytest.raises(UserError, match="holds a sweep of other settings"):
        Runs(tmp_path, "pretrain_pico", {"tokens": 200})
