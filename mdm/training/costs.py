"""What a run costs besides arithmetic: what its loader, storage and network carry, its checkpoints, and its lost machines.

    ring(size, cards, machines)      inside: size (1 - 1 / cards)     between: size (1 - 1 / machines) / cards
    Young / Daly                     interval = sqrt(2 * pause of a checkpoint * time between failures)

Counted from a few figures of the machines (`Machine`), which are assumptions: a bandwidth that yours reach is better than the
one here. Bytes are of one card and one way; sizes are decimal (1 GB = 10^9 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mdm.config import UserError

GIGA = 1e9
CODE = 4  # bytes that a token has in a shard (components.data.shards: I32)
FLOAT = 4  # bytes of a reduced gradient
INSIDE_HOP, BETWEEN_HOP = 3.4e-6, 14e-6  # seconds a hop of a ring: assumed, of the order that NCCL takes


@dataclass
class Machine:
    """What is assumed of each machine; `recipes/configs/plan.yaml` explains the keys."""

    cards: int = 8
    nvlink: float = 360.0
    network: float = 40.0
    storage: float = 2.0
    host: float = 10.0
    loader: float = 166_000.0
    failures: float = 1.97e-5
    restart: float = 10.0

    def validate(self) -> None:
        """Raises UserError."""
        if self.cards < 1:
            raise UserError(f"machine.cards must be at least 1, got {self.cards}")
        for key in ("nvlink", "network", "storage", "host", "loader"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"machine.{key} must be positive, got {getattr(self, key)}")
        for key in ("failures", "restart"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"machine.{key} must be at least 0, got {getattr(self, key)}")


@dataclass(frozen=True)
class Mesh:
    """How cards share the work: replicate x shard of them have rows of their own, `tensor` share each row's products.

    Cards that lie next to each other are of one `tensor` group, then of one `shard` group.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        """Those that have rows of their own."""
        return self.replicate * self.shard


@dataclass(frozen=True)
class Traffic:
    """Bytes that a card receives over NVLink and over the network, and seconds that the hops of the rings take besides."""

    inside: float = 0.0
    between: float = 0.0
    latency: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between, self.latency + other.latency)

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """Inside a machine, and between machines; what the hops take is counted where they are slower."""
        inside, between = self.inside / machine.nvlink / GIGA, self.between / machine.network / GIGA
        return (inside, between + self.latency) if between else (inside + self.latency, 0.0)


def ring(size: float, group: int, stride: int, cards: int, times: int) -> Traffic:
    """A tensor of `size` bytes gathered (or reduced and scattered) over a group of cards that lie `stride` apart.

    times: collectives that the bytes are moved in
    """
    own = max(1, min(group, cards // stride))  # of the group, in one machine
    machines = math.ceil(group / own)
    hops = (group - machines) * INSIDE_HOP + (machines if machines > 1 else 0) * BETWEEN_HOP
    return Traffic(size * (1 - 1 / own), size * (1 - 1 / machines) / own, times * hops)


def traffic(
    blocks: float, rest: float, layers: int, mesh: Mesh, cards: int, micros: int = 1, gather: float = 2, activations: float = 0
) -> Traffic:
    """Of one optimizer step: FSDP2's gathers and reductions, of replicas the sums, and those of tensor parallelism.

    blocks, rest: parameters of the blocks, gathered for each forward and each backward pass; and of the embeddings, once
    cards:        of one machine
    micros:       forward passes of a step; gradients are reduced in the last one
    gather:       bytes of a gathered weight (2: bf16)
    activations:  bytes of a micro-batch's residual stream in bf16
    """
    gathered, reduced = gather * (2 * blocks + rest) / mesh.tensor, FLOAT * (blocks + rest) / mesh.tensor
    shards = (mesh.shard, mesh.tensor, cards)
    moved = ring(micros * gathered, *shards, times=micros * (2 * layers + 1)) + ring(reduced, *shards, times=layers + 1)
    moved += ring(2 * reduced / mesh.shard, mesh.replicate, mesh.shard * mesh.tensor, cards, times=2 * (layers + 1))
    sums = 4 * layers * micros  # of a block: two in the forward pass, two in the backward pass
    return moved + ring(2 * sums * activations, mesh.tensor, 1, cards, times=2 * sums)


def best_mesh(
    meshes: list[Mesh], blocks: float, rest: float, layers: int, machine: Machine, micros: int, gather: float
) -> Mesh:
    """The one whose traffic takes least."""
    return min(meshes, key=lambda m: sum(traffic(blocks, rest, layers, m, machine.cards, micros, gather).seconds(machine)))


@dataclass(frozen=True)
class Data:
    """What is drawn: tokens a second of a process and of a machine, bytes a second that a machine reads, bytes in all."""

    process: float
    machine: float
    read: float
    shards: float


def data(tokens: float, rate: float, ranks: int, machines: int, pairs: bool) -> Data:
    """Of a run that draws every sample once; a pair's second row is the sample of its first.

    tokens, rate: of the run, and those that it sees in a second
    """
    drawn = CODE / (2 if pairs else 1)
    return Data(rate / ranks, rate / machines, drawn * rate / machines, drawn * tokens)


@dataclass(frozen=True)
class Checkpoint:
    """bytes: of one;  pause: seconds that training waits while it is copied to the machine's memory;  write: to storage."""

    bytes: float
    pause: float
    write: float


def checkpoint(parameters: float, moments: float, ema: bool, split: int, machines: int, machine: Machine) -> Checkpoint:
    """Float32 weights, AdamW's moments (bytes a parameter) and maybe the average; a card holds one part of `split`."""
    size = parameters * (FLOAT + moments + FLOAT * ema)
    return Checkpoint(size, size / split / machine.host / GIGA, size / machines / machine.storage / GIGA)


def young_daly(pause: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose least, of pauses and of repeated work (Young 1974; Daly 2006, first order)."""
    return math.sqrt(2 * pause * between_failures)


@dataclass(frozen=True)
class Losses:
    """Seconds between failures, failures in all, hours lost after them and in pauses, hours in all, and the best interval."""

    between: float
    failures: float
    lost: float
    paused: float
    hours: float
    interval: float


def losses(hours: float, cards: int, saved: Checkpoint, every: float, machine: Machine) -> Losses:
    """Of `hours` of undisturbed work, with a checkpoint every so many seconds. A failure costs half of them and the restart."""
    between = 3600 / (machine.failures * cards) if machine.failures else math.inf
    paused = hours * saved.pause / every
    failures = (hours + paused) * 3600 / between
    lost = failures * (every / 2 / 3600 + machine.restart / 60)
    best = max(young_daly(saved.pause, between), saved.write)  # one is written before the next is begun
    return Losses(between, failures, lost, paused, hours + paused + lost, best)
