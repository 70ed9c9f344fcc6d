"""Names in configs: short ones, and those of modules that have moved."""

import json

import pytest

from mdm.config import UserError, component, instantiate, locate
from mdm.config.names import MOVED, NAMES, _exists, full_path, up_to_date
from mdm.studies.runs import Runs
from mdm.studies.table import claim
from mdm.training.run import check_same


def test_every_name_of_the_table_and_every_new_place_is_there():
    assert not [name for name in NAMES.values() if not _exists(name)]
    assert not [new for new in MOVED.values() if not _exists(new)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mdm.builders.nano", "mdm.models.builders.nano"),
        ("mdm.builders.mine", "mdm.builders.mine"),  # was never there
        ("mdm.judges.ImageJudge", "mdm.evaluation.judges.ImageJudge"),
        ("mdm.geneval.prompts", "components.metrics.geneval.prompts"),
        ("mdm.data.corpus", "mdm.data.pipeline.corpus"),  # a module of old, a room now
        ("mdm.data.processor.Processor", "mdm.data.processor.Processor"),
        ("mdm.processor.saved_tokenizer", "mdm.data.processor.saved_tokenizer"),
        ("Confidence", "components.samplers.Confidence"),
        ("mine.Tokens", "mine.Tokens"),
    ],
)
def test_an_old_path_leads_to_the_new_place(old, new):
    assert full_path(old) == new


def test_a_config_of_old_works_and_is_told_the_new_place_once(capsys):
    component._said_if_moved.cache_clear()
    for _ in range(2):
        assert (
            instantiate({"_component_": "mdm.builders.pico", "vocab_size": 9, "max_length": 8}, "model").config.max_length == 8
        )
    assert capsys.readouterr().err == "mdm: mdm.builders.pico has moved; it is mdm.models.builders.pico now\n"
    with pytest.raises(UserError, match=r"model: unknown component 'mdm\.builders\.picco'"):
        locate("mdm.builders.picco", "model")
    assert not capsys.readouterr().err


OLD = {
    "model": {"_component_": "mdm.builders.pico", "width": 32},
    "judge": [{"_component_": "mdm.judges.ImageJudge"}],
}
NEW = {"model": {"_component_": "mdm.models.builders.pico", "width": 32}, "judge": [{"_component_": "ImageJudge"}]}


def test_settings_of_a_run_saved_under_old_names_are_the_same_settings(tmp_path):
    assert up_to_date(OLD) == up_to_date(NEW)
    check_same(tmp_path, {"fixed": {"model": OLD["model"]}}, {"model": NEW["model"]})
    with pytest.raises(UserError, match="another `model`"):
        check_same(tmp_path, {"fixed": {"model": OLD["model"]}}, {"model": {**NEW["model"], "width": 64}})


def test_a_study_and_its_runs_of_old_go_on(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"question": "scaling", "run": OLD}))
    claim(tmp_path, {"question": "scaling", "run": NEW})
    with pytest.raises(UserError, match="another study"):
        claim(tmp_path, {"question": "scaling", "run": {**NEW, "seed": 1}})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sweep.json").write_text(
        json.dumps({"config": "pretrain", "base": {"masker": OLD["model"], "tokens": 9}})
    )
    done = {"name": "a", "loss": 1.0, "changes": {"masker": OLD["model"], "tokens": 9, "seed": 0}}
    (tmp_path / "runs" / "a.json").write_text(json.dumps(done))
    runs = Runs(tmp_path, "pretrain", {"masker": NEW["model"], "tokens": 9})
    assert runs.finished("a", {"seed": 0})
    runs.close()
    with pytest.raises(UserError, match="other settings"):
        Runs(tmp_path, "pretrain", {"masker": NEW["judge"][0], "tokens": 9})
