"""Every mistake is one clear line and exit code 2, before any long work."""

import json
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mdm.config import UserError
from mdm.hardware import MeshSettings
from mdm.training import checkpoint
from mdm.training.run import check_lanes
from tests.processes import in_a_process
from tests.recipes.conftest import in_process

BAD = {
    "unknown key": (["lerning_rate=1"], "unknown key 'lerning_rate'"),
    "unknown nested key": (["optimizer.learning_rate=1"], "unknown key 'optimizer.learning_rate'"),
    "unknown key of a table that is null": (
        ["profile={start: 1, step: 3}"],
        "unknown key 'profile.step' (did you mean 'steps'?)",
    ),
    "unknown key of a component": (["model.num_layer=2"], "unknown key 'model.num_layer' (did you mean 'num_layers'?)"),
    "unknown component": (["model._component_=mdm.models.builders.huge"], "unknown component 'mdm.models.builders.huge'"),
    "wrong type": (["tokens=many"], "tokens: 'many' is no whole number; write it as 5000000"),
    "wrong type in a component": (["model.width=wide"], "model.width: 'wide' is no whole number; write it as 5000000"),
    "nan": (["optimizer.lr=.nan"], "optimizer.lr: nan is no value"),
    "nan in a component": (["masker.t_min=.nan"], "masker.t_min: nan is no value"),
    "infinite learning rate": (["optimizer.lr=.inf"], "optimizer.lr must be positive, got inf"),
    "negative end": (["optimizer.final_lr=-1"], "optimizer.final_lr must be at least 0, got -1.0"),
    "negative seed": (["seed=-1"], "seed must be at least 0, got -1"),
    "not an override": (["tokens"], "'tokens' is not an override; write key=value"),
    "a bare arrow": (["-"], "'-' is not an override; write key=value, and an arrow in quotes (\"text->image\")"),
    "width and heads": (["model.num_heads=3"], "model.width 32 does not divide into model.num_heads = 3"),
    "longer than the model": (["data.text.pack=65"], "data.text.pack = 65 is longer than the model"),
    "pair longer than the model": (["model.max_length=32", "canvas.image=64"], "takes 81 positions"),
    "missing source file": (
        ["data.digits.train={_component_: components.data.sources.Folder, path: absent, kind: image}"],
        "data.digits.train: folder not found: absent",
    ),
    "missing rank file": (
        ["tokenizers.text={_component_: components.tokenizers.text.TextTokenizer.from_ranks, path: absent.tiktoken}"],
        "rank file not found: absent.tiktoken",
    ),
    "unknown modality": (
        ["data.digits.tasks={text_to_video: 1}"],
        "task text_to_video of data.digits needs tokenizers.video; there are text, image",
    ),
    "no task": (
        ["data.digits.tasks={text_video: 1}"],
        "data.digits.tasks: 'text_video' is no task: write GIVEN_to_GENERATED (text_to_image), joint_A_B",
    ),
    "the same modality twice": (["data.digits.tasks={text_to_text: 1}"], "'text_to_text' is no task: text stands twice"),
    "the same task twice": (
        ['data.digits.tasks={text_to_image: 1, "text->image": 1}'],
        "data.digits.tasks: text_to_image stands twice, once as 'text->image'",
    ),
    "an arrow without quotes": (
        ["data.digits.tasks={text-: 1}"],
        "data.digits.tasks: 'text-' is no task: write an arrow in quotes (\"text->image\"); without, the",
    ),
    "a modality called speech": (
        ["tokenizers.speech={_component_: components.tokenizers.audio.Codec2Tokenizer}"],
        "tokenizers: a modality's name is letters and digits, and not to, joint, instruct or speech; got 'speech'",
    ),
    "bad choice": (["loss.weighting=best"], "loss.weighting: 'best' is not one of nelbo, plain"),
    "bad device": (["device=tpu"], "device: 'tpu' is not one of auto, cpu, cuda"),
    "graphs in training": (["compile=graphs"], "compile: 'graphs' is not one of auto, true, false"),
    "bad masker": (["masker.t_min=0.9"], "t_min must be in [0, 0.5) with pairs, got 0.9"),
    "odd batch": (["batch.physical=3"], "the physical batch of 3 must be even"),
    "no batch": (["batch.physical=0"], "batch.physical must be at least 1, got 0"),
    "no lanes": (["lanes=0"], "lanes must be at least 1, got 0"),
    "best fit without a pack": (
        ["data.digits.best_fit=8"],
        "data.digits.best_fit = 8: a number of documents, of a stream with `pack`",
    ),
    "ramp past the horizon": (["batch.ramp={1.5: 24}"], "batch.ramp: 1.5 is not a share of the horizon in (0, 1)"),
    "batch of a ramp": (["batch.ramp={0.5: 0}"], "batch.ramp.0.5 must be at least 1, got 0"),
    "warm-up longer than the horizon": (["optimizer.warmup=1.5"], "optimizer.warmup must be in [0, 0.25] of the horizon"),
    "alpha": (["parameterization.alpha=0.3"], "parameterization: CompleteP: alpha must be in [0.5, 1], got 0.3"),
    "head size": (["model={_component_: mdm.models.builders.small, width: 192}"], "model.width 192 is not a multiple of 128"),
    "caption longer than its canvas": (
        ["canvas.text=2"],
        "tokens does not fit canvas.text = 2",
    ),
    "unknown key of a mesh": (["mesh.shrad=2"], "unknown key 'mesh.shrad' (did you mean 'shard'?); mesh has replicate"),
    "unknown key of what may be null": (
        ["profile={stop: 3}"],
        "unknown key 'profile.stop' (did you mean 'steps'?); profile has start, steps",
    ),
    "no mesh": (["mesh=null"], "mesh: keys and values stand there (as mesh.KEY=VALUE)"),
    "a mesh of none": (["mesh.tensor=0"], "mesh.tensor must be at least 1, got 0"),
    "one slash of a URL": (
        ["checkpoint_dir=s3:/bucket/run"],
        "checkpoint_dir=s3:/bucket/run: a URL has two slashes, s3://bucket",
    ),
    "output_dir is a file": (["output_dir=/dev/null"], "output_dir=/dev/null cannot be written to"),
}


def one_line(done) -> str:
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("reading the data")]  # wiped
    assert len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.replace(" ", "_"))
def test_a_bad_config_is_one_line(config, run, case):
    arguments, message = BAD[case]
    assert message in one_line(run("run", "pretrain", "--config", config, *arguments, check=False))


def test_unknown_recipes_and_configs_are_named(run):
    assert "recipe 'pretrian' is not one of" in one_line(run("run", "pretrian", check=False))
    assert "config 'absent' is not one of" in one_line(run("run", "pretrain", "--config", "absent", check=False))
    assert "command 'frob' is not one of ls, cp, run" in one_line(run("frob", check=False))
    assert "config file not found: a.yaml" in one_line(run("run", "pretrain", "--config", "a.yaml", check=False))
    assert "checkpoint=absent: no model there" in one_line(run("generate", "checkpoint=absent", "task=text", check=False))


def test_an_empty_dataset_is_named(config, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.py").write_text("def nothing():\n    return []\n")
    source = "data.text.train={_component_: components.data.sources.Folder, path: " + str(tmp_path / "empty") + ", kind: text}"
    assert "no text files" in one_line(run("run", "pretrain", "--config", config, source, check=False))
    mine = run("run", "pretrain", "--config", config, "data.text.train={_component_: mine.nothing}", check=False, cwd=tmp_path)
    assert "data.text.train: the dataset is empty" in one_line(mine)


def test_a_corrupt_file_is_refused_where_that_was_asked_for(config, run, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"nothing")
    for name in ("good", "bad"):
        (tmp_path / "images" / f"{name}.txt").write_text("one")
    node = f"_component_: components.data.sources.Folder, path: {tmp_path / 'images'}, kind: image"
    refuse = f"data.digits.train={{{node}, on_corrupt: refuse}}"
    assert "corrupt file" in one_line(run("run", "pretrain", "--config", config, refuse, check=False))
    done = run("run", "pretrain", "--config", config, f"data.digits.train={{{node}}}", "tokens=500", "canvas.text=24")
    assert "skipped 1 corrupt of 2 files" in done.stdout


def test_a_sample_that_turns_out_unusable_is_one_line(config, run, tmp_path):
    """A folder is read as it is drawn: one caption among ten is too long, or an image is missing."""
    (tmp_path / "images").mkdir()
    for i in range(10):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text("x" * (200 if i == 7 else 2))
    node = f"data.digits.train={{_component_: components.data.sources.Folder, path: {tmp_path / 'images'}, kind: image}}"
    no_validation = "data.digits.validation=null"
    line = one_line_of_many(run("run", "pretrain", "--config", config, node, no_validation, check=False))
    assert "/images/7.png: its text of" in line
    assert "does not fit canvas.text = 12 (data.digits.on_long = refuse; skip leaves such samples out, cut" in line
    text = f"data.digits.train={{_component_: components.data.sources.Folder, path: {tmp_path / 'images'}, kind: text}}"
    line = one_line_of_many(run("run", "pretrain", "--config", config, text, no_validation, check=False))
    assert "data.digits: none of its samples can be used; the first is" in line
    assert "it has no image; it has text" in line


def test_a_nan_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(config, run, tmp_path):
    """The user's own masker makes step 6's weights infinite."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass, replace\n"
        "from components.maskers import FixedCountMasker\n"
        "@dataclass(frozen=True)\n"
        "class Broken(FixedCountMasker):\n"
        "    def __call__(self, batch):\n"
        "        noisy = super().__call__(batch)\n"
        "        bad = int(batch.document.max()) > 60\n"
        "        return replace(noisy, weight=noisy.weight * float('nan')) if bad else noisy\n"
    )
    arguments = ["masker={_component_: mine.Broken}", "checkpoint_every_tokens=600", "tokens=9000"]
    line = one_line_of_many(run("run", "pretrain", "--config", config, *arguments, check=False, cwd=tmp_path))
    assert "the loss is nan, on the batch of samples" in line
    assert "the last good checkpoint is" in line
    kept = line.split("checkpoint is ")[1].split(";")[0].split(". ")[0]
    assert json.loads((Path(kept) / "state.json").read_text())["step"] >= 1


def one_line_of_many(done) -> str:
    """The one line of the mistake, beside the progress bar."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("mdm: ") == 1, done.stderr[-2000:]
    return done.stderr.partition("mdm: ")[2].splitlines()[0]


def test_a_run_with_other_data_is_not_resumed_by_accident(config, run):
    run("run", "pretrain", "--config", config, "tokens=500")
    line = one_line(run("run", "pretrain", "--config", config, "tokens=500", "seed=1", check=False))
    assert "holds a run with another `seed`" in line
    assert "holds a run with another `seed`" in one_line(run("validate", "pretrain", "--config", config, "seed=1", check=False))
    line = one_line(run("run", "pretrain", "--config", config, "tokens=500", "tokenizers.text.vocab_size=310", check=False))
    assert "holds a run with another `tokenizers`" in line


def test_too_little_space_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 * 2**20))
    with pytest.raises(UserError, match="10 MiB free, and 3 more checkpoints of 12 MiB are needed"):
        checkpoint.check_space(tmp_path, num_parameters=2**20, ema=False)
    for k in range(3):  # those that are there have theirs, and one of them goes
        with pytest.raises(UserError, match=f"10 MiB free, and {3 - k} more checkpoints? of 12 MiB"):
            checkpoint.check_space(tmp_path, num_parameters=2**20, ema=False)
        (tmp_path / f"step_{k:08d}").mkdir()
        (tmp_path / f"step_{k:08d}" / "state.json").write_text("{}")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=13 * 2**20))
    checkpoint.check_space(tmp_path, num_parameters=2**20, ema=False)


def test_a_checkpoint_that_cannot_be_written_is_one_line(config, run, tmp_path):
    """Files may not grow beyond 50 kB, as on a full disk: the write fails in the middle, and leaves nothing half-written."""

    def without_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return run("run", "pretrain", "--config", config, "tokens=500", check=False)

    line = one_line_of_many(in_a_process(without_room))
    assert "cannot write the checkpoint" in line
    assert "there is no earlier checkpoint" in line
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["compile=true"], "mesh.tensor: split blocks cannot be compiled, nor multiply float8; set compile=auto"),
        (["model.num_heads=1"], "mesh.tensor: 2 does not divide model.num_heads = 1"),
        (["mesh.shard=4"], "mesh: {replicate: 1, shard: 4, tensor: 2} is for 8 processes, and there are 2"),
    ],
)
def test_what_cannot_be_split_over_processes_is_said_before_data_loads(config, monkeypatch, settings, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=re.escape(said)):
        in_process("pretrain", config, "mesh.tensor=2", *settings)


def test_processes_of_the_same_rows_need_one_lane(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    settings = {"lanes": 4, "data": {"text": SimpleNamespace(pack=32)}}
    check_lanes(SimpleNamespace(mesh=MeshSettings(tensor=2), **settings))
    with pytest.raises(UserError, match="8 processes need at least as many"):
        check_lanes(SimpleNamespace(mesh=MeshSettings(), **settings))


def test_plans_comparisons_studies_and_copies_of_what_is_none_are_one_line(run, tmp_path):
    for name, metrics in (("whole", '{"a": 1}'), ("cut", "{"), ("list", "[1]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(metrics)
    (tmp_path / "whole" / "history.jsonl").write_text('{\n[]\n3\n{"step": 1, "bits/text": 2.0}\n')
    (tmp_path / "second").mkdir()
    shutil.copy(tmp_path / "whole" / "metrics.json", tmp_path / "second")

    def compare(*names, **options):
        runs = "runs=[" + ", ".join(str(tmp_path / name) for name in names) + "]"
        return run("run", "compare", runs, f"output_dir={tmp_path / 'out'}", **options)

    assert "cut/metrics.json is not JSON" in one_line(compare("whole", "cut", check=False))
    assert "must hold keys and values, got list" in one_line(compare("whole", "list", check=False))
    assert "in place of the one that was there" not in compare("whole", "second").stdout
    assert "compare.html, in place of the one that was there" in compare("whole", "second").stdout
    assert "data: name at least one source" in one_line(run("plan", "data=null", check=False))
    assert "vocab must be at least 1, got -5" in one_line(run("plan", "vocab=-5", check=False))
    assert "no table of a study" in one_line(run("study", tmp_path / "whole", check=False))
    assert "cannot be written" in one_line(run("cp", "pretrain", "/proc/absent/my.py", check=False))


def test_fewer_lanes_than_processes_are_said_before_data_loads(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    pairs, packed = SimpleNamespace(pack=None), SimpleNamespace(pack=32)
    check_lanes(SimpleNamespace(lanes=4, mesh=MeshSettings(), data={"pairs": pairs}))
    check_lanes(SimpleNamespace(lanes=5, mesh=MeshSettings(), data={"pairs": pairs, "text": packed}))
    with pytest.raises(UserError, match=r"^lanes = 4: data\.text is cut into them, and 5 processes need at least as many"):
        check_lanes(SimpleNamespace(lanes=4, mesh=MeshSettings(), data={"pairs": pairs, "text": packed}))
