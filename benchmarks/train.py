"""A training step's variants: logits at masked positions only against logits everywhere, other noise than masks, two streams,
bf16, torch.compile, float8.

Random tokens, Bernoulli masks of mean rate 0.5 (drawn once), forward and backward; no optimizer, no data. On a GPU the model
FLOPs are counted (weights multiplied, masked rows alone, attention, no recomputation) against the card's peak: MFU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from components.corruption import Corruption, KernelCorruption
from components.kernels import Hybrid, Kernel, Uniform
from components.losses import coefficients, loss_from_logits
from components.maskers import BernoulliMasker, LowDiscrepancyTimes
from components.orders import Order, OrderMasker, Permuted
from components.sequences import collate, task_sequence
from components.vocabulary import Vocabulary
from mdm.data.pipeline import MicroBatch, micro_batch
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import forward_loss
from mdm.hardware import Hardware, can_compile, compile_blocks, fast_bf16, multiplies_float8
from mdm.models import builders
from mdm.models.memory import FLOAT8, to_float8
from mdm.models.shape import in_two_streams
from mdm.models.transformer import MaskedDiffusionModel
from mdm.training.planner import peak_tflops

from .measure import Result, interleaved, peak_memory, rows

PRESETS = {
    "smoke": {"width": 64, "num_layers": 2, "vocab": 2_000, "length": 64, "rows": 8, "warmup": 1, "repeats": 3},
    "cpu": {"width": 256, "num_layers": 4, "vocab": 50_000, "length": 128, "rows": 16, "warmup": 2, "repeats": 7},
    "gpu": {"width": 768, "num_layers": 12, "vocab": 50_000, "length": 1024, "rows": 32, "warmup": 5, "repeats": 20},
    "gpu_1b7": {"width": 2048, "num_layers": 24, "vocab": 120_000, "length": 2048, "rows": 8, "warmup": 5, "repeats": 10},
    "quickstart": {"width": 192, "num_layers": 4, "vocab": 2_048, "length": 64, "rows": 50, "warmup": 3, "repeats": 15},
}


KERNELS: dict[str, Kernel] = {"uniform noise": Uniform(), "hybrid noise": Hybrid(0.1)}


def run(preset: str) -> Result:
    p = PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = Vocabulary.build({"text": (p["vocab"],)}, ["text"], tasks=("text",))
    micro, coefficient = random_batch(vocabulary, p["rows"], p["length"], device)
    model = build(vocabulary, p, device)
    hardware, unmeasured = {name: Hardware(device, 0, 1, name == "bf16") for name in precisions(device)}, []
    if "bf16" not in hardware:
        unmeasured.append("bf16: this processor does not multiply it")
    first = next(iter(hardware))
    variants = {f"all logits, {first}": everywhere(model, micro, coefficient, hardware[first])}
    variants |= {f"masked only, {name}": masked_only(model, micro, vocabulary, hw) for name, hw in hardware.items()}
    fastest = model
    if can_compile(device):
        for name, hw in hardware.items():
            fastest = compiled(model, device)
            variants[f"masked only, {name}, compiled"] = masked_only(fastest, micro, vocabulary, hw)
    else:
        unmeasured.append("compiled variants: no C++ compiler")
    best, hw = list(variants)[-1], list(hardware.values())[-1]
    for noise, kernel in KERNELS.items():  # every position is predicted
        other, _ = random_batch(vocabulary, p["rows"], p["length"], device, kernel)
        variants[best.replace("masked only", noise)] = masked_only(fastest, other, vocabulary, hw)
    asked, _ = random_batch(vocabulary, p["rows"], p["length"], device, order=Permuted())  # every token twice
    ordered = compiled(model, device, setting="auto")
    ordered.change(in_two_streams(model.config))
    variants[best.replace("masked only", "two streams")] = masked_only(ordered, asked, vocabulary, hw)
    for recipe in FLOAT8:
        if multiplies_float8(device):
            own = compiled(model, device, recipe)
            variants[f"masked only, float8 {recipe}, compiled"] = masked_only(own, micro, vocabulary, hardware["bf16"])
        else:
            unmeasured.append(f"float8 {recipe}: no GPU of compute capability 8.9")
    timings = interleaved(variants, p["warmup"], p["repeats"])
    flops, peak = step_flops(model, micro, vocabulary), peak_tflops()
    more = {
        name: {"GFLOP/s": flops / t.median / 1e9}
        | ({"MFU": flops / t.median / 1e12 / peak, "GiB": peak_memory(variants[name])} if peak else {})
        for name, t in timings.items()
        if name.startswith("masked only")
    }
    found = rows(timings, p["rows"] * p["length"], more)
    figures = {
        "masked_only_speedup": timings[f"all logits, {first}"].median / timings[f"masked only, {first}"].median,
        "mask_rate": float(micro.noisy.mask.double().mean()),
    } | {
        f"{n}_over_masked": timings[best.replace("masked only", n)].median / timings[best].median
        for n in [*KERNELS, "two streams"]
    }
    return Result("train", preset, "tokens/s", p, found, figures, unmeasured)


def precisions(device: torch.device) -> list[str]:
    """What variants are measured in, the base first: on a GPU bf16 alone, on a CPU float32 and, if it multiplies it, bf16."""
    if device.type == "cuda":
        return ["bf16"]
    return ["float32", "bf16"] if fast_bf16(cuda=False) else ["float32"]


def random_batch(
    vocabulary: Vocabulary,
    count: int,
    length: int,
    device: torch.device,
    kernel: Kernel | None = None,
    seed: int = 0,
    order: Order | None = None,
) -> tuple[MicroBatch, torch.Tensor]:
    """Rows of random text, masked, and what each position counts in the loss. Their rates fill [0, 1] evenly: a mean of 0.5.

    kernel: of the noise; None: masks.  order: of two streams, in place of noise
    """
    ids = torch.randint(0, vocabulary.ranges[0].size, (count, length - 3), generator=torch.Generator().manual_seed(0))
    batch = collate(
        [[task_sequence(vocabulary, "text", {"text": row}, {})] for row in ids], [[i] for i in range(count)], vocabulary.pad_id
    )
    masker: Corruption = BernoulliMasker(vocabulary.mask_id, times=LowDiscrepancyTimes(group=count), seed=seed)
    if kernel is not None:
        masker = KernelCorruption(vocabulary, kernel, times=LowDiscrepancyTimes(group=count), seed=seed)
    if order is not None:
        masker = OrderMasker(vocabulary.mask_id, order, seed)
    micro = micro_batch(batch, masker, LossSettings(), vocabulary)
    return micro.to(device), coefficients(micro.noisy)[0].to(device)


def build(vocabulary: Vocabulary, p: dict[str, int], device: torch.device) -> MaskedDiffusionModel:
    """A model of the preset's shape: the same weights every time."""
    model = builders.model(vocabulary.size, p["length"], p["width"], p["num_layers"], p["width"] // 64)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(device)


def compiled(
    model: MaskedDiffusionModel, device: torch.device, float8: str | None = None, setting: str = "true"
) -> MaskedDiffusionModel:
    """The same weights, not copied, in blocks that are compiled; with float8 products where that is asked for."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, shared)
    if float8 is not None:
        to_float8(own.blocks, float8)
    compile_blocks(own, setting, Hardware(device, 0, 1, False))
    return own


def ways(model: MaskedDiffusionModel, device: torch.device, sampling: bool = False) -> dict[str, MaskedDiffusionModel]:
    """The model in each way that this machine can run it: eager, compiled, and for sampling on a GPU with recorded graphs."""
    found = {"eager": model}
    if can_compile(device):
        found["compiled"] = compiled(model, device)
    if sampling and device.type == "cuda":
        found["graphs"] = compiled(model, device, setting="graphs")
    return found


def masked_only(model: Any, micro: MicroBatch, vocabulary: Vocabulary, hw: Hardware) -> Callable[[], None]:
    """Forward and backward as pretraining does it."""

    def step() -> None:
        model.zero_grad()
        forward_loss(model, micro, vocabulary, hw).loss.backward()

    return step


def everywhere(model: Any, micro: MicroBatch, coefficient: torch.Tensor, hw: Hardware) -> Callable[[], None]:
    """Forward and backward with the logits of every position."""

    def step() -> None:
        model.zero_grad()
        with hw.autocast():
            logits = model(micro.noisy.noisy)
        loss_from_logits(logits, micro.noisy.clean.tokens, micro.noisy.mask, coefficient).backward()

    return step


def step_flops(model: MaskedDiffusionModel, micro: MicroBatch, vocabulary: Vocabulary) -> float:
    """Floating-point operations of a step that are needed: three products for each weight, of the masked rows in the loss."""
    length = micro.noisy.clean.tokens.shape[1]
    tokens = micro.noisy.clean.tokens.numel()
    return tokens * model.flops_per_token(length, float(micro.noisy.mask.float().mean()), vocabulary.ranges[0].size + 1)
