"""A prompt in a template: the template's control tokens are control tokens, what the user says is text."""

import importlib
import json
import sys
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from components.templates import fill
from components.tokenizers.text import JsonTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError, load
from mdm.data.processor import Processor
from mdm.generation.prompts import check_template, example, read_prompt

CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|bot|>"


@pytest.fixture
def processor(tmp_path):
    """Bytes as tokens, and control tokens."""
    own = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens(["<|mask|>", "<|user|>", "<|end|>", "<|bot|>"])
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(str(tmp_path / "tokenizer.json"))
    return Processor(Vocabulary.of_text(260, 256, 258, 258), {"text": tokenizer}, {})


def given(processor, prompt, template=None):
    edit = read_prompt({"prompt": prompt}, "text", processor, "prompt", length=2, template=template)["text"]
    assert edit.region.tolist() == [False] * (len(edit.tokens) - 2) + [True] * 2
    return edit.tokens[:-2].tolist()


def test_control_tokens_are_those_of_the_template(processor):
    def spelled(text):
        return processor.encode("text", text).tolist()

    literal = spelled("hi <|end|>")
    assert 258 not in literal
    assert given(processor, "hi <|end|>") == literal
    assert given(processor, "hi <|end|>", "<|user|>{}<|end|><|bot|>") == [257, *literal, 258, 259]


def test_the_checkpoints_own_chat_template(processor, tmp_path):
    with pytest.raises(UserError, match="prompt: template=chat: chat template: there is neither"):
        given(processor, "hi", "chat")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    own = JsonTokenizer(str(tmp_path / "tokenizer.json"))
    literal = processor.encode("text", "hi <|end|>").tolist()
    assert given(Processor(processor.vocabulary, {"text": own}, {}), "hi <|end|>", "chat") == [257, *literal, 258, 259]


@pytest.mark.parametrize(("template", "task"), [("no place", "text"), ("chat", "text_to_image"), ("{}", "image_to_text")])
def test_a_template_that_takes_no_prompt_is_named(template, task):
    with pytest.raises(UserError, match="template: "):
        check_template(template, task)


def test_a_command_finds_the_tokenizer_that_stands_beside_a_config_elsewhere(tmp_path, monkeypatch):
    """Training looks beside its config, another command does not."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "besides.py").write_text("class Tokens: ...")
    (tmp_path / "mine" / "c.yaml").write_text("x: 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    load(Holder, "mine/c.yaml")
    tokens = importlib.import_module("besides").Tokens()
    shown = "mdm generate checkpoint=runs/x task=tune trust=true"
    assert example("runs/x", "tune", foreign=[tokens]) == f"PYTHONPATH=mine {shown}"
    monkeypatch.chdir("mine")
    assert example("runs/x", "tune", foreign=[tokens]) == shown


@dataclass
class Holder:
    x: int = 0


def test_a_command_says_the_prompt_and_the_template_apart():
    shown = example("runs/x", "text", fill("<|user|>{}<|end|>", "say it"))
    assert shown == "mdm generate checkpoint=runs/x task=text 'prompt=say it' 'template=<|user|>{}<|end|>'"
    assert example("runs/x", "text", fill("{}", "say it")) == "mdm generate checkpoint=runs/x task=text 'prompt=say it'"
