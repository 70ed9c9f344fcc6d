import csv
import json

from PIL import Image

SMALL = """
base: sweep_inference
samples: 20
modalities:
  image:
    judge: {samples: {_component_: components.data.digits.digits, split: judge}}
    test: {_component_: components.data.digits.digits, split: test}
    one_per_step:
      - sampler: {_component_: components.samplers.FirstHitting, top_p: [0.9, 1.0]}
        guidance_scale: 0.5
    grid:
      - sampler: {_component_: components.samplers.Ancestral, num_steps: 2, temperature: [0.5, 1.0]}
        guidance_scale: [0.0, 1.0]
  text:
    length: 12
    grid: [{sampler: {_component_: components.samplers.Ancestral, num_steps: 3}}]
"""


def test_a_sweep_writes_tables_plots_and_defaults_and_is_not_repeated(untrained, run, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    recipe = tmp_path / "out"
    arguments = ["--config", config, f"checkpoint={untrained}", f"output_dir={recipe}", "compile=false", "install=false"]
    one_modality = tmp_path / "mine.py"  # a user's own copy: without speech, whose judge takes long to train
    run("cp", "sweep_inference", one_modality)
    source = one_modality.read_text().replace(
        "def validate(cfg: Settings) -> None:", "def validate(cfg: Settings) -> None:\n    cfg.modalities.pop('audio', None)", 1
    )
    one_modality.write_text(source)
    done = run("run", one_modality, *arguments)
    assert "fewer forwards" in done.stdout
    summary = json.loads((recipe / "summary.json").read_text())
    for key in ("one_per_step", "best", "untuned"):
        assert {"forwards", "accuracy", "frechet", "distinct", "setting"} <= set(summary["image"][key])
        assert {"forwards", "ngram_bits", "entropy_bits", "setting"} <= set(summary["text"][key])
    assert summary["image"]["one_per_step"]["forwards"] == 16
    with (recipe / "cells.csv").open() as file:
        assert len(list(csv.DictReader(file))) == (1 + 2 + 4) + (1 + 2 + 1)
    for plot in ("pareto_image", "effects_image", "pareto_text"):
        with Image.open(recipe / f"{plot}.png") as picture:
            assert picture.width > 600
    before = (recipe / "cells.jsonl").read_text()
    lines = before.splitlines()
    (recipe / "cells.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    run("run", one_modality, *arguments)
    assert sorted((recipe / "cells.jsonl").read_text().splitlines()) == sorted(lines)  # the two again, to the bit
    defaults = recipe / "defaults.yaml"
    made = run(
        "generate",
        f"checkpoint={untrained}",
        "task=text_to_image",
        "prompt=a seven",
        f"defaults={defaults}",
        f"output_dir={tmp_path / 'g'}",
    )
    assert "forward passes a sample" in made.stdout


def test_a_sweep_of_the_wrong_modality_is_one_line(untrained, run):
    done = run("run", "sweep_inference", f"checkpoint={untrained}", "modalities.image.task=text_to_speech", check=False)
    assert done.returncode == 2
    assert "modalities.image.task: 'text_to_speech' does not generate image alone" in done.stderr
