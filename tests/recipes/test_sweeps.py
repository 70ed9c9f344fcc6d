"""The sweeps over batch, width and depth, at a size for tests: what they write, and that nothing is run twice."""

import json
import math

import pytest

from mdm.config import UserError
from mdm.studies import batch as study
from mdm.studies.runs import Runs

TINY = (
    "tokens: 1500, batch.logical: 8, validation_samples: 8, data.digits.train.split: test, model.width: 32, model.num_layers: 1"
)


def files(folder):
    return {p.name for p in folder.iterdir()}


def test_sweep_batch(run, runs_in_process, tmp_path):
    command = ["run", "sweep_batch", f"output_dir={tmp_path}", "batches=[2, 4, 8]", "beyond=[]", f"set={{{TINY}}}"]
    command += ["seeds=1", "tuning_seeds=1", "lr=0.02", "lr_factor=8", "workers=1"]
    done = run(*command)
    assert {"runs.csv", "summary.json", "figure.png", "finding.md"} <= files(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["batch_range"] == [2, 8]
    assert summary["steps"]["2"] == pytest.approx(4 * summary["steps"]["8"], rel=0.1)
    assert "From 2 to 8 sequences a step" in done.stdout
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*_seed*.json")}
    run(*command)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*_seed*.json")} == finished


def batch_rows(rise=20):
    """Made-up runs: flat with the rule up to a rise of a / steps, sloping without it."""
    rows = [
        {"cell": f"lr{lr}", "group": "tuning", "status": "finished", "batch": 32, "seed": 0, "lr": lr, "loss": loss}
        for lr, loss in ((5e-4, 2.1), (1e-3, 2.0), (2e-3, 2.1))
    ]
    for seed, noise in enumerate((-0.002, 0.0, 0.002)):
        for batch in (4, 8, 16, 32, 64, 128, 256):
            steps = 64_000 // batch
            own = {"status": "finished", "batch": batch, "seed": seed, "lr": 1e-3, "steps": steps}
            own["squared_grad_norm"] = 1.0 + 50.0 / batch
            rows.append({**own, "cell": f"s{batch}_{seed}", "group": "sde", "loss": 2.0 + rise / steps + noise})
            if batch <= 32:
                loss = 2.0 + 0.1 * math.log2(32 / batch) + noise
                rows.append({**own, "cell": f"f{batch}_{seed}", "group": "fixed", "loss": loss})
    return rows


def test_what_sweep_batch_concludes():
    rows = batch_rows()
    summary, text = study.conclude(rows)
    assert summary["sde_spread"] == pytest.approx(20 * (32 - 4) / 64_000)
    assert summary["fixed_spread"] == pytest.approx(0.3)
    assert summary["nelbo"] == pytest.approx(2.01)
    assert summary["seed_std"] == pytest.approx(0.002)
    assert summary["can_tell"]
    assert summary["lr"] == 1e-3
    assert summary["gradient_noise_scale"] == pytest.approx(50)
    assert summary["critical_batch"]["batch"] == pytest.approx(64_000 / (20 / 0.02), rel=0.1)
    assert "The critical batch is" in text
    assert "cannot tell" not in text
    assert study.draw(rows, summary).startswith(b"\x89PNG")
    flat, text = study.conclude([{**r, "loss": 2.0 + 0.1 * r["seed"]} for r in rows])
    assert not flat["can_tell"]
    assert "this task cannot tell" in text
    assert "does not reach the critical batch" in text


def test_a_batch_that_diverged_is_left_out_and_said():
    rows = batch_rows()
    lost = [{**r, "status": "diverged", "loss": math.inf} if r["cell"] == "f4_1" else r for r in rows]
    summary, text = study.conclude(lost)
    assert summary["left_out"] == ["f4_1"]
    assert "Left out: f4_1." in text
    assert math.isfinite(summary["fixed_spread"])
    with pytest.raises(UserError, match="runs that finished at 3 batch sizes or more; there are 2"):
        study.conclude([r for r in rows if r["batch"] > 8])


def test_sweep_transfer(run, runs_in_process, tmp_path):
    settings = [f"output_dir={tmp_path}", "sizes=[16, 32]", f"set={{{TINY.replace('model.width: 32, ', '')}}}", "seeds=1"]
    run("run", "sweep_transfer", *settings, "lr=0.03", "lr_factor=8", "workers=1", "without=false")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["with"]["moves_by"] >= 1
    assert len(summary["with"]["best_lr"]) == 2
    assert {"runs.csv", "figure.png", "finding.md"} <= files(tmp_path)


def test_coordinate_check(run, tmp_path):
    settings = ["base_width=16", "base_depth=1", "widths=[16, 32]", "depths=[1, 2]", "steps=2", "seeds=1"]
    settings.append(f"set={{{TINY.split(', model')[0]}}}")
    done = run("run", "coordinate_check", f"output_dir={tmp_path}", *settings)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["width"]["with"]) == {
        "embedding", "first attention", "first feed-forward", "last block", "final norm", "logits",
    }  # fmt: skip
    assert {"runs.csv", "figure.png", "finding.md"} <= files(tmp_path)
    assert "the steepest slope" in done.stdout


def test_a_run_that_diverges_is_an_outcome_and_one_that_fails_is_an_error(tmp_path, config, runs_in_process, monkeypatch):
    monkeypatch.chdir(config.parent)  # a config may be named by a path from where the user stands
    runs = Runs(tmp_path, config.name, {"tokens": 1500}, workers=1)
    found = runs.run({"diverges": {"optimizer.lr": 1e30, "optimizer.clip": 1e30}, "fine": {}})
    assert found["diverges"]["loss"] == float("inf")
    assert "A lower optimizer.lr may help" in found["diverges"]["error"]
    assert 0 < found["fine"]["loss"] < 20
    assert not (tmp_path / "runs" / "fine" / "checkpoints").exists()
    with pytest.raises(UserError, match=r"the run wrong failed \(mdm: unknown key 'no_such_key'"):
        runs.run({"wrong": {"no_such_key": 1}})
    runs.close()


@pytest.mark.parametrize(
    ("recipe", "argument", "message"),
    [
        ("sweep_batch", "batches=[2, 4]", "batches: at least three sizes"),
        ("sweep_batch", "beyond=[16]", "beyond: sizes past the largest of batches, 32"),
        ("sweep_batch", "run=absent", "config 'absent' is not one of"),
        ("sweep_batch", "set={optimiser.lr: 1}", "unknown key 'optimiser'"),
        ("sweep_transfer", "axis=heads", "axis: 'heads' is not one of width, depth, batch, horizon"),
        ("sweep_transfer", "sizes=[40, 80]", "model.width 40 is not a multiple of 16"),
        ("coordinate_check", "steps=0", "steps must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, recipe, argument, message):
    done = run("run", recipe, f"output_dir={tmp_path}", argument, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
