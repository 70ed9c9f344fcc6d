"""What the demo's sliders do to a sampler: they begin where its settings are, and one that is not moved changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from components.samplers import Ancestral, Confidence, EntropyBounded, FirstHitting, ReMDM, Sampler, Threshold
from components.samplers.guidance import Scale

TUNED = "as tuned for this task"
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "first-hitting (one token a pass)": lambda n: FirstHitting(),
    "ancestral": lambda n: Ancestral(num_steps=n),
    "confidence": lambda n: Confidence(num_steps=n),
    "margin": lambda n: Confidence(num_steps=n, rank_by="margin"),
    "entropy": lambda n: Confidence(num_steps=n, rank_by="entropy"),
    "confidence threshold 0.9": lambda n: Threshold(threshold=0.9),
    "entropy-bounded": lambda n: EntropyBounded(gamma=1.0),
    "ReMDM (masks again)": lambda n: ReMDM(num_steps=n, variant="rescale", eta=0.2),
}
SLIDERS = {"num_steps": 8, "temperature": 1.0, "top_p": 1.0}
"""The settings of a sampler that have one, and where it begins for a sampler that has no such setting."""
MOST_STEPS = 64
"""Where the slider of passes ends."""


def settings(sampler: Any) -> dict[str, Any]:
    """Where the sliders begin: the sampler's own settings, of one that is made of several the first that has any."""
    own = dict(SLIDERS)
    for part in reversed(_parts(sampler)):
        own |= {name: value for name in SLIDERS if (value := getattr(part, name, None)) is not None}
    return own | {"num_steps": min(own["num_steps"], MOST_STEPS)}


def number(scale: Scale) -> float:
    """Where the slider of a guidance scale begins: one that changes with time has its first value there."""
    return float(scale) if isinstance(scale, (int, float)) else float(getattr(scale, "start", 0.0))


def fixed_passes(sampler: Any) -> bool:
    """Whether a sampler, or one of those that it is made of, takes a number of passes."""
    return any(hasattr(part, "num_steps") for part in _parts(sampler))


def chosen(name: str, tuned: Sampler, moved: Mapping[str, Any]) -> Sampler:
    """The sampler of that name: the one tuned for the task with what of its settings was moved, or another with all of them."""
    begin = settings(tuned)
    if name == TUNED:
        return changed(tuned, {key: moved[key] for key in SLIDERS if moved[key] != begin[key]})
    return changed(SAMPLERS[name](moved["num_steps"]), {key: moved[key] for key in ("temperature", "top_p")})


def changed(sampler: Any, new: Mapping[str, Any]) -> Any:
    """A sampler with those of the settings that it has, in it and in all that it is made of. Raises ValueError as it does."""
    if not is_dataclass(sampler) or not new:
        return sampler
    held: dict[str, Any] = {f.name: getattr(sampler, f.name) for f in fields(sampler)}
    own = {name: new[name] for name in held if name in new}
    if "sampler" in held:
        own["sampler"] = changed(held["sampler"], new)
    if "samplers" in held:
        own["samplers"] = [changed(one, new) for one in held["samplers"]]
    built: Any = sampler
    return replace(built, **own)


def _parts(sampler: Any) -> list[Any]:
    """A sampler and all that it is made of."""
    inner = [*filter(None, [getattr(sampler, "sampler", None)]), *(getattr(sampler, "samplers", None) or ())]
    return [sampler, *(part for one in inner for part in _parts(one))]
