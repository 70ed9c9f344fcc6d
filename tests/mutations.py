"""Deliberate breakages of the library, each of which some test has to see. By hand, before a release (an hour on two cores):

    python tests/mutations.py --jobs 2                 all of them
    python tests/mutations.py --only sde --whole       those with "sde" in file or name; survivors meet the whole suite

A breakage is one exact replacement in one file. It is applied to a copy of the tracked files, and the tests of its room run
until the first that fails; a run that does not end counts as caught. The exit code is 1 where under 95 % of those that change
what is computed are caught, or where a snippet is no longer found: then write it anew, for what the code says now.
(tests/test_mutations.py looks for the snippets in every run of the suite.)
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parent.parent
WANTED = 0.95  # of the breakages that change what is computed
SECONDS = 120  # for the tests of a room; the slowest take a minute
WHOLE = 1800  # for the whole suite


@dataclass(frozen=True)
class Mutation:
    """One replacement. tests: what pytest is given; equal: why nothing is computed otherwise, for one that is kept as a note"""

    file: str
    tests: str
    name: str
    old: str
    new: str
    equal: str = ""

    @property
    def paths(self) -> list[str]:
        return [f"tests/{t}" for t in self.tests.split()]

    def found(self, root: Path = ROOT) -> int:
        """How often the snippet occurs in its file."""
        return (root / self.file).read_text().count(self.old)


def of(file: str, tests: str, *rows: tuple[str, ...]) -> list[Mutation]:
    """The breakages of a file: name, old and new of each, and where they differ its tests."""
    return [Mutation(file, row[3] if len(row) > 3 else tests, *row[:3], *row[4:]) for row in rows]


MUTATIONS = [
    *of(
        "components/schedules.py",
        "components/test_schedules.py",
        (
            "polynomial: alpha' without its power",
            "return -self.power * t ** (self.power - 1)",
            "return -(t ** (self.power - 1))",
        ),
        ("polynomial: weight without its power", "return self.power / t ", "return 1 / t "),
        ("polynomial: inverse without the root", "(1 - alpha) ** (1 / self.power)", "(1 - alpha)"),
        ("cosine: another angle", "math.pi / 4 * (1 - t)", "math.pi / 5 * (1 - t)"),
        ("cosine: the weight upside down", "torch.cos(angle) / torch.sin(angle)", "torch.sin(angle) / torch.cos(angle)"),
        ("geometric: not normalised", "- math.exp(-self.beta_max)) / self._span\n", ")\n"),
        (
            "geometric: 1 - alpha by subtraction",
            "self.beta_min * torch.expm1(t * math.log(self.beta_max / self.beta_min))  #",
            "sigma - self.beta_min  #",
        ),
        (
            "truncated: alpha' of the base",
            "return (self.hi - self.lo) * self.base.alpha_prime(t)",
            "return self.base.alpha_prime(t)",
        ),
        ("truncated: inverse without lo", "(1 - alpha - self.lo) / (self.hi - self.lo)", "(1 - alpha) / (self.hi - self.lo)"),
    ),
    *of(
        "components/noise.py",
        "components/test_noise.py",
        ("noise: the seed is ignored", "Philox(key=seed,", "Philox(key=0,"),
        ("noise: all purposes share one stream", "STREAMS.index(stream), index]", "0, index]"),
        ("noise: all samples share one stream", "STREAMS.index(stream), index]", "STREAMS.index(stream), 0]"),
    ),
    *of(
        "components/maskers.py",
        "components/test_maskers.py",
        ("times: a group without a common offset", '"group", index // self.group)', '"group", index)'),
        ("times: a group with one time", "offset + index % self.group / self.group", "offset + 0"),
        (
            "times: strata are not kept",
            '"time", index).random() + index % self.group) / self.group',
            '"time", index).random())',
        ),
        ("bernoulli: t_min dropped at the low end", "t_max - (t_max - self.t_min) *", "t_max - t_max *"),
        ("bernoulli: t_min of a pair dropped at the high end", "t_max = 1 - self.t_min if self.pairs else 1.0", "t_max = 1.0"),
        (
            "bernoulli: a pair is twice the same mask",
            "(torch.from_numpy(u) < 1 - alpha) ^ other",
            "(torch.from_numpy(u) < 1 - alpha)",
        ),
        ("bernoulli: the complement weighs as the mask", "torch.where(other, -alpha_prime / alpha, weight)", "weight"),
        (
            "bernoulli: a pair has two masks",
            "key = index // 2 if self.pairs else index\n            t[row",
            "key = index\n            t[row",
        ),
        ("bernoulli: noise of the row, not the sample", '"mask", key).random(span.stop', '"mask", row).random(span.stop'),
        (
            "bernoulli: every modality by the first's schedule",
            "values = self.schedule[name]",
            "values = self.schedule[self.modalities[0]]",
        ),
        ("fixed count: from 0", "order[: fewest + int(uniform", "order[: int(uniform"),
        ("fixed count: the most is never drawn", "* (largest - fewest + 1))]", "* (largest - fewest))]"),
        ("fixed count: clipped shares are a bound", "return (self.least, self.most) == (0, 1)", "return True"),
        ("fixed count: none of a block of one", "fewest = max(1, math.ceil(", "fewest = max(0, math.ceil("),
        ("fixed count: not weighed", "= scale / max(len(chosen), 1)", "= 1.0"),
        ("fixed count: a pair weighs L", "scale = length + 1", "scale = length"),
        ("prompts are masked too", "mask = masked & batch.maskable", "mask = masked"),
        (
            "next token: prompts are predicted",
            "mask=batch.maskable, weight=",
            "mask=batch.document >= 0, weight=",
            "components/test_maskers.py",
        ),
    ),
    *of(
        "components/block_diffusion/clipping.py",
        "components/block_diffusion/test_clipping.py",
        ("clipping: the most is left out", "(masked <= largest)", "(masked < largest)"),
        ("clipping: the narrow ranges too", "if most - least < width - 1e-9:", "if most <= least:"),
        ("clipping: in the order of shares", "key=lambda c: (c.variance, c.least - c.most)", "key=lambda c: c.least"),
    ),
    *of(
        "components/losses.py",
        "components/test_losses.py",
        ("plain: divided by maskable positions", 'clean.maskable if weighting == "nelbo" else noisy.mask', "clean.maskable"),
        ("plain: weighed as the NELBO", 'own if weighting == "nelbo" else noisy.mask.float()', "own"),
        ("a sequence is not averaged over its positions", "weight / positions.clamp(min=1)[document]", "weight"),
        ("documents without positions are counted", "((ids != PAD_DOCUMENT) & (positions > 0))", "(ids != PAD_DOCUMENT)"),
        (
            "a bucket's fill is in the loss",
            "torch.where(valid, coefficient.flatten()[index].float(), 0.0)",
            "coefficient.flatten()[index].float()",
        ),
        (
            "a bucket's fill is in the NELBO",
            "torch.where(valid, weight.flatten()[index].float(), 0.0)",
            "weight.flatten()[index].float()",
        ),
        ("the NELBO weighs as the loss", "(p.weight * bound)", "(p.coefficient * bound)"),
        ("logits: no coefficient", "(coefficient[mask] * each).sum()", "each.sum()"),
        ("bits are nats", "return nelbo_nats / math.log(2) / max(tokens, 1)", "return nelbo_nats / max(tokens, 1)"),
        (
            "bits a byte are nats",
            "return nelbo_nats / math.log(2) / max(text_bytes, 1)",
            "return nelbo_nats / max(text_bytes, 1)",
        ),
    ),
    *of(
        "components/range_losses.py",
        "components/test_losses.py",
        (
            "the mask's logit is left in the softmax",
            "    if ruled_out >= 0:\n        logits[:",
            "    if False:\n        logits[:",
        ),
        ("the mask's logit is left in a chunk", "if 0 <= ruled_out < len(rows):", "if False:"),
        (
            "the end token is no target of its own",
            "torch.where(ids == end_id, id_range.size, ids - id_range.start)",
            "ids - id_range.start",
        ),
        ("a chunk takes every target for its own", "torch.where(inside, chunk, found)", "chunk"),
        ("chunks are not added up", "log_z, found = torch.logaddexp(log_z, chunk_z)", "log_z, found = chunk_z"),
    ),
    *of(
        "components/kernels.py",
        "components/test_kernels.py",
        ("kernel: a token's noise is that of all", "self.mask, self.uniform / size), torch", "self.mask, self.uniform), torch"),
        (
            "kernel: a token's rate is that of all",
            "masked, self.mask_rate, self.uniform_rate / size",
            "masked, self.mask_rate, self.uniform_rate",
        ),
        (
            "mask: the rate of the level",
            "Levels(1 - tau, tau, zero, 1 / (1 - tau), zero)",
            "Levels(1 - tau, tau, zero, 1 + 0 * tau, zero)",
        ),
        ("uniform: the rate of the level", "tau, zero, 1 / (1 - tau))", "tau, zero, 1 + 0 * tau)"),
        ("hybrid: p_u is its peak at one gamma alone", "c = 2**self.gamma *", "c = 2 *"),
        ("hybrid: another exponent", "(tau * clean) ** (self.gamma / 2)", "(tau * clean) ** self.gamma"),
        ("hybrid: the uniform rate without its own alpha", "(1 - 2 * tau) / tau + 1) /", "(1 - 2 * tau) / tau) /"),
        ("hybrid: the mask rate of masks alone", "c / total, 1 / (clean * total), rate)", "c / total, 1 / clean, rate)"),
        ("hybrid: never without uniform noise", "return self.p_u == 0", "return False"),
        ("log-snr: masks as if the mixture stood still", "(1 - g) * (1 + slope * g)", "(1 - g)"),
        ("log-snr: uniform noise as if the mixture stood still", "g * (1 - slope * (1 - g))", "g"),
        ("log-snr: goes on behind the last of training", "log_snr.clamp(-HELD, HELD)", "log_snr.clamp(-700, 700)"),
        ("log-snr: ends masked whatever the shift", "return self.shift - self.slope * HELD < ", "return -self.slope * HELD < "),
        ("prior: masks are never drawn", "position < levels_at_one.mask", "position < 0"),
        (
            "prior: a number next to 1 has no token",
            ".long().clamp(max=size - 1)\n    return torch.where(position",
            ".long()\n    return torch.where(position",
        ),
        (
            "marginal: noise over what is ruled out",
            "torch.ones_like(p) if allowed is None else",
            "torch.ones_like(p) if True else",
        ),
        ("marginal: no noise", "levels.alpha[..., None] * p + uniform,", "levels.alpha[..., None] * p,"),
        ("posterior: what is kept forgets r", "keep = r * (", "keep = ("),
        ("posterior: what no noise could be is lost", "torch.where(at_t > 0, keep.clamp(max=1), 1.0)", "keep.clamp(max=1)"),
        (
            "posterior: a mask is kept as a token of p",
            "torch.where(masked, 0.0, p.gather(",
            "torch.where(masked & False, 0.0, p.gather(",
        ),
        ("posterior: a mask never stays", "torch.where(masked, keep, 0.0)", "0.0"),
        ("hybrid: a gamma that is too large", "0 < self.gamma <= 2", "0 < self.gamma", "components/test_corruption.py"),
        (
            "log-snr: a slope that is too large",
            "not abs(self.slope) <= 1",
            "not abs(self.slope) >= 0",
            "components/test_corruption.py",
        ),
        ("saved without its settings", '"kernel": name, **asdict(settings)', '"kernel": name', "components/test_corruption.py"),
    ),
    *of(
        "components/weightings.py",
        "components/test_corruption.py",
        ("weight: what became another is likely to be clean", "torch.where(clean, levels.alpha, 0.0)", "levels.alpha"),
        ("clipped: at nothing", "exact.clamp(max=self.clip)", "exact"),
        ("noise of a file: numbers without an end", " and abs(value) < 1e30", "", "recipes/test_corruption.py"),
        ("low variance: the exact one", "return exact * tau", "return exact"),
        ("dynamic: masks weigh 1", "torch.where(masked, 2.0,", "torch.where(masked, 1.0,"),
        ("dynamic: clean tokens weigh 1", "noise / (noise + levels.alpha), 1.0)", "1.0, 1.0)"),
        ("cross-entropy: weighed as the bound", "return torch.ones_like(exact) if", "return exact if"),
        ("clipped: taken for leave-one-out", "self.weighting in LEAVE_ONE_OUT\n\n", 'self.weighting != "cross_entropy"\n\n'),
        ("tilt: not of how likely z is", "here = (noise + levels.alpha) *", "here = noise *"),
        ("tilt: not of what it weighs", " * self.weight(levels, tau, no, yes, size)", ""),
        (
            "tilt: of the mask too",
            "return torch.where(masked, 0.0, torch.log",
            "return torch.where(masked & False, 0.0, torch.log",
        ),
        ("a clip goes with any weighting", '(self.clip is not None) != (self.weighting == "clipped") or ', ""),
        ("saved: a clip that is no number", 'settings if raw.get("clip") is None else', "settings if True else"),
        (
            "every modality has the last one's levels",
            "here = modality == i\n            pairs",
            "here = modality >= -1\n            pairs",
        ),
        ("one noise tilts the first modality alone", "modality == i if len(self.each) > 1 else", "modality == i if True else"),
        ("one noise is of the first modality alone", "min(index, len(self.each) - 1)", "index"),
        ("untilted the wrong way", "0.0, -tilt)", "0.0, tilt)"),
        ("untilted: of the mask too", "torch.where(place < 0, 0.0, -tilt)", "(-tilt)"),
    ),
    *of(
        "components/corruption.py",
        "components/test_corruption.py",
        ("corruption: too few become others", "u[here] < 1 - levels.alpha", "u[here] < levels.uniform"),
        ("corruption: a pair has two times", "key, length = index // 2 if self.pairs else index,", "key, length = index,"),
        ("corruption: a pair becomes the same others", '"replacement", index)', '"replacement", key)'),
        ("corruption: a pair has one time", "= 1 - t[row, span], 1 - u[row, span]", "= t[row, span], 1 - u[row, span]"),
        ("corruption: a pair has the same numbers", "= 1 - t[row, span], 1 - u[row, span]", "= 1 - t[row, span], u[row, span]"),
        (
            "corruption: noise of the row, not the sample",
            'sample_rng(self.seed, "mask", key)',
            'sample_rng(self.seed, "mask", row)',
        ),
        ("corruption: t_max is not looked at", "        t_max = self._t_max", "        t_max = 1.0"),
        ("corruption: others at times up to 1", "1.0 if masks else 0.999", "1.0"),
        ("corruption: one level a document", "if self.per_token:", "if False:"),
        ("corruption: levels beyond 1", "random(length)) % 1.0", "random(length))"),
        ("corruption: prompts too", "here = batch.maskable & (batch.modality == i)", "here = batch.modality == i"),
        (
            "corruption: the last modality's noise for all",
            "batch.maskable & (batch.modality == i)",
            "batch.maskable & (batch.modality >= 0)",
        ),
        ("corruption: masks weigh as D", "own = levels.alpha * noise.weight(", "own = noise.weight("),
        (
            "corruption: masks are not clipped in tau",
            'torch.where(masked, own * speed[here] if noise.weighting == "clipped" else own, 0.0)',
            "torch.where(masked, own, 0.0)",
        ),
        ("corruption: the bound in tau", "bound = per_tau * speed[here]", "bound = per_tau"),
        ("corruption: the bound by the training weight", "Noise(noise.kernel).weight(levels", "noise.weight(levels"),
        (
            "corruption: all weights in t",
            'own = own * speed[here] if noise.weighting in ("exact", "clipped") else own',
            "own = own * speed[here]",
        ),
        ("corruption: what is not masked is not predicted", "masked if noise.kernel.masks_only else True", "masked"),
        (
            "corruption: one level a token is a bound",
            "return self.schedule.complete and not self.per_token",
            "return self.schedule.complete",
        ),
        ("corruption: rates at the very ends", "at = at.clamp(NEXT_TO_CLEAN, 1 - NEXT_TO_CLEAN)", "pass"),
        ("corruption: no uniform noise at all", "levels.uniform.clamp(min=LEAST_UNIFORM)", "levels.uniform"),
        ("corruption: no tilt", "own = None if all(noise.leave_one_out for noise in noises) else tilt.float()", "own = None"),
        ("corruption: cross-entropy is forgotten", 'own, self.weighting == "cross_entropy")', "own, False)"),
        ("corruption: every range is as large as the largest", "count = size[ranges]", "count = size.max().expand_as(ranges)"),
        ("corruption: the others of the first range", "others = ids[ranges, (v", "others = ids[ranges * 0, (v"),
        (
            "corruption: what is ruled out",
            "allowed.int().argsort(dim=1, descending=True",
            "allowed.int().argsort(dim=1, descending=False",
        ),
        (
            "corruption: a kernel of one modality for all",
            "set(self.kernel) != set(modalities)",
            "not set(self.kernel) <= set(modalities)",
        ),
    ),
    *of(
        "components/divergence.py",
        "components/test_divergence.py",
        ("D: KL without x's own noise", "kl = (alpha + each) * whole", "kl = alpha * whole"),
        ("D: KL without the other ids", " * log_p_x.exp()) - each * total", " * log_p_x.exp())"),
        ("D: KL alone", "return kl + torch.expm1(log_rho) - log_rho", "return kl"),
        ("D: rho of the mask", "torch.where(masked, 0.0, log_rho)", "log_rho"),
        ("D: rho as if all were clean", "torch.where(clean, whole, 0.0)", "whole"),
        ("D: x is always z", "target == place, place < 0", "place >= 0, place < 0"),
        ("D: a gradient without the columns' share", "(slope.sum(dim=-1) + at.sum(dim=-1))", "slope.sum(dim=-1)"),
        ("D: a gradient without the columns", "return out.scatter_add_(-1, columns, at), None, None", "return out, None, None"),
        ("D: a gradient without kappa below", "/ (1 + kappa[:, None] * p)\n", "\n"),
        (
            "D in pieces: the sum is not tilted",
            "log_z = log_z + torch.log1p((raw_z - log_z).exp() * torch.expm1(-tilt))",
            "pass",
        ),
        (
            "D in pieces: x keeps its tilt",
            "torch.stack([torch.where(clean, tilt, 0.0), tilt], dim=1)",
            "torch.stack([0 * tilt, tilt], dim=1)",
        ),
        (
            "D in pieces: z's own term keeps its tilt",
            "total = total - torch.log1p(kappa * (raw_z - log_z).exp()) +",
            "total = total +",
        ),
        ("D in pieces: the mask has a share", "if 0 <= ruled_out < len(rows):\n        each", "if False:\n        each"),
        ("D in pieces: every piece is the first", "ruled_out - start, use_reentrant", "ruled_out, use_reentrant"),
    ),
    *of(
        "components/losses.py",
        "components/test_divergence.py",
        (
            "masks beside others have D",
            "torch.zeros_like(mask) if replaced is None else replaced.uniform > 0",
            "mask if replaced is not None else mask & False",
        ),
        ("cross-entropy trains by D", "if p.replaced is None or p.replaced.cross_entropy:", "if p.replaced is None:"),
        ("training by the tilted distribution", "replace(p.replaced, tilt=None), *where)", "p.replaced, *where)"),
        ("the bound of what the model learns", "if p.replaced is not None and p.replaced.tilt is not None:", "if False:"),
        ("logits: noise over what is ruled out", "(chosen > -math.inf).sum(dim=1))", "chosen.shape[1])"),
        ("logits: masks beside others have D", "each = torch.where(uniform > 0, others, each)", "each = others"),
        (
            "logits: cross-entropy trains by D",
            "if replaced is not None and not replaced.cross_entropy:",
            "if replaced is not None:",
        ),
        ("logits: the mask is a token", "place = token if mask_id is None else", "place = token if True else"),
        (
            "training weighs as the bound",
            "own = noisy.weight if noisy.training is None else noisy.training",
            "own = noisy.weight",
        ),
    ),
    *of(
        "components/range_losses.py",
        "components/test_divergence.py",
        ("D: the mask is one of N", "len(end) - (ruled_out >= 0)", "len(end)"),
        ("D: the end token is none of N", "id_range.size + len(end) - (ruled_out", "id_range.size - (ruled_out"),
        ("D: the mask is a token", ".masked_fill(replaced.token == mask_id, -1)", ""),
        ("D: the mask is tilted", "replaced.tilt.masked_fill(place < 0, 0.0)", "replaced.tilt"),
        ("D: tilted the wrong way", "untilted(logits, place, off)", "untilted(logits, place, -off)"),
    ),
    *of(
        "components/likelihood.py",
        "components/test_likelihood.py",
        ("the error of one draw, not of their mean", "each.std(dim=1) / each.shape[1] ** 0.5", "each.std(dim=1)"),
        ("the bound is not weighed by L / k", "weight = lengths[:, None] / masks.sum(dim=2)", "weight = 1 / masks.sum(dim=2)"),
        ("times are not stratified", "(np.arange(draws) + 1 - rng.random(draws)) / draws", "1 - rng.random(draws)"),
        ("a token is known when it is scored", "(rank[:, None] >= steps", "(rank[:, None] > steps"),
        ("the order is ignored", "if order is None else order", "if True else order"),
        ("prompts take a place in the order", "rank = rank.masked_fill(~scored, int(1e9)).argsort", "rank = rank.argsort"),
        (
            "the mask token has a share",
            "else allowed[own], mask_id, logits)",
            "else allowed[own], -1, logits)",
            "components/test_likelihood.py",
        ),
        ("the first row's allowed ids for all", "len(allowed) == 1 else allowed[own]", "len(allowed) == 1 else allowed[:1]"),
    ),
    *of(
        "components/samplers/ancestral.py",
        "components/test_samplers.py",
        ("ancestral: not conditioned on being masked", "(alpha_s - alpha_t) / (1 - alpha_t), 1.0)", "alpha_s - alpha_t, 1.0)"),
        (
            "at time 0 noise is left by a schedule that stops short",
            "torch.where(s > 0, schedule.alpha(s), 1.0)",
            "schedule.alpha(s)",
            "components/test_any_noise.py",
        ),
        ("ancestral: a step late", "(state.step + 1).double() / num_steps", "state.step.double() / num_steps"),
    ),
    *of(
        "components/samplers/first_hitting.py",
        "components/test_samplers.py",
        ("first hitting: time falls as with one token", "[:, 0] ** (1 / remaining.clamp(min=1))", "[:, 0]"),
        (
            "first hitting: from left to right",
            "state.uniform[:, POSITION].masked_fill(~state.masked, -1.0)",
            "state.masked.long()",
        ),
        (
            "first hitting: position and token share a number",
            "state.uniform[:, TOKEN].gather",
            "state.uniform[:, POSITION].gather",
        ),
    ),
    *of(
        "components/samplers/adaptive.py",
        "components/test_samplers.py",
        ("entropy bound: the largest counts too", "finite.cumsum(dim=1) - finite", "finite.cumsum(dim=1)"),
        ("entropy bound: the least sure first", "keep_top(-h, state.masked, count)", "keep_top(h, state.masked, count)"),
        ("threshold: may unmask nothing", "now = now | keep_top(score", "now = now & keep_top(score"),
        ("factor: of the next n", "torch.arange(1, doubt.shape[1] + 1,", "torch.arange(0, doubt.shape[1],"),
        ("factor: may unmask nothing", "count.clamp(min=1)", "count"),
        ("factor: nothing is certain enough for one more", "* doubt < self.factor", "* doubt <= self.factor"),
        (
            "factor: given positions count too",
            '.masked_fill(~state.masked, float("inf")).sort(dim=1).values\n        n',
            ".sort(dim=1).values\n        n",
        ),
        ("time left counts what was just unmasked", "(state.masked & ~now).sum", "state.masked.sum"),
    ),
    *of(
        "components/samplers/any_noise/editing.py",
        "components/test_any_noise.py",
        ("editing: given tokens too", "editable = state.generate & ~state.masked", "editable = ~state.masked"),
        ("editing: below its threshold", "(probability > self.edit_threshold)", "(probability > self.threshold)"),
        ("editing: a row ends with its last mask", "finished=filled.finished & settled", "finished=filled.finished"),
        ("editing: goes on without an end", "| (extra >= self.extra_steps)", "| (extra > self.extra_steps)"),
        ("editing: finished rows too", " & ~state.finished[:, None]\n        edited", "\n        edited"),
        ("editing: ends though it edited", "(full & ~edited.any(dim=1))", "full"),
    ),
    *of(
        "components/samplers/any_noise/gibbs.py",
        "components/test_any_noise.py",
        ("gibbs: the grid is disturbed", "step=state.step // (1 + self.correctors)", "step=state.step"),
        ("gibbs: all tokens at once", "torch.full_like(state.total, self.positions)", "state.total"),
        ("gibbs: finished rows too", " | (state.time <= 0)\n", "\n"),
        ("gibbs: as many passes as its sampler", "passes(self.sampler) * (1 + self.correctors)", "passes(self.sampler)"),
    ),
    *of(
        "components/samplers/any_noise/correcting.py",
        "components/test_any_noise.py",
        ("self-correction: given tokens too", "changed = state.generate & (drawn", "changed = (drawn"),
        ("self-correction: finished rows too", " & done & ~state.finished[:, None]", " & done"),
        ("self-correction: before the sampler has done", "(drawn != state.tokens) & done &", "(drawn != state.tokens) &"),
        ("self-correction: the least sure ones", "now = keep_top(score, changed", "now = keep_top(-score, changed"),
        ("self-correction: a pass more", "(extra >= self.passes)", "(extra > self.passes)"),
        ("self-correction: no end where nothing changes", "(~changed.any(dim=1) | (extra", "((extra"),
        ("self-correction: a constraint ends it", "    revises = True\n", ""),
        (
            "self-correction: as many passes as its sampler",
            "(self.sampler) + self.passes",
            "(self.sampler)",
        ),
        (
            "self-correction: what a constraint filled is forgotten",
            "masked=child.masked & state.masked",
            "masked=child.masked",
        ),
    ),
    *of(
        "components/samplers/any_noise/least_sure.py",
        "components/test_any_noise.py",
        ("least sure: whatever the noise", "(p.amax(dim=-1) - here) * share", "p.amax(dim=-1) - here"),
        ("least sure: the surest", "(p.amax(dim=-1) - here)", "p.amax(dim=-1)"),
        ("least sure: a share that is rounded down", "-(-state.total // self.num_steps)", "state.total // self.num_steps"),
        ("least sure: goes on where nothing changes", "torch.where(now.any(dim=1), s, 0.0)", "s"),
        ("least sure: at the very end of the noise", "END = 1 / (1 + math.exp(-9))", "END = 1.0"),
    ),
    *of(
        "components/samplers/any_noise/psi.py",
        "components/test_any_noise.py",
        ("psi: noise on what the others say", "here[..., None])", "0 * here[..., None])"),
        ("psi: kappa of another time", "(1 - sigma / (1 - earlier.alpha)", "(1 - sigma / (1 - said.levels.alpha)"),
        ("psi: the ancestral part is not uniform", "chance / kappa.clamp(min=1e-12)", "chance"),
    ),
    *of(
        "components/samplers/any_noise/reverse.py",
        "components/test_any_noise.py",
        ("reverse: the model's tilt stays on", "if tilt is not None:", "if False:"),
        ("reverse: position and mask share a number", "state.uniform[:, TIME] < mask", "state.uniform[:, POSITION] < mask"),
        ("reverse: given tokens too", "tokens = torch.where(state.generate, tokens, state.tokens)\n    over", "over"),
    ),
    *of(
        "components/samplers/any_noise/start.py",
        "components/test_any_noise.py",
        ("start: the outermost sampler speaks for all", "yield from along(part, modality)", "yield part"),
        ("start: every part, whatever its modality", "None if one else i)", "None)"),
        ("start: a modality without noise has another's", "if not one and bool(without.any()):", "if False:"),
        ("start: structure has noise", "(state.modality < 0) | ", ""),
        ("start: as good as none is some", "if noise.kernel.ends_masked:", "if False:"),
    ),
    *of(
        "components/samplers/ranking.py",
        "components/test_samplers.py",
        (
            "margin: the largest alone",
            'return best[..., 0] - best[..., 1] if by == "margin" else',
            'return best[..., 0] if by == "margin" else',
        ),
        ("entropy: the least sure first", "return -entropy(logits)", "return entropy(logits)"),
        ("probability: of the drawn token", 'if by == "confidence":', 'if by in ("confidence", "probability"):'),
    ),
    *of(
        "components/samplers/confidence.py",
        "components/test_samplers.py",
        ("llada: the rest is not shared out", "(state.step < state.total % self.num_steps).long()", "(state.step < 0).long()"),
        ("maskgit: a step that unmasks nothing", "(remaining - stay).clamp(min=1)", "(remaining - stay).clamp(min=0)"),
        ("maskgit: of what is left, not of the start", "* state.total).long()", "* state.masked.sum(dim=1)).long()"),
        (
            "choice temperature is not annealed",
            "self.choice_temperature * s[:, None] * gumbel",
            "self.choice_temperature * gumbel",
        ),
        ("choice temperature on probabilities", "score = score.log() +", "score = score +"),
    ),
    *of(
        "components/learned_orders.py",
        "components/test_learned_orders.py",
        ("learned orders: exponents around no mean", "spread * (level - average)", "spread * level"),
        ("learned orders: a mean over padding too", "level.masked_fill(~there, 0.0).sum", "level.sum"),
        ("learned orders: velocity with the other sign", "- (forward - reverse)", "+ (forward - reverse)"),
        ("learned orders: nats do not weigh by the rate", "return forward * nats +", "return nats +"),
        ("learned orders: the slowest first", "(arrival / exponent.detach())", "(arrival * exponent.detach())"),
        ("learned orders: left are those before, too", "weights.flip(-1).cumsum(dim=-1).flip(-1)", "weights.cumsum(dim=-1)"),
        ("learned orders: no gradient of what was drawn", "return surrogate - surrogate.detach()", "return surrogate * 0"),
        ("learned orders: half the gradient", "surrogate = 0.5 * (first", "surrogate = 0.25 * (first"),
        ("learned orders: both samples are one", "for s in STREAMS[", "for s in STREAMS[:1] * len(STREAMS)["),
    ),
    *of(
        "components/samplers/orders/learned_rates.py",
        "components/test_learned_rates.py",
        ("learned rates: any position is next", "/ rate).masked_fill", "/ 1.0).masked_fill"),
        ("learned rates: the same for all on a grid", "** rate\n", "** (0 * rate + 1)\n"),
        (
            "learned rates: the last is first",
            "wait.min(dim=1, keepdim=True)",
            "wait.masked_fill(~state.masked, -1).max(dim=1, keepdim=True)",
        ),
        ("learned rates: of what is drawn from", "rate = logits.double()", "rate = self.tempered(logits).double()"),
    ),
    *of(
        "mdm/evaluation/order_loss.py",
        "mdm/evaluation/test_order_loss.py",
        ("order loss: one sample's documents are the other's", "[:, None] * documents", "[:, None] * 0"),
        ("order loss: no gradient of what was drawn", "    if samples == 2:", "    if samples == 3:"),
        ("order loss: one masked too few", "rank >= finished[:, None]", "rank > finished[:, None]"),
        ("order loss: the forward head sees masks", "model.hidden(clean.tokens, sees", "model.hidden(clean.tokens * 0, sees"),
        ("order loss: reverse exponents are the forward ones", "drawn.reverse.gather(1, place)", "drawn.forward[place]"),
        ("order loss: the sum of exponents is the number", "torch.where(hit, forward, 0.0)", "torch.where(hit, 1.0, 0.0)"),
        ("order loss: too few places", "+ -noise.most[p.range_index] % BUCKET", "// 2"),
    ),
    *of(
        "mdm/generation/rates.py",
        "mdm/generation/test_rates.py",
        ("log rates: of ids that it was not trained with", 'logits.masked_fill(~self.trained, float("-inf"))', "logits"),
        ("log rates: those of the clean row", "order.noisy(hidden, mask)", "order.clean(hidden, mask)"),
        ("log rates: rates themselves", "self.canvas.take(reverse.log())", "self.canvas.take(reverse)"),
        (
            "log rates: other rows' positions",
            '"maskable": self.maskable[rows]',
            '"maskable": self.maskable[: len(rows)]',
        ),
    ),
    *of(
        "components/samplers/drawing.py",
        "components/test_samplers.py",
        ("cumulative sums in float32", "cumsum(dim=-1, dtype=torch.float64)", "cumsum(dim=-1, dtype=torch.float32).double()"),
        ("top-k: the largest alone", "dim=-1).values[..., -1:]", "dim=-1).values[..., :1]"),
        (
            "top-p: without the id that crosses it",
            "probability.cumsum(dim=-1) - probability >= top_p",
            "probability.cumsum(dim=-1) >= top_p",
        ),
        ("temperature multiplies", "/ self.temperature", "* self.temperature"),
        ("one more is kept", "order.argsort(dim=1) < count[:, None]", "order.argsort(dim=1) <= count[:, None]"),
        ("gumbel noise with the other sign", "return -torch.log(-torch.log(", "return torch.log(-torch.log("),
    ),
    *of(
        "components/samplers/remasking.py",
        "components/test_samplers.py",
        ("remasking: the largest sigma of another time", "((1 - alpha_s) / alpha_t", "((1 - alpha_t) / alpha_t"),
        ("remasking: unmasks as without", "(alpha_s - (1 - sigma) * alpha_t)", "(alpha_s - alpha_t)"),
        ("remasking: the surest first", "share = (-state.confidence).masked_fill", "share = state.confidence.masked_fill"),
        (
            "remasking: what is given, too",
            "decoded = state.generate & ~state.masked\n        stepped",
            "decoded = ~state.masked\n        stepped",
        ),
        (
            "remasking: the last step masks again",
            "again = decoded & (u < sigma) & ~last",
            "again = decoded & (u < sigma)",
            "components/test_samplers.py",
            "a complete schedule ends with a sigma of 0",
        ),
    ),
    *of(
        "components/samplers/composite.py",
        "components/test_decoding_order.py",
        ("each modality: its own confidence alone", '"confidence": state.confidence, "uniform"', '"uniform"'),
        ("blocks: steps are not counted anew", "step=torch.where(inner.finished, 0, inner.step)", "step=inner.step"),
        (
            "blocks: passes without masks are counted on",
            "extra=torch.where(inner.finished, 0, inner.extra)",
            "extra=inner.extra",
            "components/test_any_noise.py",
        ),
        ("blocks: time is not begun anew", "time=torch.where(fresh, 1.0, state.time)", "time=state.time"),
        ("blocks: counts of the whole canvas", "total=torch.where(fresh, masked.sum(dim=1), state.total)", "total=state.total"),
        (
            "blocks: what is given counts",
            "(generate.long().cumsum(dim=1) - 1)",
            "(torch.ones_like(generate).long().cumsum(dim=1) - 1)",
        ),
        ("per modality: what a constraint filled is forgotten", "masked=c.masked & state.masked", "masked=c.masked"),
        ("per modality: the last sampler's tokens", "torch.where(child.generate, child.tokens, tokens)", "child.tokens"),
        ("per modality: the first to end ends all", "torch.stack(finished).all(dim=0)", "torch.stack(finished).any(dim=0)"),
    ),
    *of(
        "components/samplers/constraints.py",
        "components/test_decoding_order.py",
        ("an end closes the spans behind its own", "return before > at_start", "return before > 0"),
        ("filled up without being sure", "state.confidence.masked_fill(behind, 1.0)", "state.confidence"),
    ),
    *of(
        "components/samplers/base.py",
        "components/test_samplers.py components/test_decoding_order.py",
        (
            "a constraint ends what revises",
            "replace(held, finished=part.finished) if revising else held",
            "held",
            "components/test_any_noise.py",
        ),
        ("finished rows count forwards", "forwards[still] += 1", "forwards += 1"),
        (
            "allowed ids are ignored",
            "if allowed is None else ~allowed | mask",
            "if True else ~allowed | mask",
            "components/test_samplers.py",
        ),
        (
            "the mask token may be drawn",
            "device=logits.device) == mask_id",
            "device=logits.device) == -1",
            "components/test_samplers.py",
        ),
        ("noise of the place in the batch", '"sample", i) for i in index]', '"sample", i) for i, _ in enumerate(index)]'),
        (
            "noise of all positions, given ones too",
            "[np.flatnonzero(row) for row in generate]",
            "[np.arange(len(row)) for row in generate]",
        ),
    ),
    *of(
        "components/samplers/state.py",
        "components/test_samplers.py",
        ("the confidence of every draw", "torch.where(now, probability, self.confidence)", "probability"),
    ),
    *of(
        "components/samplers/guidance.py",
        "components/test_samplers.py",
        ("guidance: w is one too small", "return conditional + w * (", "return unconditional + w * ("),
        ("guidance: the prompt stays", "tokens.masked_fill(self.prompt, self.mask_id)", "tokens"),
        ("guidance: the scale runs backwards", "self.start * t + self.end * (1 - t)", "self.end * t + self.start * (1 - t)"),
        (
            "guidance: one half's rows for both",
            "torch.cat([rows, rows + len(self.prompt)])",
            "torch.cat([rows, rows])",
            "mdm/generation/test_generation.py",
        ),
    ),
    *of(
        "components/sde.py",
        "components/test_sde.py",
        ("lr scales with kappa", "lr=base.lr * root", "lr=base.lr * kappa"),
        ("the scheduled lr does not scale", "return self.base.lr * math.sqrt(self.kappa) *", "return self.base.lr *"),
        ("beta2 does not scale", "beta2=base.beta2**kappa", "beta2=base.beta2"),
        ("eps grows with kappa", "eps=base.eps / root", "eps=base.eps * root"),
        (
            "the two kinds of decay are swapped",
            '(root if decay == "coupled" else kappa)',
            '(kappa if decay == "coupled" else root)',
        ),
        ("the horizon upside down", "(base_tokens / tokens) ** gamma", "(tokens / base_tokens) ** gamma"),
        ("moments: steps stay", 'state["step"].div_(ratio)', "pass"),
        ("moments: the second one grows", "second.copy_(whole / ratio)", "second.copy_(whole * ratio)"),
        ("no warm-up", "return progress / warmup", "return 1.0"),
        ("the cosine ends at 0", "return final + (1 - final) *", "return (1 - final) *"),
        ("groups have one eps", 'settings.eps * group.get("eps_multiplier", 1.0)', "settings.eps"),
        ("groups have one decay", 'settings.weight_decay * group.get("decay_multiplier", 1.0)', "settings.weight_decay"),
    ),
    *of(
        "components/critical_batch.py",
        "components/test_sde.py",
        ("critical batch: residuals uncorrected", "(y - fitted) * np.sqrt(len(y) / max(len(y) - 3, 1))", "(y - fitted)"),
        ("critical batch: 80 % passes as 90 %", "[0.95, 0.05]", "[0.9, 0.1]"),
        ("critical batch: the tolerance is absolute", "a / (tolerance * floor)", "a / tolerance"),
        ("critical batch: a is not scaled back", "a[best] * scale ** POWERS[best]", "a[best]"),
        ("noise scale: upside down", "float(noise / signal)", "float(signal / noise)"),
    ),
    *of(
        "components/scaling.py",
        "components/test_scaling.py",
        ("scaling: least squares", "DELTA = 1e-3", "DELTA = 1e3"),
        ("scaling: D* without the root", "/ (self.a * self.A)) ** (1 / self.b)", "/ (self.a * self.A))"),
        ("scaling: the exponent upside down", "return self.a / self.b", "return self.b / self.a"),
        ("scaling: 80 % passes as 90 %", "tail = (1 - level) / 2", "tail = 1 - level"),
        ("scaling: the bootstrap draws every run once", "rng.integers(0, len(y), len(y))", "rng.permutation(len(y))"),
        ("scaling: a draw's constants by its own middle", "y[chosen], (n, d))[0]", "y[chosen])[0]"),
        ("scaling: a parabola through all sizes", "near = slice(i - 1, i + 2)", "near = slice(None)"),
        ("scaling: the least loss is the middle one", "float(a - b**2 / (4 * c))", "float(a)"),
        ("scaling: runs that diverged count", "finite = np.isfinite(y) & (y > 0)", "finite = y > 0"),
    ),
    *of(
        "components/gradient_variance.py",
        "components/test_gradient_variance.py",
        ("variance: of the sample", "/ (self.draws - 1)", "/ self.draws"),
        ("variance: the mean's own noise stays in it", " - self.variance / self.draws", ""),
    ),
    *of(
        "components/parameterization.py",
        "components/test_parameterization.py",
        ("hidden lr does not fall with width", "depth_lr / n, depth_eps / n, n)", "depth_lr, depth_eps / n, n)"),
        ("unembedding starts as a hidden one", "Multipliers(1 / n, 1 / n, 1, n)", "Multipliers(n**-0.5, 1 / n, 1, n)"),
        ("depth's lr upside down", "self.depth ** (self.alpha - 1)", "self.depth ** (1 - self.alpha)"),
        ("branches grow with depth", "return self.depth**-self.alpha", "return self.depth**self.alpha"),
        ("vectors decay", "decay = by.weight_decay if decayed else 0.0", "decay = by.weight_decay"),
        ("initialized as the base", "* parameterization.multipliers(role).init", "* 1.0"),
        ("groups have one lr", '"lr": lr * by.lr', '"lr": lr'),
    ),
    *of(
        "components/coordinate_check.py",
        "components/test_parameterization.py",
        ("coordinates: the size, not the change", "(value - before[name]).square()", "value.square()"),
    ),
    *of(
        "components/tokenizers/audio.py",
        "components/test_tokenizers.py",
        ("codec2: energy and pitch swapped", "FIELD_BITS = (9, 9, 4, 6)", "FIELD_BITS = (9, 9, 6, 4)"),
        ("codec2: fields from the other end", "fields.append(word >> left", "fields.insert(0, word >> left"),
        ("codec2: half as loud", "np.clip(padded, -1, 1) * 32767", "np.clip(padded, -1, 1) * 16383"),
        ("codec2: twice as loud", "astype(np.float32) / 32768", "astype(np.float32) / 16384"),
    ),
    *of(
        "components/tokenizers/image.py",
        "components/test_tokenizers.py",
        ("grey: rounded down", "np.rint(grey / 255", "np.floor(grey / 255"),
        (
            "grey: patches column by column",
            "self.patch, side, self.patch).transpose(0, 2, 1, 3)",
            "self.patch, side, self.patch).transpose(2, 0, 1, 3)",
        ),
    ),
    *of(
        "components/tokenizers/image_vq.py",
        "components/test_learned_tokenizers.py",
        ("vq: pixels in [0, 1]", "(levels / 127.5 - 1)", "(levels / 255)"),
        ("vq: columns before rows", "(levels / 127.5 - 1).permute(2, 0, 1)", "(levels / 127.5 - 1).permute(2, 1, 0)"),
        ("vq: decoded too dark", "((pixels.clamp(-1, 1) + 1) * 127.5)", "((pixels.clamp(-1, 1) + 1) * 100)"),
    ),
    *of(
        "components/tokenizers/audio_neural.py",
        "components/test_learned_tokenizers.py",
        (
            "delay: the finest first",
            "delayed[k, k : k + frames] = own",
            "delayed[k, books - 1 - k : books - 1 - k + frames] = own",
        ),
        ("books: the finest are kept", "[: self.books]", "[-self.books :]"),
        ("a pad is decoded as a code", "torch.where(codes < size, codes, 0)", "torch.where(codes < size, codes, size - 1)"),
    ),
    *of(
        "components/tokenizers/pictures.py",
        "mdm/generation/test_editing.py",
        (
            "a patch that is only touched stays",
            "(edge < high) & (edge + self.patch > low)",
            "(edge + self.patch <= high) & (edge >= low)",
        ),
        ("a patch is known by its first code", ".all(dim=1)", "[:, 0]", "components/test_modality.py"),
        ("what is masked shows", "colours[self._pixels(~whole)] = MASKED", "pass", "components/test_modality.py"),
    ),
    *of(
        "components/tokenizers/clips.py",
        "mdm/generation/test_editing.py",
        ("a clip is not silenced", "silenced[begin * per_frame", "silenced[:0][begin * per_frame"),
        ("a span ends early", "math.ceil(round(stop * rate) / per_frame)", "(round(stop * rate) // per_frame)"),
    ),
    *of(
        "components/tokenizers/sinc.py",
        "components/test_learned_tokenizers.py",
        ("sinc: another window", "torch.cos(math.pi * u / (2 * ZEROS)) ** 2", "torch.cos(math.pi * u / (2 * ZEROS))"),
        ("sinc: half a sample late", "u = ((n - phase) * cutoff)", "u = ((n - phase - 0.5 / rate) * cutoff)"),
    ),
    *of(
        "components/tokenizers/fsq.py",
        "recipes/test_train_tokenizer.py",
        ("fsq: pixels in [0, 1]", "(levels / 127.5 - 1).view", "(levels / 255).view"),
        ("fsq: another floor to encode than to decode", "db / (FLOOR_DB / 2)", "db / FLOOR_DB"),
    ),
    *of(
        "components/tokenizers/text.py",
        "components/test_tokenizers.py",
        (
            "text: ranks in the order of the bytes",
            "key=lambda item: item[1])\n        ranks = {bytes",
            "key=lambda item: item[0])\n        ranks = {bytes",
        ),
        ("text: a token is a byte", "sum(len(self.encoding.decode_single_token_bytes(c)) for c", "sum(1 for c"),
        ("text: the pattern is not saved", '"pattern": self.encoding._pat_str', '"pattern": GPT2_PATTERN'),
    ),
    *of(
        "components/data/draws/endless.py",
        "components/test_data.py",
        ("draws: a resume begins anew", '(initial_state or {}).get("draw", 0)', "0"),
        (
            "draws: every lane draws the same",
            "self.lane + self.draw * self.lanes",
            "self.draw * self.lanes",
            "components/test_workers.py",
        ),
        ("placed: another lane replaces a bad sample", "k * (self.lanes or 1)", "k", "components/test_nodes.py"),
        (
            "placed: a bad sample is not told of",
            "if first is None else with_notes(",
            "if True else with_notes(",
            "components/test_nodes.py",
        ),
        ("passing: what is bad is not told of", "return with_notes(item, notes)", "return item", "mdm/data/test_lanes.py"),
        (
            "streamed: the state after the block",
            "self.block + 1, 0\n            self._read_block()",
            "self.block + 1, 0\n            self._read_block()\n            self._before = self.dataset.state_dict()",
            "components/test_data.py",
        ),
        ("streamed: every block in one order", '"order", self.block)', '"order", 0)'),
    ),
    *of(
        "components/data/nodes.py",
        "components/test_data.py",
        ("mix: every window in one order", '"mix", window)', '"mix", 0)'),
        ("mix: the seed is ignored", 'sample_rng(self.seed, "mix"', 'sample_rng(0, "mix"'),
        ("mix: rows of pairs are counted twice", "(1 if s.pairs else self.copies)", "self.copies"),
        ("mix: rows beside pairs are counted once", "(1 if s.pairs else self.copies)", "1"),
        ("rows: every one has the same task", '"task", row)', '"task", 0)'),
        ("rows: documents of a row have one index", "(place << IN_A_ROW | row)", "row"),
        ("rows: both of a pair have one index", "* copies + c for place", "* copies for place"),
        (
            "ranks: rows of lanes are dealt as others",
            "count = self.lanes or world_size\n        lanes = range",
            "count = world_size\n        lanes = range",
            "components/test_ranks.py",
        ),
        ("ranks: each makes as many passes as it needs", "(slots - len(own))", "0", "components/test_ranks.py"),
        (
            "ranks: the most rows are an even share",
            "each + ((lanes - rows.start) % count < more)",
            "each + 0 * lanes",
            "components/test_ranks.py",
        ),
        ("lanes: all are one", "row % lanes.lanes", "0", "components/test_ranks.py"),
        ("lanes: those of others are saved too", "if int(lane) % self.world_size == self.rank", "", "components/test_ranks.py"),
        ("lanes: a resume begins them anew", "self._saved[stream.name].get(str(lane))", "None", "components/test_ranks.py"),
        ("micro-batches: a resume counts rows from 0", '{"row": self.row, "lanes": lanes,', '{"row": 0, "lanes": lanes,'),
    ),
    *of(
        "components/data/packing.py",
        "components/test_data.py",
        ("packed: a resume begins the document anew", 'state.get("offset", 0)', "0"),
        ("packed: the rest of a document is lost", "self.offset += len(span)", "self.offset = len(self._document)"),
        ("packed: rows have no end", "room -= len(span) + self.overhead", "room -= len(span)", "components/test_packing.py"),
        (
            "packed: the next document is cut where a bad one was left",
            "            offset = 0\n        self._document",
            "        self._document",
            "components/test_packing.py",
        ),
        (
            "packed: the state behind the document",
            "self._before = self.source.state_dict()\n            document = next(self.source)",
            "document = next(self.source)\n            self._before = self.source.state_dict()",
        ),
    ),
    *of(
        "components/data/draws/order.py",
        "components/test_order.py",
        ("order: too few rounds for a few samples", "24 if bits <= 8 else 8", "12 if bits <= 8 else 8"),
        ("order: too few rounds", "24 if bits <= 8 else 8", "24 if bits <= 8 else 2"),
        ("order: epochs share one", "Permutation(n, seed, epoch))  # lanes", "Permutation(n, seed, 0))  # lanes"),
        ("order: seeds share one", "sample_rng(seed, stream, index)", "sample_rng(0, stream, index)"),
        ("shards: windows share an order", "window * self.lanes + lane,", "0,"),
        ("shards: pieces of one lane are another's", "[lane + self.lanes * k for k in", "[lane + k for k in"),
    ),
    *of(
        "components/data/draws/workers.py",
        "components/test_workers.py",
        ("workers: what was drawn is held", "self._coming.pop(index, (None, 0))", "self._coming.get(index, (None, 0))"),
        ("workers: Ctrl-C ends them", "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n", ""),
    ),
    *of(
        "components/copies.py",
        "components/test_places.py",
        ("cache: what was used last goes first", "key=lambda age: age[0]):", "key=lambda age: -age[0]):"),
        ("cache: a copy that is being made goes", "file != keep and not making:", "file != keep:"),
        ("cache: its own copy goes", "file != keep and not making:", "not making:"),
    ),
    *of(
        "components/places.py",
        "components/test_places.py",
        ("places: longer than the patience", "min(seconds, patience())", "seconds"),
    ),
    *of(
        "mdm/data/corruption.py",
        "recipes/test_corruption.py",
        ("noise that was undone is forgotten", "if modality not in found}, **learned}", "if False}, **learned}"),
        ("noise that was undone stays for ever", "if modality not in found}, **learned}", "}, **learned}"),
        (
            "blocks: the masker of the next token is said to need another model",
            "if model.blocks and True in next_token",
            "if False",
            "recipes/test_adapt.py",
        ),
        ("bounds: all by the first one's weights", "self.learned.get(modality, Noise())", "next(iter(self.learned.values()))"),
    ),
    *of(
        "mdm/data/position.py",
        "mdm/data/test_position.py",
        ("position: of one rank", "own |= gathered(gather([dict(own)]))", "gathered(gather([dict(own)]))"),
        ("position: earlier versions begin at 0", 'row = own["mix"]["row"]', "row = 0"),
    ),
    *of(
        "mdm/data/pipeline.py",
        "mdm/data/test_lanes.py",
        ("lanes: each reads the whole stream", "source.shard(lanes, lane % lanes) if lanes > 1 else source", "source"),
        ("lanes: streams in one order", "Streamed(part(lane), seed + lane,", "Streamed(part(lane), seed,"),
        ("lanes: placed rows are of none", "None if few is None else lanes)", "None)"),
        ("packed: best_fit is ignored", "best_fit=settings.best_fit or 0", "best_fit=0"),
        ("batch: rows are taken for tokens", "physical(int(rows * average))", "physical(rows)"),
    ),
    *of(
        "components/data/sources.py",
        "components/test_data.py",
        ("jsonl: the template is ignored", 'fill(self.template, row["prompt"])', 'row["prompt"]', "components/test_data.py"),
        ("adapted: the rate stays", 'own["sample_rate"] = sample_rate', "pass"),
    ),
    *of(
        "components/data/speech.py",
        "components/test_data.py",
        ("speech: noise differs from process to process", "self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))", "pass"),
        (
            "speech: silence is not cut",
            "np.flatnonzero(np.sqrt((frames**2).mean(axis=1)) > threshold)",
            "np.arange(len(frames))",
        ),
    ),
    *of(
        "components/data/digits.py",
        "components/test_digits.py",
        ("mnist: the splits overlap", "own[round(start * len(own)) : round(stop * len(own))]", "own[: round(stop * len(own))]"),
        ("mnist: the caption of the next one", "WORDS[label - after]", "WORDS[label - after - 1]"),
        ("mnist: every copy is the same", "np.random.default_rng((i, k))", "np.random.default_rng(i)"),
        ("mnist: copies are turned about a corner", "centre = np.array(image.size) / 2", "centre = np.zeros(2)"),
        ("mnist: the margin is on one side", "(MARGIN, MARGIN), (MARGIN, MARGIN))", "(2 * MARGIN, 0), (MARGIN, MARGIN))"),
    ),
    *of(
        "components/data/folders/captions.py",
        "components/test_folders.py",
        ("captions: a quote swallows what follows", "quoting=quoting, strict=True)", "quoting=quoting)"),
        ("captions: accents as they are written", 'key = unicodedata.normalize("NFC", name)', "key = name"),
        ("captions: two files of one name are one", "if key(file) not in own else None", "if True else None"),
        ("captions: the header is a row", "rows[1 if header else 0 :]", "rows"),
    ),
    *of(
        "components/data/folders/splits.py",
        "components/test_folders.py",
        ("split: of the rows in order", "sorted(set(names), key=_drawn)", "sorted(set(names))"),
        ("split: the parts are exchanged", '== (split == "validation")', '== (split == "train")'),
    ),
    *of(
        "components/progress.py",
        "components/test_progress.py",
        ("progress: a broken pipe keeps the lock", "super().refresh(nolock=True)", "super().refresh(nolock=nolock)"),
        ("progress: streams stay replaced", "setattr(sys, name, stream.stream)", "pass"),
        ("progress: the end of a line is lost", 'self._write(f"{kept}\\n")', "pass"),
    ),
    *of(
        "mdm/config/spelling.py",
        "mdm/config/test_config.py",
        ("spelling: M is a thousand", '"M": 6', '"M": 3'),
        ("spelling: what is not whole is cut", "or exact != exact.to_integral_value()", ""),
        ("spelling: the component that stands there is not asked", "_of_key(hint, under or value, k", "_of_key(hint, value, k"),
    ),
    *of(
        "mdm/hub.py",
        "mdm/test_hub.py",
        ("builtin: not in bfloat16", "in_dtype(model, torch.bfloat16)", "model"),
        ("builtin: its defaults are left behind", "shutil.copy(source / FILE, folder)", "pass"),
    ),
    *of(
        "components/data/shards.py",
        "recipes/test_tokenize_data.py",
        (
            "shards: places in the first shard",
            "spans(place - (self._ends[shard - 1] if shard else 0))",
            "spans(place % self._ends[0])",
            "components/test_data.py",
        ),
        (
            "shards: what has changed is not looked at again",
            "self.checked.get(shard) != state",
            "shard not in self.checked",
            "components/test_data.py",
        ),
        ("shards: the checksum is not compared", 'if check and sha256(file) != about["sha256"]', "if False"),
    ),
    *of(
        "components/vocabulary.py",
        "components/test_vocabulary.py",
        ("every range may end", "table[i, self.end_id] = r.may_end", "table[i, self.end_id] = True"),
        ("the mask may stand anywhere", "table[:, self.mask_id] = False", "table[:, self.mask_id] |= False"),
        (
            "codes: the first codebook's start for all",
            "codes + starts[torch.arange(len(codes)) % len(starts)]",
            "codes + starts[0]",
        ),
        (
            "codebooks one after the other",
            "own[torch.arange(length) % len(own)]",
            "own[torch.arange(length) * len(own) // max(length, 1)]",
        ),
        (
            "grown: specials are overwritten",
            "start=r.start + self.size)",
            "start=r.start + self.ranges[-1].stop)",
            "components/test_vocabulary.py",
        ),
    ),
    *of(
        "components/tasks.py",
        "components/test_tasks.py",
        ("tasks: a modality twice", "if twice is not None:", "if False:"),
        ("tasks: nothing generated", "if not self.generated:", "if False:"),
        ("tasks: audio is audio", '"audio": "speech"', '"audio": "audio"'),
        ("tasks: joint or not", "if len(task.generated) == 1 else", "if len(task.generated) else"),
        ("tasks: those that cannot be formed", "if set(task.modalities) <= known]", "]"),
        ("tasks: a config's own first", "(*KNOWN, *further)", "(*further, *KNOWN)"),
    ),
    *of(
        "mdm/data/processor.py",
        "mdm/data/test_any_modality.py",
        ("processor: every canvas may end", "tokenizers.items() if may_end(tokenizer)]", "tokenizers.items()]"),
        ("processor: tasks that are there twice", "if name in tasks and vocabulary.tasks]", "]"),
    ),
    *of(
        "components/sequences.py",
        "components/test_sequences.py",
        ("dropping a prompt drops all", "if given and drop_prompt:", "if drop_prompt:"),
        ("prompts are maskable", "maskable=~flag,", "maskable=torch.ones_like(flag),"),
        (
            "filled with padding",
            "torch.full((length - len(ids),), vocabulary.end_id)",
            "torch.full((length - len(ids),), vocabulary.pad_id)",
        ),
        ("end fill is content", "return batch.maskable & ~fill", "return batch.maskable"),
        ("content of neighbours runs together", " & (batch.document[:, 1:] == batch.document[:, :-1])", ""),
        ("positions of the row", "torch.arange(len(sequence))\n", "torch.arange(span.start, span.stop)\n"),
        ("a prompt's last token is predicted", "nonzero()[: len(prompt), 0]", "nonzero()[: len(prompt) - 1, 0]"),
    ),
    *of(
        "components/kv_cache.py",
        "mdm/generation/test_generation.py",
        ("cache: keys for values", "self.values[where] = values.transpose(1, 2)", "self.values[where] = keys.transpose(1, 2)"),
        ("cache: nothing new is kept", "self.keys[where] = keys.transpose(1, 2)", "pass"),
        (
            "attention keeps its cache",
            "block.attn.kv_cache, block.attn.cache_enabled = None, False",
            "pass",
            "mdm/generation/test_blockwise.py",
        ),
    ),
    *of(
        "components/blocks.py",
        "mdm/models/test_model.py",
        ("attention is not scaled", "(q * q.shape[-1] ** -0.5)", "q"),
        ("attention: the mask is ignored", "scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)", "scores"),
        ("the residual multiplier of one branch", "mlp_scale=scale()", "mlp_scale=None"),
        (
            "norms before the rotation are left out",
            "return self.norm(projected.unflatten(-1, (self.heads, -1))).flatten(-2)",
            "return projected",
            "mdm/models/test_open_models.py",
        ),
        (
            "the whole head is rotated",
            "rotated = int(head_dim * rotary_share)",
            "rotated = head_dim",
            "mdm/models/test_shape.py",
        ),
        ("norms have another eps", "k_norm=RMSNorm(head_dim, eps=norm_eps)", "k_norm=RMSNorm(head_dim, eps=1e-2)"),
    ),
    *of(
        "components/moe.py",
        "mdm/models/test_open_models.py",
        (
            "moe: weights normalised again",
            "* chosen.flatten()[order, None]",
            "* (chosen / chosen.sum(-1, keepdim=True)).flatten()[order, None]",
        ),
        (
            "moe: gate and up swapped",
            "silu(linear(own, self.gate[e])) * linear(own, self.up[e])",
            "silu(linear(own, self.up[e])) * linear(own, self.gate[e])",
        ),
        ("moe: the bias has no say", "biased = (scores + bias)", "biased = (scores + 0 * bias)", "components/test_moe.py"),
        ("moe: the bias weighs too", "chosen = scores.gather(1, expert)", "chosen = (scores + bias).gather(1, expert)"),
        ("moe: a group by its best expert", "biased.topk(2, dim=-1)", "biased.topk(1, dim=-1)", "components/test_moe.py"),
        ("moe: the shared expert is left out", "mixed if self.shared is None else mixed + self.shared(x)", "mixed"),
        (
            "moe: routers rounded",
            "return linear(flat.float(), self.router.weight.float())",
            "return self.router(flat).float()",
            "components/test_moe.py",
        ),
        (
            "moe: one expert too few",
            ".topk(self.experts_per_token, dim=-1)",
            ".topk(self.experts_per_token, dim=-1, largest=False)",
        ),
    ),
    *of(
        "mdm/models/transformer.py",
        "mdm/models/test_model.py",
        (
            "causal: not where rows are packed",
            "rule = causal if c.causal and not c.blocks else same_document",
            "rule = same_document",
        ),
        ("next position: not moved", "torch.cat([h[:, :1], h[:, :-1]], dim=1)", "h", "mdm/models/test_open_models.py"),
        (
            "next position: across documents",
            "return before if position is None else torch.where((position == 0)[..., None], h, before)",
            "return before",
            "mdm/models/test_open_models.py",
        ),
        (
            "branches start as wide as all",
            "std /= math.sqrt(2 * self.config.num_layers / scaled.depth)",
            "pass",
            "components/test_parameterization.py",
        ),
        ("flops: attention once", "attention = 12 * attended", "attention = 6 * attended"),
        (
            "flops: all experts",
            "used = c.experts_per_token / c.num_experts if c.num_experts else 1.0",
            "used = 1.0",
            "mdm/training/test_planner.py",
        ),
    ),
    *of(
        "mdm/training/optim.py",
        "mdm/training/test_optim.py",
        ("ema: kappa is ignored", "1 - self.decay**kappa", "1 - self.decay"),
        ("ema: a swap does not come back", "self.average[name].copy_(held)", "pass"),
        (
            "base width upside down",
            "config.width / (self.base_width or config.width)",
            "(self.base_width or config.width) / config.width",
        ),
        ("the base depth is ignored", "config.num_layers / (self.base_depth or config.num_layers)", "1.0"),
        ("gamma is ignored", "gamma=self.gamma,", "gamma=0.0,"),
        ("the base horizon is ignored", "base_tokens=self.base_tokens,", "base_tokens=None,"),
        ("tuned at the physical batch", "logical=batch.logical,", "logical=physical,"),
        ("a warning where there are steps enough", "steps < critical_steps", "steps > critical_steps"),
    ),
    *of(
        "mdm/training/history.py",
        "mdm/training/test_history.py",
        ("history: the sum of the losses", "self.hw.sum(self.loss / self.steps)", "self.hw.sum(self.loss)"),
        ("history: the square of the sum", "self.squared_norm + norm**2", "(self.squared_norm + norm) ** 2"),
        (
            "history: a resume repeats its last line",
            "<= resumed_step] if path.is_file()",
            "<= resumed_step + 1] if path.is_file()",
        ),
        ("history: speed of the last step", "self.tokens + tokens, self.seconds + seconds", "tokens, self.seconds + seconds"),
        (
            "a gradient that is not finite passes",
            "if not (math.isfinite(loss) and math.isfinite(norm)):",
            "if not math.isfinite(loss):",
        ),
    ),
    *of(
        "mdm/training/checkpoint.py",
        "mdm/training/test_checkpoint.py",
        (
            "a partial checkpoint is chosen, killed in the first",
            "OWN.fullmatch(path.name) and STATE in names]",
            "OWN.fullmatch(path.name)]",
        ),
        ("one checkpoint is kept", "complete(self.folder)[: -self.keep]", "complete(self.folder)[:-1]"),
        ("the random state is not restored", 'torch.set_rng_state(held["rng"])', "pass"),
        ("the moments are not saved", '"optimizer": moments', '"optimizer": {}'),
        ("the average is not saved", 'found["ema"] = ema.average', "pass"),
    ),
    *of(
        "mdm/hardware/sharding.py",
        "mdm/hardware/test_sharding.py",
        ("weights are gathered in float32", "param_dtype=hw.gathers", "param_dtype=None"),
        ("gradients are reduced as they were gathered", "reduce_dtype=torch.float32", "reduce_dtype=None"),
        ("a common token's gradient is rounded away", "module.weight.float())", "module.weight).float()"),
        (
            "queries' gains get the gradient of some heads",
            "if getattr(block.attn, norm.partition",
            "if not getattr(block.attn, norm.partition",
        ),
        ("weights are kept after an evaluation", "model.reshard()", "pass"),
    ),
    *of(
        "mdm/hardware/processes.py",
        "mdm/hardware/test_sharding.py",
        ("processes of one row see others", "return self.rank // self.copies", "return self.rank"),
        ("what copies see is counted twice", "values = values / self.copies if", "values = values if"),
    ),
    *of(
        "mdm/models/folder.py",
        "mdm/training/test_checkpoint.py",
        (
            "a vocabulary of another meaning is taken",
            " not in (None, vocabulary.digest())",
            " in ()",
            "mdm/models/test_model.py",
        ),
    ),
    *of(
        "mdm/generation/canvas.py",
        "mdm/generation/test_generation.py",
        ("slots: those that are none fall on the last", "self.ids[local])[:, :-1]", "self.ids[local])[:, 1:]"),
        (
            "cache: refreshed a step late",
            "self.kept.age[self.rows] + 1 >= self.refresh_every",
            "self.kept.age[self.rows] >= self.refresh_every",
        ),
        (
            "cache: never refreshed between blocks",
            "fresh = block != self.kept.block[self.rows]",
            "fresh = self.kept.block[self.rows] < 0",
        ),
        ("cache: the prefix is all that is computed", 'if self.mode == "dual":', "if True:"),
        (
            "documents of a row see each other",
            "document = None if batch.one_document_per_row else",
            "document = None if True else",
        ),
        ("cache: padding is seen", "if self.document is not None:\n            own", "if False:\n            own"),
        (
            "cache: the position itself predicts",
            "(positions - 1).clamp(min=0), positions]",
            "positions, positions]",
            "mdm/models/test_open_models.py",
        ),
        ("the mask is not the last id", "some[mask_id] = False", "pass", "mdm/generation/test_generation.py"),
    ),
    *of(
        "mdm/generation/generate.py",
        "mdm/generation/test_generation.py",
        ("an end may stand before what is given", "out |= generate & (batch.modality == modality) & (later > 0)", "pass"),
        ("forbidden ids are not", "allowed[..., list(forbid)] = False", "pass"),
        ("noise of the place in the batch", "range(start, start + len(prompt))", "range(len(prompt))"),
        ("an edit is generated whole", "region[own] = edit.on_canvas(len(own))", "pass"),
        ("guided where nothing is given", "(defaults.guidance_scale if spec.given else 0.0)", "defaults.guidance_scale"),
        ("ends are not filled up", "local_end(ids, vocabulary.end_id) if stop_at_end else None", "None"),
    ),
    *of(
        "mdm/generation/checks.py",
        "mdm/generation/test_generation.py",
        ("a cache for what goes on", 'getattr(sampler.sampler, "goes_on", False)', "False"),
    ),
    *of(
        "components/block_diffusion/cache.py",
        "mdm/generation/test_blockwise.py",
        ("a cache forgets when it grows", "torch.cat([kept, room], dim=2)", "torch.cat([torch.zeros_like(kept), room], dim=2)"),
        ("rows are not left out", "cache.values[rows]", "cache.values[: len(rows)]"),
        ("all is attended to", "return own[:, :, : self.length], other[:, :, : self.length]", "return own, other"),
    ),
    *of(
        "components/block_diffusion/decoding.py",
        "components/block_diffusion/test_decoding.py",
        (
            "a block begins with masks whatever the noise",
            "        self._show()\n\n    def _at",
            "\n    def _at",
            "components/block_diffusion/test_inner_samplers.py",
        ),
        (
            "chance for what is given",
            "own[:, generate] = row.chance.random((3, int(generate.sum())))",
            "own[:] = row.chance.random(own.shape)",
        ),
        (
            "the first one's sampler",
            "after = self.samplers[kind].step(",
            "after = self.samplers[min(kinds)].step(",
            "components/block_diffusion/test_inner_samplers.py",
        ),
        ("blocks behind an end are sampled", "row.spans = [s for s in row.spans if s.start >= span.canvas_stop]", "pass"),
        (
            "confidence behind an end",
            "torch.where(self.task.generate[behind], 1.0,",
            "torch.where(self.task.generate[behind], 0.0,",
        ),
        ("patience is of the row", "            row.least, row.idle = 2**40, 0\n            done", "            done"),
    ),
    *of(
        "components/visibility.py",
        "components/test_visibility.py",
        ("padding is seen", "return q.document == k.document", "return (q.document == k.document) | (k.document < 0)"),
        (
            "a finished position sees noisy ones",
            "(k.stream == FINISHED) & (q.stream == FINISHED) & (k.block <= q.block)",
            "(q.stream == FINISHED) & (k.block <= q.block)",
        ),
    ),
    *of(
        "mdm/data/processor.py",
        "mdm/models/test_model.py",
        ("decoded to the last end", "ids[: int(ends[0])]", "ids[: int(ends[-1])]", "mdm/data/test_batches.py"),
        (
            "learned tokenizers run in bfloat16",
            "torch.autocast(device, enabled=False)(method)",
            "torch.autocast(device, enabled=False)(method) if False else method",
        ),
        ("clips of any rate are taken", "rate != wanted", "False", "mdm/data/test_batches.py"),
        (
            "a document has no end",
            "torch.tensor([self.vocabulary.end_id])",
            "torch.tensor([], dtype=torch.long)",
            "mdm/data/test_batches.py",
        ),
    ),
    *of(
        "mdm/evaluation/nelbo.py",
        "mdm/evaluation/test_evaluation.py",
        (
            "unigram bits over prompts and padding",
            "torch.cat([b.tokens[b.maskable] for b in batches])",
            "torch.cat([b.tokens.flatten() for b in batches])",
        ),
        (
            "packed rows are one document",
            "mask = None if micro.whole_rows else model.sees(Places(clean.document, clean.position))",
            "mask = None",
        ),
        (
            "positions of the row",
            "model.hidden(micro.noisy.noisy, mask, clean.position)",
            "model.hidden(micro.noisy.noisy, mask)",
        ),
        ("bytes of the whole canvas", "b.maskable & (b.tokens != end)", "b.maskable & (b.tokens != end) & False"),
        ("bits over batches, not tokens", "sum(tokens for _, tokens in batches)", "len(batches)"),
    ),
    *of(
        "mdm/evaluation/judges.py",
        "mdm/evaluation/test_judges.py",
        (
            "a text of several words is the first's",
            "return found[0] if len(found) == 1 else -1",
            "return found[0] if found else -1",
        ),
        ("loudness is heard", "(mel - mel.mean(axis=0)).T", "mel.T"),
        (
            "halves of the held-out samples are one",
            "self.held_out[order[::2]], self.held_out[order[1::2]]",
            "self.held_out[order[::2]], self.held_out[order[::2]]",
        ),
    ),
    *of(
        "components/metrics/mel.py",
        "mdm/evaluation/test_judges.py",
        ("mel bands of another scale", "2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)", "2595 * np.log10(1 + SAMPLE_RATE / 700)"),
    ),
    *of(
        "mdm/models/open_models.py",
        "mdm/models/test_open_models.py",
        (
            "rows of heads are not permuted",
            "interleaved(own, config.head_size, config.rotated) if _is_rotated(name) else own",
            "own",
        ),
        ("keys are not permuted", '".q_proj." in ours or ".k_proj." in ours', '".q_proj." in ours'),
        ("heads are permuted beyond what is rotated", "head_dim if rotated is None else rotated", "head_dim"),
        (
            "a second embedding is dropped unseen",
            "if not torch.equal(state[theirs], state[embedding]):",
            "if False:",
            "mdm/models/test_shape.py",
        ),
    ),
    *of(
        "mdm/models/open_formats.py",
        "mdm/models/test_open_models.py",
        (
            "dream predicts its own position",
            '"qkv_bias": True, "predicts_next": True}',
            '"qkv_bias": True, "predicts_next": False}',
        ),
        (
            "llada2: norms after the rotation",
            '"norm_before_rope": True, "router": "sigmoid"}',
            '"norm_before_rope": False, "router": "sigmoid"}',
        ),
        (
            "qwen3 predicts its own position",
            '"causal": True, "predicts_next": True},\n        names=_QWEN3',
            '"causal": True},\n        names=_QWEN3',
        ),
        (
            "llada: rope_theta is ours",
            '            "rope_base": "rope_theta",\n            "norm_eps"',
            '            "norm_eps"',
        ),
    ),
    *of(
        "mdm/models/adapters.py",
        "recipes/test_finetune.py::test_lora_starts_where_the_model_was_and_merges_to_the_same_outputs",
        ("lora starts with a change", "layer.lora_b.weight.zero_()", "layer.lora_b.weight.normal_()"),
        (
            "lora: A starts as wide as can be",
            ".mul_(weight.shape[1] ** -0.5)",
            "",
            "mdm/models/test_lora_start.py",
        ),
        (
            "lora: all is trained",
            "model.requires_grad_(False)",
            "pass",
            "recipes/test_finetune.py::test_only_the_adapter_is_trained_and_what_is_asked_for",
        ),
        (
            "qlora: the base stays whole",
            "if quantize_base:",
            "if False:",
            "recipes/test_finetune.py::test_qlora_keeps_the_weights_in_half_a_byte_and_merges_what_it_computes",
        ),
    ),
    *of(
        "mdm/models/quantization.py",
        "recipes/test_quantize.py",
        ("a packed tensor is not read", "part.copy_(left.pop(key))", "left.pop(key)"),
        ("norms are rounded too", "torch.float32 if id(parameter) in norms else dtype", "dtype", "mdm/test_hub.py"),
        (
            "scales are not counted",
            "return sum(part.numel() * part.element_size() for part in found)",
            "return max(part.numel() * part.element_size() for part in found)",
        ),
    ),
    *of(
        "mdm/data/pipeline.py",
        "mdm/data/test_batches.py",
        ("padding of a row is no document", "whole_rows=not packed and batch.one_document_per_row", "whole_rows=not packed"),
    ),
    *of(
        "mdm/data/settings.py",
        "mdm/data/test_batches.py",
        ("the ramp stays at its first step", "self.ramp[max(begun)] if begun", "self.ramp[min(begun)] if begun"),
    ),
    *of(
        "mdm/data/rows.py",
        "mdm/data/test_batches.py",
        (
            "prompts are dropped the other way round",
            "rng.random() < self.prompt_dropout\n        return [self",
            "rng.random() >= self.prompt_dropout\n        return [self",
        ),
        ("tasks have equal shares", "p=shares / shares.sum()", "p=np.full(len(shares), 1 / len(shares))"),
    ),
    *of(
        "mdm/data/validation.py",
        "mdm/data/test_batches.py",
        ("validation counts the fill", "int(content(batch, processor.vocabulary.end_id).sum())", "int(batch.maskable.sum())"),
        (
            "validation: every batch has the same masks",
            "[[i] for i, _ in part]",
            "[[i - start] for i, _ in part]",
            "mdm/data/test_batches.py",
        ),
    ),
    *of(
        "mdm/training/planner.py",
        "mdm/training/test_planner.py",
        ("blocks: the copies take no memory", "micro * taken.widest * kept_bytes", "rows * kept_bytes"),
        ("blocks: the copies take no time", "moved = copies * BETWEEN", "moved = BETWEEN"),
        ("gradients are not sharded", "(split if accumulation == 1 else tensor) / gib", "tensor / gib"),
        ("moments in 8 bits are one byte", '"int8": 2.0 * (1', '"int8": 1.0 * (1'),
        (
            "all positions have logits",
            "min(rows * masked * config.vocab_size, max_logits)",
            "min(rows * config.vocab_size, max_logits)",
        ),
        ("one card's speed", "tokens_per_second=count / token_seconds", "tokens_per_second=1 / token_seconds"),
        ("recomputing costs nothing", '"full": 4 / 3}[checkpointing]', '"full": 1.0}[checkpointing]'),
    ),
    *of(
        "mdm/training/costs.py",
        "mdm/training/test_costs.py",
        ("a ring moves what a card has", "size * (1 - 1 / own)", "size"),
        ("the whole tensor between machines", "size * (1 - 1 / machines) / own", "size * (1 - 1 / machines)"),
        ("weights are gathered once a micro-batch", "gather * (2 * blocks + rest)", "gather * (blocks + rest)"),
        ("replicas sum whole gradients", "2 * reduced / mesh.shard", "2 * reduced"),
        ("a pair is read twice", "CODE / (2 if pairs else 1)", "CODE"),
        ("Young without the two", "math.sqrt(2 * pause", "math.sqrt(pause"),
        ("a failure loses the interval", "every / 2 / 3600", "every / 3600"),
    ),
    *of(
        "components/metrics/quality.py",
        "components/metrics/test_quality.py",
        ("frechet: the root once", "- 2 * root", "- root"),
        (
            "n-grams: one new word after every history",
            "(after[word] + len(after) * p) / (after.total() + len(after))",
            "(after[word] + p) / (after.total() + 1)",
        ),
        ("n-grams: the shortest history", "min(self.order - 1, len(history)) + 1", "1"),
        ("distinct: how many", "len({tuple(s) for s in samples}) / len(samples)", "float(len({tuple(s) for s in samples}))"),
        ("unigram entropy in nats", "return float(-(p * np.log2(p)).sum())", "return float(-(p * np.log(p)).sum())"),
    ),
    *of(
        "components/metrics/scorers.py",
        "components/metrics/test_scorers.py",
        ("words: upper case counts", "text.lower()", "text"),
        ("words: said and heard swapped", "float(word_error_rate(heard, said))", "float(word_error_rate(said, heard))"),
        ("speakers are heard at the clip's rate", "self.extract(resample(clip, sample_rate, self.RATE),", "self.extract(clip,"),
        ("speech is recognised at the clip's rate", '"raw": resample(clip, sample_rate, self.RATE)', '"raw": clip'),
        ("fid: real for generated", "((given, True), (made, False))", "((given, True), (given, False))"),
    ),
    *of(
        "mdm/evaluation/harness.py",
        "recipes/test_harness.py",
        ("harness: the context is scored", "scored[scored.nonzero()[: len(context), 0]] = False", "pass"),
        ("harness: the bound as it is", "return -float(bound.nats)", "return float(bound.nats)"),
        ("harness: the beginning of a long context", "return ids[lost:]", "return ids[: len(ids) - lost]"),
    ),
    *of(
        "mdm/generation/diffusers_scheduler.py",
        "mdm/generation/test_diffusers_scheduler.py",
        ("scheduler: steps are the sampler's", "self.sampler = with_steps(self.sampler, num_inference_steps)", "pass"),
        ("scheduler: a block goes on from the last", "self.state is None or int(timestep) == 0", "self.state is None"),
        (
            "scheduler: rows that have ended are waited for",
            "(~self.state.finished & ~finished).any()",
            "(~self.state.finished).any()",
        ),
        ("scheduler: a callback is not heard", "torch.where(changed, sample == mask_token_id, before.masked)", "before.masked"),
        (
            "scheduler: the mask token may be drawn",
            'logits.masked_fill(ruled_out(None, mask_token_id, logits), float("-inf"))',
            "logits",
        ),
        ("scheduler: the generator is not used", "device=device, generator=generator)", "device=device)"),
        ("scheduler: what is asked is ignored", "if value not in (None, own, pipeline_defaults().get(name)):", "if False:"),
        (
            "scheduler: a folder may name anything",
            'check_travelled(in_full(sampler), "sampler", self.config_name, SAMPLERS)',
            "in_full(sampler)",
        ),
    ),
    *of(
        "mdm/generation/editing.py",
        "mdm/generation/test_generation.py",
        (
            "what fills a canvas up is open",
            "torch.full((length - len(self.region),), self.open_end)",
            "torch.full((length - len(self.region),), True)",
        ),
        ("a gap is one token", 'int((gap.group(1) or "1")[:20]) if gap', "1 if gap"),
    ),
    *of(
        "components/data/images.py",
        "components/test_reading.py",
        ("fit: the corner, not the middle", "(image.width - side) // 2, (image.height - side) // 2", "0, 0"),
    ),
    *of(
        "mdm/config/trust.py",
        "mdm/config/test_trust.py",
        ("trust: nothing is refused", "if not (known or trust):\n", "if False:\n"),
        (
            "trust: what the run before named stays trusted",
            "= frozenset(map(full_path, named(config))), everything",
            "= _named_by_run | frozenset(map(full_path, named(config))), everything",
        ),
        ("trust: everything is forgotten", "named(config))), everything", "named(config))), False"),
        ("trust: private members too", 'and not last.startswith("_")', ""),
        ("trust: functions of a named module", "(path == owner and _is_class(owner))", "(path == owner)"),
        ("trust: whatever lies beside a named function", "(same and _is_class(above))", "same"),
        ("trust: paths are left as they are", "for name in FILES:", "for name in ():"),
        ("trust: random weights of any size", '_has_file(out["_component_"]):', "False:"),
    ),
    *of(
        "mdm/config/names.py",
        "mdm/config/test_trust.py",
        ("names: what is there is taken for moved", "if last in NAMES and not _exists(name):", "if last in NAMES:"),
        ("names: another's of our name", "if name.startswith(OURS) and name", "if name"),
    ),
    *of(
        "components/files.py",
        "mdm/config/test_trust.py",
        ("files: drives", "windows.drive or ", ""),
        ("files: upwards", '".." in windows.parts or ', ""),
        ("files: links of a page lead out", "if not path.resolve().is_relative_to(Path(folder).resolve()):", "if False:"),
    ),
    *of(
        "mdm/config/settings.py",
        "mdm/config/test_trust.py",
        ("config: words are YAML", "if _say(said, key, typed):", "if False:", "mdm/config/test_config.py"),
        ("config: text is YAML", "elif _holds_text(config, key, stood) and", "elif False and", "mdm/config/test_config.py"),
        (
            "config: a whole node is merged",
            'if empty or not isinstance(value, DictConfig) or "_component_" in value:',
            "if empty or not isinstance(value, DictConfig):",
            "mdm/config/test_config.py",
        ),
    ),
    *of(
        "mdm/data/processor.py",
        "mdm/config/test_trust.py",
        ("processor: other codebooks than the vocabulary's", "if sizes != tuple(tokenizer.codebooks):", "if False:"),
        ("processor: a part of an image", "if whole is not None and length != whole:", "if False:"),
    ),
    *of(
        "mdm/models/folder.py",
        "mdm/config/test_trust.py",
        (
            "checkpoint: config.json imports",
            'if isinstance(value, (dict, list)):\n            raise UserError(f"checkpoint',
            'if False:\n            raise UserError(f"checkpoint',
        ),
        ("checkpoint: the embedding is not measured", "if embedding != [config.vocab_size, config.width]:", "if False:"),
    ),
    *of(
        "components/data/shards.py",
        "mdm/config/test_trust.py",
        ("shards: an index of any length", 'if not 0 <= shard["count"] <= shard["bytes"]:', "if False:"),
        ("shards: codes too large", " | (found >= sizes)", ""),
    ),
    *of(
        "components/vocabulary.py",
        "mdm/config/test_trust.py",
        ("vocabulary: ranges overlap", "if r.start < stop or r.size < 1:", "if r.size < 1:"),
    ),
    *of(
        "mdm/generation/defaults.py",
        "mdm/config/test_trust.py",
        (
            "defaults: samplers of strangers",
            'check_travelled(part, f"{key}.{name}", path, SAMPLERS)',
            "part",
        ),
        ("defaults: steps without end", '_refuse_extremes(node, f"{path}: {key}")', "pass"),
    ),
    *of(
        "components/tokenizers/modality.py",
        "components/test_modality.py",
        ("modality: what is heard is words", "(Filed, Drawn, Played))", "(Filed, Drawn))"),
        ("modality: what is in a file is words", "(Filed, Drawn, Played))", "(Drawn, Played))"),
        ("modality: a half without its region", "return tokenizer.region(raw, HALF)", "pass"),
        ("modality: grey by the first codebook", "books[torch.arange(len(codes)) % rows]", "books[0]"),
        ("modality: a suffix that leads elsewhere", 're.fullmatch(r"(\\.\\w+)+", own)', "own"),
    ),
    *of(
        "components/tokenizers/clips.py",
        "components/test_modality.py",
        ("clips: loud ones wrap around", "np.clip(audio, -1, 1) * 32767", "audio * 32767"),
        (
            "clips: a span behind the end",
            "(seconds if stop is None else min(stop, seconds))",
            "(seconds if stop is None else stop)",
        ),
    ),
    *of(
        "components/tokenizers/pictures.py",
        "components/test_modality.py",
        ("pictures: patches that are touched are left", "(edge + self.patch > low)", "(edge >= low)"),
    ),
    *of(
        "components/vocabulary.py",
        "components/test_vocabulary.py",
        ("vocabulary: codes of any size", "if bool(wrong.any()):", "if False:"),
        ("vocabulary: a frame cut short", "if len(codes) % len(sizes):", "if False:"),
        (
            "vocabulary: tasks of absent modalities",
            "if absent := set(find_task(task).modalities) - set(self.modalities):",
            "if False:",
        ),
    ),
    *of(
        "mdm/pages/media.py",
        "mdm/pages/test_any_modality.py",
        ("media: numbers of files that are there", "return max(found)", "return found[0]"),
        ("media: half of the outputs stays", "(folder / name).unlink(missing_ok=True)", "pass"),
    ),
    *of(
        "mdm/pages/film.py",
        "mdm/pages/test_any_modality.py",
        ("film: what lies behind the end", "stop = int(ends[0]) if len(ends) else len(ids)", "stop = len(ids)"),
        (
            "film: codes of several codebooks are words",
            "is_words(tokenizer) and len(tokenizer.codebooks) == 1",
            "is_words(tokenizer)",
        ),
    ),
    *of(
        "mdm/pages/live.py",
        "mdm/pages/test_any_modality.py",
        ("live: a clip is a square", "square = fixed_length(tokenizer) is not None and side", "square = side"),
    ),
    *of(
        "mdm/generation/chat.py",
        "mdm/generation/test_chat.py",
        (
            "chat: all masks of a model of blocks are shown",
            "torch.where(block <= block[left][0], tokens,",
            "torch.where(block <= block[left][-1], tokens,",
            "recipes/test_chat.py",
        ),
        (
            "chat: a turn has no end",
            "[self.processor.vocabulary.end_id, *self._turn_ends]",
            "[self.processor.vocabulary.end_id]",
        ),
        ("chat: what was left out is saved as seen", "self.exchanges[e.first : i + 1]", "self.exchanges[: i + 1]"),
        ("chat: the newest goes first", "self._text(first, question)", "self._text(-first or None, question)"),
    ),
    *of(
        "mdm/pages/terminal.py",
        "mdm/pages/test_terminal.py",
        (
            "terminal: lines that are gone stay",
            '"\\n".join(CLEAR_LINE + line for line in blocks) + CLEAR_BELOW',
            '"\\n".join(blocks)',
        ),
        ("terminal: a line is cleared behind its text", "CLEAR_LINE + line for line", "line + CLEAR_LINE for line"),
        ("terminal: higher than it is", "columns)[1 - lines :]", "columns)"),
        ("terminal: wide characters are narrow", "return 2 if unicodedata", "return 1 if unicodedata"),
    ),
    *of(
        "components/orders.py",
        "components/test_orders.py",
        (
            "orders: the documents of a packed row share one",
            'rng = sample_rng(self.seed, "order", index)\n',
            'rng = sample_rng(self.seed, "order", index & ROW)\n',
        ),
        (
            "orders: canvases of one modality are one",
            "run = np.cumsum(np.diff(modality, prepend=modality[:1]) != 0)",
            "run = modality",
        ),
        (
            "orders: a curriculum goes by the place in a row too",
            "order.at(row / (self.horizon or 1), rng)",
            "order.at(index / (self.horizon or 1), rng)",
        ),
        (
            "orders: later stages are not tried",
            "for stage in order.stages.values() if row < TRIED else ():",
            "for stage in ():",
        ),
    ),
    *of(
        "components/samplers/orders/in_order.py",
        "mdm/generation/test_any_order.py",
        (
            "in order: of several samplers the last one's ranks",
            "found = ranks if found is None else torch.where(generate, ranks, found)",
            "found = ranks",
        ),
        ("in order: all that is generated is one canvas", "lengths = canvases(where, kinds[row])", "lengths = [len(where)]"),
    ),
    *of(
        "components/visibility.py",
        "components/test_visibility.py",
        ("two streams: a query sees its own rank", "((k.block < q.block) | own)", "((k.block <= q.block) | own)"),
    ),
    *of(
        "mdm/generation/any_order.py",
        "mdm/generation/test_any_order.py",
        (
            "any order: a prompt that guidance leaves out is not known",
            "now = self.canvas.spread(masked.double()) == 0",
            "now = tokens != self.mask_id",
        ),
        ("any order: padding is known", "            now = now & (self.document != PAD_DOCUMENT)\n", "            pass\n"),
        ("any order: what is masked again stays known", "before.masked_fill(~now, UNKNOWN)", "before"),
        ("any order: a selection asks everything", "turn = None if self.turn is None else self.turn[rows]", "turn = None"),
    ),
    *of(
        "mdm/generation/generate.py",
        "mdm/generation/test_any_order.py",
        (
            "any order: guidance's copies are asked in each other's turn",
            "fixed.repeat(copies, 1)",
            "fixed.repeat_interleave(copies, 0)",
        ),
    ),
    *of(
        "components/types.py",
        "mdm/evaluation/test_order_likelihood.py",
        (
            "any-order bound: padding is a part of the row",
            "torch.where(own.document == PAD_DOCUMENT, PAD_DOCUMENT, index)",
            "index",
        ),
    ),
    *of(
        "mdm/evaluation/order_likelihood.py",
        "mdm/evaluation/test_order_likelihood.py",
        ("left to right: in any order", "model=model.config, order=Sequential())", "model=model.config)"),
    ),
    *of(
        "mdm/models/shape.py",
        "recipes/test_adapt.py",
        ("in blocks: never counted from the start", "blocks_from_start=alone", "blocks_from_start=False"),
    ),
    *of(
        "mdm/data/corruption.py",
        "recipes/test_orders.py",
        (
            "orders: one stream of masks among them",
            "!= {model.orders in orders}:",
            ".isdisjoint({model.orders in orders}):",
        ),
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression in file or name")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="survivors meet the whole suite")
    parser.add_argument("--list", action="store_true", help="name them, run none")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if re.search(options.only, f"{m.file} {m.name}")]
    if options.list:
        for m in chosen:
            print(f"{m.file}: {m.name}" + (f" (nothing else is computed: {m.equal})" if m.equal else ""))
        return 0
    lost = [m for m in chosen if m.found() != 1]
    for m in lost:
        print(f"no longer there: {m.file}: {m.name}")
    running = [m for m in chosen if m not in lost and not m.equal]
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for job in range(options.jobs):
            copies.put(copied(Path(folder) / str(job)))
        outcome = tests_of(copies.queue[0], sorted({p for m in running for p in m.paths}), SECONDS * 10)
        if outcome:
            print(f"the tests fail on the code as it is: {outcome}")
            return 1

        def run(mutation: Mutation) -> str:
            root = copies.get()
            try:
                caught = broken(root, mutation, mutation.paths, SECONDS)
                if not caught and options.whole:
                    caught = broken(root, mutation, [], WHOLE)
            finally:
                copies.put(root)
            print(f"{mutation.file}: {mutation.name}: {f'caught by {caught}' if caught else 'SURVIVED'}", flush=True)
            return caught

        with ThreadPoolExecutor(options.jobs) as pool:
            caught = list(pool.map(run, running))
    survivors = [m for m, by in zip(running, caught, strict=True) if not by]
    share = 1 - len(survivors) / max(len(running), 1)
    print(f"\n{len(running) - len(survivors)} of {len(running)} caught ({share:.1%}); {len(lost)} no longer there")
    for m in survivors:
        print(f"survived: {m.file}: {m.name}")
    return int(bool(lost) or share < WANTED)


def copied(folder: Path) -> Path:
    """The tracked files, as they are in the work tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def broken(root: Path, mutation: Mutation, tests: Sequence[str], seconds: float) -> str:
    """What fails in a copy with the breakage in it; the copy is mended again."""
    file = root / mutation.file
    whole = file.read_text()
    file.write_text(whole.replace(mutation.old, mutation.new))
    try:
        return tests_of(root, tests, seconds)
    finally:
        file.write_text(whole)


def tests_of(root: Path, tests: Sequence[str], seconds: float) -> str:
    """The first test that fails, "" where none does; a time that runs out is a failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        out = child.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the tests' own processes too
        child.communicate()
        return f"the time limit of {seconds} s"
    if child.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", out, re.MULTILINE)
    return found.group(1) if found else f"pytest's exit code {child.returncode}: {out.strip()[-200:]}"


if __name__ == "__main__":
    sys.exit(main())
