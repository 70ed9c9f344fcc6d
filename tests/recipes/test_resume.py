"""A run that was stopped, killed or damaged goes on where it was, and what was lost is said."""

import errno
import io
import json
import os
import pickle
import shutil
import signal

import pytest
import safetensors.torch
import torch

from components.files import Unreachable
from components.places import place
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.hardware import Hardware
from mdm.recipe import exit_on_user_error
from mdm.training.checkpoint import complete
from mdm.training.history import read_history
from mdm.training.stopping import Stopped, StopRequest
from tests.recipes.test_bad_input import one_line_of_many

ALONE = Hardware(torch.device("cpu"), 0, 1, False)
SMALL = ["tokens=2000", "checkpoint_every_tokens=600", "data.digits.validation=null"]


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def losses(folder):
    return {line["step"]: line["loss"] for line in read_history(folder / "history.jsonl") if "loss" in line}


def assert_same_run(a, b):
    assert losses(a) == losses(b)
    one, other = weights(a), weights(b)
    assert all(torch.equal(one[name], other[name]) for name in one)


def drop_late_checkpoints(folder):
    for late in complete(folder / "checkpoints")[1:]:
        shutil.rmtree(late)
    return complete(folder / "checkpoints")[0]


@pytest.fixture
def whole(config, run, tmp_path):
    """A finished run, and the command that made it, for another folder."""
    folder = tmp_path / "whole"
    run("run", "pretrain", "--config", config, f"output_dir={folder}", *SMALL)
    return folder


@pytest.fixture
def again(config, run):
    command = ["run", "pretrain", "--config", config, *SMALL]
    return lambda folder, *more, **options: run(*command, f"output_dir={folder}", *more, **options)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_by_signal_saves_and_the_same_command_goes_on_bit_exactly(config, run, tmp_path, monkeypatch, name):
    """Within the first checkpoint interval, in the middle of making a batch: the user's own masker raises the signal."""
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "from components.maskers import FixedCountMasker\n"
        "class Interrupting(FixedCountMasker):\n"
        "    def __call__(self, batch):\n"
        "        if int(batch.document.max()) > 40 and os.environ.pop('INTERRUPT', None):\n"
        "            os.kill(os.getpid(), signal." + name + ")\n"
        "        return super().__call__(batch)\n"
    )
    arguments = [
        "run",
        "pretrain",
        "--config",
        config,
        "masker={_component_: mine.Interrupting}",
        "tokens=3000",
        "log_every_steps=3",
    ]
    run(*arguments, f"output_dir={tmp_path / 'whole'}", cwd=tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setenv("INTERRUPT", "1")
    done = run(*arguments, f"output_dir={tmp_path / 'parts'}", cwd=tmp_path, check=False)
    assert done.returncode == 128 + getattr(signal, name)
    (kept,) = complete(tmp_path / "parts" / "checkpoints")
    assert f"mdm: stopped by {name} at step " in done.stderr
    assert f"saved as {kept}; the same command goes on from there" in done.stderr
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert f"Resuming from {kept}" in run(*arguments, f"output_dir={tmp_path / 'parts'}", cwd=tmp_path).stdout
    a, b = (weights(tmp_path / folder) for folder in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_signal_ends_at_once_and_the_handlers_are_put_back(capsys):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)  # of a scheduler, to a launcher and to its processes
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "once more stops at once" in capsys.readouterr().err


def test_one_process_says_for_all_that_it_stops_after_the_step(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.votes == [0.0, 1.0, 0.0]
    assert capsys.readouterr().err == ""


def test_a_preemption_that_is_sent_to_all_and_passed_on_is_one_request():
    with StopRequest() as stop:
        for signum in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(signum)
        assert stop.signum == signal.SIGUSR1
        assert stop.stopped(3, "x").code == 143


@pytest.mark.parametrize(
    ("came", "code", "name"),
    [
        ([signal.SIGINT, None], 130, "SIGINT"),
        ([None, signal.SIGTERM], 143, "SIGTERM"),
        ([signal.SIGUSR1, None], 143, "SIGUSR1"),
        ([signal.SIGINT, signal.SIGTERM], 143, "SIGTERM"),
    ],
)
def test_all_processes_end_with_the_code_of_the_signal_that_came_to_one(came, code, name):
    stops = [StopRequest() for _ in came]
    for stop, signum in zip(stops, came, strict=True):
        stop.signum = signum
    votes = [sum(votes) for votes in zip(*(stop.votes for stop in stops), strict=True)]
    for stop in stops:
        assert not stop.asked
        stop.agreed(votes)
        assert stop.asked
        stopped = stop.stopped(7, "there")
        assert (stopped.code, str(stopped)) == (
            code, f"stopped by {name} at step 7: saved as there; the same command goes on from there",
        )  # fmt: skip


def test_an_interruption_promises_only_what_the_recipe_does(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("mdm.recipe.leave", leave)
    for more in ({}, {"again": "writes the shards that are missing"}):
        with pytest.raises(SystemExit, match="130"):
            exit_on_user_error(interrupted, **more)
    said = capsys.readouterr().err
    assert said == (
        "mdm: interrupted; the same command begins anew\n"
        "mdm: interrupted; the same command writes the shards that are missing\n"
    )


@pytest.mark.parametrize(("rank", "said"), [("0", "mdm: stopped by SIGTERM at step 4\n"), ("3", "")])
def test_one_process_says_for_all_that_they_were_stopped(capsys, monkeypatch, rank, said):
    def stopped():
        raise Stopped("stopped by SIGTERM at step 4", signal.SIGTERM)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("mdm.recipe.leave", leave)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="143"):
        exit_on_user_error(stopped)
    assert capsys.readouterr().err == said


def test_a_reader_that_is_gone_ends_a_command_quietly(capsys, monkeypatch):
    """`mdm ls | head -1`."""

    class Gone:
        def flush(self):
            raise BrokenPipeError

        write = flush

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("mdm.recipe.leave", leave)
    monkeypatch.setattr("sys.stdout", Gone())
    with pytest.raises(SystemExit, match="141"):
        exit_on_user_error(lambda: None)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as raw, monkeypatch.context() as unbuffered:  # as with PYTHONUNBUFFERED=1
        unbuffered.setattr("mdm.recipe.leave", leave)
        unbuffered.setattr("sys.stdout", io.TextIOWrapper(raw, write_through=True))
        with pytest.raises(SystemExit, match="141"):
            exit_on_user_error(lambda: print("a line"))

    read, write = os.pipe()
    os.close(read)
    unbuffered = io.TextIOWrapper(os.fdopen(write, "wb", 0), write_through=True)  # PYTHONUNBUFFERED: nothing is left to flush
    monkeypatch.setattr("mdm.recipe.leave", leave)
    monkeypatch.setattr("sys.stdout", unbuffered)
    with pytest.raises(SystemExit, match="141"):
        exit_on_user_error(lambda: print("a recipe"))
    monkeypatch.undo()

    def pipe_of_its_own():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):  # any other pipe is no matter of course
        exit_on_user_error(pipe_of_its_own)


def test_a_mended_file_does_not_change_the_vocabulary_of_a_resume(again, tmp_path):
    """The BPE is trained on the run's own texts; one of them is mended, and later one is taken out."""
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i:02d}.txt").write_text(f"The value of the statement is {i}. " * 10)
    (texts / "03.txt").write_text("wrrrong " * 200)
    settings = [f"data.text.train={{_component_: components.data.sources.Folder, path: {texts}, kind: text}}", "canvas.text=24"]
    settings += ["data.text.validation=null"]
    again(out, *settings)
    trained = Processor.load(out / "model")
    drop_late_checkpoints(out)
    (texts / "03.txt").write_text("The value of the statement is 3. " * 10)
    done = again(out, *settings)
    assert "Resuming from" in done.stdout
    assert "their order is another" not in done.stdout
    resumed = Processor.load(out / "model")
    assert resumed.vocabulary.to_dict() == trained.vocabulary.to_dict()
    assert resumed.encode("text", "wrrrong").tolist() == trained.encode("text", "wrrrong").tolist()
    drop_late_checkpoints(out)
    (texts / "11.txt").unlink()
    done = again(out, *settings)
    assert "data.text has 11 samples, 12 when it was saved: from here on their order is another." in done.stdout
    shutil.rmtree(out / "checkpoints")  # a new run learns from the data that there is now
    again(out, *settings)
    assert Processor.load(out / "model").encode("text", "wrrrong").tolist() != trained.encode("text", "wrrrong").tolist()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


DAMAGES = {
    "state cut": lambda c: cut(c / "state.json"),
    "state of nothing": lambda c: (c / "state.json").write_text("[]"),
    "shard cut": lambda c: cut(next(c.glob("*.distcp"))),
    "shard missing": lambda c: next(c.glob("*.distcp")).unlink(),
    "shard of zeros": lambda c: next(c.glob("*.distcp")).write_bytes(bytes(next(c.glob("*.distcp")).stat().st_size)),
    "metadata missing": lambda c: (c / ".metadata").unlink(),
    "metadata cut": lambda c: cut(c / ".metadata"),
    "metadata of nothing": lambda c: (c / ".metadata").write_bytes(pickle.dumps([])),
}


@pytest.mark.parametrize("case", DAMAGES, ids=lambda c: c.replace(" ", "_"))
def test_a_damaged_newest_checkpoint_is_named_and_the_last_whole_one_taken(whole, again, case):
    older, newest = complete(whole / "checkpoints")
    expected, before = losses(whole), weights(whole)
    DAMAGES[case](newest)
    done = again(whole)
    aside = newest.with_name(f"damaged_{newest.name}")
    damaged, resuming = [line for line in done.stdout.splitlines() if "checkpoints" in line][:2]
    assert str(newest) in damaged
    assert (" bytes of " in damaged) == (case in ("shard cut", "shard missing"))  # said before anything is loaded
    assert damaged.endswith(f"this checkpoint is damaged and passed over; it is kept as {aside}")
    assert resuming.startswith(f"Resuming from {older}")
    assert aside.is_dir()
    assert losses(whole) == expected
    assert all(torch.equal(value, before[name]) for name, value in weights(whole).items())


ELSEWHERE = [
    KeyboardInterrupt(),
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files"),
    Unreachable("s3://data does not answer"),
    ConnectionResetError("reset"),
]


@pytest.mark.parametrize("error", ELSEWHERE, ids=repr)
def test_a_checkpoint_is_not_damaged_where_its_reading_is_interrupted(tmp_path, monkeypatch, error):
    from torch.distributed.checkpoint import FileSystemReader

    from mdm.training import checkpoint

    def fails(*arguments):
        raise error

    monkeypatch.setattr(FileSystemReader, "read_data", fails)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with checkpoint.Checkpoints(tmp_path, ALONE) as checkpoints:
        kept = checkpoints.save(1, model, optimizer, None, {})
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        checkpoint.restore(kept, model, optimizer, None, ALONE)


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew_and_nothing_deleted(whole, again):
    for step in complete(whole / "checkpoints"):
        cut(step / "state.json")
    line = one_line_of_many(again(whole, check=False))
    assert "the checkpoint is damaged, and there is no whole one before it; choose another output_dir, or delete" in line
    assert len(complete(whole / "checkpoints")) == 2
    assert len(losses(whole)) > 3


def test_a_checkpoint_of_another_model_is_refused_and_not_called_damaged(whole, again):
    line = one_line_of_many(again(whole, "ema=0.5", check=False))
    assert "is not a checkpoint of this model: " in line
    assert "Missing key in checkpoint state_dict: ema." in line
    assert "holds a run with another `seed`" in one_line_of_many(again(whole, "seed=3", check=False))
    assert len(complete(whole / "checkpoints")) == 2


def test_a_checkpoint_half_written_in_a_first_interval_is_not_chosen_and_the_start_at_zero_is_said(whole, again):
    """Killed between the last byte and the rename: it looks whole, and is not one."""
    newest = complete(whole / "checkpoints")[-1]
    steps = json.loads((newest / "state.json").read_text())["step"]
    expected = losses(whole)
    shutil.copytree(newest, whole / "checkpoints" / "partial_00000003")
    for step in (whole / "checkpoints").glob("step_*"):
        shutil.rmtree(step)
    assert complete(whole / "checkpoints") == []
    done = again(whole)
    assert (
        f"{whole} holds a run of {steps} steps that left no checkpoint: it and its history begin again at zero" in done.stdout
    )
    assert "Resuming" not in done.stdout
    assert losses(whole) == expected


def test_a_stopped_run_of_a_sweep_is_no_crash(tmp_path, monkeypatch):
    """It keeps its checkpoint and has no outcome: the next start goes on with it."""
    from types import SimpleNamespace

    from mdm.studies import runs

    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    for code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        monkeypatch.setattr(runs.subprocess, "run", lambda *a, code=code, **k: SimpleNamespace(returncode=code))
        with pytest.raises(Stopped, match="the run a"):
            runs.run_one(tmp_path, "a", "pretrain_pico", {}, {}, tolerant=True)
    assert (tmp_path / "a" / "checkpoints").is_dir()
    assert not (tmp_path / "a.json").exists()


def test_a_run_goes_on_from_a_bucket_on_a_machine_that_has_nothing(config, run, tmp_path):
    """Weights, order, tokenizers and history are those of a run that nothing disturbed."""
    whole, moved, bucket = tmp_path / "whole", tmp_path / "moved", f"memory://{tmp_path.name}/run"
    command = ["run", "pretrain", "--config", config, *SMALL]
    run(*command, f"output_dir={whole}")
    run(*command, f"output_dir={moved}", f"checkpoint_dir={bucket}")
    assert not (moved / "checkpoints").exists()
    kept = complete(place(bucket))
    assert len(kept) == 2
    shutil.rmtree(moved)
    (kept[1] / "state.json").unlink()  # it was being written when the machine went
    moved.mkdir()
    (moved / "history.jsonl").write_text((whole / "history.jsonl").read_text().partition("\n")[0] + "\n")  # of a stay before
    done = run(*command, f"output_dir={moved}", f"checkpoint_dir={bucket}")
    assert f"Resuming from {kept[0]}" in done.stdout
    assert_same_run(moved, whole)
    line = one_line_of_many(run(*command, f"output_dir={moved}", f"checkpoint_dir={bucket}", "seed=3", check=False))
    assert f"{bucket} holds a run with another `seed`" in line
    done = run(*command, f"output_dir={tmp_path / 'other'}", "checkpoint_dir=nowhere://x", check=False)
    assert done.stderr.startswith("mdm: checkpoint_dir=nowhere://x")
    assert len(done.stderr.splitlines()) == 1
