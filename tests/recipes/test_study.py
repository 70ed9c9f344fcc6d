"""Studies: cells expand and resume, a crash is recorded, figures rebuild from the table, findings say what it shows."""

import json

import numpy as np
import pytest

from components.scaling import ScalingLaw
from mdm.config import UserError
from mdm.studies import mixing, scaling, schedules
from mdm.study import expand, read_table, write_table

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
    assert "same: +0.010 +-0.016 (within noise)" in finding
    assert "worse: +0.200 +-0.016, mean squared gradient norm 2.00x" in finding
    assert schedules.draw(table, summary)[:4] == b"\x89PNG"
    _, finding = schedules.conclude([r for r in table if r["seed"] == 0])
    assert "no difference here is a finding" in finding


def test_a_mixing_law_finds_the_transfer_it_was_made_with_and_predicts_new_mixtures():
    transfer = {"digits": (0.3, 0.0), "speech": (0.1, 0.2), "text": (0.0, 0.0)}  # from the two others, in their order

    def row(weights, group):
        w = np.array(weights) / sum(weights)
        bits = {}
        for m, (name, key) in enumerate(mixing.TASKS.items()):
            theta = np.array([1.0 + m, 0.8, 0.5, *transfer[name]])
            bits[key] = float(mixing.predicted(theta, w[None], m)[0])
        keys = {f"data.{name}.weight": x for name, x in zip(mixing.TASKS, weights, strict=True)}
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


def test_cells_are_every_combination_with_every_seed():
    cells = expand({"model.width": [32, 64], "masker": [{"_component_": "a.B"}]}, [0, 1], "g", {"tokens": 5})
    assert [c.name for c in cells][:2] == ["g_width32_maskerB_seed0", "g_width32_maskerB_seed1"]
    assert cells[-1].changes == {"tokens": 5, "model.width": 64, "masker": {"_component_": "a.B"}, "seed": 1}
    with pytest.raises(UserError, match="grid: it is empty"):
        expand({}, [0])
    with pytest.raises(UserError, match=r"grid\.tokens: a list of values, got \[\]"):
        expand({"tokens": []}, [0])


TINY = [
    "run=pretrain_pico",
    "set={tokens: 1500, validation_samples: 8, log_every_steps: 1}",
    "groups.linear={grid: {model.width: [16]}, seeds: [0]}",
    "groups.cosine={grid: {model.width: [16]}, set: {masker.schedule._component_: components.schedules.Cosine}, seeds: [0]}",
]


def test_a_study_runs_records_a_crash_and_goes_on(tmp_path, monkeypatch, capsys):
    import mdm.runs
    from tests.recipes.conftest import in_process

    config = tmp_path / "study.yaml"
    config.write_text("question: schedules\nrun: pretrain_pico\ngroups: {}\n")
    out = tmp_path / "out"
    in_process("study", config, f"output_dir={out}", *TINY)
    rows = read_table(out / "runs.parquet")
    assert [r["status"] for r in rows] == ["finished", "finished"]
    assert rows[0]["parameters"] > 0
    assert rows[0]["flops"] > 0
    assert (out / "figure.png").stat().st_size > 5000
    for name in list((out / "runs").glob("cosine*.json")):  # this one is run again, and breaks
        name.unlink()
    monkeypatch.setattr(mdm.runs.sys, "executable", "/bin/false")
    in_process("study", config, f"output_dir={out}", *TINY)
    assert [r["status"] for r in read_table(out / "runs.parquet")] == ["finished", "crashed"]
    assert json.loads((out / "summary.json").read_text())["left_out"] == [rows[1]["cell"]]
    (out / "figure.png").unlink()
    in_process("study", config, f"output_dir={out}", "rebuild=true", *TINY)
    assert (out / "figure.png").is_file()
    with pytest.raises(UserError, match="holds a sweep of other settings"):
        in_process("study", config, f"output_dir={out}", *TINY, "set.tokens=1600")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("question=why", "question: 'why' is not one of scaling, schedules, mixing"),
        ("groups.linear.seeds=[0,0]", r"groups\.linear\.seeds: each once"),
        ("groups.linear.grid={model.widht: [16]}", "unknown key 'model.widht'"),
        ("groups.linear.grid={}", "grid: it is empty"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, change, message):
    from tests.recipes.conftest import in_process

    config = tmp_path / "study.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\nquestion: schedules\nrun: pretrain_pico\ngroups: {{}}\n")
    with pytest.raises(UserError, match=message):
        in_process("study", config, *TINY, change)


def test_a_table_reloads_in_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    write_table(tmp_path / "runs.parquet", scaling_rows())
    assert {"cell", "group", "status", "seed", "parameters", "tokens", "loss"} <= set(
        pandas.read_parquet(tmp_path / "runs.parquet")
    )
    with pytest.raises(UserError, match="no table of a study"):
        read_table(tmp_path / "absent.parquet")
