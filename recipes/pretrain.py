"""Pretrain one masked diffusion model on any mix of text, images and speech.

    mdm run pretrain                                       one process
    mdm run --nproc_per_node 2 pretrain                    several: the same loss curve (docs/cluster.md)
    mdm cp pretrain my.py                                  take a copy and change it

A step draws the next `batch.physical` sequences of the mix, masks each at its own time, predicts the masked tokens, and takes
an AdamW step on the weighted cross-entropy. The optimizer's settings are those tuned at `batch.logical` sequences and at the
base width and depth: the SDE scaler carries them to the physical batch, CompleteP to the model's shape, and the learning rate
is a function of tokens seen. Ctrl-C, SIGTERM or SIGUSR1 saves after the step that is being done. Run it again with the same
output_dir to resume from its last whole checkpoint, at the very next sample, with the tokenizers that it began with, on as
many processes and with as large a physical batch as you have now.

In a copy, `self.history.log(mine=number)` in any step puts a number of your own into history.jsonl and the curves, and `print`
writes a line above the progress bar.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from omegaconf import MISSING

from components.parameterization import CompleteP
from components.places import AnyPath
from components.progress import working
from components.sde import rescale_moments
from mdm.config import UserError, check, instantiate
from mdm.data.corruption import check_autoregressive, horizon, layout_of, learned_noise, maskers
from mdm.data.pipeline import corpus, next_step, open_source, streams, tokenizers, training_loader
from mdm.data.position import whole_state
from mdm.data.processor import Processor
from mdm.data.settings import BatchSettings, LossSettings, StreamSettings, check_tasks, tasks_of
from mdm.data.validation import validation_batches
from mdm.evaluation.nelbo import forward_loss, nelbo, task_bits, write_samples
from mdm.generation.prompts import example_of
from mdm.hardware import Hardware, MeshSettings, compile_blocks, hardware, parallelize, shard, sync_gradients, whole
from mdm.models.folder import export
from mdm.models.memory import checkpoint_blocks, offloaded, to_float8
from mdm.models.transformer import MaskedDiffusionModel, ModelConfig
from mdm.pages import examples
from mdm.recipe import run_recipe
from mdm.training import checkpoint, record
from mdm.training.history import History, NonFinite, open_history
from mdm.training.meter import Meter
from mdm.training.optim import EMA, OptimizerSettings, ParameterizationSettings, adamw, batch_warnings
from mdm.training.output import output_folder
from mdm.training.profiling import ProfileSettings, profiled
from mdm.training.run import bar_of, check_run, find_resume, introduce, kept_processor, open_checkpoints, restore_or_start
from mdm.training.stopping import StopRequest
from mdm.training.trial import glance

CONFIG = "pretrain"
MODEL_SUPPLIED = ("vocab_size", "residual_multiplier")


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/pretrain.yaml` explains each."""

    output_dir: str = MISSING
    model: dict[str, Any] = MISSING
    tokenizers: dict[str, dict[str, Any]] = MISSING
    canvas: dict[str, int | None] = MISSING
    data: dict[str, StreamSettings] = MISSING
    lanes: int = 64
    data_workers: int = 0
    prompt_dropout: float = 0.1
    masker: dict[str, Any] = MISSING
    loss: LossSettings = field(default_factory=LossSettings)
    parameterization: ParameterizationSettings = field(default_factory=ParameterizationSettings)
    batch: BatchSettings = MISSING
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    tokens: int = MISSING
    ema: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    mesh: MeshSettings = field(default_factory=MeshSettings)
    compile: str = "auto"
    float8: str | None = None
    activation_checkpointing: str | None = None
    activation_offloading: bool = False
    log_every_steps: int = 10
    validate_every_tokens: int = 1_000_000
    validation_samples: int = 256
    sample_every_tokens: int | None = None
    checkpoint_every_tokens: int = 1_000_000
    checkpoint_dir: str | None = None
    profile: ProfileSettings | None = None
    metric_logger: dict[str, Any] | None = None


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before data loads. Raises UserError."""
    check(cfg.model, "model", supplied=MODEL_SUPPLIED)
    shape = model_shape(cfg)
    cfg.parameterization.of(shape)
    check_run(cfg, shape, list(cfg.tokenizers))
    if cfg.ema is not None:
        EMA.check(cfg.ema)
    check_tasks(cfg.data, cfg.tokenizers, cast(dict[str, int], cfg.canvas), shape.max_length)  # no null, since `check_run`


def model_shape(cfg: Settings) -> ModelConfig:
    """The shape of the config's model, without its weights. Raises UserError."""
    with torch.device("meta"):
        model = instantiate(cfg.model, "model", vocab_size=1, residual_multiplier=1.0)
    if not isinstance(model, MaskedDiffusionModel):
        raise UserError(f"model: {cfg.model['_component_']} builds no MaskedDiffusionModel (see mdm/models/builders.py)")
    cfg.mesh.check_model(model)
    return model.config


def main(cfg: Settings) -> None:
    with hardware(cfg.device, cfg.precision, cfg.mesh) as hw:
        with working("reading the data, building tokenizers and model", hw.main):
            run = Pretrain(cfg, hw)
        run.train()


class Pretrain:
    """setup in __init__, then `train`, which calls `step`, `validate`, `sample` and `save`."""

    def __init__(self, cfg: Settings, hw: Hardware) -> None:
        self.cfg, self.hw, self.folder = cfg, hw, output_folder(cfg.output_dir)
        self.checkpoints = open_checkpoints(cfg, hw)
        self.resumed = find_resume(self.folder, self.checkpoints.folder, asdict(cfg), hw)
        self.stop = StopRequest()
        torch.manual_seed(cfg.seed)

        # Data: sources, one vocabulary over their modalities, and an endless loader of optimizer steps.
        sources = {n: open_source(s.train or {}, f"data.{n}.train", endless=True) for n, s in cfg.data.items()}
        self.sources, self.lengths = sources, {n: len(s) for n, s in sources.items() if hasattr(s, "__len__")}
        self.held_out = {n: open_source(s.validation, f"data.{n}.validation") for n, s in cfg.data.items() if s.validation}
        try:
            self.processor = kept_processor(self.folder, self.resumed) or self.make_processor(sources)
            self.vocabulary = self.processor.vocabulary
            self.model, scaled = self.make_model()
            layout = layout_of(self.model.config, self.vocabulary)
            rows = horizon(cfg.data, self.processor.canvas, cfg.tokens)
            masker = maskers(cfg.data, cfg.masker, self.vocabulary, cfg.seed, layout, rows)
            autoregressive = check_autoregressive(self.model.config, masker, cfg.loss)
            learned = learned_noise(cfg.data, masker, cfg.loss, before=self.model.config.noise)
            self.model.config = replace(self.model.config, noise=learned)
            longest = self.model.config.max_length
            drawn = (longest, cfg.lanes, cfg.data_workers)
            mix = streams(cfg.data, sources, self.processor, masker, cfg.seed, cfg.prompt_dropout, *drawn)
            glance(cfg, sources, self.processor, masker, longest, hw.data_ranks)
            self.loader = training_loader(
                mix, masker, self.processor, self.physical, cfg.batch.micro, cfg.loss, cfg.seed, hw.data_rank, hw.data_ranks,
            )  # fmt: skip
            self.plan = validation_batches(
                cfg.data, self.held_out, self.processor, cfg.validation_samples, autoregressive=autoregressive,
                model=self.model.config,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(str(error)) from error

        # Model, optimizer, and what a run leaves behind.
        self.model.to(hw.device)
        self.num_parameters = self.model.num_parameters()
        meter = Meter(hw, self.vocabulary, self.model.flops)
        parallelize(self.model, hw)
        to_float8(self.model.blocks, cfg.float8)
        checkpoint_blocks(self.model.blocks, cfg.activation_checkpointing)
        self.compiled = compile_blocks(self.model, cfg.compile, hw)
        shard(self.model, hw)
        self.scaler = cfg.optimizer.scaler(cfg.batch, self.physical(0), cfg.tokens)
        self.optimizer = adamw(self.model, self.scaler.base, scaled, cfg.optimizer.state)
        self.ema = EMA(self.model, cfg.ema) if cfg.ema is not None else None
        self.example = example_of(self, sources)
        checkpoint.check_space(self.checkpoints.folder, self.num_parameters, self.ema is not None)
        self.state = restore_or_start(self, asdict(cfg))
        self.scaled_to: int | None = None
        self.history: History = open_history(cfg, hw, self.state["step"], meter)
        self.finite = NonFinite(hw, self.checkpoints.folder)

    def make_processor(self, sources: Mapping[str, Any]) -> Processor:
        """The tokenizers, some of them trained on the sources' own text, and their vocabulary."""
        built = tokenizers(self.cfg.tokenizers, lambda modality: corpus(sources, modality))
        return Processor.build(built, cast(dict[str, int], self.cfg.canvas), tasks_of(self.cfg))

    def make_model(self) -> tuple[MaskedDiffusionModel, CompleteP]:
        """The model with its initial weights, and how much larger it is than the one its settings were tuned at."""
        scaled = self.cfg.parameterization.of(model_shape(self.cfg))
        multiplier = scaled.residual_multiplier
        model = instantiate(self.cfg.model, "model", vocab_size=self.vocabulary.size, residual_multiplier=multiplier)
        model.init_weights(torch.Generator().manual_seed(self.cfg.seed), scaled)
        return model, scaled

    def export(self) -> None:
        """Writes the model to share."""
        export(self.folder / "model", self.model, self.processor, self.hw)

    def train(self) -> None:
        cfg, hw, state = self.cfg, self.hw, self.state
        introduce(self)
        batches = self.history.meter.waits(iter(self.loader))
        due = {"validate": state["tokens"], "save": state["tokens"] + cfg.checkpoint_every_tokens}
        due["sample"] = state["tokens"] + (cfg.sample_every_tokens or math.inf)
        profile = profiled(cfg.profile, self.folder / "profile", hw)
        with self.stop, self.checkpoints, bar_of(self) as bar, profile as stepped:
            while state["tokens"] < cfg.tokens:
                if state["tokens"] >= due["validate"]:
                    self.validate()
                    due["validate"] += cfg.validate_every_tokens
                seen = self.step(next_step(batches))
                stepped()
                bar.set_description("training", refresh=False)
                bar.update(min(seen, max(cfg.tokens - bar.n, 0)))
                last = self.stop.asked or state["tokens"] >= cfg.tokens
                if last or state["step"] % cfg.log_every_steps == 0:
                    bar.set_postfix_str(self.log())
                if last or state["tokens"] >= due["save"]:
                    saved = self.save()
                    due["save"] += cfg.checkpoint_every_tokens
                    if self.stop.asked:
                        self.checkpoints.wait()
                        raise self.stop.stopped(state["step"], saved)
                if state["tokens"] >= due["sample"]:
                    self.sample()
                    due["sample"] += cfg.sample_every_tokens
            self.checkpoints.wait()
        with working("evaluating on what was held out", hw.main):
            self.validate()
        if self.ema is not None:
            self.ema.swap(self.model)
        self.export()
        if hw.main:
            record.write(self.folder / "model", cfg, state["tokens"])
            examples.write(self.folder, self.processor, cfg.data, self.held_out, self.sources)
        self.history.close()
        hw.say(f"The model is in {self.folder / 'model'}. Try: {self.example}")

    def step(self, micros: list) -> int:
        """One optimizer step over the micro-batches of this rank; returns the tokens seen by all ranks."""
        hw, started = self.hw, time.perf_counter()
        counts = [sum(part) for part in zip(*((m.denominator, m.num_tokens, m.num_rows) for m in micros), strict=True)]
        summed = hw.sum(torch.tensor([*counts, *self.stop.votes], dtype=torch.float64))  # on the CPU: no device is waited for
        denominator, seen, rows, *votes = summed.tolist()
        self.stop.agreed(votes)
        denominator, seen = max(denominator, 1.0), int(seen)
        self.follow_batch(int(rows), seen)
        loss = torch.zeros((), device=hw.device)
        for i, micro in enumerate(micros):
            sync_gradients(self.model, i == len(micros) - 1, hw)
            with offloaded(self.cfg.activation_offloading):
                sums = forward_loss(self.model, micro.to(hw.device), self.vocabulary, hw)
            (sums.loss * (hw.data_ranks / denominator)).backward()  # FSDP averages over ranks; the loss is a sum
            loss += sums.loss.detach() / denominator
            self.history.accumulate(sums.nelbo, micro)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optimizer.clip))
        self.scaler.configure(self.optimizer, self.state["tokens"] + seen)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model.named_parameters(), self.scaler.kappa)
        self.state["step"] += 1
        self.state["tokens"] += seen
        self.finite.record(self.state["step"], micros, loss, norm)
        self.history.count(loss, norm, seen, time.perf_counter() - started)
        return seen

    def physical(self, seen: int) -> int:
        """Sequences of the step that begins after `seen` tokens."""
        return self.cfg.batch.at(seen / self.cfg.tokens)

    def follow_batch(self, physical: int, step_tokens: int) -> None:
        """Carries the optimizer over to another physical batch: one of the ramp, or of a resume with other settings."""
        if self.scaled_to == physical:
            return
        if (before := self.state.get("physical", physical)) != physical:
            rescale_moments(self.optimizer, physical / before)
            self.hw.say(f"The physical batch goes from {before} to {physical} sequences, and AdamW with it.")
        self.state["physical"] = self.scaled_to = physical
        self.scaler = replace(self.scaler, physical=physical)
        for warning in batch_warnings(self.scaler, step_tokens, self.cfg.optimizer.critical_steps):
            self.hw.say(f"Warning: {warning}")

    def log(self) -> str:
        """The only place, with validation and saving, that waits for the device."""
        self.finite.check()
        self.checkpoints.check()
        lr = float(self.optimizer.param_groups[0]["lr"])
        return self.history.write(self.state, self.vocabulary, lr)

    def validate(self) -> None:
        """NELBO per task on held-out samples, of the averaged weights where there are some."""
        if self.plan:
            if self.ema is not None:
                self.ema.swap(self.model)
            bits = task_bits(nelbo(self.model, self.plan, self.vocabulary, self.hw), self.plan)
            if self.ema is not None:
                self.ema.swap(self.model)
            self.history.validation(self.state, bits)

    def sample(self) -> None:
        """A few samples of each stream, into output_dir/samples/."""
        folder = self.folder / "samples" / f"step_{self.state['step']:08d}"
        write_samples(folder, self.model, self.processor, self.cfg.data, self.held_out, self.hw)

    def save(self) -> AnyPath:
        """A checkpoint to resume from, which is written while the next steps are done."""
        self.finite.check()
        self.history.notes.gather(self.state["step"])
        with self.history.meter.waiting("checkpoint_seconds"):
            state = {**self.state, "data": whole_state(self.loader, self.hw.gather), "vocabulary": self.vocabulary.to_dict()}
            return self.checkpoints.save(self.state["step"], self.model, self.optimizer, self.ema, state)


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on from the last checkpoint, where one was written")
