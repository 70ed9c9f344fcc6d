"""A checkpoint is written while steps go on: what is in it is of the step it was saved at, and it is one when all is there."""

import shutil
import threading
import time
from concurrent import futures

import pytest
import torch

from components.places import place, sizes
from mdm.config import UserError
from mdm.hardware import Hardware, MeshSettings, hardware
from mdm.training import checkpoint, storage
from mdm.training.checkpoint import Checkpoints
from mdm.training.stopping import Stopped
from tests.mdm.training.test_checkpoint import made, step
from tests.processes import in_processes

HERE = Hardware(torch.device("cpu"), 0, 1, False)


@pytest.fixture
def held(monkeypatch):
    """Holds the writing of tensors until it is set."""
    release, write = threading.Event(), storage.FileSystemWriter.write_data

    def waits(self, *arguments):
        assert release.wait(20)
        return write(self, *arguments)

    monkeypatch.setattr(storage.FileSystemWriter, "write_data", waits)
    return release


@pytest.mark.parametrize("far", [False, True])
def test_what_is_written_is_of_the_step_that_was_saved_though_steps_go_on(tmp_path, held, far):
    folder = place(f"memory://{tmp_path}/run") if far else tmp_path
    run, other = made(0), made(1)
    step(*run)
    step(*other)
    weights, average = run[0].weight.detach().clone(), run[2].average["weight"].clone()
    moments = run[1].state[run[0].weight]["exp_avg"].clone()
    with Checkpoints(folder, HERE) as checkpoints:
        saved = checkpoints.save(1, *run, {"step": 1})
        for _ in range(3):
            step(*run)
        assert checkpoint.complete(folder) == []  # nothing is one before all of it is there
        checkpoints.check()
        held.set()
        checkpoints.wait()
    assert checkpoint.complete(folder) == [saved]
    checkpoint.restore(saved, *other, HERE)
    assert checkpoint.read_state(saved) == {"step": 1}
    for found, expected in ((other[0].weight, weights), (other[2].average["weight"], average)):
        assert torch.equal(found, expected)
    assert torch.equal(other[1].state[other[0].weight]["exp_avg"], moments)


@pytest.mark.parametrize("ending", [None, UserError("mine"), Stopped("by hand", 2)], ids=str)
def test_what_is_being_written_is_finished_before_a_run_ends(tmp_path, held, ending):
    run = made(0)
    step(*run)
    threading.Timer(0.3, held.set).start()
    try:
        with Checkpoints(tmp_path, HERE) as checkpoints:
            checkpoints.save(1, *run, {"step": 1})
            if ending is not None:
                raise ending
    except (UserError, Stopped):
        pass
    assert len(checkpoint.complete(tmp_path)) == 1


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, held):
    run = made(0)
    step(*run)
    threading.Timer(0.5, held.set).start()
    with Checkpoints(tmp_path, HERE) as checkpoints:
        checkpoints.save(1, *run, {"step": 1})
        started = time.perf_counter()
        checkpoints.save(2, *run, {"step": 2})
        assert time.perf_counter() - started > 0.3
        assert checkpoint.complete(tmp_path)[0].name == "step_00000001"


def test_far_away_the_newest_are_kept_and_what_is_damaged_or_half_written_is_dealt_with(tmp_path):
    folder, run = place(f"memory://{tmp_path}/bucket/run"), made(0)
    history = tmp_path / "history.jsonl"
    history.write_text('{"step": 1}\n')
    step(*run)
    with Checkpoints(folder, HERE, along=[history, tmp_path / "none.jsonl"]) as checkpoints:
        for k in range(1, 5):
            checkpoints.save(k, *run, {"step": k})
    names = ["step_00000003", "step_00000004"]
    assert [p.name for p in checkpoint.complete(folder)] == names
    assert (folder / names[1] / "history.jsonl").read_text() == history.read_text()
    assert set(sizes(folder / names[1])) == {".metadata", "__0_0.distcp", "history.jsonl", "state.json"}
    (folder / names[1] / ".metadata").write_bytes(b"")
    with pytest.raises(checkpoint.Damaged, match="metadata cannot be read"):
        checkpoint.read_state(folder / names[1])
    aside = checkpoint.set_aside(folder / names[1])
    assert [p.name for p in checkpoint.complete(folder)] == names[:1]
    assert (aside / "state.json").exists()
    (folder / names[0] / "state.json").unlink()
    checkpoint.remove_partial(folder)
    assert not (folder / names[0] / ".metadata").exists()
    assert (aside / "state.json").exists()


def failing(folder):
    """Rank 1 cannot write its part of the second checkpoint."""
    with hardware("cpu", "fp32", MeshSettings()) as hw:
        run = made(hw.rank)
        step(*run)
        write, said = storage.FileSystemWriter.write_data, []

        def full(self, *arguments):
            raise OSError(28, "No space left on device")

        with Checkpoints(folder, hw) as checkpoints:
            checkpoints.save(1, *run, {"step": 1})
            checkpoints.wait()
            if hw.rank == 1:
                storage.FileSystemWriter.write_data = full
            checkpoints.save(2, *run, {"step": 2})
            try:
                checkpoints.wait()
            except UserError as error:
                said.append(str(error))
            storage.FileSystemWriter.write_data = write
        return said


def test_where_one_process_cannot_write_all_say_so_and_the_last_whole_one_stays(tmp_path):
    for said in in_processes(2, failing, tmp_path):
        assert said == [
            f"cannot write the checkpoint {tmp_path / 'step_00000002'} ([Errno 28] No space left on device); the last complete "
            f"checkpoint is {tmp_path / 'step_00000001'}"
        ]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def without_a_state(folder):
    """The main process alone fails, after all have written their part."""
    with hardware("cpu", "fp32", MeshSettings()) as hw:
        run = made(hw.rank)
        step(*run)
        with Checkpoints(folder, hw) as checkpoints:
            if hw.main:
                checkpoint._publish_state = refused
            checkpoints.save(1, *run, {"step": 1})
            with pytest.raises(UserError, match="Permission denied" if hw.main else "another process says why"):
                checkpoints.wait()


def refused(*arguments):
    raise PermissionError(13, "Permission denied")


def test_where_the_main_process_cannot_finish_none_goes_on(tmp_path):
    in_processes(2, without_a_state, tmp_path, seconds=30)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_known_before_the_next_one(tmp_path, monkeypatch):
    run = made(0)
    step(*run)
    with Checkpoints(tmp_path, HERE) as checkpoints:
        monkeypatch.setattr(checkpoint, "_publish_state", refused)
        checkpoints.save(1, *run, {"step": 1})
        futures.wait([checkpoints._pending])
        with pytest.raises(UserError, match=r"step_00000001 \(.*Permission denied\); there is no earlier checkpoint"):
            checkpoints.check()


def test_a_peer_that_has_died_is_no_fault_of_the_place(tmp_path, monkeypatch):
    """A UserError would not be started again."""

    def dead(*arguments, **options):
        raise RuntimeError("Connection closed by peer")

    run = made(0)
    step(*run)
    with Checkpoints(tmp_path, HERE) as checkpoints:
        monkeypatch.setattr(checkpoint, "_publish_state", dead)
        checkpoints.save(1, *run, {"step": 1})
        with pytest.raises(RuntimeError, match="closed by peer"):
            checkpoints.wait()
        checkpoints._pending = None
    monkeypatch.undo()
    with Checkpoints(tmp_path, HERE) as checkpoints:
        saved = checkpoints.save(2, *run, {"step": 2})
    monkeypatch.setattr(checkpoint.state_dict_loader, "load", dead)
    with pytest.raises(RuntimeError, match="closed by peer"):
        checkpoint.restore(saved, *run, Hardware(torch.device("cpu"), 0, 2, False))


def test_a_second_ctrl_c_waits_for_no_checkpoint(tmp_path, held):
    run = made(0)
    step(*run)
    checkpoints, started = Checkpoints(tmp_path, HERE), time.monotonic()
    checkpoints.save(1, *run, {"step": 1})
    checkpoints.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert time.monotonic() - started < 10
    assert checkpoint.complete(tmp_path) == []
    held.set()
    futures.wait([checkpoints._pending])  # the thread of this test, before the next one's


def test_the_state_comes_last_all_of_it_or_nothing_and_goes_first(tmp_path, monkeypatch):
    run, published, history = made(0), [], tmp_path / "history.jsonl"
    history.write_text("{}")
    step(*run)
    publish, rmtree = checkpoint.publish, shutil.rmtree

    def noted(path, *arguments):
        published.append(path.name)
        publish(path, *arguments)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    def without_state(folder, **options):
        assert not (folder / "state.json").exists()
        rmtree(folder, **options)

    monkeypatch.setattr(checkpoint, "publish", noted)
    with Checkpoints(place(f"memory://{tmp_path}/run"), HERE, along=[history]) as checkpoints:
        checkpoints.save(1, *run, {"step": 1})
    assert published == ["history.jsonl", "state.json"]
    with Checkpoints(tmp_path / "run", HERE, along=[history], keep=1) as checkpoints:
        first = checkpoints.save(1, *run, {"step": 1})
        checkpoints.wait()
        assert set(sizes(first)) == {".metadata", "__0_0.distcp", "state.json"}  # the history lies where it is read
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.shutil, "rmtree", without_state)
            second = checkpoints.save(2, *run, {"step": 2})
            checkpoints.wait()
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.os, "fsync", full)
            patched.setattr(checkpoint, "_discard", lambda folder: None)
            third = checkpoints.save(3, *run, {"step": 3})
            with pytest.raises(UserError, match="No space left"):
                checkpoints.wait()
        assert not (third / "state.json").exists()
    assert checkpoint.complete(tmp_path / "run") == [second]


def test_what_breaks_off_while_a_file_is_made_is_not_sent(tmp_path):
    at = f"memory://{tmp_path}/file"

    def breaks():
        with storage.Far().create_stream(at, "wb") as stream:
            stream.write(b"half")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        breaks()
    assert not storage.Far().exists(at)


def test_what_lies_where_a_checkpoint_is_written_is_removed_first(tmp_path):
    run, left = made(0), tmp_path / "step_00000001"
    left.mkdir()
    for name in ("__1_0.distcp", "state.json"):
        (left / name).write_text("{}")
    step(*run)
    with Checkpoints(tmp_path, HERE) as checkpoints:
        checkpoints.save(1, *run, {"step": 1})
    assert set(sizes(left)) == {".metadata", "__0_0.distcp", "state.json"}
