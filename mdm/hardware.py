"""Where a run happens: device, processes, precision, compiler, CUDA graphs. One process, or several under torchrun with FSDP2.

A CUDA graph holds kernels and the addresses they read and write: inputs are copied to where it reads, its output is overwritten
by the next replay, and what it wrote elsewhere (kept keys and values) is written again. Python runs once, while it is recorded.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from mdm.config import UserError


@dataclass(frozen=True)
class Hardware:
    """device, rank and world size of this process, and whether matrix products run in bfloat16."""

    device: torch.device
    rank: int
    world_size: int
    bf16: bool

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Weights and optimizer stay in float32; products run in bfloat16 where that was chosen."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.world_size == 1:
            return values
        found: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(found, values)
        return [value for own in found for value in own]

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
def hardware(device: str, precision: str) -> Iterator[Hardware]:
    """Joins the process group that torchrun prepared, if any, and leaves it at the end.

    device:    "auto" (CUDA where there is one), "cpu", "cuda"
    precision: "auto" (bf16 where the hardware multiplies it), "bf16", "fp32"
    """
    check_hardware(device, precision)
    cuda = device != "cpu" and torch.cuda.is_available()
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # counts are summed on the CPU
    try:
        yield Hardware(where, rank, world_size, precision == "bf16" or (precision == "auto" and fast_bf16(cuda)))
    finally:
        if world_size > 1:
            dist.destroy_process_group()


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


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can work here: on a CPU it needs a C++ compiler and Python's headers."""
    if device.type != "cpu":
        return True
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()  # what it compiles includes Python's headers


def check_compile(setting: str, sampling_on: str | None = None) -> None:
    """Raises UserError for another value (YAML's booleans arrive as "True" and "False").

    sampling_on: the setting `device` of a recipe that samples, and so may record graphs
    """
    choices = ("auto", "true", "false") if sampling_on is None else ("auto", "true", "false", "graphs")
    if setting.lower() not in choices:
        raise UserError(f"compile: {setting!r} is not one of {', '.join(choices)}")
    if setting.lower() == "graphs" and (sampling_on == "cpu" or not torch.cuda.is_available()):
        raise UserError("compile: graphs records CUDA graphs, and there is no CUDA device; set compile=auto")


COMPILING = "The model's blocks are compiled before the first step: half a minute to a minute, in which nothing else happens."


def compile_blocks(model: Any, setting: str, hw: Hardware) -> bool:
    """Compiles each transformer block ("auto": where it can be done; "true", "false"): equal blocks share one graph.

    Lengths differ from stream to stream, so the graph is made for any of them. "graphs" also records the passes of sampling.
    """
    check_compile(setting, hw.device.type)
    if setting.lower() == "graphs":
        model.recorder = cuda_graph
    able = can_compile(hw.device)
    if setting.lower() == "true" and not able:
        raise UserError("compile: true was asked for, and there is no C++ compiler with Python's headers; set compile=auto")
    if setting.lower() == "false" or not able:
        if setting == "auto":
            hw.say("No C++ compiler (or no Python headers) found: the model runs eagerly, about a third slower.")
        return False
    for block in model.blocks:
        block.compile(dynamic=True)
    return True


def shard(model: Any, hw: Hardware) -> None:
    """FSDP2: every block, then the rest, sharded over all ranks. The loss may read the unembedding after `hidden`."""
    if hw.world_size == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")


def reshard(model: Any, hw: Hardware) -> None:
    """Gives back the weights that a forward pass without a backward has gathered (FSDP2); call it after evaluating."""
    if hw.world_size > 1:
        model.reshard()


def whole(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A sharded tensor as an ordinary one, on every rank."""
    own: Any = value
    return own.full_tensor() if hasattr(own, "full_tensor") else own


def sync_gradients(model: Any, now: bool, hw: Hardware) -> None:
    """Gradients are exchanged in the last micro-batch of a step only."""
    if hw.world_size > 1:
        model.set_requires_gradient_sync(now)


Recorder = Callable[[Callable[..., Tensor], list[Any]], tuple[Callable[[], None], Tensor]]
"""(function, its inputs) -> what replays it on those inputs' memory, and the output that a replay fills."""


def cuda_graph(function: Callable[..., Tensor], inputs: list[Any]) -> tuple[Callable[[], None], Tensor]:
    """The `Recorder` of a GPU. It first runs the function, so that what is made on first use (code, caches) is there."""
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(3):
            function(*inputs)
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)
    return graph.replay, output


class Recorded:
    """A function of tensors (or None), recorded for each combination of shapes when that comes a second time.

    function: must not read a tensor's values in Python, nor keep its output; calling it twice must be calling it once
    The output is overwritten by the next call of the same shapes: use it before.
    """

    def __init__(self, function: Callable[..., Tensor], recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self.seen: dict[Any, tuple[list[Any], Callable[[], None], Tensor] | None] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        if not all(x is None or isinstance(x, Tensor) for x in inputs):  # a FlexAttention mask: its blocks are not inputs
            return self.function(*inputs)
        key = tuple(x if x is None else (x.shape, x.dtype) for x in inputs)
        if key not in self.seen:  # rows leave a batch as they finish: many a shape comes only once
            self.seen[key] = None
            return self.function(*inputs)
        found = self.seen[key]
        if found is None:
            copies = [x if x is None else x.clone() for x in inputs]
            found = self.seen[key] = copies, *self.recorder(self.function, copies)
        own, replay, output = found
        for mine, given in zip(own, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        replay()
        return output


def recorded(function: Callable[..., Tensor], recorder: Recorder | None) -> Callable[..., Tensor]:
    """The function, recorded where there is a recorder."""
    return function if recorder is None else Recorded(function, recorder)


def barrier(hw: Hardware) -> None:
    """Waits for all ranks."""
    if hw.world_size > 1:
        dist.barrier()
