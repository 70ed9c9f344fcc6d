"""What a checkpoint brings back: everything that the next step depends on. (That a killed run resumes: tests/recipes.)"""

import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from components.places import exists, place, publish
from mdm.hardware import Hardware
from mdm.training import checkpoint
from mdm.training.checkpoint import Checkpoints
from mdm.training.optim import EMA

HERE = Hardware(torch.device("cpu"), 0, 1, False)


def made(seed):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), EMA(model, 0.5)


def step(model, optimizer, ema):
    """A step whose data are drawn from torch's own generator; returns what was drawn."""
    x = torch.randn(4, 3)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model.named_parameters())
    return x


def test_weights_moments_average_and_random_state_come_back(tmp_path):
    run = made(0)
    step(*run)
    with Checkpoints(tmp_path, HERE) as checkpoints:
        saved = checkpoints.save(1, *run, {"step": 1})
    expected = [step(*run) for _ in range(2)]
    again = made(1)
    step(*again)
    checkpoint.restore(saved, *again, HERE)
    assert checkpoint.read_state(saved) == {"step": 1}
    assert_close([step(*again) for _ in range(2)], expected)
    for a, b in zip(again[0].parameters(), run[0].parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)  # by the moments
    for name, value in run[2].average.items():
        assert_close(again[2].average[name], value, rtol=0, atol=0)


def test_the_newest_are_kept(tmp_path):
    run = made(0)
    step(*run)
    with Checkpoints(tmp_path, HERE, keep=3) as checkpoints:
        for k in range(1, 5):
            checkpoints.save(k, *run, {})
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000003", "step_00000004"]


def test_what_was_being_written_is_no_checkpoint(tmp_path):
    """Killed while the first one was written: there is none, though its state was there already."""
    (tmp_path / "partial_00000001").mkdir()
    (tmp_path / "partial_00000001" / "state.json").write_text("{}")
    (tmp_path / "step_00000002").mkdir()  # nor is one without a state
    (tmp_path / "step_00000002" / "__0_0.distcp").write_text("")
    assert checkpoint.complete(tmp_path) == []
    checkpoint.remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("far", [False, True])
def test_what_lies_further_below_is_none_of_the_runs(tmp_path, far):
    """A folder above: of another run's checkpoints, and of samples, none is resumed from, and none is removed."""
    folder, run = place(f"memory://{tmp_path}/bucket/") if far else tmp_path, made(0)
    step(*run)
    with Checkpoints(folder / "other" / "checkpoints", HERE) as checkpoints:
        other = [checkpoints.save(k, *run, {"step": k}) for k in (5, 6)]
    publish(folder / "samples" / "step_00000001" / "samples.json", "[]")
    publish(other[0].parent / "step_00000007" / "__0_0.distcp", "it is being written")
    assert checkpoint.complete(folder) == []
    with Checkpoints(folder, HERE) as checkpoints:
        own = [checkpoints.save(k, *run, {"step": k}) for k in (1, 2, 3)]
    checkpoint.remove_partial(folder)
    assert checkpoint.complete(folder) == own[1:]
    assert checkpoint.complete(other[0].parent) == other
    assert exists(folder / "samples" / "step_00000001" / "samples.json")
    assert exists(other[0].parent / "step_00000007" / "__0_0.distcp")


def test_a_copy_that_a_user_has_made_is_neither_resumed_from_nor_removed(tmp_path):
    run = made(0)
    step(*run)
    with Checkpoints(tmp_path, HERE) as checkpoints:
        first = checkpoints.save(99_999_999, *run, {})
        checkpoints.wait()
        shutil.copytree(first, tmp_path / "step_best")
        shutil.copytree(tmp_path / "step_best", tmp_path / "step_00000002.bak")
        (tmp_path / "partial_results").mkdir()
        (tmp_path / "partial_results" / "mine.txt").write_text("mine")
        for k in (100_000_000, 100_000_001):
            checkpoints.save(k, *run, {})
    checkpoint.remove_partial(tmp_path)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_100000000", "step_100000001"]
    kept = {"step_best", "step_00000002.bak", "partial_results"}
    assert {p.name for p in tmp_path.iterdir()} == kept | {"step_100000000", "step_100000001"}


@pytest.mark.parametrize("far", [False, True])
def test_what_is_set_aside_again_is_kept_beside_the_first(tmp_path, far):
    folder, run = place(f"memory://{tmp_path}/run") if far else tmp_path, made(0)
    step(*run)
    asides = []
    for _ in range(3):
        with Checkpoints(folder, HERE) as checkpoints:
            saved = checkpoints.save(1, *run, {"step": 1})
        asides.append(checkpoint.set_aside(saved))
        assert checkpoint.complete(folder) == []
    assert [aside.name for aside in asides] == [f"damaged_step_00000001{more}" for more in ("", "_2", "_3")]
    assert all(exists(aside / name) for aside in asides for name in ("state.json", ".metadata", "__0_0.distcp"))


def test_the_new_checkpoint_stays_where_an_old_one_cannot_be_removed(tmp_path, monkeypatch, capsys):
    run, discard = made(0), checkpoint._discard
    step(*run)

    def refused(folder):
        if folder.name == "step_00000001":
            raise PermissionError(13, "Permission denied", str(folder))
        discard(folder)

    with Checkpoints(tmp_path, HERE) as checkpoints:
        checkpoints.save(1, *run, {})
        checkpoints.wait()
        monkeypatch.setattr(checkpoint, "_discard", refused)
        for k in (2, 3):
            checkpoints.save(k, *run, {})
            checkpoints.wait()
        assert [p.name for p in checkpoint.complete(tmp_path)] == [f"step_{k:08d}" for k in (1, 2, 3)]
        said = capsys.readouterr().out
        assert f"Checkpoints in {tmp_path} that are older than the newest 2 stay: [Errno 13] Permission denied" in said
        monkeypatch.undo()
        checkpoints.save(4, *run, {})
        checkpoints.wait()
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000004"]
