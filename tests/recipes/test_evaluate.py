"""What a user scores and compares: figures, samples, a gallery, and runs side by side."""

import json

import pytest
from PIL import Image

from mdm.config import UserError

SCORED = """
base: evaluate_scored
output_dir: {out}
samples: 6
shown: 3
device: cpu
scored:
  captions: null
  geneval:
    task: text_to_image
    test: {{_component_: components.metrics.geneval.prompts, path: {prompts}}}
    scorers:
      geneval: {{_component_: components.metrics.geneval.GenEval, colours: null, detector: {{_component_: {detector}}}}}
  transcripts: null
  recognition:
    task: image_to_text
    test: {{_component_: components.data.digits.digits, split: test}}
    scorers:
      words: {{_component_: components.metrics.scorers.WordErrors}}
"""


def everything():
    """A detector that finds each class that is asked for, once, in every image."""
    from components.metrics.geneval import Found

    return lambda images, classes: [[Found(c, 1.0, (0, 0, 4, 4)) for c in classes] for _ in images]


def long_captions():
    return [{"text": "many words " * 9, "image": Image.new("L", (8, 8))}]


@pytest.fixture
def scored(tmp_path):
    clause = {"class": "seven", "count": 1}
    rows = [
        {"prompt": "a handwritten seven", "tag": "single_object", "include": [clause]},
        {"prompt": "a spoken nine", "tag": "two", "include": [clause], "exclude": [{"class": "nine", "count": 1}]},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = tmp_path / "scored.yaml"
    path.write_text(SCORED.format(out=tmp_path / "first", prompts=prompts, detector=f"{__name__}.everything"))
    return path


def test_scorers_samples_and_a_page_that_compares(scored, untrained, tmp_path, capsys):
    from tests.recipes.conftest import in_process

    in_process("evaluate", scored, f"checkpoint={untrained}")
    first = tmp_path / "first"
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["geneval_score"] == 0.5  # one of two tags: the other has what it must not have
    assert metrics["geneval_single_object"] == 1
    assert metrics["recognition_wer"] > 0
    lines = [json.loads(line) for line in (first / "samples/recognition/outputs.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert (first / "samples/recognition" / lines[0]["given_image"]).is_file()
    gallery = (first / "gallery.html").read_text()
    assert gallery.count('class="sample"') == 6
    in_process("evaluate", scored, f"checkpoint={untrained}", f"output_dir={tmp_path / 'second'}", "seed=1")
    capsys.readouterr()
    in_process(
        "compare", "recipes/configs/compare.yaml", f"runs=[{first}, {tmp_path / 'second'}]", f"output_dir={tmp_path / 'c'}"
    )
    assert "| measure | first | second | second - first |" in capsys.readouterr().out
    page = (tmp_path / "c/compare.html").read_text()
    assert page.count('class="sample"') == 9  # three digits read, three drawn by each run
    assert page.count("<h2>") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scored.recognition.task=shouting", "scored.recognition: the model has no shouting, only text, image, audio"),
        ("scored.recognition.task=text-", "scored.recognition: 'text-' is no task: write an arrow in quotes"),
        (
            "scored.geneval.scorers.geneval.threshhold=1",
            "unknown key 'scored.geneval.scorers.geneval.threshhold' .did you mean",
        ),
        ("scored.geneval.test.path=absent.jsonl", "scored.geneval.test: file not found: absent.jsonl"),
        (
            "scored.recognition.task=text_to_speech",
            "scored.recognition.scorers.words: it looks at text, and the task generates audio",
        ),
        (
            "scored.recognition.scorers.words={_component_: components.metrics.scorers.ClipScore, model: /absent}",
            "model '/absent' cannot be loaded",
        ),
        (
            f"data.digits={{validation: {{_component_: {__name__}.long_captions}}, tasks: {{text_to_image: 1}}}}",
            r"data.digits.validation: .* does not fit canvas.text = 24 \(data.digits.on_long = refuse",
        ),
        ("shown=-1", "shown must be at least 0, got -1"),
    ],
)
def test_mistakes_are_one_sentence(scored, untrained, change, message):
    from tests.recipes.conftest import in_process

    with pytest.raises(UserError, match=message):
        in_process("evaluate", scored, f"checkpoint={untrained}", change)


def test_a_refused_sample_and_broken_weights_are_one_sentence(untrained, tmp_path):
    import shutil

    import safetensors
    import safetensors.torch

    from tests.recipes.conftest import in_process

    config, out = "recipes/configs/evaluate.yaml", f"output_dir={tmp_path / 'out'}"
    with pytest.raises(UserError, match=r"^data\.speech\.validation: .*: its audio of \d+ tokens does not fit canvas\.audio"):
        in_process("evaluate", config, out, f"checkpoint={untrained}", "data.digits=null")
    broken = tmp_path / "broken"
    shutil.copytree(untrained, broken)
    file = next(broken.rglob("model.safetensors"))
    with safetensors.safe_open(file, "pt") as opened:
        about, weights = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    weights["norm.scale"].fill_(float("nan"))
    safetensors.torch.save_file(weights, file, metadata=about)
    digits = "data.digits.validation={_component_: components.data.digits.digits, split: judge}"
    only = ["data.speech=null", "data.text=null", digits, "judged={}", "crossed={}"]
    with pytest.raises(UserError, match=r"^the NELBO of text_to_image is nan: broken weights"):
        in_process("evaluate", config, out, f"checkpoint={broken}", *only)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_compare_wants_runs_with_figures(tmp_path):
    from tests.recipes.conftest import in_process

    with pytest.raises(UserError, match="name two folders or more"):
        in_process("compare", "recipes/configs/compare.yaml", f"runs=[{tmp_path}]")
    with pytest.raises(UserError, match=r"has no metrics\.json; mdm run evaluate writes one"):
        in_process("compare", "recipes/configs/compare.yaml", f"runs=[{tmp_path}, {tmp_path / 'other'}]")
