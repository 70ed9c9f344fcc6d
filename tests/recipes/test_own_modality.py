"""A modality of the user's own, in one file of theirs: trained, validated, sampled, saved, loaded, generated and added to."""

import sys

from mdm.generation.generate import generate
from mdm.models.folder import load_model, load_processor
from mdm.training.history import read_history
from tests.recipes.conftest import mdm
from tests.recipes.test_bad_input import one_line

MINE = """
import torch

class Pen:  # moves: a letter and a digit each, as many as it takes
    codebooks = (5, 3)
    def encode(self, raw):
        return torch.tensor([[ord(move[0]) - 97, int(move[1])] for move in raw.split()], dtype=torch.long).flatten()
    def decode(self, codes):
        return " ".join(f"{chr(97 + letter)}{digit}" for letter, digit in codes.view(-1, 2).tolist())
    def save(self, folder):
        return {"_component_": "pens.Pen"}

class OneWay:
    codebooks = (5, 3)
    def encode(self, raw):
        return torch.zeros(2, dtype=torch.long)

def strokes():
    return [{"text": f"draw {i % 5}", "pen": f"{'abcde'[i % 5]}{i % 3} " * (1 + i % 3)} for i in range(30)]
"""

CONFIG = """
output_dir: out
model: {_component_: mdm.models.builders.nano, max_length: 40, width: 32, num_layers: 1, num_heads: 2}
tokenizers:
  pen: {_component_: pens.Pen}
  text: {_component_: components.tokenizers.text.TextTokenizer.train, vocab_size: 280}
canvas: {pen: 8, text: 8}
data:
  strokes:
    train: {_component_: pens.strokes}
    validation: {_component_: pens.strokes}
    tasks: {"pen->text": 1.0, "text -> pen": 1.0}
masker: {_component_: components.maskers.BernoulliMasker, pairs: true}
batch: {logical: 8, micro: 8}
optimizer: {lr: 1.0e-3}
tokens: 1500
device: cpu
precision: fp32
compile: "false"
log_every_steps: 1
validation_samples: 16
sample_every_tokens: 500
"""


def test_a_modality_of_the_user_s_own_goes_all_the_way(tmp_path, monkeypatch):
    (tmp_path / "pens.py").write_text(MINE)
    (tmp_path / "pen.yaml").write_text(CONFIG)

    def run(*words, check=True):
        return mdm(*words, cwd=tmp_path, check=check)

    assert "tried: a batch of strokes with the masker" in run("validate", "pretrain", "--config", "pen.yaml").stdout
    run("run", "pretrain", "--config", "pen.yaml")
    history = read_history(tmp_path / "out" / "history.jsonl")
    trained = [line["train_bits/pen"] for line in history if "train_bits/pen" in line]
    assert min(trained) > 0
    assert len(trained) > 5  # of 9 steps: in one all rows may be texts
    assert next(set(line) - {"step", "tokens"} for line in history if "loss" not in line) == {"bits/text_to_pen"}
    shown = next((tmp_path / "out" / "samples").rglob("outputs.jsonl"))
    assert shown.parent.name == "text_to_pen"
    (tmp_path / "named.yaml").write_text(CONFIG.replace('"pen->text"', "pen_to_text").replace('"text -> pen"', "text_to_pen"))
    assert "Resuming from out/checkpoints" in run("run", "pretrain", "--config", "named.yaml", "tokens=1600").stdout
    again = run("run", "pretrain", "--config", "pen.yaml", "data.strokes.tasks={pen_to_text: 1, text_to_pen: 1}", check=False)
    assert "stands twice" in one_line(again)  # an argument adds to a table: the tasks have two names now

    monkeypatch.syspath_prepend(tmp_path)
    model, processor = load_model(tmp_path / "out", trust=True)
    assert processor.vocabulary.tasks == ("text", "pen_to_text", "text_to_pen")
    (made,) = generate(model, processor, "text->pen", [{"text": "draw 3"}], seed=1).outputs
    assert made == generate(model, processor, "text_to_pen", [{"text": "draw 3"}], seed=1).outputs[0]
    assert processor.decode("pen", processor.encode("pen", made["pen"])) == made["pen"]  # what comes out is a sample
    (read,) = generate(model, processor, "pen_to_text", [{"pen": "a0 b1"}]).outputs
    assert isinstance(read["text"], str)

    del sys.modules["pens"]  # every command imports it anew

    common = ["checkpoint=out", "trust=true", "output_dir=made", "device=cpu", "precision=fp32", "count=2"]
    run("generate", *common, "task=text -> pen", "prompt=draw 1")
    assert len((tmp_path / "made" / "outputs.jsonl").read_text().splitlines()) == 2
    run("generate", *common, "task=pen_to_text", "prompt=a0 b1")
    why = one_line(run("generate", *common, "task=pen", check=False))
    assert "task pen: the model was made before that task, or without it; it learned pen_to_text, text_to_pen" in why

    tuned = [
        "checkpoint=out",
        "trust=true",
        "output_dir=tuned",
        "method=full",
        "compile=false",
        "tokens=300",
        "canvas={}",
        "judged={}",
    ]
    tuned += ["data={own: {train: {_component_: pens.strokes}, tasks: {pen: 1}}}", "batch={logical: 8, micro: 8}"]
    run("run", "finetune", *tuned, "device=cpu", "precision=fp32")
    further = load_processor(tmp_path / "tuned", trust=True)
    del sys.modules["pens"]
    assert further.vocabulary.tasks == (*processor.vocabulary.tasks, "pen")
    tuned[-2] = "data={own: {train: {_component_: pens.strokes}, tasks: {text_to_smell: 1}}}"
    tuned[2] = "output_dir=not"
    why = one_line(run("run", "finetune", *tuned, "device=cpu", check=False))
    assert "task text_to_smell of data.own needs tokenizers.smell; there are pen, text" in why


def test_a_tokenizer_that_lacks_a_method_is_named(tmp_path):
    (tmp_path / "pens.py").write_text(MINE)
    (tmp_path / "pen.yaml").write_text(CONFIG)
    for command in (["validate", "pretrain"], ["run", "pretrain"]):
        done = mdm(*command, "--config", "pen.yaml", "tokenizers.pen={_component_: pens.OneWay}", cwd=tmp_path, check=False)
        assert one_line(done) == "mdm: tokenizers.pen: pens.OneWay lacks decode, save, which a Tokenizer has"
