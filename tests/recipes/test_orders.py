"""Two streams through the recipes: from a checkpoint by A3's curriculum, from scratch, resumed; and what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from components.orders import Curriculum, OrderMasker, Permuted, Sequential
from components.samplers import Confidence, InOrder
from mdm.config import UserError, find_config
from mdm.data.corruption import horizon
from mdm.data.settings import StreamSettings
from mdm.generation.editing import infill
from mdm.generation.generate import generate
from mdm.models.folder import load_config, load_model
from mdm.training.history import read_history
from tests.mdm.models.test_open_models import LLADA, QWEN3, write
from tests.recipes.conftest import CONFIG, in_process
from tests.recipes.test_adapt import SMALL

MASKER = "masker={_component_: components.orders.OrderMasker}"


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    for name, config in {"qwen3": QWEN3, "llada": LLADA}.items():
        write(folder / name, config)
    texts = [{"text": " ".join(f"w{(i + j) % 9}" for j in range(3 + i % 9))} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    return folder


def adapt(starts, name, out, *settings):
    own = [s for s in SMALL if not s.startswith("blocks")]
    named = [f"checkpoint={starts / name}", f"output_dir={out}", f"data.text.train.path={starts / 'texts.jsonl'}"]
    in_process("finetune", find_config("adapt_orders"), *named, *own, *settings)


@pytest.mark.parametrize(("name", "method"), [("qwen3", "full"), ("llada", "lora")])
def test_a_checkpoint_learns_any_order_by_the_five_stages(starts, tmp_path, name, method):
    adapt(starts, name, tmp_path, f"method={method}")
    losses = [line["loss"] for line in read_history(tmp_path / "history.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    before, (model, processor) = load_config(starts / name), load_model(tmp_path)
    own = model.config
    assert (own.orders, own.causal, own.predicts_next, own.blocks) == ("two_streams", False, False, {})
    assert (own.tied_embeddings, own.vocab_size) == (before.tied_embeddings, before.vocab_size)
    prompt = [{"text": infill(processor, "w1 w2 w3 [mask:7]")}]
    for sampler in (InOrder(temperature=0.0), Confidence(num_steps=2, temperature=0.0)):
        made = [generate(model, processor, "text", prompt, sampler, 0.0, cache=cache).tokens for cache in ("exact", "off")]
        assert torch.equal(*made)


def test_the_horizon_counts_the_rows_of_each_stream():
    """Of three rows one is text of 10 positions, two are images of 5 + 4 (the task's token, two boundaries, a prompt)."""
    from mdm.data.settings import row_length

    source = {"_component_": "x"}
    data = {
        "text": StreamSettings({"text": 1.0}, 1, source, pack=10),
        "image": StreamSettings({"text_to_image": 1.0}, 2, source),
    }
    canvas = {"text": 1, "image": 5}
    image = row_length(data["image"], "text_to_image", canvas)
    rows = horizon(data, canvas, 30 * (10 + 2 * image))
    assert rows == {"text": 30, "image": 60}


TINY = ["model.orders=two_streams", MASKER, "tokens=4000", "validation_samples=8"]


def test_a_run_tells_its_maskers_how_many_rows_are_to_come(tmp_path, monkeypatch):
    """By which a curriculum goes: twice as many tokens are twice as many rows."""
    path, seen, begun = tmp_path / "config.yaml", [], OrderMasker.__post_init__
    path.write_text(CONFIG.format(output_dir=tmp_path / "out"))
    monkeypatch.setattr(OrderMasker, "__post_init__", lambda self: seen.append(self.horizon) or begun(self))

    def stop(*args):
        raise KeyboardInterrupt  # all is built, and nothing is trained

    monkeypatch.setattr("mdm.training.checkpoint.check_space", stop)
    rows = []
    for tokens in (40_000, 80_000):
        seen.clear()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            in_process("pretrain", path, *TINY[:2], f"tokens={tokens}")
        rows.append(max(filter(None, seen)))
    assert rows[0] > 100
    assert rows[1] == pytest.approx(2 * rows[0], abs=1)


def test_it_trains_validates_and_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(output_dir=tmp_path / "out"))
    in_process("pretrain", path, *TINY)
    lines = read_history(tmp_path / "out" / "history.jsonl")
    assert any("bits/text_to_image" in line for line in lines)
    in_process("pretrain", path, *TINY[:2], "tokens=8000", "validation_samples=8")
    assert load_config(tmp_path / "out").two_streams


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["model.orders=two_streams"], "components.orders.OrderMasker goes with model.orders=two_streams, and that with it"),
        ([MASKER], "for every stream (a `data.NAME.masker` too); got OrderMasker with model.orders=null"),
        (
            ["model.orders=two_streams", MASKER, "data.text.masker={_component_: BernoulliMasker}"],
            "and that with it, for every stream (a `data.NAME.masker` too)",
        ),
        (["data.text.masker={_component_: OrderMasker}"], "components.orders.OrderMasker goes with model.orders=two_streams"),
        (
            [
                "model.orders=two_streams",
                "masker={_component_: OrderMasker, order: {_component_: Curriculum, stages: "
                "{0: {_component_: Sequential}, 0.9: {_component_: Strided, streams: 5}}}}",
            ],
            "Strided: streams = 5 do not divide a canvas of",
        ),
        (["model.orders=any"], "model.orders must be one of two_streams, learned, learned_by_token, got 'any'"),
        (
            ["model.orders=two_streams", "masker={_component_: OrderMasker, order: {_component_: Permuted, group: 0}}"],
            "Permuted: group must be a whole number of positions, at least 1; got 0",
        ),
        (
            ["model.orders=two_streams", "masker={_component_: OrderMasker, order: {_component_: Strided, streams: 5}}"],
            "Strided: streams = 5 do not divide a canvas of",
        ),
        (
            ["model.orders=two_streams", "masker={_component_: OrderMasker, order: {_component_: Explicit, order: [0, 0]}}"],
            "order is no permutation: it has to name each of 0 to 1 once",
        ),
        (["model.orders=two_streams", "model.blocks={text: 4}", MASKER], "what a position sees is its order's to say"),
        (["model.orders=two_streams", MASKER, "loss.weighting=plain"], "in an order every token weighs the same: set nelbo"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(tmp_path, settings, what):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(output_dir=tmp_path / "out"))
    with pytest.raises(UserError) as said:
        in_process("pretrain", path, *settings)
    assert what in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("settings", [["orders=learned"], ["orders=two_streams", "blocks={text: 4}"]])
def test_a_checkpoint_goes_on_in_two_streams_or_in_blocks(starts, tmp_path, settings):
    with pytest.raises(UserError, match="a checkpoint goes on with two_streams alone, and not in blocks"):
        adapt(starts, "qwen3", tmp_path, *settings)


def test_the_curricula_of_the_packaged_configs_are_those_of_the_papers():
    from mdm.config import load
    from mdm.recipe import load_recipe

    cfg = load(load_recipe("finetune").Settings, find_config("adapt_orders"), ["checkpoint=x"])
    from mdm.config import instantiate

    order = instantiate(cfg.masker["order"], "masker.order")
    assert order == Curriculum({0.0: Sequential(1), 0.2: Sequential(2), 0.4: Sequential(4), 0.6: Permuted(4), 0.8: Permuted(8)})
