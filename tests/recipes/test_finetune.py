"""Finetuning a tiny pretrained model: LoRA, QLoRA, all of it, and with a modality more."""

import json
import re

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from mdm.config import UserError, read_yaml
from mdm.models import builders
from mdm.models.adapters import LoraSettings, adapter_state, add_lora, merged, num_bytes
from mdm.models.folder import load_model
from mdm.training import record
from mdm.training.history import read_history
from tests.processes import in_processes
from tests.recipes.conftest import CONFIG, in_process, mdm

FINETUNE = """
base: finetune
data:
  after:
    train: {_component_: components.data.digits.digits, split: test, caption: "after {}", after: 1}
    validation: {_component_: components.data.digits.digits, split: judge, caption: "after {}", after: 1}
    tasks: {text_to_image: 1.0}
lora: {rank: 4}
batch: {logical: 12, micro: 12}
tokens: 3000
samples: 10
validation_samples: 8
device: cpu
precision: fp32
compile: "false"
log_every_steps: 1
judged:
  image:
    judge: {_component_: mdm.evaluation.judges.ImageJudge, samples: {_component_: components.data.digits.digits, split: judge}}
    test: {_component_: components.data.digits.digits, split: test}
    caption: a handwritten {}
    write: text_to_image
    read: image_to_text
crossed:
  next_digit:
    task: text_to_image
    judged: image
    test: {_component_: components.data.digits.digits, split: test, caption: "after {}", after: 1}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of text and images, trained a little, beside a finetuning's config."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "pretrain.yaml").write_text(CONFIG.format(output_dir=folder / "out"))
    mdm("run", "pretrain", "--config", folder / "pretrain.yaml", "tokens=2000")
    (folder / "finetune.yaml").write_text(FINETUNE)
    return folder / "out"


def command(base, *settings):
    return ["run", "finetune", "--config", base.parent / "finetune.yaml", f"checkpoint={base}", *settings]


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_finetuning_writes_a_model_and_what_it_could_do_before_and_after(base, run, tmp_path, method):
    out = tmp_path / method
    done = run(*command(base, f"method={method}", f"output_dir={out}"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"task_accuracy", "largest_base_accuracy_drop", "seconds", "weights_mib", "before", "after"} <= set(metrics)
    assert metrics["largest_base_accuracy_drop"] == max(
        metrics["before"][k] - metrics["after"][k] for k in ("text_to_image_accuracy", "image_to_text_accuracy")
    )
    assert "next_digit_accuracy" in metrics["after"]
    assert "->" in done.stdout
    before, after = weights(base), weights(out)
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if method == "full":
        assert moved == set(before)
    else:
        assert moved == {n for n in before if n.startswith("blocks.") and n.endswith("weight")}  # norms and embeddings stay
        assert len(safetensors.torch.load_file(out / "adapter" / "adapter.safetensors")) == 2 * len(moved)
        assert metrics["trained_parameters"] < sum(v.numel() for v in before.values()) / 3
    run("generate", f"checkpoint={out}", "task=text_to_image", "prompt=after two", "count=1", f"output_dir={tmp_path / 'made'}")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_finetune_to_the_model_of_one(base, tmp_path, method):
    settings = [f"checkpoint={base}", f"method={method}", "tokens=2000"]
    config, one, two = base.parent / "finetune.yaml", tmp_path / "one", tmp_path / "two"
    in_process("finetune", config, *settings, f"output_dir={one}", "judged={}", "crossed={}")
    in_processes(2, in_process, "finetune", config, *settings, f"output_dir={two}", "judged={}", "crossed={}")
    expected, found = weights(one), weights(two)
    assert all(torch.equal(found[n], weights(base)[n]) == torch.equal(expected[n], weights(base)[n]) for n in expected)
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=2e-4)
    if method == "lora":
        trained = [safetensors.torch.load_file(f / "adapter" / "adapter.safetensors") for f in (one, two)]
        assert_close(trained[1], trained[0], rtol=0, atol=2e-4)


def test_four_bits_are_for_one_process(base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="method: qlora is for one process"):
        in_process("finetune", base.parent / "finetune.yaml", f"checkpoint={base}", "method=qlora")


def test_a_finetuning_resumes_bit_exactly(base, run, tmp_path):
    import shutil

    from mdm.training.checkpoint import complete

    settings = ["checkpoint_every_tokens=1000", "judged=null", "crossed=null"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*command(base, f"output_dir={whole}", *settings))
    shutil.copytree(whole, parts)
    for late in complete(parts / "checkpoints")[1:]:
        shutil.rmtree(late)
    assert "Resuming from" in run(*command(base, f"output_dir={parts}", *settings)).stdout
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_base_could_do_is_not_taken_from_a_run_that_kept_nothing(tmp_path):
    """Its before.json may be of another checkpoint."""
    from types import SimpleNamespace

    from mdm.recipe import load_recipe

    (tmp_path / "before.json").write_text('{"a": 1.0}')
    score = load_recipe("finetune").score_base
    cfg, hw = SimpleNamespace(judged={}), SimpleNamespace(main=True)
    assert score(cfg, hw, tmp_path, resumed=True) == {"a": 1.0}
    assert score(cfg, hw, tmp_path, resumed=False) == {}


def test_a_modality_is_added_behind_the_ids_there_are(base, run, tmp_path):
    out = tmp_path / "out"
    speech = "{train: {_component_: components.data.speech.spoken_words, split: test, voices: 1}, tasks: {text_to_speech: 1.0}}"
    settings = ["method=full", f"data.speech={speech}", "canvas.audio=56", "max_length=96", "judged=null", "crossed=null"]
    audio = "tokenizers.audio={_component_: components.tokenizers.audio.Codec2Tokenizer}"
    run(*command(base, f"output_dir={out}", *settings, audio))
    (old_model, old), (model, processor) = load_model(base), load_model(out)
    assert processor.vocabulary.modalities == ("text", "image", "audio")
    assert processor.vocabulary.ranges[:2] == old.vocabulary.ranges
    for name in old.vocabulary.specials:
        assert processor.vocabulary.special(name) == old.vocabulary.special(name)
    assert len(set(processor.vocabulary._ids.values())) == len(processor.vocabulary.specials)
    assert processor.vocabulary.ranges[2].start == old.vocabulary.size
    assert (
        model.config.vocab_size
        == processor.vocabulary.size
        == old.vocabulary.size
        + 512
        + 512
        + 16
        + 64
        + 2
        + len([s for s in processor.vocabulary.specials if s.startswith("task:") and not old.vocabulary.has(s)])
    )
    assert (model.config.max_length, old_model.config.max_length) == (96, 64)
    assert record.of(out).learned == [*record.of(base).learned, "text_to_speech"]
    run(
        "generate", f"checkpoint={out}", "task=text_to_speech", "prompt=a spoken two", "count=1", f"output_dir={tmp_path / 'w'}"
    )


def adapted(quantize_base=False, seed=0):
    model = builders.nano(40, 32, 64, 2, 2)
    model.init_weights(torch.Generator().manual_seed(seed))
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    settings = LoraSettings(rank=4, alpha=8.0)
    add_lora(model, settings, quantize_base)
    return model, plain, settings


def test_lora_starts_where_the_model_was_and_merges_to_the_same_outputs():
    model, plain, settings = adapted()
    reference = builders.nano(40, 32, 64, 2, 2)
    reference.load_state_dict(plain)
    tokens = torch.randint(0, 40, (2, 9))
    assert_close(model(tokens), reference(tokens), rtol=0, atol=0)
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            p.data.normal_(0, 0.1, generator=g)
    assert (model(tokens) - reference(tokens)).abs().max() > 0.1
    reference.load_state_dict(merged(model, settings))
    assert_close(model(tokens), reference(tokens), rtol=0, atol=1e-5)
    name = "blocks.0.attn.q_proj"
    by_hand = plain[f"{name}.weight"] + 2.0 * model.get_parameter(f"{name}.lora_b.weight") @ model.get_parameter(
        f"{name}.lora_a.weight"
    )
    assert_close(merged(model, settings)[f"{name}.weight"], by_hand)


def test_only_the_adapter_is_trained_and_what_is_asked_for():
    model, _, _ = adapted()
    assert all("lora_" in name for name in adapter_state(model))
    model = builders.nano(40, 32, 64, 2, 2)
    add_lora(model, LoraSettings(modules=["q_proj"], train=["embedding"]))
    trained = set(adapter_state(model))
    assert {n for n in trained if "lora" not in n} == {"embedding.weight", "unembedding.weight"}
    assert len(trained) == 2 + 2 * 2


def test_qlora_keeps_the_weights_in_half_a_byte_and_merges_what_it_computes():
    model, plain, settings = adapted(quantize_base=True)
    tokens = torch.randint(0, 40, (2, 9))
    frozen = [m.weight for m in model.modules() if hasattr(m, "lora_a")]
    numel = sum(w.numel() for w in frozen)
    assert num_bytes(frozen) < 0.6 * numel  # 4 bits a weight, 8 bits for every 64 of them, and a table
    back = builders.nano(40, 32, 64, 2, 2)
    state = merged(model, settings)
    back.load_state_dict(state)
    assert_close(model(tokens), back(tokens), rtol=0, atol=1e-4)
    for name in ("blocks.0.mlp.w1.weight", "blocks.1.attn.v_proj.weight"):
        error = (state[name] - plain[name]).square().mean().sqrt() / plain[name].std()
        assert 0.02 < error < 0.15  # NF4's error on normal weights is 0.09 (2305.14314)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=dora"], "method: 'dora' is not one of full, lora, qlora"),
        (["lora.rank=0"], "lora: rank must be at least 1"),
        (["lora.modules=[qproj]"], "lora.modules: qproj: not among the model's linear layers"),
        (["model.width=64"], "model: it comes from checkpoint; only max_length may be set"),
        (["tokenizers.audio={_component_: components.tokenizers.audio.Codec2Tokenizer}", "canvas.audio=57"], "multiple of 4"),
        (["tokenizers.image={_component_: components.tokenizers.image.GreyPatchTokenizer, size: 8}"], "it has image already"),
        (["checkpoint=nowhere"], "checkpoint=nowhere: no model there"),
        (["data=null"], "data: name at least one source"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(base, tmp_path, settings, message):
    words = [f"checkpoint={base}", f"output_dir={tmp_path}", "judged=null", "crossed=null", *settings]
    with pytest.raises(UserError, match=re.escape(message)):
        in_process("finetune", base.parent / "finetune.yaml", *words)


def test_a_config_takes_out_or_replaces_what_it_builds_on(tmp_path):
    (tmp_path / "low.yaml").write_text("a: {_component_: x.y, b: 1}\nc: {d: {e: 1}, f: 2}\ng: {h: 1}\n")
    (tmp_path / "high.yaml").write_text("base: low.yaml\na: {_component_: x.z, i: 3}\nc: {d: null, f: 3}\ng: {}\n")
    assert read_yaml(tmp_path / "high.yaml") == {"a": {"_component_": "x.z", "i": 3}, "c": {"f": 3}, "g": {}}


def test_lora_of_an_unknown_parameter_is_an_error():
    with pytest.raises(UserError, match=r"lora\.train: no parameter has 'head' in its name"):
        add_lora(builders.nano(40, 32, 64, 2, 2), LoraSettings(train=["head"]))


def test_an_open_model_learns_to_respond_and_only_responses_are_masked(run, tmp_path):
    from tests.mdm.models.test_open_models import LLADA, write

    write(tmp_path / "open", LLADA)
    chat = [{"ask": f"w1 w{i}", "say": f"w{i} w{i}"} for i in range(2, 8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chat))
    source = f"data.chat.train.path={tmp_path / 'chat.jsonl'}"
    fields = ["data.chat.train.fields.prompt=ask", "data.chat.train.fields.text=say", "data.chat.train.template=w9 {}"]
    small = ["canvas.text=4", "tokens=1500", "batch.logical=12", "batch.micro=12", "optimizer.lr=1e-2", "method=lora"]
    machine = ["device=cpu", "precision=fp32", "compile=false", "log_every_steps=1"]
    words = [f"checkpoint={tmp_path / 'open'}", f"output_dir={tmp_path / 'out'}", source, *fields, *small, *machine]
    run("run", "finetune", "--config", "finetune_instruct", *words)
    losses = [line["loss"] for line in read_history(tmp_path / "out" / "history.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] / 2
    _, processor = load_model(tmp_path / "out")
    sequence = processor.response({"prompt": "w9 w1 w3", "text": "w3 w3"})
    assert sequence.tokens.tolist() == [9, 1, 3, 3, 3, 57, 57]  # the fill is end tokens
    assert sequence.maskable.tolist() == [False] * 3 + [True] * 4
    assert processor.response({"prompt": "w9 w1 w3", "text": "w3 w3"}, drop_prompt=True).tokens[:3].tolist() == [58] * 3
    made = ["task=text", "prompt=w9 w1 w5", "length=4", "count=1", f"output_dir={tmp_path / 'made'}"]
    run("generate", f"checkpoint={tmp_path / 'out'}", *made)
    with pytest.raises(ValueError, match=r"a response of 4 tokens and its end do not fit canvas\.text = 4"):
        processor.response({"prompt": "w1", "text": "w1 w1 w1 w1"})
