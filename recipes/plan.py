"""What a training run will need, before a GPU is rented: memory, time, loader, storage, network, lost machines; and what binds.

    mdm plan --config pretrain_hub --gpu h100:8
    mdm plan --config pretrain_3b --gpu h100:256
    mdm plan --config my.yaml --gpu a100:4 model.num_layers=24 vocab=120000

Memory is counted from the model's shape; time is a prediction from what such models reached on an H100; what a run costs
besides (mdm/training/costs.py) is counted from figures of the machines that are assumed: `machine` in the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from components.tasks import INSTRUCT
from mdm.config import UserError, at_least_one, check, instantiate
from mdm.data.corruption import check_maskers
from mdm.data.settings import check_streams, row_length
from mdm.models.memory import CHECKPOINTING
from mdm.models.transformer import ModelConfig
from mdm.recipe import load_recipe, run_recipe
from mdm.training.costs import GIGA, Machine, Mesh, best_mesh, checkpoint, data, losses, traffic
from mdm.training.optim import batch_warnings
from mdm.training.planner import NARROWEST, Doubling, Plan, moment_bytes, parse_gpu, plan, recompute
from mdm.training.reach import told_at_once

CONFIG = "plan"

pretrain = load_recipe("pretrain")

PUBLISHED = {
    "gpt2": 50_257,
    "r50k_base": 50_257,
    "p50k_base": 50_281,
    "cl100k_base": 100_277,
    "o200k_base": 200_019,
    "kandinsky-community/kandinsky-2-1": 16_384,
    "bosonai/higgs-audio-v2-tokenizer": 8 * 1_024,  # codebooks and their codes
}
"""Ids of tokenizers whose files lie on a network, by the name that a config gives them: as their makers publish them."""


@dataclass
class Settings(pretrain.Settings):
    """Those of pretrain; `recipes/configs/plan.yaml` explains the others."""

    gpu: str = "h100"
    vocab: int | None = None
    machine: Machine = field(default_factory=Machine)


def validate(cfg: Settings) -> None:
    """Raises UserError."""
    parse_gpu(cfg.gpu)
    check(cfg.model, "model", supplied=pretrain.MODEL_SUPPLIED)
    pretrain.model_shape(cfg)
    check_streams(cfg.data)
    cfg.batch.validate()
    at_least_one(cfg, "vocab", "tokens", "checkpoint_every_tokens")
    cfg.machine.validate()


def main(cfg: Settings) -> None:
    card, count = parse_gpu(cfg.gpu)
    size, said = vocabulary_size(cfg)
    shape = replace(pretrain.model_shape(cfg), vocab_size=size)
    length = max(row_length(s, task, cfg.canvas) for s, task, _ in tasks(cfg))
    first = plan(shape, 1, length, card)
    mesh, gather = mesh_of(cfg, first, shape.num_layers, count)
    noise = check_maskers(cfg.data, cfg.masker, cfg.loss, list(cfg.tokenizers), shape)
    predicted = 1.0 if noise else 0.5  # where tokens become others, every one is; of masks, half on average
    predicted += 1.0 if cfg.loss.next_token else 0.0
    rows_of = [(task, s.pack, share) for s, task, share in tasks(cfg)]
    lengths = {m: n for m, n in cfg.canvas.items() if n is not None}
    given = (rows_of, lengths, list(cfg.tokenizers), bool(cfg.loss.next_token))
    doubling = Doubling.of(shape, *given) if shape.blocks or shape.two_streams else None
    twice = f" ({doubling.widest} with a copy of what is finished)" if doubling else ""
    physical, fitting = cfg.batch.at(0), list[tuple[float, int, str | None, Plan]]()
    print(
        f"{first.parameters / 1e9:.3f} B parameters, vocabulary of {size:,}{said}, rows of {length} positions{twice}; "
        f"{count} x {card.name} of {card.memory:.0f} GiB\n\nGiB of a card by its rows at a time (batch.micro), until a step "
        f"has its {physical:,} sequences;\nwhere that takes more than one micro-batch, gradients are whole on each card:\n"
    )
    print(HEAD)
    for mode in (None, *reversed(CHECKPOINTING)):
        for rows in (1, 2, 4, 8, 16, 32, 64, 128):
            micros = shared(physical, mesh.ranks * rows)
            meshed = (mesh.replicate, mesh.tensor, gather, micros)
            made = plan(shape, rows, length, card, count, mode, cfg.optimizer.state, predicted, 2**27, *meshed, doubling)
            fits = made.total < 0.92 * card.memory  # what the allocator and NCCL need besides
            parts = (made.weights, made.gradients, made.moments, made.activations, made.logits, made.total)
            print(f"{rows:>5}  {mode or 'none':<14}" + "".join(f"{v:>9.1f}" for v in parts) + ("  yes" if fits else "  no"))
            if not fits:
                break
            fitting.append((made.tokens_per_second, rows, mode, made))
    if not fitting:
        raise UserError(f"gpu: not one row fits {count} x {card.name}; take more, a smaller model, or optimizer.state=int8")
    best = max(fitting, key=lambda f: (f[0], f[1]))
    rate, rows, mode, made = best
    bound = "at most" if shape.width < NARROWEST else "about"
    mfu = rate * made.flops_per_token / count / card.tflops / 1e12
    print(
        f"\nFastest: batch.micro={rows} activation_checkpointing={mode or 'null'}, {made.total:.1f} GiB: {bound} {si(rate)} "
        f"tokens/s ({made.flops_per_token / 1e9:.2f} GFLOP a token, {mfu:.0%} of the peak); {cfg.tokens / 1e9:g} B tokens take "
        f"{cfg.tokens / rate / 3600:,.1f} h\n"
    )
    around(cfg, best, shape, mesh, gather, count)


HEAD = f"{'rows':>5}  {'checkpointing':<14}" + "".join(
    f"{name:>9}" for name in ("weights", "grads", "moments", "activ.", "logits", "GiB")
) + "  fits"  # fmt: skip


def around(
    cfg: Settings, best: tuple[float, int, str | None, Plan], shape: ModelConfig, mesh: Mesh, gather: float, count: int
) -> None:
    """Prints what the run costs besides its arithmetic, with the batch of the config, and what binds.

    best: tokens a second, rows, checkpointing and plan
    """
    (rate, fit, mode, made), m = best, cfg.machine
    machines, pairs = shared(count, m.cards), bool(cfg.masker.get("pairs"))
    print(
        f"Assumed of a machine (machine.KEY=VALUE): {m.cards} cards, each with NVLink of {m.nvlink:g} GB/s, network of "
        f"{m.network:g} GB/s,\ncopies to memory of {m.host:g} GB/s; storage of {m.storage:g} GB/s; {m.loader:,.0f} tokens/s of "
        f"a loader's thread,\nfrom token shards; {m.failures:g} failures a card and hour, {m.restart:g} minutes each\n"
    )
    physical = cfg.batch.at(0)
    own = shared(physical, mesh.ranks)  # rows of a process
    micros = shared(own, fit)
    micro = shared(own, micros)
    computing = own * mesh.ranks * mean_row(cfg) / rate
    seen = physical * mean_row(cfg)
    scaler = cfg.optimizer.scaler(cfg.batch, physical, cfg.tokens)
    drawn = data(cfg.tokens, seen / computing, mesh.ranks, machines, pairs)
    split = count // mesh.replicate
    saved = checkpoint(made.parameters, moment_bytes(cfg.optimizer.state), cfg.ema is not None, split, machines, m)
    activations = 2.0 * micro * mean_row(cfg) * shape.width
    moved = traffic(made.blocks, made.parameters - made.blocks, shape.num_layers, mesh, m.cards, micros, gather, activations)
    inside, between = moved.seconds(m)
    shares = {
        "compute": 1.0,
        "network between machines": between / computing,
        "NVLink": inside / computing,
        "loader": drawn.process / m.loader,
        "storage": drawn.read / m.storage / GIGA,
        "writing checkpoints": saved.write / (cfg.checkpoint_every_tokens * computing / seen),
    }
    slowest, *others = sorted(shares, key=lambda name: -shares[name])
    rate = seen / computing / shares[slowest]
    every = cfg.checkpoint_every_tokens / rate
    lost = losses(cfg.tokens / rate / 3600, count, saved, every, m)

    told("batch", f"batch.physical = {physical:,} sequences" + (f" of {physical // 2:,} samples" if pairs else ""))
    told("", f"{micro} rows x {micros} micro-batches x {mesh.ranks} processes; {fit} x 1 x {mesh.ranks} fill the cards")
    told("", f"{si(seen)} tokens in {span(computing)}, {si(cfg.tokens / seen)} steps; kappa = {scaler.kappa:.2f} (SDE scaler)")
    for warning in batch_warnings(scaler, int(seen), cfg.optimizer.critical_steps):
        told("", f"Warning: {warning}")
    share = f"{shares['loader']:.0%} of a thread"
    told("loader", f"{si(drawn.process)} tokens/s of a process ({share}), {si(drawn.machine)} of a machine")
    told("storage", f"token shards {si(drawn.shards, 'B')}, if no sample comes twice; a machine reads {si(drawn.read, 'B/s')}")
    told("", f"a checkpoint {si(saved.bytes, 'B')}; two, and one that is being written, {si(3 * saved.bytes, 'B')}")
    if count > 1:
        dims = f"{{replicate: {mesh.replicate}, shard: {mesh.shard}, tensor: {mesh.tensor}}}"
        told("network", f"mesh: {dims}, weights gathered in {'bf16' if gather == 2 else 'float32'}; a step moves to each card")
        if cfg.mesh.flat and mesh.replicate > 1:
            told("", "that mesh is advised: the config's is one group of all cards")
        near = f"{si(moved.inside, 'B')} in its machine ({span(inside)})"
        told("", f"{near}, {si(moved.between, 'B')} between machines ({span(between)})")
    told("checkpoint", f"{span(saved.pause)} to stage into memory, {span(saved.write)} to write behind the steps")
    told("", f"every {si(cfg.checkpoint_every_tokens)} tokens ({span(every)}): {saved.pause / every:.2%} of the time")
    if m.failures:
        each = f"{span(every / 2 + 60 * m.restart)} each: half an interval, and the restart"
        told("restart", f"a failure in {span(lost.between)}, {lost.failures:.1f} in the run, {each}")
        told("", f"least is lost at checkpoint_every_tokens = {si(lost.interval * rate)} ({span(lost.interval)}, Young/Daly)")
    whole = f"{span(3600 * lost.hours)} ({si(lost.hours * count)} GPU-hours)"
    told("total", f"{whole}, {span(3600 * (lost.paused + lost.lost))} of it lost")
    memory = f", and memory (activation_checkpointing={mode}: {recompute(mode) - 1:.0%} more time)" if mode else ""
    much = f" ({shares[slowest]:.1f} x compute)" if slowest != "compute" else ""
    beside = ", ".join(f"{name} {shares[name]:.0%}" for name in others if name != "compute" and shares[name] >= 0.005)
    print(f"\nWhat binds: {slowest}{much}{memory}. Behind it, as shares of compute: {beside or 'nothing'}")


def told(name: str, text: str) -> None:
    print(f"{name:<11} {text}")


def si(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 12.8 TB, 7.1 M, 1.3 B."""
    for power, prefix in enumerate(("", "k", "M", "G" if unit else "B", "T")):
        if abs(scaled := value / 1000**power) < 999.5 or prefix == "T":
            return f"{scaled:.3g} {prefix}{unit}".rstrip()
    raise AssertionError("the last prefix takes what is left")


def span(seconds: float) -> str:
    """A time in the unit that reads best."""
    for limit, one, unit in ((1, 1e-3, "ms"), (60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / one:.3g} {unit}"
    return f"{seconds / 86400:,.1f} days"


def shared(whole: int, parts: int) -> int:
    """The largest of so many shares."""
    return -(-whole // parts)


def tasks(cfg: Settings) -> list[tuple[Any, str, float]]:
    """The streams' tasks, with their share of the rows."""
    streams = [s for s in cfg.data.values() if INSTRUCT not in s.tasks]
    if not streams:
        raise UserError(f"data: rows of {INSTRUCT} are as long as their prompts; name a stream of another task")
    weights = sum(s.weight for s in streams)
    return [(s, task, s.weight / weights * share / sum(s.tasks.values())) for s in streams for task, share in s.tasks.items()]


def mean_row(cfg: Settings) -> float:
    """Positions of a row of the mix; padding of packed rows, which best fit leaves, is not taken off."""
    return sum(row_length(s, task, cfg.canvas) * share for s, task, share in tasks(cfg))


def mesh_of(cfg: Settings, made: Plan, layers: int, count: int) -> tuple[Mesh, float]:
    """The mesh of the config and the bytes of a gathered weight; where it leaves the mesh open, the one whose traffic takes
    least: all cards one group, or a group in each machine. Raises UserError."""
    gather, cards = 4.0 if "fp32" in (cfg.precision, cfg.mesh.gather) else 2.0, cfg.machine.cards
    if not cfg.mesh.flat:
        return Mesh(*cfg.mesh.shape(count)), gather
    meshes = [Mesh(shard=count)]
    if count > cards and count % cards == 0:
        meshes.append(Mesh(count // cards, cards))
    parts = (made.blocks, made.parameters - made.blocks, layers)
    micros = shared(cfg.batch.at(0), count * cfg.batch.micro)
    return best_mesh(meshes, *parts, cfg.machine, micros, gather), gather


def vocabulary_size(cfg: Settings) -> tuple[int, str]:
    """Ids of all tokenizers, and 64 for what is no modality's, and what to say of them.

    A tokenizer that is to be trained says how many it will have; of published ones it is known, and nothing is fetched.
    """
    if cfg.vocab is not None:
        return cfg.vocab, ""
    total, known = 64, list[str]()
    for modality, node in cfg.tokenizers.items():
        if node.get("vocab_size") is not None:
            total += node["vocab_size"]
        elif (ids := published(node)) is not None:
            known.append(f"{modality} {ids:,}")
            total += ids
        else:
            total += sum(built(node, modality).codebooks)
    return total, f" (as published: {', '.join(known)})" if known else ""


def published(node: Mapping[str, Any]) -> int | None:
    """Ids of a tokenizer that is named as in `PUBLISHED`, with all of its codebooks, as they are."""
    if node.get("books") is not None or node.get("order") == "delay":
        return None
    return next((PUBLISHED[node[key]] for key in ("name", "path") if node.get(key) in PUBLISHED), None)


@told_at_once()
def built(node: Mapping[str, Any], modality: str) -> Any:
    """Raises UserError where a tokenizer cannot be built here."""
    try:
        return instantiate(node, f"tokenizers.{modality}", corpus=())
    except Exception as error:
        raise UserError(f"tokenizers.{modality} cannot be built here ({error}); say vocab=SIZE") from error


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
