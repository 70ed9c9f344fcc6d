"""The processes of a run: device, rank, precision, and what all of them agree on. One process, or several of a launcher's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout

from mdm.config import UserError
from mdm.hardware.mesh import MeshSettings, number_of_processes

MEETING = timedelta(minutes=10)
"""How long processes wait for each other as they start."""


@dataclass(frozen=True)
class Hardware:
    """device, rank and world size of this process, and whether matrix products run in bfloat16.

    mesh:   [replicate, shard, tensor], of several processes
    copies: processes that see the same rows: the size of `tensor`
    gathers: type in which weights are gathered
    """

    device: torch.device
    rank: int
    world_size: int
    bf16: bool
    mesh: Any = None
    copies: int = 1
    gathers: torch.dtype = torch.float32

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """The share of the rows that this process sees, among `data_ranks`."""
        return self.rank // self.copies

    @property
    def data_ranks(self) -> int:
        """Processes that see rows of their own."""
        return self.world_size // self.copies

    def autocast(self) -> contextlib.AbstractContextManager:
        """Weights and optimizer stay in float32; products run in bfloat16 where that was chosen."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over ranks that see rows of their own, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        if self.copies > 1:  # each was summed so often
            values = values / self.copies if values.is_floating_point() else values // self.copies
        return values

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all ranks that see rows of their own, on every rank."""
        if self.world_size == 1:
            return values
        found: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(found, values)
        return [value for own in found[:: self.copies] for value in own]

    def say(self, message: str) -> None:
        if self.main:
            print(message, flush=True)


def check_hardware(device: str, precision: str) -> None:
    """Raises UserError for an unknown choice, or a device that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {device!r} is not one of auto, cpu, cuda")
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"precision: {precision!r} is not one of auto, bf16, fp32")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, and torch finds no CUDA device")


@contextlib.contextmanager
def hardware(device: str, precision: str, mesh: MeshSettings | None = None) -> Iterator[Hardware]:
    """Joins the process group that the launcher prepared (torchrun), and leaves it at the end; or keeps the one it made (Ray).

    device:    "auto" (CUDA where there is one), "cpu", "cuda"
    precision: "auto" (bf16 where the hardware multiplies it), "bf16", "fp32"
    mesh:      how processes are laid out; None shards over all of them

    Raises UserError.
    """
    check_hardware(device, precision)
    cuda = device != "cpu" and torch.cuda.is_available()
    world_size, rank = number_of_processes(), int(os.environ.get("RANK", 0))
    mesh = mesh or MeshSettings()
    shape = mesh.shape(world_size)
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    bf16 = precision == "bf16" or (precision == "auto" and fast_bf16(cuda))
    if mesh.gather == "bf16" and not bf16:
        raise UserError("mesh.gather: bf16 goes with products in bf16, and here they are in float32; set mesh.gather=auto")
    gather = torch.bfloat16 if mesh.gather != "fp32" and bf16 else torch.float32
    if cuda:
        torch.cuda.set_device(where)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_the_launcher()
    joins = world_size > 1 and not dist.is_initialized()
    if joins:
        # Counts are summed on the CPU. Who waits here for one that is gone gives up soon, and the launcher goes on without it;
        # later one may wait for long, as for what the main process evaluates alone.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=MEETING)
        _set_pg_timeout(default_pg_timeout)
    try:
        made = None
        if world_size > 1:
            made = init_device_mesh(where.type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
        yield Hardware(where, rank, world_size, bf16, made, shape[2], gather)
    finally:
        if joins:
            dist.destroy_process_group()


def end_with_the_launcher() -> None:
    """Asks the kernel for a SIGTERM when the launcher has died: else its processes would train on beside those of the next."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def fast_bf16(cuda: bool) -> bool:
    """Whether the hardware multiplies bfloat16; a CPU that does not takes many times as long as in float32."""
    if cuda:
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_float8(device: torch.device) -> bool:
    """Whether a device multiplies float8: a GPU of compute capability 8.9 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def cpu_name() -> str:
    """The processor's name, to stand beside a measurement."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def barrier(hw: Hardware) -> None:
    """Waits for all ranks."""
    if hw.world_size > 1:
        dist.barrier()
