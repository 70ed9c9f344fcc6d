"""What is made of runs that lost a process; that they lose it is measured by the suite itself."""

import pytest

from benchmarks import restarts
from mdm.config import UserError


def kill(**changes):
    usual = {"rank": 1, "step": 8, "resumed": "step_00000006", "again": 7.5, "equal": True, "lost": False, "restarts": 1}
    return restarts.Kill(**{"moment": 6.5, "seconds": 20.0, **usual, **changes})


def test_a_row_for_each_kill_and_what_is_wrong_in_capitals():
    found = [kill(), kill(moment=1.0, rank=None, step=0, resumed=None, again=None, equal=False, lost=True)]
    assert restarts.markdown(found).splitlines()[2:] == [
        "| 1.0 | not yet known | 0 | the beginning | all were done | NO | YES |",
        "| 6.5 | 1 | 8 | step_00000006 | 7.5 | yes | no |",
    ]
    result = restarts.summary("cpu", "ray", 3, 10.0, found)
    assert (result.figures["weights_equal"], result.figures["checkpoints_lost"], result.figures["kills"]) == (1, 1, 2)
    assert [row.rate for row in result.rows] == [360.0, 180.0]


def test_a_run_that_had_ended_before_its_kill_is_drawn_anew_in_a_folder_of_its_own(monkeypatch):
    folders, kills = [], iter([None, kill(), None, kill()])

    class Run:
        seconds = 10.0

        def __init__(self, folder, launcher, tokens):
            folders.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self, seconds):
            return 0

    monkeypatch.setattr(restarts, "Run", Run)
    monkeypatch.setattr(restarts, "killed", lambda own, whole, rng: next(kills))
    assert restarts.run("smoke", kills="2").figures["kills"] == 2
    assert len(set(folders)) == len(folders) == 5


WRONG = {
    "--launcher slurm: choose from torchrun, ray": {"launcher": "slurm"},
    "--kills 0: write a number": {"kills": "0"},
    "--seed x: write a number": {"seed": "x"},
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_one_line(message):
    with pytest.raises(UserError, match=message):
        restarts.run("smoke", **WRONG[message])
