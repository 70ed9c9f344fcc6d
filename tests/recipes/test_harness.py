"""lm-evaluation-harness end to end on a tiny local task: its likelihoods are ours."""

import json

import pytest
import torch

from components.likelihood import nelbo, ordered
from mdm.checkpoint import load_model
from mdm.config import UserError
from tests.recipes.conftest import in_process

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
ROWS = [
    {"question": "a spoken", "choices": [" nine", " seven"], "answer": 0},
    {"question": "The value of", "choices": [" the statement", " a"], "answer": 1},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choices.yaml").write_text(CHOICES.format(data=data))
    (folder / "written.yaml").write_text(WRITTEN.format(data=data))
    return folder


def test_a_task_runs_end_to_end(untrained, tasks, tmp_path, capsys):
    from mdm.config import find_config

    words = [f"checkpoint={untrained}", f"output_dir={tmp_path}", f"include_path={tasks}", "draws=4", "device=cpu"]
    in_process("harness", find_config("harness"), *words, "tasks=[tiny_choices,tiny_written]")
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert 0 <= results["tiny_choices"]["acc,none"] <= 1
    assert 0 <= results["tiny_written"]["exact_match,none"] <= 1
    assert "tiny_choices" in capsys.readouterr().out


@pytest.mark.parametrize("likelihood", ["nelbo", "left_to_right"])
def test_the_harness_sees_our_likelihood(untrained, likelihood):
    from lm_eval.api.instance import Instance

    from mdm.harness import HarnessModel

    model, processor = load_model(untrained)
    seen = HarnessModel(model, processor, likelihood, draws=8)
    requests = [Instance("loglikelihood", {}, (row["question"], c), k) for row in ROWS for k, c in enumerate(row["choices"])]
    found = seen.loglikelihood(requests, disable_tqdm=True)
    vocabulary = processor.vocabulary
    for request, (value, _) in zip(requests, found, strict=True):
        context, whole = (processor.encode("text", t) for t in (request.args[0], "".join(request.args)))
        tokens = torch.cat([torch.tensor([vocabulary.special("task:text"), vocabulary.special("begin:text")]), whole])
        tokens = torch.cat([tokens, torch.tensor([vocabulary.special("close:text")])])[None]
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        scored[0, 2 + len(context) : -1] = True
        allowed = torch.zeros(1, 1, vocabulary.size, dtype=torch.bool)
        allowed[..., : vocabulary.ranges[0].stop] = allowed[..., vocabulary.end_id] = True
        if likelihood == "nelbo":
            expected = -nelbo(model, tokens, vocabulary.mask_id, scored, allowed, 8).nats
        else:
            expected = ordered(model, tokens, vocabulary.mask_id, scored, allowed=allowed).sum()
        assert value == pytest.approx(float(expected), rel=1e-6)


def test_greedy_is_what_decoding_gives(untrained):
    from lm_eval.api.instance import Instance

    from mdm.harness import HarnessModel

    model, processor = load_model(untrained)
    seen = HarnessModel(model, processor, draws=2)
    made = seen.generate_until([Instance("generate_until", {}, ("a spoken", {"until": [], "max_gen_toks": 3}), 0)], True)[0]
    context = seen.tok_encode("a spoken")
    from components.samplers import Confidence

    ids = seen.continued([context], 3, Confidence(num_steps=3, temperature=0.0))[0]
    assert processor.decode("text", torch.tensor(ids)) == made
    assert seen.is_greedy(context, ids)
    other = [(ids[0] + 1) % 256, *ids[1:]]
    assert not seen.is_greedy(context, other)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tasks=[]", "tasks: name at least one"),
        ("tasks=[no_such_task]", "tasks: no_such_task: not among the harness's tasks"),
        ("likelihood=exact", "likelihood: 'exact' is not one of nelbo, left_to_right"),
        ("include_path=absent", "include_path: folder not found: absent"),
        ("draws=1", "draws must be at least 2, got 1"),
    ],
)
def test_mistakes_are_one_sentence(untrained, tmp_path, word, message):
    from mdm.config import find_config

    words = [f"checkpoint={untrained}", f"output_dir={tmp_path}", "tasks=[piqa]", word]
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        in_process("harness", find_config("harness"), *words)
