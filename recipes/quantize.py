"""Quantize a trained model: the linear layers of its blocks in 8 or 4 bits.

    mdm run quantize checkpoint=runs/quickstart scheme=int4_weight_only
    mdm generate checkpoint=runs/quantized task=text_to_image prompt="a handwritten seven"

Writes output_dir/model, which every recipe loads as any other. What each scheme costs in quality and gains in memory and speed:
`mdm bench quantize`, and `mdm run evaluate checkpoint=runs/quantized` for your own figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from mdm.config import UserError
from mdm.hardware import check_hardware, hardware
from mdm.models.folder import QUANTIZED, export, load_model, model_folder
from mdm.models.quantization import check_scheme, flattened, in_dtype, num_bytes, quantize, weights
from mdm.recipe import run_recipe
from mdm.training import record
from mdm.training.output import check_output_dir, in_place_of

CONFIG = "quantize"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/quantize.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    output_dir: str = MISSING
    scheme: str = "int8_weight_only"
    dtype: str = "bf16"
    device: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    check_hardware(cfg.device, "auto")
    with hardware(cfg.device, "auto") as hw:
        check_scheme(cfg.scheme, hw.device)
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype: {cfg.dtype!r} is not one of {', '.join(DTYPES)}")
    folder = model_folder(cfg.checkpoint)
    if (folder / QUANTIZED).is_file():
        raise UserError(f"checkpoint={cfg.checkpoint} is quantized already; give the model that it was made from")
    check_output_dir(cfg.output_dir)
    if (Path(cfg.output_dir) / "model").resolve() == folder.resolve():
        raise UserError(f"output_dir={cfg.output_dir}: the quantized model would replace the one it is made from")


def main(cfg: Settings) -> None:
    with hardware(cfg.device, "auto") as hw:
        model, processor = load_model(cfg.checkpoint, hw.device)
        in_dtype(model, DTYPES[cfg.dtype])
        before = 2 * sum(weight.numel() for weight in weights(model).values())
        count, whole = before // 2, model.num_parameters()
        quantize(model, cfg.scheme)
        after = num_bytes(model)
        state = {name: value.cpu() for name, value in flattened(model.state_dict()).items()}
        about = {"scheme": cfg.scheme, "dtype": str(DTYPES[cfg.dtype]).removeprefix("torch."), "device": hw.device.type}
        folder = Path(cfg.output_dir) / "model"
        replaced = in_place_of(folder / "model.safetensors")
        export(folder, model, processor, hw, state, about)
        record.carry(cfg.checkpoint, folder)
    print(
        f"{cfg.scheme}: {count:,} of {whole:,} weights, those of the blocks' layers, take {after / 2**20:.2f} MiB, "
        f"{after / before:.3f} of bfloat16's {before / 2**20:.2f} MiB. Written to {folder}{replaced}"
    )


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
