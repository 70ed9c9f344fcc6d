"""LoRA on every kind of model that loads, at every layer; every precision of folder and run; and nothing lost in merging."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mdm.config import UserError
from mdm.hardware import Hardware
from mdm.models.adapters import LoraSettings, add_lora, merged
from mdm.models.folder import load_model
from mdm.models.open_formats import FORMATS, find_format
from mdm.models.open_models import from_open, load_open, save_open, to_open
from mdm.models.transformer import MaskedDiffusionModel
from tests.mdm.models.test_open_models import CONFIGS, VOCAB, write
from tests.mdm.models.test_weights import ours

TOKENS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
OWN = {"norm after": {}, "norm before": {"norm_before_rope": True, "qkv_bias": True}, "experts": {"num_experts": 3}}


def loaded(kind, folder):
    """A model of that kind: an open one's, or ours."""
    if kind in CONFIGS:
        write(folder, CONFIGS[kind])
    else:
        ours(folder, **OWN[kind])
    return load_model(folder)


def layers(model):
    """The names of a block's linear layers, without the path."""
    return sorted({n.split(".")[-1] for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear)})


@torch.no_grad()
def trained_a_little(model, seed=1):
    """Some of B, as an optimizer would leave it."""
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_b" in name:
            p.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed + i))


@pytest.mark.parametrize("kind", [*CONFIGS, *OWN])
def test_with_b_zero_no_layer_of_any_model_computes_anything_else(kind, tmp_path):
    model, _ = loaded(kind, tmp_path)
    assert {"q_proj", "k_proj", "v_proj", "output_proj"} < set(layers(model))
    expected = model(TOKENS)
    for layer in layers(model):
        adapted = copy.deepcopy(model)
        add_lora(adapted, LoraSettings(rank=2, modules=[layer]))
        assert torch.equal(adapted(TOKENS), expected), layer
        trained_a_little(adapted)
        assert not torch.equal(adapted(TOKENS), expected), layer
        adapted = adapted.double()  # but for its norms, which are float32: the products round by more
        plain = MaskedDiffusionModel(model.config).eval().double()
        plain.load_state_dict(merged(adapted, LoraSettings(rank=2, modules=[layer])))
        assert_close(plain(TOKENS), adapted(TOKENS), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_is_taken_merged_and_written_in_the_models_own_format(kind, tmp_path):
    model, processor = loaded(kind, tmp_path / "in")
    settings = LoraSettings(rank=2, modules=layers(model))
    add_lora(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # the first moves B alone, as B = 0 hides A
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    form = FORMATS[kind]
    plain = MaskedDiffusionModel(model.config).eval()
    plain.load_state_dict(merged(model, settings))
    save_open(tmp_path / "out", plain, processor, form)
    again, _ = load_open(tmp_path / "out")
    assert_close(again(TOKENS), model(TOKENS), rtol=0, atol=1e-4)
    theirs = to_open(form, plain.config, plain.state_dict())
    assert find_format(CONFIGS[kind]) is form
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in from_open(form, plain.config, theirs, "it").items())


def test_a_layer_whose_forward_pass_would_be_lost_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q_proj": Doubled(4, 4)})])})
    with pytest.raises(UserError, match="no LoRA is known for a layer of Doubled"):
        add_lora(model, LoraSettings(modules=["q_proj"]))


def finetuned(model, processor, method, bf16):
    """A model as `mdm run finetune` makes it of a checkpoint's, with the run it belongs to."""
    from mdm.recipe import load_recipe

    finetune = load_recipe("finetune")
    run = object.__new__(finetune.Finetune)
    run.cfg = finetune.Settings(
        checkpoint="it", output_dir="it", method=method, lora=LoraSettings(modules=["q_proj", "v_proj"])
    )
    run.hw, run.base, run.vocabulary = Hardware(torch.device("cpu"), 0, 1, bf16), (model, processor), processor.vocabulary
    return run.make_model()[0], run


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("folder", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_method_runs_on_every_folder_in_every_precision(method, folder, bf16, tmp_path):
    for kind in CONFIGS:
        write(tmp_path / kind, CONFIGS[kind])
        model, run = finetuned(*load_open(tmp_path / kind, dtype=folder), method, bf16)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        kept = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert kept <= {torch.bfloat16 if method == "qlora" and bf16 and folder == torch.bfloat16 else torch.float32}
        optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
        for _ in range(3):
            optimizer.zero_grad()
            with run.hw.autocast():
                hidden = model.hidden(TOKENS)
                loss = nn.functional.cross_entropy(
                    (hidden @ model.unembedding.weight.T).float().flatten(0, 1), TOKENS.flatten()
                )
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("size", [1e-3, 1e-4])
@pytest.mark.parametrize("folder", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["lora", "qlora"])
@torch.no_grad()
def test_the_whole_of_an_update_survives_being_merged_and_saved(method, folder, size, tmp_path):
    """Share of B A that is found in the saved weights, in the direction it has: in bfloat16 it is 0.7 and 0.08."""
    from mdm.models.folder import export

    write(tmp_path / "in", CONFIGS["llada"])
    base, processor = load_open(tmp_path / "in", dtype=folder)
    model, run = finetuned(base, processor, method, True)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            p.normal_(0, 1, generator=torch.Generator().manual_seed(0))
            update = run.cfg.lora.alpha / run.cfg.lora.rank * p @ model.get_parameter(name.replace("lora_b", "lora_a"))
            p.mul_(size / update.std())
    name = "blocks.0.attn.q_proj"
    start = model.get_parameter(f"{name}.weight").detach()
    start = start.get_original_weight() if method == "qlora" else start
    update = 2.0 * model.get_parameter(f"{name}.lora_b.weight") @ model.get_parameter(f"{name}.lora_a.weight")
    assert update.std().item() == pytest.approx(size, rel=1e-3)
    export(tmp_path / "out", model, processor, run.hw, merged(model, run.cfg.lora))
    found = load_model(tmp_path / "out")[0].get_parameter(f"{name}.weight") - start.float()
    assert ((found * update).sum() / update.square().sum()).item() == pytest.approx(1.0, abs=1e-3)
    assert_close(found, update, rtol=0, atol=1e-6)
