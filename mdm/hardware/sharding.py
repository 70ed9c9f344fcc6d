"""A model over several processes: FSDP2, plain or hybrid, and tensor parallelism of the blocks.

    mesh [replicate, shard, tensor]     weights are sharded over `shard` and copied over `replicate`; blocks split over `tensor`

Weights and moments are kept in float32. They are gathered in `hw.gathers` (bfloat16 where products are), and gradients are
added up in float32, over micro-batches and over processes. Processes that differ in `tensor` alone see the same rows.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from mdm.hardware.mesh import SPLIT, check_split
from mdm.hardware.processes import Hardware


def parallelize(model: Any, hw: Hardware) -> None:
    """Tensor parallelism, in place: before the blocks are compiled or wrapped, and before `shard`."""
    if hw.copies == 1:
        return
    assert hw.mesh is not None  # it is what has the copies
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
    from torchtune.training import prepare_mha_for_tp

    # Said at every step: that the gradients' norm takes two sums, and that hidden states must not be changed in place.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh, styles = hw.mesh["tensor"], {"columns": ColwiseParallel, "rows": RowwiseParallel}
    check_split(model, hw.copies)
    prepare_mha_for_tp(model, mesh)
    for block in model.blocks:
        plan: dict[str, Any] = {name: styles[by]() for name, by in SPLIT.items()}
        for norm in ("attn.q_norm", "attn.k_norm"):  # [batch, heads, seq, dim]; their gains' gradients are summed over heads
            if getattr(block.attn, norm.partition(".")[2]) is not None:
                plan[norm] = SequenceParallel(sequence_dim=1, use_local_output=True)
        parallelize_module(block, mesh, plan)
        _copied(block.sa_norm, mesh)
        _copied(block.mlp_norm, mesh)
    for module in (model.embedding, model.norm, model.unembedding):
        _copied(module, mesh)


def _copied(module: nn.Module, mesh: Any) -> None:
    """A module that every process of `tensor` computes whole; its weights are of the mesh, as those of the split ones are."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    def enter(module: nn.Module, inputs: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
        return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

    def leave(module: nn.Module, output: Any, mesh: Any) -> Any:
        return output.to_local()

    distribute_module(module, mesh, input_fn=enter, output_fn=leave)  # pyright: ignore[reportArgumentType] (its hint says that input_fn gives None)


def shard(model: Any, hw: Hardware) -> None:
    """FSDP2: every block, then the rest, sharded over the mesh. The loss may read the unembedding after `hidden`."""
    if hw.world_size == 1:
        return
    assert hw.mesh is not None  # there is one of several processes
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = hw.mesh["replicate", "shard"] if hw.mesh["replicate"].size() > 1 else hw.mesh["shard"]
    # The residual stream stays in float32, and autocast casts what is multiplied: as on one process.
    policy = MixedPrecisionPolicy(param_dtype=hw.gathers, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for block, following in itertools.pairwise(model.blocks):  # backward passes fetch ahead by themselves
        block.set_modules_to_forward_prefetch([following])
    if hw.gathers != torch.float32:
        model.embedding.forward = functools.partial(_embedded, model.embedding)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("hidden", "log_rates"):
        register_fsdp_forward_method(model, method)


def _embedded(module: nn.Embedding, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
    """Rows of a table that was gathered in bfloat16, in float32.

    Half of the positions are masks: the gradients of their one row would be rounded away if they were added up in bfloat16.
    """
    return F.embedding(tokens, module.weight.float())


def reshard(model: Any, hw: Hardware) -> None:
    """Gives back the weights that a forward pass without a backward has gathered (FSDP2); call it after evaluating."""
    if hw.world_size > 1 and hasattr(model, "reshard"):  # one process may evaluate another model alone
        model.reshard()


def local(weight: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A gathered weight as an ordinary tensor: under tensor parallelism it is one of the mesh, whole on each process."""
    own: Any = weight
    return own.to_local() if hasattr(own, "to_local") else own


def whole(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A sharded tensor as an ordinary one, on every rank."""
    own: Any = value
    return own.full_tensor() if hasattr(own, "full_tensor") else own


def sync_gradients(model: Any, now: bool, hw: Hardware) -> None:
    """Gradients are exchanged in the last micro-batch of a step only."""
    if hw.world_size > 1:
        model.set_requires_gradient_sync(now)
