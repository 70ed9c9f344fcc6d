"""A conversation: what the model is given of it, where an answer ends, what is kept, and what there is no room for."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from components.data.sources import Jsonl
from components.tokenizers.text import JsonTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.chat import AS_IT_IS, CHAT, Chat, own_template
from mdm.generation.generate import prepare

TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
MASK, USER, TURN, BOT, END = range(256, 261)


def processor_in(folder, template=TEMPLATE):
    """Bytes as tokens, and control tokens."""
    own = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens(["<|mask|>", "<|user|>", "<|turn|>", "<|bot|>", "<|end|>"])
    own.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = JsonTokenizer(str(folder / "tokenizer.json"))
    return Processor(Vocabulary.of_text(261, MASK, END, END), {"text": tokenizer}, {})


@pytest.fixture
def processor(tmp_path):
    return processor_in(tmp_path)


def ids(processor, text):
    return processor.encode("text", text).tolist()


def answered(chat, asked, written):
    """The answer that is read where the model writes these tokens, and masks behind them."""
    batch = prepare(chat.processor, "text", [{"text": asked.edit}], {}).batch
    tokens = batch.tokens[0].clone()
    tokens[-chat.length :][: len(written)] = torch.tensor(written)
    return chat.answer(asked, tokens, batch)


def test_turns_stand_in_the_checkpoints_template_and_what_is_said_in_them_is_text(processor):
    chat = Chat(processor, own_template(processor), room=200, length=3)
    assert chat.template == CHAT
    chat.keep(chat.ask("say <|turn|>"), "no <|bot|>", seed=0)
    asked = chat.ask("why")
    given = [
        USER,
        *ids(processor, "say <|turn|>"),
        TURN,
        BOT,
        *ids(processor, "no <|bot|>"),
        TURN,
        USER,
        *ids(processor, "why"),
    ]
    assert asked.edit.tokens.tolist() == [*given, TURN, BOT, MASK, MASK, MASK]
    assert asked.edit.region.tolist() == [False] * (len(given) + 2) + [True] * 3


def test_without_a_template_a_text_is_gone_on_with_and_exchanges_are_on_lines_of_their_own(tmp_path):
    processor = processor_in(tmp_path, template=None)
    chat = Chat(processor, own_template(processor), room=200, length=3)
    assert chat.template == AS_IT_IS
    first = chat.ask("The value")
    chat.keep(first, answered(chat, first, ids(processor, " of")), seed=0)
    assert chat.exchanges[0].answer == " of"  # with the blank that a text which goes on begins with
    assert chat.ask("It").edit.tokens.tolist() == [*ids(processor, "The value of\nIt"), MASK, MASK, MASK]


def test_a_template_of_the_users_own_has_control_tokens(processor):
    chat = Chat(processor, "<|user|>{}<|bot|>", room=200, length=1)
    chat.keep(chat.ask("a"), "<|end|>", seed=0)
    given = [USER, *ids(processor, "a"), BOT, *ids(processor, "<|end|>\n"), USER, *ids(processor, "b"), BOT, MASK]
    assert chat.ask("b").edit.tokens.tolist() == given


@pytest.mark.parametrize("end", [TURN, END])
def test_an_answer_ends_with_its_turn_or_with_the_text(processor, end):
    chat = Chat(processor, CHAT, room=200, length=12)
    asked = chat.ask("hi")
    assert answered(chat, asked, [*ids(processor, "yes"), end, *ids(processor, "more"), END]) == "yes"
    assert answered(chat, asked, [*ids(processor, "yes"), USER]) == "yes"  # any other control token is no end of it


def test_oldest_exchanges_go_where_there_is_no_room_and_what_is_saved_stays(processor, tmp_path):
    chat = Chat(processor, CHAT, room=30, length=4)
    for i, word in enumerate(("one", "two", "six", "ten")):
        asked = chat.ask(word)
        chat.keep(asked, f"is {i}", seed=i, sampler="Threshold")
        assert len(asked.edit.tokens) <= 30
    assert [e.first for e in chat.exchanges] == [0, 0, 1, 2]
    assert asked.edit.tokens.tolist()[:5] == [USER, *ids(processor, "six"), TURN]
    lines = chat.lines()
    assert lines[3] == {
        "prompt": "ten",
        "text": "is 3",
        "messages": [
            {"role": "user", "content": "six"},
            {"role": "assistant", "content": "is 2"},
            {"role": "user", "content": "ten"},
            {"role": "assistant", "content": "is 3"},
        ],
        "seed": 3,
        "sampler": "Threshold",
    }
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = Jsonl(str(tmp_path / "chat.jsonl"), fields={"prompt": "prompt", "text": "text"})
    assert [(s["prompt"], s["text"]) for s in samples] == [("one", "is 0"), ("two", "is 1"), ("six", "is 2"), ("ten", "is 3")]
    with pytest.raises(UserError, match="a question of 43 tokens and an answer of length=4 do not fit into the model's 30 pos"):
        chat.ask("x" * 40)
    assert len(chat.exchanges) == 4


@pytest.mark.parametrize(
    ("own", "asked", "message"),
    [
        (None, "no place", "template: 'no place' must hold {}, where the question stands, or be chat"),
        (None, CHAT, "template=chat: chat template: there is neither"),
        ("{{ raise_exception('no assistants') }}", CHAT, "template=chat: chat template: no assistants"),
        ("{% if not add_generation_prompt %}{{ 1 / 0 }}{% endif %}", CHAT, "template=chat: chat template: division by zero"),
        (TEMPLATE, "{} and " + "x" * 90, "a question of 96 tokens"),
    ],
)
def test_a_template_that_does_not_work_is_said_before_the_chat_begins(tmp_path, own, asked, message):
    with pytest.raises(UserError) as error:
        Chat(processor_in(tmp_path, own), asked, room=80, length=4).check()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
