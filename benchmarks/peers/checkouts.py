"""Modules of a checkout: imported from where they lie, without being installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch

Suite = tuple[Mapping[str, Callable[[], object]], float, Callable[[], dict[str, float]]]
"""Variants to be compared, the tokens of a call, and what their outcomes have in common, asked after they ran."""


def dtype_on(device: torch.device) -> torch.dtype:
    """What weights are kept in here: bf16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class importing:
    """A folder in front of the import path, for modules that import each other by short names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no checkout at {self.folder}")
        sys.path.insert(0, str(self.folder))

    def __exit__(self, *_: object) -> None:
        sys.path.remove(str(self.folder))


def script(path: Path) -> ModuleType:
    """A Python file as a module."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None  # a file of Python has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare_package(name: str, folder: Path) -> None:
    """A package whose modules can be imported, its own `__init__` left out: it may want much that they do not need."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
