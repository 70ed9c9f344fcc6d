"""A masked or an autoregressive checkpoint goes on in blocks: every start, every method, and what is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from components.block_diffusion.layout import Layout
from components.block_diffusion.masker import BlockMasker
from components.kernels import Hybrid
from components.maskers import FixedCountMasker
from components.samplers import Confidence
from components.samplers.left_to_right import LeftToRight, SelfSpeculation
from components.sequences import collate, response_sequence, task_sequence
from components.vocabulary import Vocabulary
from components.weightings import Noise
from mdm.config import UserError, find_config
from mdm.generation.editing import infill
from mdm.generation.generate import generate
from mdm.hardware import Hardware
from mdm.models.folder import export, load_config, load_model
from mdm.models.open_formats import FORMATS
from mdm.models.open_models import load_open, save_open
from mdm.models.shape import in_blocks
from mdm.training.checkpoint import complete
from mdm.training.history import read_history
from tests.mdm.models.test_open_models import DREAM, LLADA, LLAMA3, QWEN3, write
from tests.recipes.conftest import CONFIG, in_process

OPEN = {"qwen3": QWEN3, "llama": LLAMA3, "llada": LLADA, "dream": DREAM}
AUTOREGRESSIVE = ("qwen3", "llama")
SMALL = [
    "blocks={text: 4}", "data.text.pack=16", "tokens=400", "batch.logical=4", "batch.micro=4", "optimizer.lr=1e-2",
    "device=cpu", "precision=fp32", "compile=false", "log_every_steps=1", "checkpoint_every_tokens=200",
]  # fmt: skip
MASKED = "loss.next_token=0"  # of what is not causal


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Tiny open checkpoints, and texts for them."""
    folder = tmp_path_factory.mktemp("starts")
    for name, config in OPEN.items():
        write(folder / name, config)
    texts = [{"text": " ".join(f"w{(i + j) % 9}" for j in range(3 + i % 9))} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    return folder


def words(starts, name, out, *settings):
    return [
        f"checkpoint={starts / name}",
        f"output_dir={out}",
        f"data.text.train.path={starts / 'texts.jsonl'}",
        *SMALL,
        *settings,
    ]


def adapt(starts, name, out, *settings):
    """A short adaptation by the packaged config."""
    in_process("finetune", find_config("adapt"), *words(starts, name, out, *settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3", []),
        ("qwen3", ["method=lora", "causal=false", MASKED]),
        ("llama", ["method=qlora"]),
        ("llada", ["method=lora", MASKED]),
        ("dream", ["method=full", MASKED]),
    ],
)
def test_every_start_learns_in_blocks_and_decodes_with_an_exact_cache(starts, tmp_path, name, settings):
    adapt(starts, name, tmp_path, *settings)
    losses = [line["loss"] for line in read_history(tmp_path / "history.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    before, (model, processor) = load_config(starts / name), load_model(tmp_path)
    causal = name in AUTOREGRESSIVE and "causal=false" not in settings
    own = model.config
    assert (own.blocks, own.blocks_from_start, own.causal, own.predicts_next) == ({"text": 4}, True, causal, False)
    assert (own.tied_embeddings, own.head_size, own.vocab_size) == (before.tied_embeddings, before.head_size, before.vocab_size)
    prompt = {"text": infill(processor, "w1 w2 w3 [mask:7]")}
    settings = ("text", [prompt], Confidence(num_steps=2, temperature=0.0), 0.0)
    made = {cache: generate(model, processor, *settings, cache=cache) for cache in ("exact", "off")}
    assert torch.equal(made["exact"].tokens, made["off"].tokens)
    assert torch.equal(made["exact"].forwards, made["off"].forwards)


def test_a_model_of_ours_goes_on_in_blocks_whatever_its_noise_was(untrained, starts, tmp_path, capsys):
    """With other modalities, task tokens and hybrid noise: blocks are the canvas', and what it undoes now is said."""
    model, processor = load_model(untrained)
    model.config = replace(model.config, noise={"text": Noise(Hybrid())})
    export(tmp_path / "start" / "model", model, processor, Hardware(torch.device("cpu"), 0, 1, False))
    text = [f"data.text.train.path={starts / 'texts.jsonl'}", f"checkpoint={tmp_path / 'start'}", *SMALL, MASKED]
    in_process("finetune", find_config("adapt"), f"output_dir={tmp_path / 'out'}", *text, "blocks={text: 4, audio: 8}")
    assert "The checkpoint undoes Hybrid(p_u=0.1, gamma=1.0) of text; here it learns to undo masks" in capsys.readouterr().out
    model, processor = load_model(tmp_path / "out")
    own = model.config
    assert (own.blocks, own.blocks_from_start, own.noise) == ({"text": 4, "audio": 8}, False, {})
    for task, prompt in (("text_to_speech", {"text": "a"}), ("text", {"text": infill(processor, "a se[mask:9]")})):
        sampler = Confidence(num_steps=2, temperature=0.0)
        a, b = (generate(model, processor, task, [prompt], sampler, 0.0, cache=cache).tokens for cache in ("exact", "off"))
        assert torch.equal(a, b)


def test_an_adaptation_resumes_bit_exactly_and_in_the_blocks_it_had(starts, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    adapt(starts, "qwen3", whole)
    shutil.copytree(whole, parts)
    for late in complete(parts / "checkpoints")[1:]:
        shutil.rmtree(late)
    adapt(starts, "qwen3", parts)
    a, b = (safetensors.torch.load_file(f / "model" / "model.safetensors") for f in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for key, value in (("blocks", "{text: 8}"), ("causal", "true")):
        with pytest.raises(UserError, match=f"holds a run with another `{key}`"):
            adapt(starts, "qwen3", parts, f"{key}={value}")


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_kept_causal_it_writes_from_the_start_what_transformers_writes_greedily(starts, name):
    """Before a step is trained finished tokens see what they saw, and predict what they predicted."""
    transformers = pytest.importorskip("transformers")
    model, processor = load_open(starts / name)
    model.change(in_blocks(model.config, {"text": 4}, None, processor.vocabulary))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(starts / name, dtype=torch.float32).eval()
    given = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=14, do_sample=False, eos_token_id=None,
            pad_token_id=57, suppress_tokens=[processor.vocabulary.mask_id],
        )  # fmt: skip
    prompt = {"text": infill(processor, "w1 w2 w3 [mask:14]")}
    for cache in ("exact", "off"):
        for sampler in (LeftToRight(temperature=0.0), SelfSpeculation(temperature=0.0)):
            made = generate(model, processor, "text", [prompt], sampler, 0.0, cache=cache, stop_at_end=False)
            assert torch.equal(made.tokens, expected)
    with pytest.raises(ValueError, match="from left to right the first token needs one before it: give a prompt"):
        generate(model, processor, "text", [{"text": infill(processor, "[mask:6]")}], LeftToRight(), 0.0)


def test_a_qwen3_in_blocks_that_see_themselves_whole_is_an_sdar_to_the_bit(starts, tmp_path):
    adapt(starts, "qwen3", tmp_path / "run", "causal=false", MASKED)
    model, processor = load_model(tmp_path / "run")
    save_open(tmp_path / "sdar", model, processor, FORMATS["sdar"])
    assert json.loads((tmp_path / "sdar" / "config.json").read_text())["block_size"] == 4
    again, other = load_open(tmp_path / "sdar")
    assert again.config == model.config
    assert other.vocabulary == processor.vocabulary
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    model.change(in_blocks(model.config, {"text": 4}, True, processor.vocabulary))
    with pytest.raises(UserError, match="a model with causal = True cannot be written as SDARForCausalLM"):
        save_open(tmp_path / "causal", model, processor, FORMATS["sdar"])


def test_of_text_alone_blocks_of_the_canvas_are_those_of_the_start():
    """Packed documents, a response behind its prompt, padding: the same blocks of all that there is."""
    text = Vocabulary.of_text(61, 58, 57, 57)
    sequences = [task_sequence(text, "text", {"text": torch.arange(n)}, {}) for n in (5, 9, 4)]
    sequences.append(response_sequence(text, torch.arange(6), torch.arange(5), 8))
    batch = collate([sequences[:2], sequences[2:]], [[0, 1], [2, 3]], text.pad_id, 24)
    masks = FixedCountMasker(text.mask_id)
    canvas, start = (BlockMasker(masks, Layout({"text": 4}, ("text",), first))(batch) for first in (False, True))
    there = batch.document >= 0
    assert torch.equal(canvas.block[there], start.block[there])
    assert torch.equal(canvas.noisy, start.noisy)
    ours = Vocabulary.build({"text": (40,), "audio": (4, 4)}, ("text",))
    shape = FORMATS["qwen3"].config(QWEN3, "it")
    assert not in_blocks(shape, {"text": 4}, None, ours).blocks_from_start
    assert in_blocks(shape, {"text": 4}, None, text).blocks_from_start


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3", ["blocks=32"], "blocks: "),
        ("qwen3", ["blocks={}"], "blocks: {} must name some of text, e.g. blocks={text: 32}"),
        ("qwen3", ["blocks={audio: 8}"], "blocks: {'text': 4, 'audio': 8} must name some of text"),
        ("qwen3", ["blocks={text: 0}"], "blocks.text must be a whole number of positions, at least 1; got 0"),
        ("qwen3", ["blocks={text: half}"], "blocks.text"),
        ("qwen3", ["blocks=null"], "masker: components.maskers.NextToken goes with model.autoregressive=true"),
        ("qwen3", ["blocks=null", "causal=true"], "causal=True is of finished blocks: set blocks"),
        ("qwen3", ["causal=false"], "loss.next_token=0.3 is for blocks whose finished tokens see none behind them"),
        ("llada", [], "loss.next_token=0.3 is for blocks whose finished tokens see none behind them"),
        ("qwen3", ["loss.next_token=-1"], "loss.next_token must be at least 0, or null, which is off; got -1.0"),
        ("qwen3", ["masker={_component_: components.maskers.NextToken}"], "NextToken is for a model without blocks; in blocks"),
        ("qwen3", ["model.predicts_next=true"], "model: it comes from checkpoint"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_read(starts, tmp_path, monkeypatch, name, settings, message):
    monkeypatch.setattr("mdm.data.pipeline.instantiate", None)  # what opens sources
    with pytest.raises(UserError) as error:
        adapt(starts, name, tmp_path / "out", *settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_blocks_that_cut_a_frame_are_said_by_pretrain_and_finetune_and_validate(untrained, run, tmp_path):
    data = [
        "data.text.pack=32",
        f"output_dir={tmp_path}",
        f"checkpoint={untrained}",
        "blocks={audio: 6}",
        MASKED,
    ]
    source = "data.text.train={_component_: components.data.reference.language_reference, split: test}"
    done = run("validate", "finetune", "--config", "adapt", *data, source, check=False)
    assert done.returncode == 2
    assert "blocks.audio=6 cuts a frame of 4 tokens in two; take a multiple of 4" in done.stderr
    (tmp_path / "blocks.yaml").write_text(CONFIG.format(output_dir=tmp_path / "out"))
    for blocks, message in (
        ("{text: 0}", "model.blocks.text must be a whole number of positions, at least 1; got 0"),
        ("{audio: 4}", "model: blocks.audio: there is no such modality; there are text, image"),
    ):
        done = run("validate", "pretrain", "--config", tmp_path / "blocks.yaml", f"model.blocks={blocks}", check=False)
        assert done.returncode == 2
        assert message in done.stderr
