"""A sweep over inference settings: the grid, its cells on disk, the choice among them, and what they look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.data.reading import json_lines
from mdm.config import UserError
from mdm.config.names import up_to_date


def label(sampler: Mapping[str, Any]) -> str:
    """The family of a sampler's node: its class, and what is inside blocks."""
    name = sampler["_component_"].rsplit(".", 1)[-1]
    return f"{name}, {label(sampler['sampler'])}" if "sampler" in sampler else name


def describe(setting: Mapping[str, Any]) -> str:
    """A setting in one line."""

    def short(node: Any) -> str:
        if isinstance(node, Mapping):
            inner = ", ".join(f"{k}={short(v)}" for k, v in node.items() if k != "_component_")
            return f"{node['_component_'].rsplit('.', 1)[-1]}({inner})"
        return str(node)

    return f"{short(setting['sampler'])}, guidance_scale={short(setting.get('guidance_scale', 0.0))}"


class Cells:
    """What has been measured, a line of JSON for each cell: a sweep that is started again goes on behind the last one."""

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        """Raises UserError where the folder holds a sweep of something else."""
        self.path = folder / "cells.jsonl"
        header = folder / "sweep.json"
        if header.is_file() and json.loads(header.read_text()) != of:
            raise UserError(
                f"output_dir {folder} holds a sweep of another checkpoint, number of samples or seed; choose another"
            )
        header.write_text(json.dumps(of))
        lines = [c for _, c in json_lines(self.path) if isinstance(c, dict)] if self.path.is_file() else []  # one may be torn
        self.known = {self.key(c["modality"], c["setting"]): c for c in lines if {"modality", "setting"} <= set(c)}

    @staticmethod
    def key(modality: str, setting: Mapping[str, Any]) -> str:
        return json.dumps([modality, up_to_date(setting)], sort_keys=True)

    def get(self, modality: str, setting: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.known.get(self.key(modality, setting))

    def add(self, modality: str, setting: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
        """Keeps a cell, on disk at once."""
        cell = {"modality": modality, "setting": dict(setting), **measured}
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.known[self.key(modality, setting)] = cell
        return cell


def reference(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The best of the cells that take one token a step: of those within 0.01 of the highest accuracy, the lowest Frechet
    distance; for text, the lowest n-gram bits among those that keep within 0.5 bits of the highest entropy."""
    if "accuracy" in cells[0]:
        top = max(c["accuracy"] for c in cells)
        return min((c for c in cells if c["accuracy"] >= top - 0.01), key=lambda c: c["frechet"])
    top = max(c["entropy_bits"] for c in cells)
    return min((c for c in cells if c["entropy_bits"] >= top - 0.5), key=lambda c: c["ngram_bits"])


def best(cells: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fewest forwards at the quality of `base`: accuracy within 0.02 and Frechet distance at most 1.1 times it; for text,
    n-gram bits at most 1.02 times it and entropy within 0.1 bits."""

    def good(c: Mapping[str, Any]) -> bool:
        if "accuracy" in c:
            return c["accuracy"] >= base["accuracy"] - 0.02 and c["frechet"] <= 1.1 * base["frechet"]
        return c["ngram_bits"] <= 1.02 * base["ngram_bits"] and c["entropy_bits"] >= base["entropy_bits"] - 0.1

    quality = "frechet" if "accuracy" in base else "ngram_bits"
    return min((c for c in [*cells, base] if good(c)), key=lambda c: (round(c["forwards"], 1), c[quality]))
