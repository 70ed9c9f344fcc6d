"""Train a tokenizer of your own, on images or on speech: an autoencoder with finite scalar quantization.

    mdm run train_tokenizer                                          digits, in a minute or two on two cores
    mdm run train_tokenizer --config train_tokenizer_speech          mel spectrograms of spoken words

Reports the reconstruction of held-out samples (PSNR, or the mel distance) and how much of the codebook is used; writes
tokenizer/, metrics.json, and originals beside reconstructions. Train on it with components.tokenizers.fsq, path: .../tokenizer.
"""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING
from torch import Tensor

from components.data.bad import usable
from components.progress import Bar, working
from components.sde import warmup_cosine
from components.tokenizers.fsq import FLOOR_DB, FSQAutoencoder, FSQConfig, FSQImageTokenizer, FSQMelTokenizer
from mdm.config import UserError, at_least, at_least_one, check
from mdm.data.pipeline import open_source
from mdm.hardware import check_hardware, hardware
from mdm.pages.media import image_grid
from mdm.pages.report import figure_png
from mdm.recipe import run_recipe
from mdm.training.output import check_output_dir, in_place_of, output_folder
from mdm.training.reach import Trial
from mdm.training.trial import try_out

CONFIG = "train_tokenizer"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/train_tokenizer.yaml` explains each."""

    output_dir: str = MISSING
    train: dict[str, Any] = MISSING
    validation: dict[str, Any] = MISSING
    tokenizer: dict[str, Any] = MISSING
    steps: int = 1500
    batch: int = 64
    lr: float = 2e-3
    frames: int = 32
    seed: int = 0
    device: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before data loads. Raises UserError."""
    check_output_dir(cfg.output_dir)
    check_hardware(cfg.device, "fp32")
    check(cfg.train, "train")
    check(cfg.validation, "validation")
    at_least_one(cfg, "steps", "batch", "frames")
    at_least(0, cfg, "seed")
    if not 0 < cfg.lr < float("inf"):
        raise UserError(f"lr must be positive, got {cfg.lr}")
    config = fsq_config(cfg)
    if config.kind == "mel" and cfg.frames % config.patch:
        raise UserError(f"frames = {cfg.frames} is not a multiple of tokenizer.patch = {config.patch}")


def fsq_config(cfg: Settings) -> FSQConfig:
    """The autoencoder's shape. Raises UserError."""
    try:
        return FSQConfig(**{**cfg.tokenizer, "levels": tuple(cfg.tokenizer.get("levels", FSQConfig.levels))})
    except (TypeError, ValueError) as error:
        known = ", ".join(FSQConfig.__dataclass_fields__)
        raise UserError(f"tokenizer: {error}; it has {known}") from error


def trial(cfg: Settings) -> Trial:
    """What `mdm validate` does after all keys: samples through an autoencoder that knows nothing yet."""
    tokenizer = tokenizer_of(FSQAutoencoder(fsq_config(cfg)))
    return try_out(cfg, {"image" if isinstance(tokenizer, FSQImageTokenizer) else "audio": tokenizer})


def tokenizer_of(model: FSQAutoencoder) -> FSQImageTokenizer | FSQMelTokenizer:
    """The autoencoder as a tokenizer of what it is made for."""
    return (FSQImageTokenizer if model.config.kind == "image" else FSQMelTokenizer)(model)


def main(cfg: Settings) -> None:
    folder = output_folder(cfg.output_dir)
    torch.manual_seed(cfg.seed)
    with hardware(cfg.device, "fp32") as hw:
        model = FSQAutoencoder(fsq_config(cfg)).to(hw.device)
        tokenizer = tokenizer_of(model)
        with working("reading the samples"):
            samples = features(tokenizer, open_source(cfg.train, "train"))
        train(cfg, model, samples)
        model.cpu().eval().requires_grad_(False)
    replaced = in_place_of(folder / "tokenizer")
    model.save(folder / "tokenizer")
    with working("evaluating on what was held out"):
        metrics, picture = evaluate(tokenizer, open_source(cfg.validation, "validation"))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (folder / "reconstructions.png").write_bytes(picture)
    for name, value in metrics.items():
        print(f"{name:<24}{value:,.4g}")
    print(f"Written to {folder}{replaced}")


def features(tokenizer: Any, source: Any) -> list[Tensor]:
    """What the autoencoder sees of each sample. Raises UserError where a sample has none of it."""
    part, read = ("image", tokenizer.pixels) if isinstance(tokenizer, FSQImageTokenizer) else ("audio", tokenizer.spectrogram)
    found = [read(sample[part]) for sample in usable(source) if part in sample]
    if not found:
        raise UserError(f"train: the samples have no {part}")
    return found


def train(cfg: Settings, model: FSQAutoencoder, samples: list[Tensor]) -> None:
    """Reconstruction alone: mean squared and absolute error. Spectrograms are cut to `frames` frames, at random."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator, device = torch.Generator().manual_seed(cfg.seed), next(model.parameters()).device
    bar = Bar(range(cfg.steps), desc="training", unit="step")
    for step in bar:
        chosen = torch.randint(len(samples), (cfg.batch,), generator=generator).tolist()
        x = torch.stack([crop(samples[i], cfg.frames, model.config, generator) for i in chosen]).to(device)
        y, _ = model(x)
        loss = (y - x).square().mean() + 0.1 * (y - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * warmup_cosine((step + 1) / cfg.steps, 0.05)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")


def crop(sample: Tensor, frames: int, config: FSQConfig, generator: torch.Generator) -> Tensor:
    """An image as it is; `frames` frames of a spectrogram, silence behind one that is shorter."""
    if config.kind == "image":
        return sample
    short = max(frames - sample.shape[1], 0)
    padded = torch.nn.functional.pad(sample, (0, short), value=-1.0)
    start = int(torch.randint(padded.shape[1] - frames + 1, (1,), generator=generator))
    return padded[:, start : start + frames]


def evaluate(tokenizer: Any, source: Any) -> tuple[dict[str, float], bytes]:
    """Reconstruction and codebook use on held-out samples; and a picture of the first of them."""
    codes = []
    errors = []
    image = isinstance(tokenizer, FSQImageTokenizer)
    for sample in usable(source):
        own = tokenizer.encode(sample["image" if image else "audio"])
        codes.append(own)
        if image:
            back = tokenizer.pixels(tokenizer.decode(own).convert("RGB"))
            errors.append(((back - tokenizer.pixels(sample["image"])) / 2).square().mean())
        else:
            back, real = tokenizer.decode_spectrogram(own), tokenizer.spectrogram(sample["audio"])
            errors.append((back - real).abs().mean() * FLOOR_DB / 2)
    error = float(torch.stack(errors).mean())
    size = tokenizer.codebooks[0]
    p = torch.bincount(torch.cat(codes), minlength=size).double()
    p = p[p > 0] / p.sum()
    metrics = {"psnr_db": -10 * np.log10(error)} if image else {"mel_distance_db": error}
    metrics |= {
        "codes": size,
        "codes_used": len(p) / size,
        "perplexity": float(torch.exp(-(p * p.log()).sum())),
        "tokens_per_sample": float(np.mean([len(c) for c in codes])),
    }
    return metrics, (image_picture if image else mel_picture)(tokenizer, list(itertools.islice(usable(source), 10)))


def image_picture(tokenizer: FSQImageTokenizer, samples: list[dict]) -> bytes:
    """Originals above, reconstructions below."""
    back = [tokenizer.decode(tokenizer.encode(s["image"])) for s in samples]
    buffer = io.BytesIO()
    image_grid([*(s["image"] for s in samples), *back], len(samples), scale=6).save(buffer, "PNG")
    return buffer.getvalue()


def mel_picture(tokenizer: FSQMelTokenizer, samples: list[dict]) -> bytes:
    """Spectrograms: originals above, reconstructions below."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, min(5, len(samples)), figsize=(11, 4), squeeze=False, layout="constrained")
    for column, sample in zip(axes.T, samples, strict=False):
        real = tokenizer.spectrogram(sample["audio"])
        for place, shown in zip(column, (real, tokenizer.decode_spectrogram(tokenizer.encode(sample["audio"]))), strict=True):
            place.imshow(shown, origin="lower", aspect="auto", vmin=-1, vmax=1, cmap="magma")
            place.set_xticks([])
        column[0].set_title(sample.get("text", ""))
    axes[0, 0].set_ylabel("original, mel band")
    axes[1, 0].set_ylabel("reconstructed")
    return figure_png(figure)


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
