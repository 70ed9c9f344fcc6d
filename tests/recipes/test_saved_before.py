"""What was saved when mdm/ was one room (commit 8d2ee45) loads, resumes and goes on: a model, a killed run, a killed study.

The files are that version's own: `pretrain --config pretrain_pico model.width=16 model.num_layers=1 tokens=4000 precision=fp32
checkpoint_every_tokens=1500 validation_samples=8 batch.logical=16`, and a study of two cells of it, of which one had finished.
"""

import json
import zipfile
from pathlib import Path

import pytest

from mdm import generate, load_model
from mdm.training.history import read_history

SAVED = Path(__file__).parents[1] / "saved_in_one_room.zip"
RUN = ["model.width=16", "model.num_layers=1", "tokens=4000", "checkpoint_every_tokens=1500", "validation_samples=8"]
RUN += ["batch.logical=16", "precision=fp32"]
STUDY = """
output_dir: {folder}
question: schedules
run: pretrain_pico
set:
  model: {{_component_: mdm.models.builders.pico, width: 16, num_layers: 1, max_length: 32}}
  validation_samples: 8
  batch.logical: 16
  precision: fp32
groups: {{grid: {{grid: {{tokens: [2000, 3000]}}, seeds: [0]}}}}
workers: 1
"""


@pytest.fixture
def saved(tmp_path):
    with zipfile.ZipFile(SAVED) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_its_model_loads_and_generates(saved):
    model, processor = load_model(saved / "run")
    assert model.config.width == 16
    assert generate(model, processor, "text_to_image", [{"text": "zero"}]).outputs[0]["image"].size == (8, 8)


def test_a_killed_run_goes_on_under_the_new_names(saved, run):
    folder = saved / "run"
    before = read_history(folder / "history.jsonl")
    done = run("run", "pretrain", "--config", "pretrain_pico", f"output_dir={folder}", *RUN)
    assert "Resuming from" in done.stdout
    assert "step_00000007" in done.stdout
    after = read_history(folder / "history.jsonl")
    assert after[-1]["step"] == before[-1]["step"] == 9
    # the same numbers in another order of summation, where the machine is another
    assert after[-1]["bits/text_to_image"] == pytest.approx(before[-1]["bits/text_to_image"], rel=1e-4)
    assert "mdm.models.builders.pico" in (folder / "config.yaml").read_text()


def test_a_killed_study_goes_on_and_repeats_nothing(saved, run, runs_in_process):
    folder = saved / "study"
    finished = (folder / "runs" / "grid_tokens2000_seed0.json").read_text()
    config = saved / "study.yaml"
    config.write_text(STUDY.format(folder=folder))
    run("run", "study", "--config", config)
    assert (folder / "runs" / "grid_tokens2000_seed0.json").read_text() == finished
    assert json.loads((folder / "runs" / "grid_tokens3000_seed0.json").read_text())["tokens"] == 3248
    assert (folder / "study.html").is_file()
