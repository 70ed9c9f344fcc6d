"""Studies: cells expand and resume, a crash is recorded, figures rebuild from the table, findings say what it shows."""

import fcntl
import json
import shutil
import subprocess
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import mdm.studies.measures
import mdm.studies.runs
from components.data.digits import digits
from components.data.reference import language_reference
from components.maskers import BernoulliMasker
from components.scaling import ScalingLaw
from components.tokenizers.image import GreyPatchTokenizer
from mdm.config import UserError, find_config
from mdm.recipe import load_recipe
from mdm.studies import mixing, scaling, schedules
from mdm.studies.grid import combinations, drawn
from mdm.studies.measures import Finished, Passes, TrainingGradient
from mdm.studies.table import read_table, write_table
from tests.recipes.conftest import in_process
from tests.recipes.conftest import mdm as mdm_command

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAW = ScalingLaw(E=1.8, A=20.0, B=400.0, a=0.35, b=0.42)


def scaling_rows(noise=0.002):
    rng = np.random.default_rng(0)
    rows = []
    for budget in (2e11, 5e11, 1.25e12):
        for n in (2.6e4, 6e4, 1.06e5, 2.4e5, 4.3e5):
            d = budget / (6 * n)
            loss = float(LAW.loss(n, d) * np.exp(noise * rng.normal()))
            rows.append({"cell": f"{budget}_{n}", "group": "grid", "status": "finished", "seed": 0, "budget": budget,
                         "parameters": n, "tokens": d, "loss": loss})  # fmt: skip
    for group, loss in (("masked", 2.5), ("autoregressive", 2.3)):
        rows += [
            {"cell": f"{group}{s}", "group": group, "status": "finished", "seed": s, "parameters": 106_000, "tokens": 500_000,
             "loss": loss + 0.01 * s} for s in range(3)
        ]  # fmt: skip
    return rows


def test_a_scaling_study_concludes_from_its_table():
    rows = scaling_rows()
    summary, finding = scaling.conclude(rows)
    low, high = summary["intervals_90"]["exponent"]
    assert low <= LAW.exponent <= high
    assert summary["baseline"]["masked"] == pytest.approx([2.51, 0.01])
    assert "15 runs of one seed each" in finding
    assert "2.510 (+-0.010, 3 seeds) by masked diffusion" in finding
    assert scaling.draw(rows, summary)[:4] == b"\x89PNG"
    lost = [{**rows[0], "status": "crashed", "loss": float("nan")}, {**rows[1], "status": "diverged", "loss": float("inf")}]
    summary, finding = scaling.conclude([*lost, *rows[2:]])
    assert summary["left_out"] == [rows[0]["cell"], rows[1]["cell"]]
    assert "Left out" in finding
    with pytest.raises(UserError, match="at least 6 runs that finished"):
        scaling.conclude(rows[:5])


def test_a_scaling_study_says_where_its_law_fails_and_where_it_found_an_optimum():
    law = ScalingLaw(E=1.8, A=560.0, B=400.0, a=0.55, b=0.42)  # whose optimum lies among the sizes
    grid = [r for r in scaling_rows() if r["group"] not in scaling.BASELINE]
    rows = [{**r, "loss": float(law.loss(r["parameters"], r["tokens"]))} for r in grid] + scaling_rows()[len(grid) :]
    summary, finding = scaling.conclude(rows)
    for budget, found in summary["profiles"].items():
        n = np.geomspace(2.6e4, 4.3e5, 4000)
        best = n[np.argmin(law.loss(n, float(budget) / (6 * n)))]
        assert found["parameters"] == pytest.approx(best, rel=0.2)
        assert found["tokens"] == pytest.approx(float(budget) / (6 * found["parameters"]), rel=0.01)
    assert "no finding" not in finding
    assert scaling.draw(rows, summary)[:4] == b"\x89PNG"
    noisy = [{**r, "loss": r["loss"] * (1.05 if i % 2 else 0.95)} for i, r in enumerate(rows[: len(grid)])] + rows[len(grid) :]
    assert "times a seed's noise (0.4 %): it is not the form of these losses" in scaling.conclude(noisy)[1]


def test_a_mixture_has_a_law_for_each_of_its_tasks():
    rows = [
        {**r, "bits/text": r["loss"] + 1, "bits/text_to_image": r["loss"], "bits/text_to_speech": r["loss"] + 2}
        for r in scaling_rows()
        if r["group"] == "grid"
    ]
    summary, finding = scaling.conclude(rows)
    assert set(summary["tasks"]) == {"text", "text_to_image", "text_to_speech"}
    assert summary["tasks"]["text"]["law"]["E"] == pytest.approx(summary["tasks"]["text_to_image"]["law"]["E"] + 1, abs=0.2)
    assert "For text to image the mixture's tokens grow as N^" in finding
    assert scaling.draw(rows, summary)[:4] == b"\x89PNG"


def test_a_difference_within_noise_is_called_so():
    def rows(name, losses, norm):
        return [
            {"cell": f"{name}{s}", "group": name, "status": "finished", "seed": s, "loss": x, "squared_grad_norm": norm}
            for s, x in enumerate(losses)
        ]

    table = [
        *rows("linear", (2.0, 2.02, 1.98), 4.0),
        *rows("same", (2.01, 2.03, 1.99), 4.0),
        *rows("worse", (2.2, 2.22, 2.18), 8.0),
    ]
    summary, finding = schedules.conclude(table)
    assert "same: NELBO +0.010 +-0.016 (within noise)" in finding
    assert "worse: NELBO +0.200 +-0.016, mean squared gradient norm 2.00x" in finding
    assert schedules.draw(table, summary)[:4] == b"\x89PNG"
    _, finding = schedules.conclude([r for r in table if r["seed"] == 0])
    assert "no difference here is a finding" in finding
    measured = [
        {**r, "gradient_variance": (1 + r["seed"]) * (0.5 if r["group"] == "same" else 1), "accuracy": 0.5} for r in table
    ]
    summary, finding = schedules.conclude(measured)
    assert summary["settings"]["same"]["gradient_variance"] == {"ratio": 0.5, "standard_error": 0.0}  # seed by seed
    assert "accuracy +0.000 +-0.000 (within noise), gradient variance 0.50x +-0.00" in finding
    assert schedules.draw(measured, summary)[:4] == b"\x89PNG"
    mixed = [{**r, "bits/text": r["loss"] + 1, "bits/text_to_image": r["loss"] - 1} for r in table]
    summary, finding = schedules.conclude(mixed)
    assert "worse: NELBO +0.200 +-0.016, of text +0.200 +-0.016, of text to image +0.200 +-0.016" in finding
    assert schedules.draw(mixed, summary)[:4] == b"\x89PNG"


def test_a_mixing_law_finds_the_transfer_it_was_made_with_and_predicts_new_mixtures():
    transfer = {"digits": (0.3, 0.0), "speech": (0.1, 0.2), "text": (0.0, 0.0)}  # from the two others, in their order

    def row(weights, group):
        w = np.array(weights) / sum(weights)
        bits = {}
        for m, (name, key) in enumerate(mixing.TASKS.items()):
            theta = np.array([1.0 + m, 0.8, 0.5, *transfer[name]])
            bits[key] = float(mixing.predicted(theta, w[None], m)[0])
        keys = {f"share/{name}": x for name, x in zip(mixing.TASKS, w, strict=True)}
        return {"cell": str(weights), "group": group, "status": "finished", "seed": 0, **keys, **bits}

    points = [(10, 1, 1), (1, 10, 1), (1, 1, 10), (4, 4, 4), (8, 3, 1), (1, 8, 3), (3, 1, 8), (6, 5, 1), (1, 6, 5), (5, 1, 6)]
    table = [row(p, "grid") for p in points] + [row(p, "held_out") for p in ((7, 3, 2), (2, 4, 6))]
    summary, finding = mixing.conclude(table)
    for name, expected in transfer.items():
        found = [t["value"] for t in summary["modalities"][name]["transfer_from"].values()]
        assert found == pytest.approx(expected, abs=0.05), name
        for pair in summary["modalities"][name]["held_out"]:
            assert pair["predicted"] == pytest.approx(pair["measured"], abs=0.01)
    assert "10 runs of 10 mixtures" in finding
    assert mixing.draw(table, summary)[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="at least 6 mixtures that finished; there are 3"):
        mixing.conclude(table[:3])
    with pytest.raises(UserError, match="there is no speech"):
        mixing.conclude([{k: v for k, v in r.items() if k != "share/speech"} for r in table])


def test_cells_are_every_combination_with_every_seed():
    cells = combinations({"model.width": [32, 64], "masker": [{"_component_": "a.B"}]}, [0, 1], "g", {"tokens": 5})
    assert [c.name for c in cells][:2] == ["g_width32_maskerB_seed0", "g_width32_maskerB_seed1"]
    assert cells[-1].changes == {"tokens": 5, "model.width": 64, "masker": {"_component_": "a.B"}, "seed": 1}
    with pytest.raises(UserError, match="grid: it is empty"):
        combinations({}, [0])
    with pytest.raises(UserError, match=r"grid\.tokens: a list of values, got \[\]"):
        combinations({"tokens": []}, [0])


TO_LINEAR = ["groups.cosine.set={masker.schedule._component_: components.schedules.Linear}"]
TINY = [
    "run=pretrain_pico",
    "set={tokens: 1500, validation_samples: 8, log_every_steps: 1, data.digits.train.split: test}",
    "groups.linear={grid: {model.width: [16]}, seeds: [0]}",
    "groups.cosine={grid: {model.width: [16]}, set: {masker.schedule._component_: components.schedules.Cosine}, seeds: [0]}",
]


def test_points_are_drawn_log_uniformly_and_more_draws_keep_the_first_ones():
    search = {"tokens": [1e3, 1e7], "model.width": [16, 256, 16], "optimizer.lr": [1e-4, 1e-1]}
    points = drawn(search, 400)
    assert drawn(search, 3) == points[:3]
    assert all(p["model.width"] % 16 == 0 for p in points)
    for key, low, high in (("tokens", 1e3, 1e7), ("optimizer.lr", 1e-4, 1e-1)):
        share = (np.log([p[key] for p in points]) - np.log(low)) / np.log(high / low)
        assert 0 <= share.min() <= share.max() <= 1
        assert share.mean() == pytest.approx(0.5, abs=4 * 400**-0.5 * 12**-0.5)  # four standard errors of a uniform's mean


def test_a_short_run_gets_a_smaller_batch():
    study = load_recipe("study")
    group = {"grid": {"model.width": [16, 96]}, "budgets": [1e10], "min_steps": 50}
    cfg = study.Settings(output_dir="x", question="scaling", run="pretrain_pico", groups={"grid": study.Group(**group)})
    small, large = study.cells(cfg)
    assert "batch.physical" not in small.changes  # 195,000 tokens are 210 steps of 32 pairs
    assert large.changes["batch.physical"] == 4
    assert large.changes["tokens"] / (29 * 4) >= 50 > large.changes["tokens"] / (29 * 8)


def test_two_masks_of_a_sequence_are_independent_and_its_samples_are_pairs(make_batch, vocabulary):
    masker = schedules.TwoMasks(vocabulary.mask_id, seed=3)
    assert masker.pairs  # so that the loader puts a sequence twice
    batch = make_batch(rows=400)
    noisy = masker(batch)
    alone = BernoulliMasker(vocabulary.mask_id, seed=3)(batch)
    assert (noisy.mask == alone.mask).all()
    first, second = noisy.mask[::2][batch.maskable[::2]], noisy.mask[1::2][batch.maskable[1::2]]
    assert 0.3 < (first & second).float().mean() < 0.5  # E r^2 = 1/3 for one time, and 0 were they complements


MEASURED = """
question: schedules
run: {run}
workers: 1
groups: {{}}
measure:
  gradient: {{_component_: mdm.studies.measures.TrainingGradient, steps: 3}}
  images:
    _component_: mdm.studies.measures.ImageQuality
    training: {{_component_: components.data.digits.digits, split: judge}}
    test: {{_component_: components.data.digits.digits, split: test}}
    samples: 20
    shown: 3
"""


class Tiles(GreyPatchTokenizer):
    """A user's own tokenizer, which the runs' config names, and the study's does not."""

    def save(self, folder):
        return {**super().save(folder), "_component_": f"{__name__}.Tiles"}


def test_a_finished_run_is_measured_once_and_shown_on_a_page(tmp_path, runs_in_process, capsys, monkeypatch):
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    run = tmp_path / "run.yaml"
    run.write_text(f"base: pretrain_pico\ntokenizers: {{image: {{_component_: {__name__}.Tiles}}}}\n")
    config.write_text(MEASURED.format(run=run))
    in_process("study", config, f"output_dir={out}", *TINY)
    rows = read_table(out / "runs.parquet")
    for row in rows:
        assert row["gradient_variance"] > 0
        assert 0 <= row["accuracy"] <= 1
        assert row["frechet"] > 0
    monkeypatch.setattr(TrainingGradient, "__call__", lambda *_: pytest.fail("measured again"))
    in_process("study", config, f"output_dir={out}", *TINY)
    assert read_table(out / "runs.parquet") == rows

    page = (out / "study.html").read_text()
    data = json.loads(page.split("const RUNS = ")[1].split(";\n")[0])
    assert [len(run["samples"]) for run in data] == [3, 3]
    assert len(data[0]["curves"]["loss"]) == rows[0]["steps"]
    assert data[0]["row"]["group"] == "linear"
    (out / "study.html").unlink()
    assert mdm_command("study", out).stdout == f"Page: {out / 'study.html'}\n"
    assert (out / "study.html").is_file()
    assert "no table of a study" in mdm_command("study", tmp_path, check=False).stderr
    assert "required: FOLDER; mdm study --help" in mdm_command("study", check=False).stderr
    with pytest.raises(UserError, match="holds another study, whose question is 'schedules' and not 'scaling'"):
        in_process("study", config, f"output_dir={out}", *TINY, "question=scaling")
    with pytest.raises(UserError, match=r"this run had masker.schedule._component_ = .*Cosine, now it is .*Linear"):
        in_process("study", config, f"output_dir={out}", *TINY, *TO_LINEAR)
    if BROWSER:
        shown = subprocess.run(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom",
             (out / "study.html").as_uri()], capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
        assert "2 of 2 runs" in shown
        assert "<path d=" in shown
        assert shown.count('<img class="sample"') == 3 + page.count('<img class="sample"')
    capsys.readouterr()


IN_BLOCKS = """
question: blocks
run: pretrain_pico
workers: 1
set: {tokens: 1500, validation_samples: 8, masker: {_component_: FixedCountMasker, pairs: false}}
groups:
  whole: {grid: {model.width: [16]}, set: {model.blocks: {image: 16}}}
  quarter: {grid: {model.width: [16]}, set: {model.blocks: {image: 4}}}
measure:
  image:
    _component_: Decoders
    task: text_to_image
    training: {_component_: digits, split: judge}
    test: {_component_: digits, split: test}
    samples: 6
    thresholds: [0.5]
  clipping: {_component_: ClippedCounts, samples: 8, repeats: 4}
"""


def test_models_of_blocks_are_decoded_and_their_counts_clipped(tmp_path, runs_in_process, capsys):
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(IN_BLOCKS)
    in_process("study", config, f"output_dir={out}")
    for row in read_table(out / "runs.parquet"):
        assert row["image/forwards/one a pass"] == 16
        assert 1 <= row["image/forwards/threshold 0.5"] <= 16
        assert row["image/seconds/one a pass"] > 0
        assert row["clipping/image/0-1"] > 0
    finding = (out / "finding.md").read_text()
    assert "quarter, blocks of 4 (image): text to image" in finding
    assert "Shares of a block to mask" in finding
    assert (out / "figure.png").stat().st_size > 5000
    capsys.readouterr()


def test_quality_by_passes_is_a_column_for_each_figure_and_sampler(untrained, monkeypatch):
    monkeypatch.setattr(mdm.studies.measures, "save_outputs", lambda *_: None)  # the model is other tests' too
    measure = Passes("text_to_image", digits("test"), digits("judge"), samples=6, passes=(1, 2), correct=0)
    found = measure(Finished(SimpleNamespace(device="cpu", precision="fp32", seed=0), untrained, untrained))
    figures = ("forwards", "accuracy", "frechet", "distinct")
    assert set(found) == {"image/accuracy/real", "image/frechet_of_halves/real"} | {
        f"image/{f}/{passes}/{sampler}" for f in figures for passes in (1, 2) for sampler in ("ancestral", "confidence")
    }
    assert found["image/forwards/2/confidence"] == 2
    assert found["image/accuracy/real"] > 0.9
    measure = Passes("text", language_reference("test"), samples=6, passes=(1,), correct=0, length=20)
    found = measure(Finished(SimpleNamespace(device="cpu", precision="fp32", seed=0), untrained, untrained))
    assert found["text/ngram_bits/1/ancestral"] > found["text/ngram_bits/real"]


def test_the_batch_sweep_is_a_study_whose_figure_rebuilds_from_its_table(tmp_path, runs_in_process, capsys):
    tiny = "set.tokens: 1500, set.validation_samples: 8, set.model.width: 32, set.model.num_layers: 1, batches: [2, 4, 8]"
    tiny += ", set.data.digits.train.split: test"
    more = "beyond: [], lr: 0.02, lr_factor: 8, seeds: 1"
    words = [f"output_dir={tmp_path}", f"set={{{tiny}, {more}}}", "workers=1"]
    in_process("study", find_config("batch_cpu"), *words)
    rows = read_table(tmp_path / "runs.parquet")
    assert {r["group"] for r in rows} == {"tuning", "sde", "fixed"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["batch_range"] == [2, 8]
    assert "From 1 seed: no difference here is a finding" in (tmp_path / "finding.md").read_text()
    (tmp_path / "figure.png").unlink()
    in_process("study", find_config("batch_cpu"), *words, "rebuild=true")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "figure.png").stat().st_size > 5000
    capsys.readouterr()


def test_the_inference_sweep_is_a_study(tmp_path, untrained, capsys):
    one = "[{sampler: {_component_: components.samplers.FirstHitting}}]"
    few = "{sampler: {_component_: components.samplers.Ancestral, num_steps: [2, 3]}}"
    changes = f"modalities.audio: null, modalities.text: null, modalities.image.one_per_step: {one}"
    changes += ", modalities.image.test: {_component_: digits, split: test}"
    changes += ", modalities.image.judge.samples: {_component_: digits, split: judge}"
    changes += f", modalities.image.grid: [{few}], samples: 20, checkpoint: '{untrained}', install: false, compile: 'false'"
    words = [f"output_dir={tmp_path}", f"checkpoint={untrained}", f"set={{{changes}}}"]
    in_process("study", find_config("inference_cpu"), *words)
    rows = read_table(tmp_path / "runs.parquet")
    assert [r["part"] for r in rows] == ["untuned", "one_per_step", "grid", "grid", "real"]
    assert "20 samples of one seed a setting: an accuracy is known to +-0.112" in (tmp_path / "finding.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert not (untrained / "model" / "defaults.yaml").exists()
    in_process("study", find_config("inference_cpu"), *words, "rebuild=true")
    assert read_table(tmp_path / "runs.parquet") == rows
    capsys.readouterr()


def test_a_study_runs_records_a_crash_and_goes_on(tmp_path, runs_in_process, monkeypatch, capsys):
    """Two runs of this process, one that breaks, and the same again in a process of its own, which gives what it gave here."""
    config = tmp_path / "study.yaml"
    config.write_text("question: schedules\nrun: pretrain_pico\n")
    out = tmp_path / "out"
    in_process("study", config, f"output_dir={out}", *TINY, "workers=1")
    rows = read_table(out / "runs.parquet")
    assert [r["status"] for r in rows] == ["finished", "finished"]
    assert rows[0]["parameters"] > 0
    assert rows[0]["flops"] > 0
    assert (out / "figure.png").stat().st_size > 5000
    for name in list((out / "runs").glob("cosine*.json")):  # this one is run again, and breaks
        name.unlink()
    monkeypatch.undo()  # of runs_in_process: from here on a run is a process
    monkeypatch.setattr(mdm.studies.runs.sys, "executable", "/bin/false")
    in_process("study", config, f"output_dir={out}", *TINY)
    assert [r["status"] for r in read_table(out / "runs.parquet")] == ["finished", "crashed"]
    assert json.loads((out / "summary.json").read_text())["left_out"] == [rows[1]["cell"]]
    (out / "figure.png").unlink()
    in_process("study", config, f"output_dir={out}", "rebuild=true", *TINY)
    assert (out / "figure.png").is_file()
    monkeypatch.undo()  # what broke it is mended: it is tried again
    monkeypatch.setenv("MDM_TYPECHECK", "0")  # of the run's own process
    in_process("study", config, f"output_dir={out}", *TINY)
    assert [r["loss"] for r in read_table(out / "runs.parquet")] == [r["loss"] for r in rows]
    with pytest.raises(UserError, match="holds a sweep of other settings"):
        in_process("study", config, f"output_dir={out}", *TINY, "set.tokens=1600")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "question=why",
            "question: 'why' is neither one of scaling, mixing, schedules, corruption, blocks, orders, batch, inference, nor a "
            "module of yours",
        ),
        ("question=scalin", r"batch, inference \(did you mean 'scaling'\?\), nor a module"),
        ("question=json", "question: the module json lacks conclude, draw"),
        ("question=batch", "groups: question batch has none, its cells are those of sweep_batch"),
        ("groups.linear={search: {tokens: [9, 3]}}", r"search\.tokens: \[low, high\] or \[low, high, step\]"),
        ("measure={x: {_component_: mdm.studies.measures.TrainingGradient, step: 3}}", "unknown key 'measure.x.step'"),
        ("groups.linear.grid={loss.weighting: [plain, plain]}", "two cells are called linear_width16_weightingplain_seed0"),
        ("groups.linear.seeds=[0,0]", r"groups\.linear\.seeds: each once"),
        ("groups.linear.grid={model.widht: [16]}", "unknown key 'model.widht'"),
        ("groups.linear.grid={}", "grid: it is empty"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, change, message):
    config = tmp_path / "study.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\nquestion: schedules\nrun: pretrain_pico\ngroups: {{}}\n")
    with pytest.raises(UserError, match=message):
        in_process("study", config, *TINY, change)


def test_a_question_may_be_a_module_of_the_user_s_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "steepest.py").write_text(
        "def conclude(rows):\n    return {'runs': len(rows)}, f'{len(rows)} runs were looked at.'\n"
        "def draw(rows, summary):\n    return b'\\x89PNG'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "study.json").write_text('{"question": "steepest", "run": "pretrain_pico"}')
    write_table(tmp_path / "runs.parquet", scaling_rows())
    config = tmp_path / "study.yaml"
    config.write_text(f"output_dir: {tmp_path}\nquestion: steepest\nrun: pretrain_pico\nrebuild: true\n")
    in_process("study", config)
    assert "21 runs were looked at." in capsys.readouterr().out
    assert (tmp_path / "finding.md").read_text().startswith("# Steepest\n")


def test_a_table_reloads_in_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    write_table(tmp_path / "runs.parquet", scaling_rows())
    assert {"cell", "group", "status", "seed", "parameters", "tokens", "loss"} <= set(
        pandas.read_parquet(tmp_path / "runs.parquet")
    )
    with pytest.raises(UserError, match="no table of a study"):
        read_table(tmp_path / "absent.parquet")


def test_a_run_that_a_killed_study_left_behind_is_waited_for(tmp_path, monkeypatch):
    """Its process holds the lock of its folder; a second one would write into the same files."""
    began = threading.Event()

    class Recorded:
        STDOUT = subprocess.STDOUT

        @staticmethod
        def run(command, **_):
            began.set()
            return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(mdm.studies.runs, "subprocess", Recorded)
    with (tmp_path / "cell.lock").open("w") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        thread = threading.Thread(target=mdm.studies.runs.run_one, args=(tmp_path, "cell", "pretrain_pico", {}, {}, True))
        thread.start()
        assert not began.wait(0.5)
    assert began.wait(10)
    thread.join()
    assert json.loads((tmp_path / "cell.json").read_text())["error"] == "no output"
