"""Any sampler of the house as a scheduler of `diffusers`: `LLaDA2Pipeline(model, SamplerScheduler(Factor()), tokenizer)`.

The pipeline goes from block to block and asks the model; what is unmasked and edited, and when a block is done, is the
sampler's. So are its settings, but for `num_steps`: that is the pipeline's `num_inference_steps`, in every block.

Beside diffusers' own `BlockRefinementScheduler`, greedily and where the model gives the mask token no probability:

    Threshold     the same tokens, if num_inference_steps is the block length or more: below, theirs takes a quota each pass.
                  A pass less a block, which theirs spends on finding no mask; and none for rows that have ended
    Editing       the same, with extra_steps one more than max_post_steps; theirs edits nothing at 0, ours at 1
    Confidence    the same as theirs with a threshold above 1, in blocks that are masked whole: where a prompt ends inside a
                  block, the quota is of its masks here, of the block's length there

The mask token is never drawn here; there it may be.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.precision import precise
from components.samplers import Blocks, LeftToRight, PerModality, Sampler, SamplerState
from components.samplers.any_noise.start import along
from components.samplers.base import Watch, ruled_out, started
from mdm.config import UserError
from mdm.config.names import SAMPLERS, in_full
from mdm.config.protocols import conforming
from mdm.config.trust import check_travelled

try:
    from diffusers.schedulers.scheduling_block_refinement import BlockRefinementScheduler, BlockRefinementSchedulerOutput
except ImportError as error:
    raise ImportError(
        f"{__name__} needs a diffusers that has LLaDA2Pipeline: pip install -U 'trimodal-mdm[hub]' ({error})"
    ) from error

OWN = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "threshold": "threshold",
    "editing_threshold": "edit_threshold",
    "max_post_steps": "extra_steps",
    "minimal_topk": "",
    "sampling_method": "",
}
"""What the pipeline hands over of its own, and what a sampler calls it."""


class SamplerScheduler(BlockRefinementScheduler):
    """A sampler behind diffusers' protocol, one block at a time. It keeps the state of the block that is being decoded.

    sampler:      any but `Blocks` and `PerModality`; or its settings as a config has them, which is how it is saved and loaded
    block_length: of a pipeline that is not told one

    Raises UserError for what is no sampler, and in `step` for a setting asked of the pipeline that the sampler does not have.
    """

    def __init__(self, sampler: Sampler | Mapping[str, Any] | str, block_length: int = 32) -> None:
        if isinstance(sampler, (Mapping, str)):
            node = check_travelled(in_full(sampler), "sampler", self.config_name, SAMPLERS)
            sampler = conforming(node, "sampler", Sampler)
        if isinstance(sampler, type) or not isinstance(sampler, Sampler):
            raise UserError(f"sampler must be one, such as Threshold(), or the settings of one; got {sampler!r}")
        for part in along(sampler, None):
            if isinstance(part, LeftToRight):
                raise UserError(
                    f"sampler: {type(part).__name__} asks for logits of finished tokens, which the pipeline has not"
                )
            if isinstance(part, (Blocks, PerModality)):
                raise UserError(
                    f"sampler: the pipeline goes from block to block itself, in one modality; {type(part).__name__} has no "
                    "place there: give the sampler inside it, and block_length"
                )
        if block_length < 1:
            raise UserError(f"block_length must be at least 1, got {block_length}")
        self.register_to_config(sampler=settings_of(sampler), block_length=block_length)
        self.sampler: Sampler = sampler
        self.state: SamplerState | None = None
        self.timesteps: Tensor = torch.empty(0, dtype=torch.long)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, block_length: int | None = None
    ) -> None:
        """The `num_steps` of the sampler, where it has such; the length of a block is that of what `step` is given."""
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self.sampler = with_steps(self.sampler, num_inference_steps)
        self.state = None

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]  (what else the pipeline hands over is one mapping)
        self,
        model_output: Float[Tensor, "batch block vocab"],
        timestep: int | Tensor,
        sample: Int[Tensor, "batch block"],
        *,
        mask_token_id: int | None = None,
        prompt_mask: Bool[Tensor, " block"] | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **asked: Any,
    ) -> BlockRefinementSchedulerOutput | tuple[Tensor, ...]:
        """A step of the sampler in the block `sample`; timestep 0 begins a block, whose masks are what is generated of it.

        Of the output, `sampled_tokens` and `sampled_probs` hold what has been committed so far.

        Raises ValueError where nothing can be drawn, as `sample` does.
        """
        self._refuse(asked)
        if mask_token_id is None:
            raise UserError("mask_token_id: this scheduler fills in mask tokens, and was not told which id they have")
        if self.state is None or int(timestep) == 0:
            self.state = started(self.sampler, SamplerState.start(sample, sample == mask_token_id, mask_token_id))
            self.watch = Watch(self.sampler, self.state.generate, range(len(sample)))
        before = self.state
        changed = sample != before.tokens  # by a callback, or not taken over: the row had ended
        before = replace(
            before,
            tokens=sample,
            masked=torch.where(changed, sample == mask_token_id, before.masked),
            uniform=numbers(before.uniform, generator),
        )
        logits = precise(model_output)
        logits = logits.masked_fill(ruled_out(None, mask_token_id, logits), float("-inf"))
        after = self.sampler.step(logits, before)
        self.state = after = replace(after, finished=after.finished | before.finished)
        self.watch(after, range(len(sample)), logits.amax(dim=-1).masked_fill(~before.masked | before.finished[:, None], 0.0))
        other, masked = after.tokens != sample, sample == mask_token_id
        out = BlockRefinementSchedulerOutput(
            prev_sample=after.tokens,  # pyright: ignore[reportArgumentType]  (diffusers says LongTensor, BoolTensor)
            transfer_index=other & masked,  # pyright: ignore[reportArgumentType]
            editing_transfer_index=other & ~masked,  # pyright: ignore[reportArgumentType]
            sampled_tokens=after.tokens,  # pyright: ignore[reportArgumentType]
            sampled_probs=after.confidence.float(),
            pred_logits=model_output,
        )
        return out if return_dict else out.to_tuple()

    def check_block_should_continue(
        self,
        step_idx: int,
        masks_remaining: bool | Bool[Tensor, ""],
        editing_enabled: bool,
        editing_transfer_index: Bool[Tensor, "batch block"],
        post_steps: int,
        max_post_steps: int,
        finished: Bool[Tensor, " batch"],
    ) -> bool:
        """Whether the sampler has more to do in a row that has not come to its end token (`finished`)."""
        self._refuse({"max_post_steps": max_post_steps})
        return self.state is not None and bool((~self.state.finished & ~finished).any())

    def _refuse(self, asked: Mapping[str, Any]) -> None:
        """Raises UserError for a setting that neither the sampler has nor the pipeline hands over by itself."""
        for name, value in asked.items():
            own = getattr(self.sampler, OWN.get(name, ""), None)
            if value not in (None, own, pipeline_defaults().get(name)):
                called = type(self.sampler).__name__
                has = f"has {OWN[name]}={own}: set it there" if own is not None else "has no such setting: leave it out"
                raise UserError(f"{name}={value} is asked of the pipeline, but its sampler's settings hold; {called} {has}")


@functools.cache
def pipeline_defaults() -> dict[str, Any]:
    """What LLaDA2Pipeline hands over when it is asked for nothing."""
    from diffusers.pipelines.llada2.pipeline_llada2 import LLaDA2Pipeline

    return {name: p.default for name, p in inspect.signature(LLaDA2Pipeline.__call__).parameters.items()}


def settings_of(part: Any) -> Any:
    """A sampler, or a schedule inside one, as the `_component_` node that builds it again; what is plain stays."""
    if isinstance(part, (list, tuple)):
        return [settings_of(one) for one in part]
    if part is None or isinstance(part, (str, int, float, bool)):
        return part
    name, module = type(part).__qualname__, type(part).__module__
    node = {"_component_": SAMPLERS[name] if module.startswith("components.") and name in SAMPLERS else f"{module}.{name}"}
    return node | ({f.name: settings_of(getattr(part, f.name)) for f in fields(part) if f.init} if is_dataclass(part) else {})


def with_steps(sampler: Any, num_steps: int) -> Any:
    """A sampler that takes so many steps, and the one inside it, where either has a number of them."""
    if not is_dataclass(sampler) or isinstance(sampler, type):
        return sampler
    own = {f.name: getattr(sampler, f.name) for f in fields(sampler)}
    changed: dict[str, Any] = {"num_steps": num_steps} if "num_steps" in own else {}
    if "sampler" in own:
        changed["sampler"] = with_steps(own["sampler"], num_steps)
    return replace(sampler, **changed)


def numbers(like: Float[Tensor, "batch 3 block"], generator: torch.Generator | None) -> Float[Tensor, "batch 3 block"]:
    """Uniform numbers for a step, from the generator that the pipeline was given; else from torch's."""
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, dtype=torch.float64, device=device, generator=generator).to(like.device)
