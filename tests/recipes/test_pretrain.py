import contextlib
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from components.data.draws.order import WholeOrder
from components.noise import seed_of
from mdm.training import record
from mdm.training.checkpoint import complete
from mdm.training.history import read_history
from tests.processes import begun, in_processes
from tests.recipes.conftest import CONFIG, in_process


def losses(folder, key="loss"):
    return {line["step"]: line[key] for line in read_history(folder / "history.jsonl") if key in line}


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def test_resume_after_kill_9_is_bit_exact(config, run, tmp_path):
    """A run in one go, and one with kill -9 (while a further checkpoint is half written) + resume: equal weights and losses.

    Its physical batch doubles at a quarter, which is before the kill or after it.
    """
    tokens_per_step = 384  # 8 pairs of 33 positions and 4 packed rows of 32, less what packing leaves empty
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [f"tokens={tokens_per_step * 40}", f"checkpoint_every_tokens={tokens_per_step * 5}", "ema=0.9"]
    settings.append("batch.ramp={0.25: 24}")
    run("run", "pretrain", "--config", config, f"output_dir={whole}", *settings)
    expected = losses(whole)
    assert 24 <= len(expected) <= 26  # 10 steps of 12 sequences, 15 of 24

    process = begun(run, "run", "pretrain", "--config", config, f"output_dir={parts}", *settings)
    deadline = time.time() + 120
    while len(complete(parts / "checkpoints")) < 2 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL  # and had not come to its end
    stopped = complete(parts / "checkpoints")[-1]
    half = parts / "checkpoints" / "partial_00000999"  # what a kill in the middle of writing leaves behind
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    done = run("run", "pretrain", "--config", config, f"output_dir={parts}", *settings)
    assert f"Resuming from {stopped}" in done.stdout
    assert not half.exists()
    assert losses(parts) == expected
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_train_to_the_same_loss_curve(config, run, tmp_path):
    """FSDP2 over gloo on two CPU processes, the same global batch: within float32's tolerance over the run.

    The second half of a third run is resumed on two processes from one process's checkpoint, at the same tokens. One in ten
    captions is too long and left out: each rank finds some of them, and together they count those of one process.
    """
    settings = [
        "canvas.text=6",
        "data.digits.on_long=skip",
        "ema=0.9",
        "validate_every_tokens=1500",
        "sample_every_tokens=1500",
        "checkpoint_every_tokens=1200",
    ]
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    run("run", "pretrain", "--config", config, f"output_dir={one}", "tokens=3000", *settings)
    in_processes(2, in_process, "pretrain", config, f"output_dir={two}", "tokens=3000", *settings)
    shutil.copytree(one, resumed)
    for late in complete(resumed / "checkpoints")[1:]:
        shutil.rmtree(late)
    kept = complete(resumed / "checkpoints")[0]
    said = in_processes(2, captured, "pretrain", config, f"output_dir={resumed}", "tokens=3000", *settings)
    assert f"Resuming from {kept}" in said[0]
    assert said[1] == ""  # one process speaks for all
    expected = losses(one)
    assert len(expected) > 5
    assert max(losses(one, "bad_samples").values()) >= 2
    for folder in (two, resumed):
        assert list(losses(folder)) == list(expected)
        assert losses(folder, "bad_samples") == losses(one, "bad_samples")
        assert (folder / "bad_samples.jsonl").read_text() == (one / "bad_samples.jsonl").read_text()
        for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):  # AdamW would hide a wrong scale of the gradient
            curves = [torch.tensor(list(losses(f, key).values())) for f in (folder, one)]
            assert_close(*curves, rtol=tolerance, atol=0)
        a, b = weights(one), weights(folder)
        for name in a:
            assert_close(b[name], a[name], rtol=0, atol=2e-4)


def captured(*arguments):
    """What a recipe prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        in_process(*arguments)
    return out.getvalue()


@pytest.mark.parametrize(("processes", "mesh"), [(2, []), (3, []), (4, ["mesh.replicate=2"]), (4, ["mesh.tensor=2"])])
def test_a_ramp_of_the_batch_on_several_processes_is_that_of_one(config, tmp_path, one_with_a_ramp, processes, mesh):
    """Settings, moments and schedule follow the batch, and a step of 24 or 36 sequences is shared by two, three, or four."""
    out = tmp_path / "out"
    in_processes(processes, in_process, "pretrain", config, f"output_dir={out}", *RAMP, *mesh)
    lines = [line for line in read_history(out / "history.jsonl") if "loss" in line]
    expected = [line for line in read_history(one_with_a_ramp / "history.jsonl") if "loss" in line]
    assert len({line["lr"] for line in lines}) == len(lines) > 6
    assert max(b["tokens"] - a["tokens"] for a, b in itertools.pairwise(lines)) > 2 * lines[0]["tokens"]
    for a, b in zip(lines, expected, strict=True):
        assert (a["tokens"], a["lr"]) == (b["tokens"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)  # AdamW would hide a wrong scale of the gradient
    found, one = weights(out), weights(one_with_a_ramp)
    for name in one:
        assert_close(found[name], one[name], rtol=0, atol=2e-4)


RAMP = ["tokens=6000", "batch.ramp={0.3: 24, 0.6: 36}", "checkpoint_every_tokens=2000"]


@pytest.fixture(scope="module")
def one_with_a_ramp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ramp")
    (folder / "config.yaml").write_text(CONFIG.format(output_dir=folder / "out"))
    in_process("pretrain", folder / "config.yaml", *RAMP)
    return folder / "out"


@pytest.mark.parametrize("mesh", ["mesh.replicate=2", "mesh.tensor=2"])
def test_a_run_goes_on_on_another_mesh(config, tmp_path, mesh):
    """From one process to four, and back to one: the loss curve of one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["tokens=4500", "checkpoint_every_tokens=1500", "ema=0.9"]
    in_process("pretrain", config, f"output_dir={whole}", *settings)
    for count, own in ((1, []), (4, [mesh]), (1, [])):
        in_processes(count, in_process, "pretrain", config, f"output_dir={parts}", *settings, *own)
        for late in complete(parts / "checkpoints")[1:]:
            shutil.rmtree(late)
    expected, found = losses(whole), losses(parts)
    assert list(found) == list(expected)
    assert_close(torch.tensor(list(found.values())), torch.tensor(list(expected.values())), rtol=1e-4, atol=0)


def test_weights_gathered_in_bf16_train_as_those_of_one_process(config, tmp_path):
    """Over 500 steps the losses differ by 0.04 % in the mean, and by 0.02 % where weights are gathered in float32: sums of bf16
    products in another order. Other masks would change them by a fifth. Here the first 20 steps."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["precision=bf16", "tokens=8000", "batch.micro=12"]
    in_process("pretrain", config, f"output_dir={one}", *settings)
    in_processes(2, in_process, "pretrain", config, f"output_dir={two}", *settings)
    a, b = (torch.tensor(list(losses(folder).values())) for folder in (one, two))
    assert len(a) > 18
    assert ((a - b).abs() / a).mean() < 2e-3


def test_8_bit_moments_come_back_and_a_checkpoint_that_cannot_be_shared_is_left_alone(config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["tokens=3000", "checkpoint_every_tokens=1500", "optimizer.state=int8"]
    in_processes(1, in_process, "pretrain", config, f"output_dir={whole}", *settings)  # its step is compiled: no fork after it
    shutil.copytree(whole, parts)
    shutil.rmtree(complete(parts / "checkpoints")[-1])
    with pytest.raises(AssertionError, match=r"its 8-bit moments \(optimizer.state\) come in blocks that"):
        in_processes(2, in_process, "pretrain", config, f"output_dir={parts}", *settings)
    assert len(complete(parts / "checkpoints")) == 1
    in_processes(1, in_process, "pretrain", config, f"output_dir={parts}", *settings)
    assert losses(parts) == losses(whole)
    one, other = weights(parts), weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in one)


def looking(folder, config):
    """Each process has a disk of its own, on which the first alone has a checkpoint."""
    os.chdir(folder / os.environ["RANK"])
    in_process("pretrain", config, "output_dir=out", "tokens=2000", "checkpoint_every_tokens=1000")


def test_processes_that_do_not_see_the_same_checkpoints_do_not_train_on(config, tmp_path):
    (tmp_path / "1").mkdir()
    in_process("pretrain", config, f"output_dir={tmp_path / '0' / 'out'}", "tokens=2000", "checkpoint_every_tokens=1000")
    with pytest.raises(AssertionError, match=r"out/checkpoints is not the same folder for all processes: they find None and"):
        in_processes(2, looking, tmp_path, config)


def test_more_processes_than_a_step_has_rows_are_one_line(config):
    with pytest.raises(AssertionError, match=r"batch.physical = 2: a step of 1 pairs cannot be shared by 2 processes; take"):
        in_processes(2, in_process, "pretrain", config, "batch.logical=2", "batch.micro=2")
    with pytest.raises(AssertionError, match=r"batch.ramp.0.5 = 2: a step of 1 pairs cannot be shared by 2 processes"):
        in_processes(2, in_process, "pretrain", config, "batch.ramp={0.5: 2}")


def test_a_profile_is_of_the_steps_that_were_asked_for(config, run, tmp_path):
    done = run("run", "pretrain", "--config", config, "tokens=3000", "profile={start: 2, steps: 3}")
    trace = tmp_path / "out" / "profile" / "steps_3_to_5.json"
    assert f"A profile of steps 3 to 5 of this process is in {trace}" in done.stdout
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 3
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}
    done = run("run", "pretrain", "--config", config, f"output_dir={tmp_path / 'short'}", "tokens=600", "profile={start: 90}")
    assert "profile: steps 91 to 93 were asked for, and this process has done 2\n" in done.stdout
    done = run("run", "pretrain", "--config", config, "profile={start: 0}", check=False)
    assert done.stderr == "mdm: profile.start must be at least 1, got 0\n"


def test_a_run_goes_on_with_another_batch_on_other_processes(config, run, tmp_path):
    """From 12 sequences on one process to 24 on two: settings, moments and schedule follow, and the tokens are the same."""
    settings = ["tokens=6000", "checkpoint_every_tokens=3000", f"output_dir={tmp_path / 'out'}"]
    run("run", "pretrain", "--config", config, *settings)
    for late in complete(tmp_path / "out" / "checkpoints")[1:]:
        shutil.rmtree(late)
    two = ["run", "--nproc_per_node", "2", "pretrain", "--config", config]
    done = run(*two, *settings, "batch.physical=24", "optimizer.critical_steps=100", typecheck="0")
    assert "The physical batch goes from 12 to 24 sequences, and AdamW with it." in done.stdout
    assert "fewer than optimizer.critical_steps = 100: the loss gets worse past the critical batch" in done.stdout
    lines = [line for line in read_history(tmp_path / "out" / "history.jsonl") if "lr" in line]
    resumed_at = next(i for i, (a, b) in enumerate(itertools.pairwise(lines)) if b["tokens"] - a["tokens"] > 500) + 1
    assert lines[-1]["tokens"] < 7000
    for line in lines[resumed_at:]:  # the schedule is a function of tokens, sqrt(2) higher
        progress = (line["tokens"] - 300) / 5700
        assert line["lr"] == pytest.approx(2**0.5 * 1e-3 * (1 + math.cos(math.pi * min(progress, 1))) / 2, rel=1e-6, abs=1e-9)


def test_a_folder_and_a_streamed_dataset_train_and_resume(config, run, tmp_path):
    """The user's own data: images with captions from a folder, text streamed from a saved dataset."""
    import datasets
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        Image.new("L", (16, 12), 12 * i).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"grey {i % 5}")
    lines = {"body": [f"line {i} of a text that is streamed and goes on for a while" for i in range(50)]}
    datasets.Dataset.from_dict(lines).save_to_disk(str(tmp_path / "set"))
    folder = f"{{_component_: components.data.sources.Folder, path: {images}, kind: image, size: 8}}"
    stream = f"{{_component_: components.data.sources.hugging_face, path: {tmp_path / 'set'}, text: body, streaming: true}}"
    settings = [f"data.digits.train={folder}", "data.digits.validation=null", f"data.text.train={stream}", "canvas.text=16"]
    settings += ["checkpoint_every_tokens=1000", "tokens=4000"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("run", "pretrain", "--config", config, f"output_dir={whole}", *settings)
    shutil.copytree(whole, parts)
    for late in complete(parts / "checkpoints")[1:]:
        shutil.rmtree(late)
    assert "Resuming from" in run("run", "pretrain", "--config", config, f"output_dir={parts}", *settings).stdout
    assert losses(parts) == losses(whole)
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_survives_bad_samples_and_counts_them(config, run, tmp_path):
    """Of 60 pictures five are bad, each in another way; one caption is too long, which ends the run until it may be skipped.

    Resumed, it goes on to its end after two epochs.
    """
    from PIL import Image

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for i in range(60):
        Image.new("L", (16, 12), 4 * i).save(damaged / f"{i:02d}.png")
        (damaged / f"{i:02d}.txt").write_text(f"grey {i % 5}")
    (damaged / "07.png").write_bytes((damaged / "07.png").read_bytes()[:50])
    (damaged / "12.png").write_bytes(b"nothing")
    (damaged / "23.txt").unlink()
    (damaged / "31.txt").write_bytes(b"\xff\xfe\xff")
    late = WholeOrder(60, seed_of(0, "digits"))(38)
    assert late not in (7, 12, 23, 31)
    (damaged / f"{late:02d}.txt").write_text("grey " * 30)
    settings = ["tokens=6000", "masker.pairs=false", "checkpoint_every_tokens=1200", "data.digits.validation=null"]
    settings.append(f"data.digits.train={{_component_: components.data.sources.Folder, path: {damaged}, kind: image, size: 8}}")
    stopped = run("run", "pretrain", "--config", config, *settings, cwd=tmp_path, check=False)
    assert f"data.digits: {damaged / f'{late:02d}.png'}: its text of" in stopped.stderr
    assert "data.digits.on_long = refuse; skip leaves such samples out" in stopped.stderr
    assert complete(tmp_path / "out" / "checkpoints")
    done = run("run", "pretrain", "--config", config, *settings, "data.digits.on_long=skip", cwd=tmp_path)
    assert "Resuming from" in done.stdout
    assert "Samples left out: 5; the first is data.digits: " in done.stdout
    counts = list(losses(tmp_path / "out", "bad_samples").values())
    assert counts == sorted(counts)
    assert counts[-1] == 5
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(Path(line["name"]).name for line in lines) == sorted(f"{i:02d}.png" for i in (7, 12, 23, 31, late))


def test_accumulation_does_not_change_the_run(config, run, tmp_path):
    for micro in (3, 12):
        run("run", "pretrain", "--config", config, f"output_dir={tmp_path / str(micro)}", "tokens=2000", f"batch.micro={micro}")
    three, twelve = (torch.tensor(list(losses(tmp_path / m).values())) for m in ("3", "12"))
    assert_close(three, twelve, rtol=1e-5, atol=0)


def test_a_copied_recipe_runs_from_an_empty_folder(run, tmp_path, config):
    done = run("cp", "pretrain", "my.py", cwd=tmp_path)
    assert "my.py" in done.stdout
    assert (tmp_path / "my.yaml").is_file()
    source = (tmp_path / "my.py").read_text()
    (tmp_path / "my.py").write_text(source.replace("The model is in", "The edited model is in"))
    small = ["tokens=3000", "model.width=48", "batch.physical=24", "compile=false", "validation_samples=8"]
    small += ["data.speech.train.voices=1", "data.speech.validation.voices=1"]
    done = run("run", "my.py", "--config", "my.yaml", "model.num_layers=2", *small, cwd=tmp_path)
    assert "edited" in done.stdout
    assert json.loads((tmp_path / "runs/pretrain/model/config.json").read_text())["num_layers"] == 2
    refused = run("cp", "pretrain", "my.py", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "my.py exists" in refused.stderr


def test_samples_metric_logger_activation_checkpointing_and_plain_loss(config, run, tmp_path):
    """The options that other tests leave off, in one run."""
    logger = "{_component_: torchtune.training.metric_logging.DiskLogger, log_dir: " + str(tmp_path / "logs") + "}"
    options = [
        "activation_checkpointing=selective",
        "loss.weighting=plain",
        "sample_every_tokens=1500",
        f"metric_logger={logger}",
    ]
    run("run", "pretrain", "--config", config, "tokens=2500", *options)
    assert list((tmp_path / "logs").glob("*.txt"))
    assert list((tmp_path / "out" / "samples").rglob("samples.png"))
    assert read_history(tmp_path / "out" / "history.jsonl")[-1]["bits/text_to_image"] > 0


SPOKEN = "{train: {_component_: components.data.speech.spoken_words, split: test, voices: 1}, tasks: {text_to_speech: 1.0}}"
AUDIO = "tokenizers.audio={_component_: components.tokenizers.audio.Codec2Tokenizer}"
OWN = """
from components.tokenizers.image import GreyPatchTokenizer

def asked():
    return [{"prompt": "what is it?", "text": "it"}] * 4

class Tiles(GreyPatchTokenizer):
    def save(self, folder):
        return {**super().save(folder), "_component_": "mine.Tiles"}
"""
MODELS = {
    "text alone": (["data.digits=null", "tokenizers.image=null", "canvas={}"], "task=text", "text"),
    "images": ([], "task=text_to_image", "image"),
    "an own tokenizer": (["tokenizers.image={_component_: mine.Tiles, size: 8, patch: 2, levels: 3}"], "trust=true", "image"),
    "images that are read": (["data.text=null", "data.digits.tasks.text_to_image=0"], "prompt=FILE.png", None),
    "speech": (
        ["data.digits=null", f"data.speech={SPOKEN}", AUDIO, "canvas.audio=56", "model.max_length=96"],
        "speech",
        "audio",
    ),
    "instructions": (
        ["data.digits=null", "data.text=null", "data.a={train: {_component_: mine.asked}, tasks: {instruct: 1}}"],
        "'prompt=what is it?'",
        "text",
    ),
}


@pytest.mark.parametrize("case", MODELS, ids=lambda c: c.replace(" ", "_"))
def test_the_hint_at_the_end_is_a_command_that_this_model_can_do(config, run, tmp_path, case):
    settings, part, made = MODELS[case]
    (tmp_path / "mine.py").write_text(OWN)
    arguments = [f"output_dir={tmp_path / 'a run'}", "tokens=300", "batch.physical=12", *settings]
    done = run("run", "pretrain", "--config", config, *arguments, cwd=tmp_path)
    hint = done.stdout.strip().splitlines()[-1].partition("Try: mdm ")[2]
    assert part in hint
    if made is None:  # a picture is for the user to name
        assert "image file not found: FILE.png" in run(*shlex.split(hint), check=False, cwd=tmp_path).stderr
        return
    assert f"{made}: " in run(*shlex.split(hint), "count=1", cwd=tmp_path).stdout


def test_generate_writes_what_a_model_makes(config, run, tmp_path):
    run("run", "pretrain", "--config", config, "tokens=1500")
    out = tmp_path / "made"
    arguments = ["generate", f"checkpoint={tmp_path / 'out'}", "task=text_to_image", "prompt=a handwritten two"]
    run(*arguments, f"output_dir={out}", "count=3")
    assert sorted(p.name for p in out.iterdir()) == ["0000.png", "0001.png", "0002.png", "outputs.jsonl", "samples.png"]
    read = run(
        "generate", f"checkpoint={tmp_path / 'out'}", "task=image_to_text", f"prompt={out / '0000.png'}", f"output_dir={out}"
    )
    assert read.stdout.count("text:") == 1  # it is read greedily
    assert "Warning" not in read.stdout
    own = record.of(tmp_path / "out")
    seen = read_history(tmp_path / "out" / "history.jsonl")[-1]["tokens"]
    assert own.trainings == [record.Training(seen, {"digits": ["text_to_image", "image_to_text"], "text": ["text"]})]
    done = run("generate", f"checkpoint={tmp_path / 'out'}", "task=joint_text_image", f"output_dir={out}", "count=1")
    never = "Warning: the model was never trained on joint_text_image. It learned text_to_image, image_to_text, text\n"
    assert never in done.stdout
    run("run", "quantize", f"checkpoint={tmp_path / 'out'}", f"output_dir={tmp_path / 'packed'}", "device=cpu")
    assert record.of(tmp_path / "packed") == own
