"""Talk with a text model in the terminal: its own chat template, and the answer is seen while it unmasks.

    mdm chat checkpoint=hub:GSAI-ML/LLaDA-8B-Instruct
    mdm chat checkpoint=runs/instruct template="<|user|>{}<|assistant|>" length=64
    mdm chat checkpoint=hub:GSAI-ML/LLaDA-8B-Instruct sampler=Confidence sampler.num_steps=64
    printf 'What is a mask?\\nAnd two?\\n' | mdm chat checkpoint=runs/instruct > answers.txt

A line is a question, or a command: /seed, /sampler, /save, /reset, /quit; /help explains them. Ctrl-C stops an answer, Ctrl-D
ends the chat. Where the output is a file or a pipe, the finished answers are written to it, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from components.samplers import Sampler
from components.tasks import INSTRUCT
from components.types import Batch
from mdm.config import UserError, at_least, at_least_one, check, find_config, load, locate
from mdm.config.names import SAMPLERS, close
from mdm.config.protocols import conforming
from mdm.config.spelling import is_name, typed
from mdm.data.corruption import layout_of
from mdm.data.processor import Processor
from mdm.generation.blockwise import block_samplers
from mdm.generation.chat import Chat, own_template
from mdm.generation.checks import check_settings, edits_unlearned
from mdm.generation.defaults import FILE, Defaults
from mdm.generation.generate import Step, generate
from mdm.generation.prompts import check_task
from mdm.hardware import Hardware, check_hardware, hardware
from mdm.models.folder import load_config, load_model, load_processor, model_folder
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.pages.film import half_written
from mdm.pages.terminal import Drawing, is_live
from mdm.recipe import run_recipe
from mdm.training import record

CONFIG = "chat"
LONGEST = 128  # tokens of an answer, where nothing says how many
LONGEST_IN_BLOCKS = 512  # of one that is over with the block in which it ends
SURE = Defaults({"text": {"sampler": {"_component_": "components.samplers.Threshold"}}})

SAMPLING = [name for name, path in SAMPLERS.items() if hasattr(locate(path, name), "step")]

COMMANDS = {
    "/seed": "N: of the answers to come; alone, what it is",
    "/sampler": "NAME [key=value ...]: e.g. /sampler Confidence num_steps=32; null is the model's own; alone, what it is",
    "/save": "FILE: the conversation as JSON lines, with the seed and the sampler of each answer",
    "/reset": "begins a new conversation",
    "/help": "shows this",
    "/quit": "ends the chat, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/chat.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    template: str | None = None
    length: int | None = None
    sampler: dict[str, Any] | None = None
    defaults: str | None = None
    cache: str = "auto"
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    check_hardware(cfg.device, cfg.precision)
    cfg.cache = "off" if cfg.cache.lower() == "false" else cfg.cache  # YAML reads a bare `off` so
    at_least_one(cfg, "length")
    at_least(0, cfg, "seed")
    if cfg.sampler is not None:
        check(cfg.sampler, "sampler")
    processor = load_processor(cfg.checkpoint)
    check_task("text", processor.vocabulary, record.of(cfg.checkpoint).learned)
    choose(cfg, processor)
    begin(cfg, processor, load_config(cfg.checkpoint))


def main(cfg: Settings) -> None:
    with hardware(cfg.device, cfg.precision) as hw:
        record.warn(cfg.checkpoint, ["text"], note)
        model, processor = load_model(cfg.checkpoint, hw.device)
        talk = Talk(cfg, model, processor, hw, begin(cfg, processor, model.config), choose(cfg, processor))
        talk.greet()
        talk.caution()
        talk.run()


def begin(cfg: Settings, processor: Processor, model: ModelConfig) -> Chat:
    """The empty conversation. Raises UserError for a template that does not work, or a length that leaves no room.

    A model of blocks has no length that it ends at: its conversation grows, and nothing of it is left out.
    """
    taught = any(INSTRUCT in tasks for own in record.of(cfg.checkpoint).trainings for tasks in own.streams.values())
    longest = LONGEST_IN_BLOCKS if model.blocks else min(model.max_length // 2, LONGEST)
    length = cfg.length or (processor.canvas.get("text") if taught else None) or longest
    room = None if model.blocks else processor.text_room(model.max_length)
    chat = Chat(processor, cfg.template or own_template(processor), room, length)
    chat.check()
    return chat


def choose(cfg: Settings, processor: Processor) -> Sampler:
    """The sampler of the settings, else the model's own. Raises UserError for one that cannot be, or not with the cache."""
    own = cfg.defaults is not None or (model_folder(cfg.checkpoint) / FILE).is_file()
    model = load_config(cfg.checkpoint)
    if cfg.sampler is None:
        defaults = Defaults.beside(cfg.checkpoint, cfg.defaults) if own else SURE
        sampler = defaults.of("text", processor.vocabulary.modalities, model.noise, model.learned_orders).sampler
    else:
        sampler = conforming(cfg.sampler, "sampler", Sampler)
    try:
        check_settings("text", [{}], 1, cfg.cache, sampler, 0.0, model)
        if model.blocks:
            block_samplers(sampler, model.blocks, processor.vocabulary.modalities, ["text"])
    except ValueError as error:
        raise UserError(str(error)) from error
    return sampler


def note(words: str) -> None:
    """Says something that is no answer: beside the output, which may be a file."""
    print(words, file=sys.stderr, flush=True)


@dataclass
class Talk:
    """A chat at the terminal, or with whatever its input and output are."""

    cfg: Settings
    model: MaskedDiffusionModel
    processor: Processor
    hw: Hardware
    chat: Chat
    sampler: Sampler
    saved: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a character that a terminal does not know ends no chat
        self.typed = sys.stdin.isatty()
        self.drawing = Drawing(sys.stdout) if is_live(sys.stdout) else None
        if self.typed:
            with contextlib.suppress(ImportError):  # of a Python that was built without
                import readline  # noqa: F401  # lines can be edited, and called back

    def greet(self) -> None:
        if self.typed:
            size = self.model.config.blocks.get("text")
            many = f"{self.chat.length} tokens" if size is None else f"up to {self.chat.length} tokens, in blocks of {size}"
            how = f"answers of {many}, {' '.join(typed(self.sampler))}"
            note(f"{self.cfg.checkpoint}: {how}. /help says what else there is.")

    def caution(self) -> None:
        """Says what the sampler asks of the model that it never learned."""
        if (line := edits_unlearned(["text"], self.sampler, self.model.config)) is not None:
            note(f"Warning: {line}")

    def run(self) -> None:
        """Takes lines until there are no more, or /quit. What is wrong with one is said, and the chat goes on."""
        going = True
        while going:
            try:
                line = input("> " if self.typed and self.drawing else "").strip()
                going = self.take(line)
            except EOFError:
                if self.typed:
                    note("")
                return
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                note("\n/quit or Ctrl-D ends the chat")
            except UserError as error:
                note(str(error))

    def take(self, line: str) -> bool:
        """Does what a line asks for; False where that ends the chat. Raises UserError."""
        if not line.startswith("/") or line.startswith("//"):  # two: a question that begins with one
            if line:
                self.answer(line.removeprefix("/"))
            return True
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            known = f"{', '.join(COMMANDS)}{close(name, COMMANDS)}"
            raise UserError(f"{name} is not one of {known}; a question that begins with / is written with //")
        if name == "/quit":
            return False
        getattr(self, f"do_{name[1:]}")(rest.strip())
        return True

    def answer(self, question: str) -> None:
        """Asks the model, shows its answer and keeps both. Raises UserError."""
        asked = self.chat.ask(question)
        if asked.left_out > max((e.first for e in self.chat.exchanges), default=0):
            seen = f"the first {asked.left_out} of {len(self.chat.exchanges)} answers are not seen any more"
            note(f"({seen}: there is room for {self.chat.room} tokens; /reset begins a new conversation)")

        layout = layout_of(self.model.config, self.processor.vocabulary)

        def watch(step: Step, batch: Batch) -> None:
            assert self.drawing is not None  # else nobody watches
            tokens = step.tokens[0] if layout is None else self.chat.begun(step.tokens[0], batch, layout)
            self.drawing.show(half_written(self.processor, "text", self.chat.answer_ids(asked, tokens, batch)).strip())

        try:
            with self.hw.autocast():
                made = generate(
                    self.model, self.processor, "text", [{"text": asked.edit}], self.sampler, 0.0, self.cfg.seed,
                    cache=self.cfg.cache, watch=watch if self.drawing else None,
                )  # fmt: skip
        except ValueError as error:
            if self.drawing:
                self.drawing.clear()
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            if not self.typed:
                raise
            if self.drawing:
                self.drawing.leave()
            return note("(stopped; question and answer are no part of the conversation)")
        answer = self.chat.answer(asked, made.tokens[0], made.batch)
        self.chat.keep(asked, answer, seed=self.cfg.seed, sampler=" ".join(typed(self.sampler)))
        if self.drawing:
            self.drawing.finish(answer.strip())
        else:
            print(answer.strip(), flush=True)
        if not answer.strip():
            note("(the answer is empty: the model ended it at once)")

    def do_seed(self, rest: str) -> None:
        """/seed N"""
        if rest:
            if not (rest.isascii() and rest.isdigit() and len(rest) < 19):
                raise UserError(f"/seed: {rest!r} is no whole number from 0 on; write e.g. /seed 7")
            self.cfg.seed = int(rest)
        note(f"seed {self.cfg.seed}")

    def do_sampler(self, rest: str) -> None:
        """/sampler NAME [key=value ...]: as on the command line, where the keys are sampler.key=value"""
        try:
            name, *keys = shlex.split(rest) or [""]
        except ValueError as error:
            raise UserError(f"/sampler: {rest} cannot be read ({error})") from error
        if bad := next((word for word in keys if "=" not in word), None):
            raise UserError(f"/sampler: {bad!r} is no key=value; write e.g. /sampler Confidence num_steps=32")
        if name and is_name(name) and "." not in name and name not in SAMPLING:
            raise UserError(f"/sampler: {name!r} is not one of {', '.join(SAMPLING)}{close(name, SAMPLING)}, nor a dotted path")
        if name:
            words = [f"checkpoint={self.cfg.checkpoint}", f"cache={self.cfg.cache}", f"sampler={name}"]
            asked = load(Settings, find_config(CONFIG), [*words, *(f"sampler.{word}" for word in keys)])
            asked.defaults = self.cfg.defaults
            self.sampler = choose(asked, self.processor)
            self.caution()
        note(" ".join(typed(self.sampler)))

    def do_save(self, rest: str) -> None:
        """/save FILE"""
        if not rest or not self.chat.exchanges:
            raise UserError("/save: write where to, e.g. /save chat.jsonl" if not rest else "/save: there is no answer yet")
        path = Path(rest).expanduser()
        try:
            if path.exists() and path.resolve() not in self.saved:
                raise UserError(f"/save: {path} exists; choose another file")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in self.chat.lines()), "utf-8")
        except OSError as error:
            raise UserError(f"/save: {path} cannot be written ({error.strerror or error})") from error
        self.saved.add(path.resolve())
        note(f"{len(self.chat.exchanges)} answers written to {path}")

    def do_reset(self, rest: str) -> None:
        """/reset"""
        self.chat.exchanges.clear()
        note("a new conversation")

    def do_help(self, rest: str) -> None:
        """/help"""
        note("\n".join(f"{name:<10}{what}" for name, what in COMMANDS.items()))


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, "begins a new conversation")
