"""Default inference settings of each modality: measured by `recipes/sweep_inference.py`, kept in a YAML file beside the model.

    image:
      sampler: {_component_: components.samplers.FirstHitting, top_p: 0.95}
      guidance_scale: 0.5

A key is a modality, or a task that needs settings of its own. What has none is sampled exactly: a token a pass, no guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from components.files import in_one_line
from components.samplers import Ancestral, FirstHitting, LearnedRates, PerModality, Sampler
from components.samplers.any_noise.start import along
from components.samplers.guidance import Scale
from components.schedules import Schedule
from components.tasks import find_task, name_of
from components.weightings import Noise
from mdm.config import UserError, instantiate, one_line
from mdm.config.names import SAMPLERS, in_full
from mdm.config.protocols import lacking, members
from mdm.config.trust import check_travelled
from mdm.models.folder import model_folder

FILE = "defaults.yaml"


@dataclass(frozen=True)
class Inference:
    """How a modality is sampled."""

    sampler: Sampler
    guidance_scale: Scale = 0.0


@dataclass(frozen=True)
class Defaults:
    """Inference settings by modality or task."""

    settings: Mapping[str, Mapping[str, Any]]

    @classmethod
    def packaged(cls) -> Defaults:
        """Those that come with the library, measured on the quickstart's model."""
        return cls.load(Path(__file__).parent / FILE)

    @classmethod
    def load(cls, path: str | Path) -> Defaults:
        """Reads a file, which may have travelled with a model: of samplers of the library (see mdm/config/trust.py).

        Raises UserError where it is missing, or holds something else.
        """
        return cls({}).on_top(read_plain_yaml(Path(path)), path)

    def on_top(self, read: Mapping[str, Any], path: str | Path) -> Defaults:
        """These with others, which stand in the file `path`, in their place. Raises UserError as `load` does."""
        settings = dict(self.settings)
        for key, given in read.items():
            if not isinstance(given, dict) or set(given) - {"sampler", "guidance_scale"} or "sampler" not in given:
                raise UserError(f"{path}: {key} must hold a sampler and a guidance_scale, got {given!r}")
            parts = {name: in_full(given.get(name)) for name in ("sampler", "guidance_scale")}
            node = {name: check_travelled(part, f"{key}.{name}", path, SAMPLERS) for name, part in parts.items()}
            _refuse_extremes(node, f"{path}: {key}")
            with one_line(f"{path}: {key}"):
                _require_sampler(instantiate(node["sampler"], f"{key}.sampler"), f"{key}.sampler")
                build_scale(node["guidance_scale"], key)
                settings[name_of(find_task(key)) if "->" in key else key] = node
        return Defaults(settings)

    def save(self, model: str | Path) -> None:
        """Writes the file beside a model."""
        (Path(model) / FILE).write_text(
            yaml.safe_dump({key: dict(node) for key, node in self.settings.items()}, sort_keys=False)
        )

    @classmethod
    def beside(cls, checkpoint: str | Path, path: str | Path | None = None) -> Defaults:
        """Those of `path`, else those beside a checkpoint's model, else the packaged ones."""
        own = model_folder(checkpoint) / FILE
        return cls.load(path) if path else cls.load(own) if own.is_file() else cls.packaged()

    def of(
        self,
        task: str,
        modalities: Sequence[str],
        noise: Mapping[str, Noise] | None = None,
        learned_orders: bool = False,
    ) -> Inference:
        """The settings of a task: its own, or those of what it generates (of each, where that is more than one modality).

        modalities: of the model, in the order of their indices
        noise:      what the model undoes, of modalities that are not masked: where that ends in no masks, a sampler that fills
                    them in gives way to `Ancestral`, with its steps, temperature, top-k and top-p
        learned_orders: a sampler that would take every position to be alike gives way to `LearnedRates`, with as many steps
        """
        own = self._of(task, modalities, noise)
        return replace(own, sampler=_by_rates(own.sampler)) if learned_orders else own

    def _of(self, task: str, modalities: Sequence[str], noise: Mapping[str, Noise] | None) -> Inference:
        generated, task = find_task(task).generated, name_of(find_task(task))
        if task in self.settings or len(generated) == 1:
            own = self._one(task if task in self.settings else generated[0])
            return own if all(_suits(own.sampler, m, noise) for m in generated) else replace(own, sampler=_instead(own.sampler))
        each = {m: self._one(m) for m in generated}
        each = {m: own if _suits(own.sampler, m, noise) else Inference(_instead(own.sampler)) for m, own in each.items()}
        absent = next(iter(each.values())).sampler  # never used: such a modality has no position
        return Inference(PerModality([each[m].sampler if m in each else absent for m in modalities]))

    def _one(self, key: str) -> Inference:
        if key not in self.settings:
            return Inference(FirstHitting())
        node = self.settings[key]
        return Inference(instantiate(node["sampler"], f"{key}.sampler"), build_scale(node.get("guidance_scale"), key))


def _suits(sampler: Sampler, modality: str, noise: Mapping[str, Noise] | None) -> bool:
    own = (noise or {}).get(modality)
    return own is None or own.kernel.ends_masked or all(getattr(part, "any_noise", False) for part in along(sampler, None))


def _instead(sampler: Sampler) -> Ancestral:
    """`Ancestral` with whatever settings of a sampler it has too."""
    shared = ("num_steps", "temperature", "top_k", "top_p")
    return Ancestral(**{name: getattr(sampler, name) for name in shared if hasattr(sampler, name)})


def _by_rates(sampler: Sampler) -> Sampler:
    """`LearnedRates` in place of what unmasks at random times, with its settings."""
    if isinstance(sampler, PerModality):
        return PerModality([_by_rates(own) for own in sampler.samplers])
    if not isinstance(sampler, (Ancestral, FirstHitting)):
        return sampler
    shared = {name: getattr(sampler, name) for name in ("temperature", "top_k", "top_p")}
    return LearnedRates(num_steps=getattr(sampler, "num_steps", None), **shared)


MAX_BYTES = 2**20
MAX_NUMBER = 10**6  # steps, a temperature, a scale: more is a loop without end, or no number


def _refuse_extremes(node: Any, where: str) -> None:
    """Raises UserError for a number that is none, or beyond any setting's."""
    if isinstance(node, (int, float)) and not -MAX_NUMBER <= node <= MAX_NUMBER:
        raise UserError(f"{where}: {str(node)[:30]} is beyond {MAX_NUMBER:,}")
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _refuse_extremes(value, where)


def _require_sampler(built: Any, key: str) -> None:
    """Raises UserError for what cannot sample, or has something inside that cannot, or no schedule where it needs one."""
    needed: list[tuple[str, Any, Any]] = [("sampler", built, Sampler)]
    schedule = getattr(type(built), "__dataclass_fields__", {}).get("schedule")
    if schedule is not None and not (built.schedule is None and "None" in str(schedule.type)):
        needed.append(("schedule", built.schedule, Schedule))
    for name, part, protocol in needed:
        if lacks := lacking(part, members(protocol)):
            raise UserError(f"{key}: {part!r} is no {name}: it lacks {', '.join(lacks)}")
    inner = [built.sampler] if hasattr(built, "sampler") else getattr(built, "samplers", [])
    for part in inner:
        _require_sampler(part, key)


def read_plain_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file that may be a stranger's: no interpolation, no other file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"config file not found: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that are read")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {in_one_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path} must hold keys and values, got {type(found).__name__}")
    return found


def build_scale(node: Any, key: str) -> Scale:
    """A guidance scale as configs have it: a number, or the `_component_` of one that changes with time. None is off.

    Raises UserError where it is neither, or negative.
    """
    if isinstance(node, (Mapping, str)):
        return instantiate(in_full(node), f"{key}.guidance_scale")
    if node is not None and (isinstance(node, bool) or not isinstance(node, (int, float)) or not 0 <= node < math.inf):
        raise UserError(f"guidance_scale must be at least 0 (0 is off), or the _component_ of a schedule; got {node!r}")
    return float(node or 0.0)
