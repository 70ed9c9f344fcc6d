import json

import pytest

from mdm.config import UserError, find_config, load
from mdm.recipe import load_recipe
from tests.recipes.conftest import unchecked

ACCURACIES = ("text_to_image", "text_to_speech", "image_to_text", "speech_to_text", "image_judge", "speech_judge")
OTHERS = ("text_bits_per_token", "text_unigram_bits_per_token", "tokens_per_second", "seconds")
COMPLETED = ("image_completed", "speech_completed")
KEYS = {*(f"{name}_accuracy" for name in (*ACCURACIES, *COMPLETED)), *OTHERS}
SPEECH = ("data.speech.train", "data.speech.validation", "judged.speech.test")
SMALL = [  # what is learned of it is not looked at
    *("tokens=9000", "nelbo_repeats=1", "model.width=48", "model.num_layers=1", "compile=false"),
    *(f"data.{digits}.train.split=judge" for digits in ("digits", "reading_digits")),
    "data.reading_digits.train.warped=0",
    *(f"{key}.voices=4" for key in SPEECH),
]


def test_the_quickstart_writes_its_figures_and_a_report(tmp_path):
    """A run far too short to learn, through every stage; CI runs a longer one."""
    out = tmp_path / "quick"
    judges = ["judged.image.judge.samples.warped=2", "judged.speech.judge.samples.voices=8"]
    quick = ["run", "quickstart", f"output_dir={out}", *SMALL, "samples=20", *judges]
    again = ["run", "evaluate", f"checkpoint={out}", f"output_dir={tmp_path / 'again'}", "samples=10", "nelbo_repeats=1"]
    again += ["judged.image.judge.samples.warped=0", "judged.speech.judge.samples.voices=2", "judged.speech.test.voices=4"]
    said, evaluated = unchecked(quick, again)
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) >= KEYS
    assert metrics["image_judge_accuracy"] >= 0.95
    assert metrics["speech_judge_accuracy"] >= 0.95
    assert 0 <= metrics["text_to_image_accuracy"] <= 1
    assert f"Report: {out / 'report.html'}" in said
    page = (out / "report.html").read_text()
    for heading in ("Figures", "Learning", "Text to image", "From masks to image", "Text to speech", "Settings"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<audio") >= 2
    assert "data:image/gif" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (out / "overview.png").stat().st_size > 10_000
    assert "text_exp_nelbo" in evaluated


def test_the_command_explains_itself(run):
    listed = run("ls").stdout
    configs = ("any", "armd", "blocks", "blocks_editing", "hybrid", "learned", "orders", "paper", "pen", "uniform")
    assert ", ".join(["quickstart", *(f"quickstart_{name}" for name in configs)]) + "\n" in listed
    assert "finetune, finetune_instruct, quickstart_lora, quickstart_speech" in listed  # by the command in their header
    assert "mdm run quickstart" in run("--help").stdout
    assert "mdm run pretrain" in run("run", "pretrain", "--help").stdout
    assert "The config is valid." in run("validate", "pretrain", "--config", "pretrain_hub", "data.speech=null").stdout
    wrong = run("validate", "pretrain", "tokens=-1", check=False)
    assert wrong.returncode == 2
    assert "tokens must be at least 1, got -1" in wrong.stderr


def test_any_to_any_is_the_quickstart_with_more_tasks(run, tmp_path):
    """A config on top of another: both streams of pairs are added, nothing of the quickstart is lost; and it runs."""
    assert "The config is valid." in run("validate", "quickstart", "--config", "quickstart_any").stdout
    recipe = load_recipe("quickstart")
    plain, more = (load(recipe.Settings, find_config(name)) for name in ("quickstart", "quickstart_any"))
    assert set(more.data) - set(plain.data) == {"speaking", "drawing"}
    assert more.judged == plain.judged
    assert more.data["digits"] == plain.data["digits"]
    few = [  # what judges learn on and look at, too: their figures are not
        *(f"{key}.voices=2" for key in (*SPEECH, "judged.speech.judge.samples")),
        "judged.image.judge.samples.warped=0",
        *(f"crossed.{task}.test.voices=1" for task in ("speech_to_image", "image_to_speech", "text_image_to_speech")),
        "data.speaking.train.images=1",
        "data.speaking.train.voices=1",
        "data.drawing.train.images=1",
    ]
    out = tmp_path / "any"
    (said,) = unchecked(["run", "quickstart", "--config", "quickstart_any", f"output_dir={out}", *SMALL, "samples=10", *few])
    metrics = json.loads((out / "metrics.json").read_text())
    crossed = {f"{task}_accuracy" for task in ("speech_to_image", "image_to_speech", "text_image_to_speech")}
    assert set(metrics) >= KEYS | crossed
    assert "speech_to_image_accuracy" in said


def test_a_config_may_build_on_another(tmp_path):
    recipe = load_recipe("generate")
    (tmp_path / "first.yaml").write_text("base: generate\ncount: 7\nseed: 1\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nseed: 2\ncheckpoint: x\ntask: text\n")
    cfg = load(recipe.Settings, tmp_path / "second.yaml")
    assert (cfg.count, cfg.seed, cfg.batch_size) == (7, 2, 100)
    (tmp_path / "third.yaml").write_text("base: absent\n")
    with pytest.raises(UserError, match="config 'absent' is not one of"):
        load(recipe.Settings, tmp_path / "third.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "judged.image.complete=text_to_speech",
            r"judged.image.complete: text_to_speech does not complete what text_to_image makes",
        ),
        ("judged.image.complete=joint_image_pen", r"judged.image: the model has no pen, only text, image, audio"),
        (
            "crossed={pen_to_image: {judged: image, test: {_component_: digits, split: test}}}",
            r"crossed.pen_to_image: the model has no pen",
        ),
    ],
)
def test_what_is_to_be_judged_is_there_before_hours_of_training(change, message):
    recipe = load_recipe("quickstart")
    with pytest.raises(UserError, match=message):
        recipe.validate(load(recipe.Settings, find_config("quickstart"), [change]))
