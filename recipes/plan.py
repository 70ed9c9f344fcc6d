"""What a training run will need, before a GPU is rented: memory by part, and tokens a second, for the batches that may fit.

    mdm plan --config pretrain_hub --gpu h100:8
    mdm plan --config my.yaml --gpu a100:4 model.num_layers=24 vocab=120000

Memory is counted from the model's shape; time is a prediction from the share of the peak that such models reached on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from components.tasks import INSTRUCT
from mdm.config import UserError, at_least_one, check, instantiate
from mdm.data.settings import check_streams, row_length
from mdm.models.memory import CHECKPOINTING
from mdm.recipe import load_recipe, run_recipe
from mdm.training.planner import MEASURED_MFU, Plan, parse_gpu, plan

CONFIG = "pretrain"

pretrain = load_recipe("pretrain")


@dataclass
class Settings(pretrain.Settings):
    """Those of pretrain; gpu: CARD or CARD:COUNT;  vocab: size of the vocabulary, where the tokenizers are not to be built."""

    gpu: str = "h100"
    vocab: int | None = None


def validate(cfg: Settings) -> None:
    """Raises UserError."""
    parse_gpu(cfg.gpu)
    check(cfg.model, "model", supplied=pretrain.MODEL_SUPPLIED)
    pretrain.model_shape(cfg)
    check_streams(cfg.data)
    at_least_one(cfg, "vocab", "tokens")


def main(cfg: Settings) -> None:
    card, count = parse_gpu(cfg.gpu)
    size = vocabulary_size(cfg)
    shape = replace(pretrain.model_shape(cfg), vocab_size=size)
    length = longest_row(cfg)
    first = plan(shape, 1, length, card, count)
    print(
        f"{first.parameters / 1e9:.3f} B parameters, vocabulary of {size:,}, rows of {length} positions; "
        f"{count} x {card.name} of {card.memory:.0f} GiB\n"
    )
    print(HEAD)
    fitting: list[tuple[float, int, str | None, Plan]] = []
    for mode in (None, *reversed(CHECKPOINTING)):
        for rows in (1, 2, 4, 8, 16, 32, 64, 128):
            made = plan(shape, rows, length, card, count, mode, cfg.optimizer.state)
            fits = made.total < 0.92 * card.memory  # what the allocator and NCCL need besides
            parts = (made.weights, made.gradients, made.moments, made.activations, made.logits, made.total)
            print(f"{rows:>5}  {mode or 'none':<14}" + "".join(f"{v:>9.1f}" for v in parts) + ("  yes" if fits else "  no"))
            if not fits:
                break
            fitting.append((made.tokens_per_second, rows, mode, made))
    if not fitting:
        raise UserError(f"gpu: not one row fits {count} x {card.name}; take more, a smaller model, or optimizer.state=int8")
    rate, rows, mode, made = max(fitting, key=lambda f: (f[0], f[1]))
    bound = "at most" if shape.width < min(MEASURED_MFU) else "about"
    print(
        f"\nFastest: batch.micro={rows} activation_checkpointing={mode or 'null'}, {made.total:.1f} GiB: {bound} {rate:,.0f} "
        f"tokens/s ({made.flops_per_token / 1e9:.2f} GFLOP a token); {cfg.tokens / 1e9:g} B tokens take "
        f"{cfg.tokens / rate / 3600:,.1f} h"
    )


HEAD = f"{'rows':>5}  {'checkpointing':<14}" + "".join(
    f"{name:>9}" for name in ("weights", "grads", "moments", "activ.", "logits", "GiB")
) + "  fits"  # fmt: skip


def longest_row(cfg: Settings) -> int:
    """Positions of the longest row of any task."""
    return max(row_length(s, task, cfg.canvas) for s in cfg.data.values() for task in s.tasks if s.pack or task != INSTRUCT)


def vocabulary_size(cfg: Settings) -> int:
    """Ids of all tokenizers, and 64 for what is no modality's; a tokenizer that is to be trained says how many it will have."""
    if cfg.vocab is not None:
        return cfg.vocab
    total = 64
    for modality, node in cfg.tokenizers.items():
        if node.get("vocab_size") is not None:
            total += node["vocab_size"]
            continue
        try:
            tokenizer: Any = instantiate(node, f"tokenizers.{modality}", corpus=())
        except Exception as error:
            raise UserError(f"tokenizers.{modality} cannot be built here ({error}); say vocab=SIZE") from error
        total += sum(tokenizer.codebooks)
    return total


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
