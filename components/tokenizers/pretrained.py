"""Learned tokenizers from a folder: memory is taken for as many numbers as its files hold, whatever its config states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def pretrained(model: Any, path: str, subfolder: str | None = None) -> Any:
    """`model.from_pretrained`, for a class of `transformers` or `diffusers`; a path that is no folder is a name on the hub.

    Raises ValueError where the config of a folder states more numbers than its weights have bytes.
    """
    options = {} if subfolder is None else {"subfolder": subfolder}
    folder = Path(path) / (subfolder or "")
    if folder.is_dir():
        with torch.device("meta"):
            if hasattr(model, "load_config"):
                shape = model.from_config(model.load_config(str(folder)))
            else:
                shape = model(model.config_class.from_pretrained(str(folder)))
        stated = sum(p.numel() for p in shape.parameters())
        held = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        if stated > held:
            raise ValueError(f"{folder}: its config states {stated:,} numbers, and its weights have {held:,} bytes")
    return model.from_pretrained(path, **options)
