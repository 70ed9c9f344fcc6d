"""`mdm chat` as a user runs it, on untrained models: through a pipe, with its commands and mistakes, and in a real terminal."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import time

import pytest
from tokenizers import Tokenizer

import components.samplers as library
from components.data.sources import Jsonl
from components.samplers import Confidence, Threshold
from mdm import cli
from mdm.config import UserError, find_config, load
from mdm.generation.chat import Chat
from mdm.generation.generate import generate
from mdm.models.folder import load_model
from mdm.recipe import load_recipe
from tests.mdm.models.test_open_models import DREAM, LLADA, SDAR, write
from tests.mdm.pages.test_terminal import Screen

TEMPLATE = "{% for m in messages %}<|user|> {{ m.content }} <|eot|>{% endfor %}{% if add_generation_prompt %} w1{% endif %}"
M = "▒"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, untrained):
    """Open models with a chat template; a model of ours, and the same as if it had been finetuned on instructions."""
    found = {"ours": untrained}
    for name, config in (("llada", LLADA), ("dream", DREAM), ("sdar", SDAR)):
        found[name] = folder = tmp_path_factory.mktemp(name)
        write(folder, config)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|endoftext|>", "<|mask|>", "<|user|>", "<|eot|>"])  # 57 to 60
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    found["instruct"] = folder = tmp_path_factory.mktemp("instruct") / "run"
    shutil.copytree(untrained, folder)
    trained = {"base": None, "trainings": [{"tokens": 9, "streams": {"chat": ["instruct"]}}]}
    (folder / "model" / "training.json").write_text(json.dumps(trained))
    return found


@pytest.fixture
def talk(folders, monkeypatch, capsys):
    """The recipe in this process, with lines from a pipe and its output in another: what was written to both outputs."""
    recipe = load_recipe("chat")

    def said(name, *lines, settings=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        common = [f"checkpoint={folders[name]}", "device=cpu", "precision=fp32"]
        cfg = load(recipe.Settings, find_config("chat"), [*common, *settings])
        recipe.validate(cfg)
        capsys.readouterr()
        recipe.main(cfg)
        out, err = capsys.readouterr()
        return out.split("\n")[:-1], err.split("\n")[:-1]

    return said


@pytest.mark.parametrize(
    ("name", "length", "question"),
    [("llada", 32, "w3 w4"), ("dream", 32, "w3 w4"), ("ours", 64, "a se"), ("instruct", 24, "a")],
)
def test_through_a_pipe_the_answers_are_those_of_the_api_and_nothing_else(talk, folders, name, length, question):
    out, err = talk(name, question, "", question, "/quit", question)
    model, processor = load_model(folders[name])
    template = "chat" if name in ("llada", "dream") else "{}"
    chat, expected = Chat(processor, template, processor.text_room(model.config.max_length), length), []
    for _ in range(2):
        asked = chat.ask(question)
        made = generate(model, processor, "text", [{"text": asked.edit}], Threshold(), 0.0, seed=0)
        chat.keep(asked, chat.answer(asked, made.tokens[0], made.batch))
        expected += chat.exchanges[-1].answer.strip().split("\n")
    assert out == expected
    assert len(err) == asked.left_out  # which is said


def test_in_blocks_an_answer_grows_and_a_conversation_too(talk, folders, monkeypatch):
    """Blocks of 4, beyond the 64 positions of the model: all exchanges are given, and no mask is shown behind a block's."""
    shown = []

    class Drawn:
        def __init__(self, out):
            self.show, self.finish = shown.append, print

        def clear(self):
            pass

    monkeypatch.setattr(load_recipe("chat"), "Drawing", Drawn)
    monkeypatch.setattr(load_recipe("chat"), "is_live", lambda out: True)
    questions, settings = ["w3 w4 w5 w6"] * 7, ["length=10", "sampler=Confidence", "sampler.num_steps=2"]
    out, err = talk("sdar", *questions, settings=settings)
    assert err == []
    model, processor = load_model(folders["sdar"])
    chat, expected = Chat(processor, "chat", None, 10), []
    for question in questions:
        asked = chat.ask(question)
        made = generate(model, processor, "text", [{"text": asked.edit}], Confidence(num_steps=2), 0.0, seed=0)
        chat.keep(asked, chat.answer(asked, made.tokens[0], made.batch))
        expected.append(chat.exchanges[-1].answer.strip())
    assert out == expected
    assert asked.left_out == 0
    assert len(asked.edit.tokens) > 64
    assert 0 < max(text.count(M) for text in shown) <= 4
    assert talk("sdar", "w3", "/sampler Editing", settings=["length=4"])[1][0].startswith(
        "Warning: the model was trained to fill"
    )


def test_an_answer_follows_from_seed_sampler_and_conversation(talk):
    settings = ["sampler=Confidence", "sampler.num_steps=4", "length=8"]
    first, again, other, back, anew = talk(
        "llada", "w3", "/reset", "w3", "/reset", "/seed 1", "w3", "/reset", "/seed 0", "w3", "w3", settings=settings
    )[0]
    assert first == again == back
    assert other != first
    assert anew != first  # the conversation is another
    assert talk("llada", "w3", settings=[*settings, "seed=1"])[0] == [other]
    lines = ["/sampler Confidence num_steps=4", "w3", "/sampler", "/sampler null", "/seed"]
    out, err = talk("llada", *lines, settings=["length=8"])
    assert (out, err) == ([first], ["Confidence num_steps=4", "Confidence num_steps=4", "Threshold", "seed 0"])


def test_a_sampler_is_written_as_on_the_command_line_and_read_back(talk):
    nested = "Blocks sampler=Confidence sampler.temperature=0.5 sampler.rank_by=margin block_length=4"
    cosine = "Confidence num_steps=3 schedule=Cosine"
    out, err = talk("llada", f"/sampler {nested}", "w3", f"/sampler {cosine}", "w4", settings=["length=8"])
    assert err == [nested, cosine]
    assert len(out) == 2
    name, *keys = nested.split()
    settings = ["length=8", f"sampler={name}", *(f"sampler.{key}" for key in keys)]
    assert talk("llada", "w3", settings=settings)[0] == out[:1]


def test_the_samplers_of_the_house_are_those_that_are_offered():
    offered = load_recipe("chat").SAMPLING
    assert {n for n in library.__all__ if hasattr(getattr(library, n), "step") and n not in ("Sampler", "Starting")} == {
        *offered
    }


MISTAKES = {
    "an unknown command": (
        "/sede 3",
        "/sede is not one of /seed, /sampler, /save, /reset, /help, /quit (did you mean '/seed'?);",
    ),
    "a seed that is none": ("/seed -1", "/seed: '-1' is no whole number from 0 on; write e.g. /seed 7"),
    "an unknown sampler": (
        "/sampler Confidense",
        "EntropyBounded, Editing, Blocks, PerModality, Psi, Gibbs, LeastSureFirst, Self",
    ),
    "nearly a sampler": ("/sampler Confidense", "(did you mean 'Confidence'?), nor a dotted path"),
    "no sampler": ("/sampler Linear", "/sampler: 'Linear' is not one of Ancestral, "),
    "a bad key": ("/sampler Confidence steps=4", "unknown key 'sampler.steps'"),
    "a bad value": ("/sampler Confidence num_steps=many", "sampler.num_steps"),
    "an impossible value": ("/sampler Confidence num_steps=0", "num_steps must be at least 1, got 0"),
    "a value without a key": (
        "/sampler Confidence 4",
        "/sampler: '4' is no key=value; write e.g. /sampler Confidence num_steps",
    ),
    "an open quote": ("/sampler 'Confidence", "/sampler: 'Confidence cannot be read (No closing quotation)"),
    "no such module": ("/sampler mine.Sampler", "sampler: unknown component 'mine.Sampler'"),
    "nowhere to save": ("/save", "/save: write where to, e.g. /save chat.jsonl"),
    "nothing to save": ("/save {folder}/a.jsonl", "/save: there is no answer yet"),
    "a question that is too long": (
        "w3 " * 60,
        "a question of 63 tokens and an answer of length=8 do not fit into the model's 64",
    ),
}


@pytest.mark.parametrize("case", MISTAKES, ids=lambda c: c.replace(" ", "_"))
def test_a_mistake_is_one_sentence_and_the_chat_goes_on(talk, tmp_path, case):
    line, message = MISTAKES[case]
    out, err = talk("llada", line.format(folder=tmp_path), "w3", settings=["length=8"])
    assert len(err) == 1
    assert message in err[0]
    assert out == talk("llada", "w3", settings=["length=8"])[0]


def test_what_only_shows_while_it_samples_is_said_then(talk):
    out, err = talk(
        "llada", "/sampler Blocks sampler=Threshold block_length=5", "w3", "/sampler null", "w3", settings=["length=8"]
    )
    assert err[1] == "Blocks: block_length 5 does not divide the 8 positions to generate"
    assert len(out) == 1


def test_help_names_every_command_and_a_slash_can_be_said(talk):
    out, err = talk("ours", "/help", "//help", settings=["length=8"])
    assert [line.split()[0] for line in err] == ["/seed", "/sampler", "/save", "/reset", "/help", "/quit"]
    assert out == talk("ours", "/quit")[0] + talk("ours", "//help", settings=["length=8"])[0]


def test_a_conversation_is_saved_as_instructions_and_no_file_is_lost(talk, tmp_path):
    saved, other = tmp_path / "new folder" / "chat.jsonl", tmp_path / "other.jsonl"
    other.write_text("precious")
    lines = ["w3 w4", "/seed 7", "/sampler Confidence num_steps=2", f"/save {saved}", "w5", f"/save {saved}", f"/save {other}"]
    out, err = talk("llada", *lines, f"/save {tmp_path}", settings=["length=8"])
    assert err[2:5] == [
        f"1 answers written to {saved}", f"2 answers written to {saved}", f"/save: {other} exists; choose another file"
    ]  # fmt: skip
    assert err[5] == f"/save: {tmp_path} exists; choose another file"
    assert other.read_text() == "precious"
    first, second = map(json.loads, saved.read_text().splitlines())
    assert (first["prompt"], first["text"], first["seed"], first["sampler"]) == ("w3 w4", out[0], 0, "Threshold")
    assert (second["prompt"], second["text"], second["seed"]) == ("w5", out[1], 7)
    assert second["sampler"] == "Confidence num_steps=2"
    assert second["messages"] == [
        *first["messages"],
        *({"role": r, "content": c} for r, c in (("user", "w5"), ("assistant", out[1]))),
    ]
    assert [s["prompt"] for s in Jsonl(str(saved), fields={"prompt": "prompt", "text": "text"})] == ["w3 w4", "w5"]


def test_a_conversation_that_is_too_long_goes_on_and_says_what_is_not_seen(talk):
    out, err = talk("llada", *["w3 w4"] * 6, "/reset", "w3 w4", settings=["length=12", "sampler=FirstHitting"])
    assert len(out) == 7
    assert err[0].endswith("answers are not seen any more: there is room for 64 tokens; /reset begins a new conversation)")
    assert err[-1] == "a new conversation"
    assert out[0] == out[-1]


WRONG = {
    "no length": (["length=0"], "length must be at least 1, got 0"),
    "no room for an answer": (
        ["length=64"],
        "a question of 4 tokens and an answer of length=64 do not fit into the model's 64",
    ),
    "a template without a place": (["template=hello"], "template: 'hello' must hold {}"),
    "a cache without blocks": (["cache=dual"], "cache 'dual' keeps what lies outside a block"),
    "a sampler that is none": (["sampler=Linear"], "sampler: Linear lacks step"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda c: c.replace(" ", "_"))
def test_a_mistake_in_the_settings_is_said_before_the_model_loads(talk, monkeypatch, case):
    settings, message = WRONG[case]
    monkeypatch.setattr(load_recipe("chat"), "load_model", None)
    with pytest.raises(UserError) as error:
        talk("llada", settings=settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


SLOW = """
import time
from components.samplers import FirstHitting


class Slow(FirstHitting):
    def step(self, logits, state):
        time.sleep(0.06)
        return super().step(logits, state)
"""


def become(words, cwd):
    """The command, in a process that was forked for it: what it reads and writes is the process's own, and it never returns."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
        os.chdir(cwd)
        sys.argv = words
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate("rww"))
        cli.main()
    finally:
        os._exit(99)  # else it leaves by itself


class Terminal:
    """The command in a terminal of its own: what is typed, and all that is seen."""

    def __init__(self, words, cwd):
        pid, self.fd = pty.fork()
        if pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="40", LINES="20")
            become(["mdm", "chat", *words], cwd)
        self.pid, self.seen = pid, ""

    def until(self, mark, again="", seconds=120.0):
        """What is seen up to the mark, from where the last one was found. again: typed until then, whenever nothing comes."""
        end, bytes_ = time.monotonic() + seconds, b""
        while mark not in self.seen:
            assert time.monotonic() < end, self.seen
            if not select.select([self.fd], [], [], 1.0)[0]:
                self.type(again)
            else:
                bytes_ += os.read(self.fd, 65536)
                with contextlib.suppress(UnicodeDecodeError):  # half a character
                    self.seen, bytes_ = self.seen + bytes_.decode(), b""
        found, _, self.seen = self.seen.partition(mark)
        return found

    def type(self, text):
        os.write(self.fd, text.encode())


def test_in_a_terminal_an_answer_is_seen_to_unmask_and_ctrl_c_stops_it(folders, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    words = [f"checkpoint={folders['llada']}", "length=16", "sampler=slow.Slow", "device=cpu"]
    at = Terminal(words, tmp_path)
    assert "answers of 16 tokens, slow.Slow. /help says what else there is." in at.until("\r\n> ")
    at.type("w3 w4\n")
    first = at.until("\r\n> ")
    screen = Screen(40).feed(first)
    assert screen.shown()[0] == "w3 w4"
    answer = "".join(screen.shown()[1:])
    assert M not in answer  # drawn over, every one of them
    assert answer.startswith("w")
    frames = first.count("\r\x1b[")
    assert frames >= 4  # all masked, on the way, finished
    assert M * 16 in first
    at.type("w5\n")
    at.until(f"{M * 16}\x1b[22m")
    at.type("\x03")
    at.until("^C\r\n(stopped; question and answer are no part of the conversation)")
    at.until("\r\n> ")
    at.type("/sampler Blocks sampler=slow.Slow block_length=5\n")
    at.until("\r\n> ")
    at.type("w5\n")
    assert Screen(80).feed(at.until("\r\n> ")).shown() == [
        "w5", "Blocks: block_length 5 does not divide the 16 positions to generate"
    ]  # fmt: skip
    at.until("/quit or Ctrl-D ends the chat\r\n> ", again="\x03")
    at.type("/save all.jsonl\n")
    at.until("1 answers written to all.jsonl\r\n> ")
    at.type("\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(at.pid, 0)[1]) == 0
    (line,) = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert line["text"].strip() == answer.strip()


def test_an_answer_in_a_pipe_that_is_interrupted_ends_the_command(folders, tmp_path):
    """As any other in a script: what comes next in it may count on this answer."""
    (tmp_path / "slow.py").write_text(SLOW)
    pipes = [os.pipe() for _ in range(3)]  # its stdin, stdout and stderr; ours is the other end
    pid = os.fork()
    if pid == 0:
        for number, (reader, writer) in enumerate(pipes):
            os.dup2(writer if number else reader, number)
        become(["mdm", "chat", f"checkpoint={folders['llada']}", "length=4", "device=cpu"], tmp_path)
    for end in (pipes[0][0], pipes[1][1], pipes[2][1]):
        os.close(end)
    with open(pipes[0][1], "w") as asked, open(pipes[1][0]) as answers, open(pipes[2][0]) as said:
        asked.write("w3\n/sampler slow.Slow\n" + "w4\n" * 100)
        asked.flush()
        assert answers.readline().startswith("w")
        os.kill(pid, signal.SIGINT)
        assert said.read().endswith("mdm: interrupted; the same command begins a new conversation\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
