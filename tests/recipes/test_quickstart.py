import json

import pytest

from mdm.cli import split_launcher
from mdm.config import UserError

ACCURACIES = ("text_to_image", "text_to_speech", "image_to_text", "speech_to_text", "image_judge", "speech_judge")
OTHERS = ("text_bits_per_token", "text_unigram_bits_per_token", "tokens_per_second", "seconds")
KEYS = {*(f"{name}_accuracy" for name in ACCURACIES), *OTHERS}


def test_the_quickstart_writes_its_figures_and_a_report(run, tmp_path):
    """A run far too short to learn, through every stage; CI runs a longer one."""
    out = tmp_path / "quick"
    small = ["tokens=9000", "samples=20", "nelbo_repeats=1", "model.width=48", "model.num_layers=1", "compile=false"]
    done = run("run", "quickstart", f"output_dir={out}", *small, timeout=400, typecheck="0")
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    assert metrics["image_judge_accuracy"] >= 0.95
    assert metrics["speech_judge_accuracy"] >= 0.95
    assert 0 <= metrics["text_to_image_accuracy"] <= 1
    assert f"Report: {out / 'report.html'}" in done.stdout
    page = (out / "report.html").read_text()
    for heading in ("Figures", "Learning", "Text to image", "How an image is made", "Text to speech", "Settings"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<audio") >= 2
    assert "data:image/gif" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (out / "overview.png").stat().st_size > 10_000
    evaluated = run("run", "evaluate", f"checkpoint={out}", f"output_dir={tmp_path / 'again'}", "samples=10", "nelbo_repeats=1")
    assert "text_exp_nelbo" in evaluated.stdout


def test_the_command_explains_itself(run):
    assert "quickstart" in run("ls").stdout
    assert "mdm run quickstart" in run("--help").stdout
    assert "mdm run pretrain" in run("run", "pretrain", "--help").stdout
    assert "The config is valid." in run("validate", "pretrain").stdout
    wrong = run("validate", "pretrain", "tokens=-1", check=False)
    assert wrong.returncode == 2
    assert "tokens must be at least 1, got -1" in wrong.stderr


def test_torchruns_flags_pass_through():
    assert split_launcher(["--nproc_per_node", "2", "pretrain", "a=1"]) == (["--nproc_per_node", "2"], "pretrain", ["a=1"])
    assert split_launcher(["--nnodes=1", "x.py"]) == (["--nnodes=1"], "x.py", [])
    with pytest.raises(UserError, match="needs a recipe"):
        split_launcher(["--nnodes=1"])
