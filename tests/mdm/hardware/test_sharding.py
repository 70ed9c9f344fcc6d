"""A model over four processes computes what it computes on one: losses, gradients, their norm, and weights after steps."""

import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from components.learned_orders import LearnedOrderMasker
from components.types import Batch
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.data.pipeline import micro_batch
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import forward_loss
from mdm.hardware import Hardware, MeshSettings, hardware, local, parallelize, reshard, shard, sync_gradients, whole
from mdm.models import builders
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.training import checkpoint
from mdm.training.checkpoint import Checkpoints
from tests.processes import in_processes

ALONE = Hardware(torch.device("cpu"), 0, 1, False)
TOKENS = torch.randint(300, (8, 24), generator=torch.Generator().manual_seed(0))
MESHES = {
    "sharded": MeshSettings(),
    "hybrid": MeshSettings(replicate=2),
    "hybrid, of so many machines": MeshSettings(replicate=None, shard=2),
    "tensor": MeshSettings(tensor=2),
    "tensor alone": MeshSettings(tensor=4, shard=1),
}


def made(seed=0):
    """Two layers of eight heads, two for each key: four processes can split them."""
    shape = {"vocab_size": 300, "width": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "max_length": 32}
    model = MaskedDiffusionModel(ModelConfig(**shape))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def trained(hw, steps=3):
    """A few steps, each of two micro-batches, over this process's rows. Losses of all rows, gradient norms, the optimizer."""
    model = made()
    parallelize(model, hw)
    shard(model, hw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses, norms = [], []
    for _ in range(steps):
        loss = torch.zeros(())
        parts = TOKENS[hw.data_rank :: hw.data_ranks].split(1)
        for i, rows in enumerate(parts):
            sync_gradients(model, i == len(parts) - 1, hw)
            with hw.autocast():
                logits = model.hidden(rows) @ local(model.unembedding.weight).T
                summed = cross_entropy(logits.float().flatten(0, 1), rows.flatten(), reduction="sum") / TOKENS.numel()
            (summed * hw.data_ranks).backward()
            loss += summed.detach()
        losses.append(hw.sum(loss).item())
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, model, optimizer


def of_a_mesh(mesh, precision="fp32"):
    with hardware("cpu", precision, mesh) as hw:
        losses, norms, model, _ = trained(hw)
        return losses, norms, {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_trains_as_one_process_does(name):
    losses, norms, model, _ = trained(ALONE)
    for found, found_norms, weights in in_processes(4, of_a_mesh, MESHES[name]):
        assert_close(found, losses, rtol=0, atol=1e-5)  # float32's own, as sums are in another order
        assert_close(found_norms, norms, rtol=1e-5, atol=0)
        for key, value in model.named_parameters():
            assert_close(weights[key], value.detach(), rtol=0, atol=1e-4)  # AdamW's: of gradients near 0 the sign counts


def of_learned_orders(orders):
    """Two steps of a model of learned orders over this process's rows: loss, and the weights after."""
    vocabulary = Vocabulary.build({"text": (40,)}, may_end=("text",))
    model = builders.model(vocabulary.size, 32, 32, 2, 2, orders=orders)
    model.init_weights(torch.Generator().manual_seed(0))
    with hardware("cpu", "fp32", MeshSettings()) as hw:
        shard(model, hw)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            own = Batch.of(TOKENS % 40, first_index=8 * step).select(slice(hw.data_rank, None, hw.data_ranks))
            micro = micro_batch(own, LearnedOrderMasker(vocabulary.mask_id), LossSettings(), vocabulary)
            loss = forward_loss(model, micro, vocabulary, hw).loss / 8
            (loss * hw.data_ranks).backward()
            optimizer.step()
            optimizer.zero_grad()
        return hw.sum(loss.detach()).item(), {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
def test_learned_orders_train_over_processes_as_on_one(orders):
    loss, model = of_learned_orders(orders)
    for found, weights in in_processes(2, of_learned_orders, orders):
        assert_close(found, loss, rtol=0, atol=1e-5)
        for key, value in model.items():
            assert_close(weights[key], value, rtol=0, atol=1e-5)


class Counted(TorchDispatchMode):
    """Bytes that a process receives as weights are gathered, and the types in which gradients are reduced."""

    def __init__(self):
        super().__init__()
        self.gathered, self.reduced, self.reductions = 0, set(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "allgather" in op._schema.name:
            self.gathered += args[0].numel() * args[0].element_size()
        if "reduce_scatter" in op._schema.name:
            self.reduced.add(args[0].dtype)
            self.reductions += 1
        return op(*args, **(kwargs or {}))


def counted(gather):
    with hardware("cpu", "bf16", MeshSettings(gather=gather)) as hw, Counted() as count:
        *_, model, _ = trained(hw, steps=1)
        float32 = {p.dtype for p in model.parameters()} == {torch.float32}
    assert count.reductions == len(model.blocks) + 1  # of four micro-batches, the last alone
    return count.gathered, count.reduced, float32


def test_bf16_gathers_half_the_bytes_and_reduces_in_float32():
    half, full, auto = (in_processes(2, counted, gather) for gather in ("bf16", "fp32", "auto"))
    assert half == auto  # products are in bf16
    for (few, reduced, kept), (many, reduced_too, _) in zip(half, full, strict=True):
        assert few * 2 == many > 4 * made().num_parameters()
        assert reduced == reduced_too == {torch.float32}
        assert kept


def gradient_of_a_common_token():
    """Of one that stands at nearly every place, as the mask token does."""
    with hardware("cpu", "bf16", MeshSettings()) as hw:
        return common_gradient(made(), hw)


def common_gradient(model, hw):
    shard(model, hw)
    rows = torch.full((16, 24), 7)
    rows[:, ::5] = TOKENS[0, 0]
    with hw.autocast():
        h = model.hidden(rows)
    (h * torch.sin(torch.arange(h.numel()).view_as(h))).sum().backward()
    return whole(model.embedding.weight.grad)[7]


def test_the_gradient_of_a_token_at_many_places_is_added_up_in_float32():
    found, _ = in_processes(2, gradient_of_a_common_token)
    expected = common_gradient(made(), Hardware(torch.device("cpu"), 0, 1, True))
    assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())  # of roundings to bf16, each of 0.4 %


def saved(folder, mesh):
    with hardware("cpu", "fp32", mesh) as hw:
        *_, model, optimizer = trained(hw)
        with Checkpoints(folder, hw) as checkpoints:
            checkpoints.save(3, model, optimizer, None, {"step": 3})
            checkpoints.wait()


def restored(folder, mesh):
    with hardware("cpu", "fp32", mesh) as hw:
        _, _, model, optimizer = trained(hw, steps=1)
        (kept,) = checkpoint.complete(folder)
        checkpoint.restore(kept, model, optimizer, None, hw)
        moments = {n: whole(optimizer.state[p]["exp_avg_sq"]) for n, p in model.named_parameters()}
        return {n: whole(p.detach()).clone() for n, p in model.named_parameters()}, moments


def test_a_checkpoint_of_one_mesh_is_read_on_another(tmp_path):
    in_processes(4, saved, tmp_path, MeshSettings(tensor=2))
    at_first = in_processes(4, restored, tmp_path, MeshSettings(tensor=2))[0]
    for count, mesh in ((2, MeshSettings()), (4, MeshSettings(replicate=2)), (1, MeshSettings())):
        for weights, moments in in_processes(count, restored, tmp_path, mesh):
            for found, expected in ((weights, at_first[0]), (moments, at_first[1])):
                for name in expected:
                    assert_close(found[name], expected[name], rtol=0, atol=0)


BAD = [
    ({"replicate": 2, "shard": 3}, 4, "replicate: 2, shard: 3, tensor: 1} is for 6 processes, and there are 4"),
    ({"replicate": 2, "shard": 1}, 4, "is for 2 processes, and there are 4"),
    ({"tensor": 3}, 4, "tensor: 3} is for a multiple of 3 processes, and there are 4"),
    ({"shard": 2}, 1, "is for 2 processes, and there is 1"),
    ({"replicate": None}, 4, "one of replicate and shard may be null"),
    ({"shard": 0}, 4, "mesh.shard must be at least 1, got 0"),
    ({"tensor": 0}, 4, "mesh.tensor must be at least 1, got 0"),
    ({"gather": "fp16"}, 4, "mesh.gather: 'fp16' is not one of auto, bf16, fp32"),
]


@pytest.mark.parametrize(("settings", "processes", "said"), BAD)
def test_a_mesh_that_cannot_be_is_one_line(monkeypatch, settings, processes, said):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError) as error:
        MeshSettings(**settings).check()
    assert said in str(error.value)


def test_weights_are_not_gathered_in_bf16_for_products_in_float32():
    with (
        pytest.raises(UserError, match=r"mesh.gather: bf16 goes with products in bf16, and here they are in float32; set"),
        hardware("cpu", "fp32", MeshSettings(gather="bf16")),
    ):
        pass


def test_a_launcher_that_does_not_know_its_processes_yet_refuses_no_mesh(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "0")
    MeshSettings(replicate=4, shard=8).check()
    MeshSettings(replicate=None, shard=8).check()


def test_what_cannot_be_split_is_one_line():
    with torch.device("meta"):
        model = builders.nano(vocab_size=10, width=96, num_heads=3)
        moe = MaskedDiffusionModel(
            ModelConfig(vocab_size=9, width=64, num_layers=1, num_heads=4, max_length=8, num_experts=2, experts_per_token=1)
        )
    with pytest.raises(UserError, match=r"mesh.tensor: 2 does not divide model.num_heads = 3"):
        MeshSettings(tensor=2).check_model(model)
    shape = {"vocab_size": 10, "width": 96, "num_layers": 1, "max_length": 8, "num_heads": 3}
    MeshSettings(tensor=3).check_model(MaskedDiffusionModel(ModelConfig(**shape, ffn_width=192)))
    with pytest.raises(UserError, match=r"mesh.tensor: 3 does not divide model.ffn_width = 256"):
        MeshSettings(tensor=3).check_model(model)
    shape = {"vocab_size": 9, "width": 64, "num_layers": 1, "max_length": 8, "num_heads": 4, "num_kv_heads": 2}
    with pytest.raises(UserError, match=r"mesh.tensor: 4 does not divide model.num_kv_heads = 2"):
        MeshSettings(tensor=4).check_model(MaskedDiffusionModel(ModelConfig(**shape)))
    with pytest.raises(UserError, match=r"splits plain layers, and blocks.0.mlp.w1 is missing"):
        MeshSettings(tensor=2).check_model(moe)
    with pytest.raises(UserError, match=r"mesh.tensor: 2 splits the blocks, and not what model.orders=learned has"):
        MeshSettings(tensor=2).check_model(builders.model(300, 32, 64, 2, 8, orders="learned"))
    MeshSettings(tensor=0).check_model(model)  # its own line comes after: no traceback before it


def test_weights_are_given_back_after_an_evaluation():
    def held():
        with hardware("cpu", "fp32", MeshSettings()) as hw, torch.no_grad(), warnings.catch_warnings():
            model = made()
            shard(model, hw)
            before = model.embedding.weight.to_local().numel()
            model.hidden(TOKENS)
            during = model.embedding.weight.numel()
            reshard(model, hw)
            return before, during, model.embedding.weight.to_local().numel()

    for before, during, after in in_processes(2, held):
        assert before == after == during / 2


def of_copies():
    """In the process group of another launcher's: what copies see counts once, and the group is theirs to leave."""
    torch.distributed.init_process_group("gloo")
    with hardware("cpu", "fp32", MeshSettings(tensor=2, shard=1)) as hw:
        found = hw.sum(torch.tensor(3)).item(), hw.sum(torch.tensor(3.0)).item(), hw.gather([7])
    return found, torch.distributed.is_initialized()


def test_what_copies_see_counts_once_and_the_launchers_group_is_kept():
    assert in_processes(2, of_copies) == [((3, 3.0, [7]), True)] * 2


def test_each_block_fetches_the_next_one_ahead(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    def ahead():
        fetched = []
        monkeypatch.setattr(FSDPModule, "set_modules_to_forward_prefetch", lambda own, others: fetched.append((own, others)))
        with hardware("cpu", "fp32", MeshSettings()) as hw:
            model = made()
            shard(model, hw)
            return [(own is model.blocks[0], others == [model.blocks[1]]) for own, others in fetched]

    assert in_processes(2, ahead) == [[(True, True)]] * 2
