"""The coordinate check: how much a step changes activations, over width or depth (Tensor Programs V, 2203.03466).

Where hyperparameters transfer, the change is flat: neither vanishing nor exploding as the model grows. That is a limit: in a
small model the random part of its start adds to it, and falls as size^-1/2. So check sizes past that of the tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CoordinateCheck:
    """rows: {"size", "seed", "module", "change"}: how much a step changes a module's output on the probe, root mean square
    over its entries, mean over the steps."""

    rows: list[dict[str, Any]]

    def changes(self) -> dict[str, dict[int, np.ndarray]]:
        """Per module and size, the changes of all seeds."""
        found: dict[str, dict[int, list[float]]] = {}
        for row in self.rows:
            found.setdefault(row["module"], {}).setdefault(row["size"], []).append(row["change"])
        return {module: {size: np.array(v) for size, v in by_size.items()} for module, by_size in found.items()}

    def slopes(self) -> dict[str, float]:
        """Per module, the slope of log change (its mean over seeds) against log size: 0 is flat."""
        found = {}
        for module, by_size in self.changes().items():
            means = [np.log(changes).mean() for changes in by_size.values()]
            found[module] = float(np.polyfit(np.log(list(by_size)), means, 1)[0])
        return found

    def draw(self, axes: Any, size: str) -> None:
        """The changes over the size, with the spread over seeds, into a matplotlib axes."""
        slopes = self.slopes()
        for (module, by_size), marker in zip(self.changes().items(), "osD^vPX*h<>" * 9, strict=False):
            means = [changes.mean() for changes in by_size.values()]
            spread = [changes.std(ddof=1) if len(changes) > 1 else 0.0 for changes in by_size.values()]
            label = f"{module} ({slopes[module]:+.2f})"
            axes.errorbar(list(by_size), means, spread, marker=marker, markersize=4, capsize=2, linewidth=1, label=label)
        sizes = sorted({row["size"] for row in self.rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.set_xlabel(size)
        axes.set_ylabel("RMS change of the output in a step")
        axes.legend(
            fontsize="x-small", title="module (slope)", title_fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1)
        )


def coordinate_check(
    build: Callable[[int, int], nn.Module],
    step: Callable[[nn.Module], Any],
    probe: Callable[[nn.Module], Mapping[str, Tensor] | None],
    watch: Callable[[nn.Module], Mapping[str, nn.Module]],
    sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 10,
    on_model: Callable[[int, int], object] | None = None,
) -> CoordinateCheck:
    """Trains a fresh model of each size and seed for a few steps and compares its activations before and after each.

    build:    (size, seed) -> model
    step:     takes an optimizer step of the model built last, in place; the same data for every size
    probe:    runs the model on fixed inputs; tensors that it returns, by name, are looked at too. Return logits so, of the
              ids that the loss trains: a row of the unembedding without a gradient changes by chance alone, as width^-1/2
    watch:    the modules whose outputs are looked at, by name: the same names for every size
    on_model: called after each model

    Raises ValueError for fewer than two sizes, or no step.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"coordinate_check: at least two sizes are needed, got {list(sizes)}")
    if steps < 1:
        raise ValueError(f"coordinate_check: steps must be at least 1, got {steps}")
    rows = []
    for size in sizes:
        for seed in seeds:
            model = build(size, seed)
            before = _outputs(model, probe, watch(model))
            changes = dict.fromkeys(before, 0.0)
            for _ in range(steps):
                step(model)
                after = _outputs(model, probe, watch(model))
                for name, value in after.items():
                    changes[name] += (value - before[name]).square().mean().sqrt().item() / steps
                before = after
            rows += [{"size": size, "seed": seed, "module": name, "change": change} for name, change in changes.items()]
            if on_model is not None:
                on_model(size, seed)
    return CoordinateCheck(rows)


@torch.no_grad()
def _outputs(
    model: nn.Module, probe: Callable[[nn.Module], Mapping[str, Tensor] | None], modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Each module's last output on the probe, and what the probe returns, in float32."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(name, output.detach().float().clone())

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        returned = probe(model) or {}
    finally:
        for handle in handles:
            handle.remove()
    return {**found, **{name: value.float() for name, value in returned.items()}}
