"""lm-evaluation-harness end to end on a tiny local task: its likelihoods are ours."""

import json

import pytest
import torch

from components.likelihood import nelbo, ordered
from mdm.config import UserError
from mdm.models.folder import load_model
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
target_delimiter: ""
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
TOO_LONG = {"question": "The value of the statement is" + " the statement" * 200, "choices": ["", " a"], "answer": 1}
ROWS = [
    {"question": "a spoken", "choices": [" nine", " seven"], "answer": 0},
    {"question": "The value of", "choices": [" the statement", " a"], "answer": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks: one for all, since the harness takes seconds to read its own beside any other."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, TOO_LONG]))
    (folder / "choices.yaml").write_text(CHOICES.format(data=data))
    (folder / "written.yaml").write_text(WRITTEN.format(data=data))
    return folder


def test_a_task_runs_end_to_end(untrained, tasks, tmp_path, monkeypatch, capsys):
    from mdm.config import find_config

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [f"checkpoint={untrained}", f"output_dir={tmp_path}", f"include_path={tasks}", "draws=4", "device=cpu"]
    in_process("harness", find_config("harness"), *words, "tasks=[tiny_choices,tiny_written]")
    written = json.loads((tmp_path / "results.json").read_text())
    results = written["results"]
    assert 0 <= results["tiny_choices"]["acc,none"] <= 1
    assert 0 <= results["tiny_written"]["exact_match,none"] <= 1
    notes, printed = written["notes"], capsys.readouterr().out
    assert "tiny_choices" in printed
    assert notes["tiny_choices"]["continuations without a token"] == 1
    assert notes["tiny_choices"]["contexts cut"] == 1
    lost = len(load_model(untrained)[1].encode("text", TOO_LONG["question"])) - 124  # of 125, one is left to the answer
    assert notes["tiny_written"] == {
        "answers shortened": 1, "answer tokens lost": 3, "prompts cut": 1, "prompt tokens lost": lost
    }  # fmt: skip
    assert f"answers shortened 1, answer tokens lost 3, prompts cut 1, prompt tokens lost {lost}\n" in printed


@pytest.fixture
def seen(untrained):
    """A model of 125 tokens of text."""
    from mdm.evaluation.harness import HarnessModel

    model, processor = load_model(untrained)
    own = HarnessModel(model, processor, draws=2)
    assert own.length == 125
    return own


def ask(kind, *arguments, doc=0):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0, metadata=("tiny", doc + k, 1)) for k, args in enumerate(arguments)]


@pytest.fixture
def asked(seen, monkeypatch):
    """What is asked of the sampler: context, length and settings of each request. The answer is "aaa..."."""
    made = []

    def continued(contexts, length, sampler):
        made.append((contexts[0], length, sampler))
        return [seen.tok_encode("a") * length]

    monkeypatch.setattr(seen, "continued", continued)
    return made


@pytest.mark.parametrize(
    ("prompt", "wanted", "kept", "length", "notes"),
    [
        (20, 64, 20, 64, {}),
        (120, 64, 120, 5, {"answers shortened": 1, "answer tokens lost": 59}),
        (120, 9999, 120, 5, {"answers shortened": 1, "answer tokens lost": 9994}),
        (125, 10, 124, 1, {"answers shortened": 1, "answer tokens lost": 9, "prompts cut": 1, "prompt tokens lost": 1}),
        (300, 1, 124, 1, {"prompts cut": 1, "prompt tokens lost": 176}),
    ],
)
def test_a_prompt_goes_before_the_room_of_its_answer(seen, asked, prompt, wanted, kept, length, notes):
    text = "".join(chr(97 + i % 26) + " " for i in range(prompt))
    ids = seen.tok_encode(text)[:prompt]
    prompt_text = seen.processor.decode("text", torch.tensor(ids))
    assert seen.tok_encode(prompt_text) == ids
    (answer,) = seen.generate_until(ask("generate_until", (prompt_text, {"until": [], "max_gen_toks": wanted})), True)
    assert [(context, n) for context, n, _ in asked] == [(ids[-kept:], length)]
    assert answer == "a" * length
    assert seen.notes["tiny"] == notes


def test_our_own_default_length_leaves_the_prompt_whole(untrained):
    from mdm.evaluation.harness import HarnessModel

    own = HarnessModel(*load_model(untrained), draws=2, max_tokens=500)
    ids = own.tok_encode("a spoken nine")
    assert own.answer_length(500, len(ids), own.notes["tiny"]) == own.length - len(ids)


def test_a_shortened_answer_is_a_whole_number_of_blocks(seen):
    from components.samplers import Blocks, Confidence

    seen.sampler = Blocks(Confidence(num_steps=8), 8)
    assert [seen.answer_length(64, prompt, seen.notes["tiny"]) for prompt in (10, 70, 110, 124)] == [64, 48, 8, 8]


def test_what_a_likelihood_is_not_given_is_counted(seen, monkeypatch):
    rows = []
    monkeypatch.setattr(seen, "row", lambda *pair: rows.append(pair) or ())
    monkeypatch.setattr(seen, "log_likelihood", lambda: -1.0)
    monkeypatch.setattr(seen, "is_greedy", lambda *pair: False)
    long, short = list(range(200)), [7, 8, 9]
    requests = [(ask("loglikelihood", ("", ""))[0], *pair) for pair in ((long, short), (short, long), (short, short))]
    assert seen._loglikelihood_tokens(requests, True) == [(-1.0, False)] * 3
    assert rows == [(long[-122:], short), ([], long[-125:]), (short, short)]
    assert seen.notes["tiny"] == {
        "contexts cut": 2, "context tokens lost": 78 + 3, "continuations cut": 1, "continuation tokens lost": 75
    }  # fmt: skip
    (total,) = seen.loglikelihood_rolling(ask("loglikelihood_rolling", ("a b " * 100,)), True)
    pieces = seen.notes["tiny"]["pieces"]
    assert (total, seen.notes["tiny"]["texts in pieces"]) == (-1.0 * pieces, 1)
    assert pieces == -(-len(seen.tok_encode("a b " * 100)) // 125)
    assert seen.loglikelihood_rolling(ask("loglikelihood_rolling", ("",)), True) == [0.0]


@pytest.mark.parametrize("context", ["", "a spoken"])
def test_a_continuation_without_a_token_is_certain(seen, context):
    requests = ask("loglikelihood", (context, ""), (context, " nine"), (context, ""))
    empty, some, again = seen.loglikelihood(requests, True)
    assert empty == again == (0.0, True)
    assert some[0] < 0
    assert seen.notes["tiny"]["continuations without a token"] == 2


def test_a_continuation_that_is_merged_into_its_context_is_certain(seen, monkeypatch):
    monkeypatch.setattr(seen, "tok_encode", lambda text: [len(text) // 4])  # "sev" + "en": one token either way
    assert seen.loglikelihood(ask("loglikelihood", ("sev", "en")), True) == [(0.0, True)]


@pytest.mark.parametrize(
    ("options", "length", "temperature"),
    [
        ({}, 64, 0.0),
        ({"max_gen_toks": 3, "max_new_tokens": 9}, 3, 0.0),
        ({"max_new_tokens": 9}, 9, 0.0),
        ({"max_tokens": 9}, 9, 0.0),
        ({"max_gen_toks": None, "temperature": None, "until": None, "do_sample": None}, 64, 0.0),
        ({"max_length": 30}, 20, 0.0),
        ({"max_length": 8}, 0, 0.0),
        ({"max_gen_toks": 0}, 0, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 64, 0.0),
        ({"do_sample": True, "temperature": 0.7}, 64, 0.7),
        ({"do_sample": True}, 64, 1.0),
        ({"temperature": 0.7}, 64, 0.7),
    ],
)
def test_the_keys_of_the_harness_mean_what_they_mean_there(options, length, temperature):
    from mdm.evaluation.harness import Asked

    found = Asked.of(options, 64, prompt=10)
    assert (found.length, found.temperature, found.until, found.unknown) == (length, temperature, [], {})


def test_settings_reach_the_sampler_and_unknown_ones_are_named(seen, asked):
    options = {"until": "b", "max_gen_toks": 4, "do_sample": True, "top_p": 0.9, "top_k": 5, "num_beams": 3}
    seen.generate_until(ask("generate_until", ("a", options), ("a", {"max_gen_toks": 0, "until": None})), True)
    ((_, length, sampler),) = asked
    assert (length, sampler.num_steps, sampler.temperature, sampler.top_p, sampler.top_k) == (4, 4, 1.0, 0.9, 5)
    assert seen.notes["tiny"] == {"num_beams=3 unknown": 1}
    with pytest.raises(UserError, match="tiny, document 7: max_gen_toks must be at least 0, got -1"):
        seen.generate_until(ask("generate_until", ("a", {"max_gen_toks": -1}), doc=7), True)


def test_answers_stand_in_the_order_of_their_requests(seen):
    prompts = ["a spoken", "The value of the statement is", "", "a"]
    lengths = [{"until": [], "max_gen_toks": n} for n in (3, 1, 5, 0)]
    requests = ask("generate_until", *zip(prompts, lengths, strict=True))
    together = seen.generate_until(requests, True)
    assert together == [seen.generate_until([request], True)[0] for request in requests]
    assert together[3] == ""
    assert seen.generate_until([], True) == seen.loglikelihood([], True) == seen.loglikelihood_rolling([], True) == []


@pytest.fixture
def chatty(tmp_path):
    """An open model whose tokenizer has control tokens and a chat template."""
    from tokenizers import Tokenizer

    from mdm.evaluation.harness import HarnessModel
    from tests.mdm.models.test_open_models import LLADA, write

    write(tmp_path, LLADA)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|mask|>", "<|user|>", "<|eot|>"])  # 57 to 60
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    turn = "{% for m in messages %}<|user|> {{ m.content }} <|eot|>{% endfor %}{% if add_generation_prompt %} w1{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": turn}))
    return HarnessModel(*load_model(tmp_path), draws=2)


def test_a_stop_that_is_a_special_token_ends_the_answer(chatty):
    ids = [3, 4, 60, 5, 6]
    assert chatty.until(ids, []) == "w3 w4 w5 w6"
    assert chatty.until(ids, ["<|eot|>"]) == "w3 w4"
    assert chatty.until(ids, ["w5", "<|eot|>", "w4"]) == "w3 "  # an ordinary token is a text like any other
    assert chatty.until([57, *ids], ["<|eot|>"]) == ""


def test_control_tokens_are_the_chat_templates_and_what_documents_say_is_text(chatty, monkeypatch):
    pytest.importorskip("components.templates")
    prompt = chatty.apply_chat_template([{"role": "user", "content": "w3 <|eot|> <|mask|> w4"}])
    assert prompt == "<|user|> w3 <|eot|> <|mask|> w4 <|eot|> w1"
    ids = [59, 3, 0, 0, 4, 60, 1]  # w0 stands for words that it does not know
    assert chatty.tok_encode(prompt) == ids
    rows = []
    monkeypatch.setattr(chatty, "row", lambda *pair: rows.append(pair) or ())
    monkeypatch.setattr(chatty, "log_likelihood", lambda: -1.0)
    monkeypatch.setattr(chatty, "is_greedy", lambda *pair: False)
    chatty.loglikelihood(ask("loglikelihood", (prompt + " ", "w5 <|eot|>")), True)
    assert rows == [(ids, [5, 0])]


def test_broken_weights_name_the_task_and_the_document(seen):
    with torch.no_grad():
        seen.net.norm.scale.fill_(torch.nan)
    with pytest.raises(UserError, match="tiny, document 4: likelihood: the logits at position"):
        seen.loglikelihood(ask("loglikelihood", ("a spoken", " nine"), doc=4), True)
    with pytest.raises(UserError, match="tiny, document 5: sample: nothing can be drawn at position"):
        seen.generate_until(ask("generate_until", ("a spoken", {}), doc=5), True)


def test_a_model_without_a_chat_template_says_so(seen):
    with pytest.raises(UserError, match="apply_chat_template: this model's tokenizer has no chat template"):
        seen.apply_chat_template([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("likelihood", ["nelbo", "left_to_right"])
def test_the_harness_sees_our_likelihood(untrained, likelihood):
    from lm_eval.api.instance import Instance

    from mdm.evaluation.harness import HarnessModel

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

    from mdm.evaluation.harness import HarnessModel

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
def test_mistakes_are_one_sentence(untrained, tasks, tmp_path, word, message):
    from mdm.config import find_config

    words = [f"checkpoint={untrained}", f"output_dir={tmp_path}", f"include_path={tasks}", "tasks=[piqa]", word]
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        in_process("harness", find_config("harness"), *words)
