"""How the processes of a run are laid out: a mesh of replicate x shard x tensor of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mdm.config import UserError

SPLIT = {
    "attn.q_proj": "columns",
    "attn.k_proj": "columns",
    "attn.v_proj": "columns",
    "attn.output_proj": "rows",
    "mlp.w1": "columns",
    "mlp.w3": "columns",
    "mlp.w2": "rows",
}
"""A block's layers that are split over processes, by their outputs or by their inputs (2104.04473): one sum after attention and
one after the feed-forward. Queries' and keys' norms see the heads of their process; all else is computed by each."""


def check_split(model: Any, tensor: int) -> None:
    """Raises UserError for a model whose blocks cannot be split over so many processes."""
    if tensor <= 1:  # what is no number of processes is said by `MeshSettings.check`
        return
    c = model.config
    for name, size in (
        ("num_heads", c.num_heads),
        ("num_kv_heads", c.num_kv_heads or c.num_heads),
        ("ffn_width", c.hidden_ffn),
    ):
        if size % tensor:
            raise UserError(f"mesh.tensor: {tensor} does not divide model.{name} = {size}")
    if c.tied_embeddings:
        raise UserError(f"mesh.tensor: {tensor} copies embedding and unembedding, and this model's are tied; set mesh.tensor=1")
    if c.learned_orders:
        raise UserError(f"mesh.tensor: {tensor} splits the blocks, and not what model.orders={c.orders} has; set mesh.tensor=1")
    for i, block in enumerate(model.blocks):
        for name in SPLIT:
            layer = dict(block.named_modules()).get(name)
            if type(layer) is not nn.Linear:
                kind = "missing" if layer is None else f"a {type(layer).__name__}"
                raise UserError(
                    f"mesh.tensor: {tensor} splits plain layers, and blocks.{i}.{name} is {kind}; set mesh.tensor=1"
                )


@dataclass
class MeshSettings:
    """How processes are laid out: replicate x shard x tensor of them. One of replicate and shard may be null: what is left.

    replicate: copies of the sharded weights: with `shard` the GPUs of a machine, weights are gathered inside machines alone
    shard:     processes that the weights are sharded over
    tensor:    processes that a block's products are split over (tensor parallelism), for what one GPU does not hold
    gather:    precision in which weights are gathered: auto (bf16 where products are), bf16, fp32
    """

    replicate: int | None = 1
    shard: int | None = None
    tensor: int = 1
    gather: str = "auto"

    @property
    def flat(self) -> bool:
        """Whether weights are sharded over all processes, however many there are."""
        return (self.replicate, self.shard, self.tensor) == (1, None, 1)

    def shape(self, processes: int) -> tuple[int, int, int]:
        """(replicate, shard, tensor) of so many processes. Raises UserError where they do not multiply to them."""
        said = f"mesh: {{replicate: {_or_null(self.replicate)}, shard: {_or_null(self.shard)}, tensor: {self.tensor}}}"
        for name in ("replicate", "shard", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"mesh.{name} must be at least 1, got {value}")
        if self.replicate is None and self.shard is None:
            raise UserError(f"{said}: one of replicate and shard may be null, which is what is left; not both")
        known = (self.replicate or 1) * (self.shard or 1) * self.tensor
        left, over = divmod(processes, known)
        if over or not left or (self.replicate and self.shard and left > 1):
            times = "a multiple of " if None in (self.replicate, self.shard) else ""
            raise UserError(
                f"{said} is for {times}{known} processes, and there {'is' if processes == 1 else 'are'} {processes}"
            )
        return self.replicate or left, self.shard or left, self.tensor

    def check(self) -> None:
        """Raises UserError for what no run can have, or what does not fit the processes of this one, where they are known."""
        if self.gather not in ("auto", "bf16", "fp32"):
            raise UserError(f"mesh.gather: {self.gather!r} is not one of auto, bf16, fp32")
        known = (self.replicate or 1) * (self.shard or 1) * self.tensor
        self.shape(number_of_processes() or known)

    def check_model(self, model: Any) -> None:
        """Raises UserError for a model whose blocks cannot be split over `tensor` processes."""
        check_split(model, self.tensor)


def _or_null(value: int | None) -> str:
    return "null" if value is None else str(value)


@contextlib.contextmanager
def supposing(count: int) -> Iterator[None]:
    """Looks at settings as one of `count` processes would; 0: of however many."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def number_of_processes() -> int:
    """Processes of this run, as its launcher says; 0 where a launcher asks that has none yet and may get any number."""
    return int(os.environ.get("WORLD_SIZE", "1"))
