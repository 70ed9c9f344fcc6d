"""Which order of generation? Bounds and likelihoods, samples by decoder and passes, the cost, and the order that was learned.

Columns beside those of mdm/studies/table.py: MODALITY/FIGURE/DECODER, left_to_right/TASK, one_pass/TASK/passes and seconds,
training_flops, and of learned orders order/MODALITY/ranks and content: see mdm/studies/orders/measures.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm.studies.decoders import FIGURES, bits_of, by_group, decoded, of_each, reservations, spoken
from mdm.studies.seeds import Rows, mean, signed, sure, values, with_error

NEAR = 0.03  # of an accuracy, that another reaches it
RANDOM = "random order"  # the decoder that draws from a model's joint as it was trained

GOES_WITH = {"along": "the position", "middle": "the distance from the middle"}  # what ranks are correlated with


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """Of each group means over seeds, their standard errors, and what is apart from the first group's. Raises UserError."""
    own, first = by_group(rows), rows[0]["group"]
    summary: dict[str, Any] = {"first": first, "seeds": min(map(len, own.values())), "unit": "bits per token", "groups": {}}
    for name, runs in own.items():
        summary["groups"][name] = {
            "seeds": len(runs),
            "kind": kind(runs[0]),
            "bits": bits_of(runs, own[first]),
            "left_to_right": bits_of(runs, own[first], "left_to_right/"),
            "training_flops": _ratio(runs, own[first], "training_flops"),
            "one_pass": _one_pass(runs),
            "decoders": decoded(runs, own[first]),
            "order": {m: o for m in _modalities(runs) if kind(runs[0]) == "learned" and (o := order_of(runs, m))},
        }
    whole = {name: _figures(runs) for name, runs in own.items()}
    summary["left_out"] = [r["cell"] for r in rows if r["status"] != "finished"]
    summary["not_measured"] = [r["cell"] for runs in own.values() for r in runs if _figures([r]) != whole[r["group"]]]
    return summary, "\n\n".join(_lines(summary))


def kind(run: Mapping[str, Any]) -> str:
    """masked, autoregressive, two streams or learned. Where no exponent may differ nothing is learned: masks, two of a row."""
    if run.get("model.autoregressive"):
        return "autoregressive"
    if str(run.get("model.order_spread")) in ("0", "0.0"):
        return "masked"
    orders = str(run.get("model.orders") or "masked")
    return "learned" if orders.startswith("learned") else orders.replace("_", " ")


SAYS = {  # what the bits are that a run is validated with
    "masked": "a bound",
    "autoregressive": "the likelihood itself",
    "two streams": "the mean over orders, which is masked diffusion's bound",
    "learned": "a bound, over orders of its own",
}


def order_of(runs: Rows, modality: str) -> dict[str, Any]:
    """What a group learned of the order of a canvas; nothing where it was not asked.

    ranks, error: mean over seeds of each position's mean rank, from 1, and its standard error; in rows and columns
    spread:       standard deviation of these ranks over positions, 0 where turns are equal;  most: of one order for all samples
    noise:        the spread that the seeds' differences alone would give
    content:      standard deviation of a position's rank over samples
    agreement:    mean correlation of two seeds' ranks
    along, middle: correlation of ranks with the position, and with the distance from the middle of the canvas
    """
    found = [json.loads(r[f"order/{modality}/ranks"]) for r in runs if r.get(f"order/{modality}/ranks")]
    if not found:
        return {}
    each = np.array(found)
    count, shape = each[0].size, each[0].shape
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij"))
    middle, along = np.hypot(*place), np.arange(count).reshape(shape)
    ranks, many = each.mean(axis=0), len(each) > 1
    error = each.std(axis=0, ddof=1) / len(each) ** 0.5 if many else None
    pairs = [correlation(a, b) for a, b in itertools.combinations(each, 2)]
    return {
        "ranks": ranks.tolist(),
        "error": None if error is None else error.tolist(),
        "spread": float(ranks.std()),
        "noise": None if error is None else float((error**2).mean() ** 0.5),
        "most": float(((count**2 - 1) / 12) ** 0.5),
        "content": mean(values(runs, f"order/{modality}/content")),
        "agreement": float(np.mean(pairs)) if pairs else None,
        "along": mean(np.array([correlation(ranks, along) for ranks in each])),
        "middle": mean(np.array([correlation(ranks, middle) for ranks in each])),
    }


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one is constant."""
    flat = any(float(v.std()) < 1e-9 for v in (a, b))
    return 0.0 if flat else float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _modalities(runs: Rows) -> list[str]:
    return list(dict.fromkeys(k.split("/")[1] for r in runs for k in r if k.startswith("order/")))


def _figures(runs: Rows) -> set[str]:
    """The measured columns that a run has."""
    return {k for r in runs for k, v in r.items() if v is not None and "/" in k}


def _ratio(runs: Rows, first: Rows, key: str) -> float | None:
    """Of means: what counts the same work in every seed has no error."""
    own, theirs = values(runs, key), values(first, key)
    return float(own.mean() / theirs.mean()) if len(own) and len(theirs) else None


def _one_pass(runs: Rows) -> dict[str, dict[str, Any]]:
    """Task -> how many times the passes and the time of one pass the first group's model takes for a likelihood."""
    tasks = dict.fromkeys(k.split("/")[1] for r in runs for k, v in r.items() if k.startswith("one_pass/") and v is not None)
    return {task: {what: mean(values(runs, f"one_pass/{task}/{what}")) for what in ("passes", "seconds")} for task in tasks}


def _lines(summary: Mapping[str, Any]) -> list[str]:
    """The finding, in paragraphs."""
    first, groups, seeds = summary["first"], summary["groups"], summary["seeds"]
    said = ", ".join(f"{spoken(task)} {with_error(c)}" for task, c in groups[first]["bits"].items())
    lines = [f"Held-out bits per token of {first} ({SAYS[groups[first]['kind']]}): {said} ({of_each(seeds)})."]
    for name, s in list(groups.items())[1:]:
        said = ", ".join(f"{spoken(task)} {with_error(c)} ({signed(c, 3)})" for task, c in s["bits"].items())
        lines.append(f"{name} ({SAYS[s['kind']]}): {said}.")
    lines += _said_likelihoods(groups)
    flops = [f"{name} {s['training_flops']:.2f}x" for name, s in groups.items() if s["training_flops"]]
    lines += [f"**Training FLOPs** for a token of the data, against {first}: {', '.join(flops)}."] if flops else []
    for name, s in groups.items():
        times = [
            f"{spoken(task)} {c['passes']['mean']:.0f}x fewer passes, {with_error(c['seconds'], 1)}x less time"
            for task, c in s["one_pass"].items()
        ]
        lines += [f"**Likelihood in one pass**, {name} against {first}, the same rows: {'; '.join(times)}."] if times else []
    for modality in dict.fromkeys(m for s in groups.values() for m in s["decoders"]):
        parts = []
        for name, s in groups.items():
            said = ", ".join(f"{decoder} {_quality(f)}" for decoder, f in s["decoders"].get(modality, {}).items())
            parts += [f"{name}: {said}."] if said else []
        lines.append(f"**{modality}**, {_unit(groups, modality)}, and passes of a sample. {' '.join(parts)}")
    lines += _said_streams(groups) + _said_learned(groups)
    return lines + reservations(summary)


def _quality(figures: Mapping[str, Any]) -> str:
    """How good a decoder's samples are, in how many passes; of text with the entropy, since dull text is likely too."""
    key = next((f for f in ("accuracy", "ngram_bits") if f in figures), None)
    good = "" if key is None else with_error(figures[key], FIGURES[key][2])
    dull = f", entropy {with_error(figures['entropy_bits'], FIGURES['entropy_bits'][2])}" if "entropy_bits" in figures else ""
    return f"{good}{dull} ({figures['forwards']['mean']:.0f})"


def _unit(groups: Mapping[str, Any], modality: str) -> str:
    some = next(f for s in groups.values() for f in s["decoders"].get(modality, {}).values())
    return "accuracy" if "accuracy" in some else "n-gram bits a token"


def _said_likelihoods(groups: Mapping[str, Any]) -> list[str]:
    """From left to right all models have an exact likelihood, which compares."""
    tasks = list(dict.fromkeys(task for s in groups.values() for task in s["left_to_right"]))
    parts = []
    for task in tasks:
        at = {name: s["left_to_right"][task] for name, s in groups.items() if task in s["left_to_right"]}
        parts.append(f"{spoken(task)}: " + ", ".join(f"{name} {with_error(c)}" for name, c in at.items()))
    how = "**Likelihood from left to right**, exact of every model, the same rows, bits per token."
    return [f"{how} {'. '.join(parts)}."] if parts else []


def _said_streams(groups: Mapping[str, Any]) -> list[str]:
    """Whether two streams draw and speak as well as the first group at equal tokens."""
    first, lines = next(iter(groups.values())), []
    for name, s in groups.items():
        parts = []
        for modality, theirs in first["decoders"].items() if s["kind"] == "two streams" else ():
            own = s["decoders"].get(modality, {})
            here, there = ({d: f["accuracy"] for d, f in of.items() if "accuracy" in f} for of in (own, theirs))
            if RANDOM not in here or RANDOM not in there:
                continue
            best, most = (max(of, key=lambda d: of[d]["mean"]) for of in (here, there))
            apart = here[best]["mean"] - there[most]["mean"]
            reached = "reaches" if here[RANDOM]["difference"] >= -NEAR else "does not reach"
            parts.append(
                f"{modality} {signed(here[RANDOM], 3)}, {reached} it within {NEAR:g}; the best decoder of each, {best} against "
                f"{most}, {apart:+.3f}"
            )
        said = f"**Accuracy of {name} against {next(iter(groups))}**, a token a pass in a random order:"
        lines += [f"{said} {'. '.join(parts)}."] if parts else []
    return lines


def _said_learned(groups: Mapping[str, Any]) -> list[str]:
    """Whether a learned order has the lower bound, and what it is."""
    first, lines = next(iter(groups)), []
    for name, s in groups.items():
        if s["kind"] == "learned":
            below = [spoken(t) for t, c in s["bits"].items() if c["difference"] < 0 and c["difference_error"] and sure(c)]
            where = f"below that of {first} by more than two standard errors: {', '.join(below)}"
            lines.append(f"**The bound of {name}** is {where if below else 'surely lower on no task'}.")
        said = ". ".join(f"{modality}: {_turns(o)}" for modality, o in s["order"].items())
        lines += [f"**The learned order**, {name}, as mean ranks from 1. {said}."] if said else []
        if {"image", "audio"} <= set(s["order"]):
            lines.append(_alike(s["order"]["image"], s["order"]["audio"]))
    return lines


def _turns(o: Mapping[str, Any]) -> str:
    """How far an order is from equal turns, and what it goes with."""
    spread = f"they spread by {o['spread']:.2f}"
    if o["noise"] is not None:
        apart = "not equal turns" if o["spread"] > 2 * o["noise"] else "no more than noise"
        spread += f" (noise: {o['noise']:.2f}; {apart}; two seeds' correlate by {o['agreement']:.2f})"
    parts = [f"{spread}, in one order for all by {o['most']:.1f}", f"by content one moves by {with_error(o['content'], 2)}"]
    for key, what in GOES_WITH.items():
        parts.append(f"correlation with {what} {with_error(o[key], 2)}")
    ranks = np.array(o["ranks"])
    if 1 < ranks.shape[1] < ranks.shape[0]:
        parts.append(f"by codebook {', '.join(f'{r:.1f}' for r in ranks.mean(axis=0))}")
    return "; ".join(parts)


def _alike(image: Mapping[str, Any], audio: Mapping[str, Any]) -> str:
    """Whether an image's order is like that of speech, by what correlates with it."""
    parts = []
    for key, what in GOES_WITH.items():
        errors = [o[key]["standard_error"] for o in (image, audio)]
        error = None if None in errors else float(np.hypot(*errors))
        c = {"difference": image[key]["mean"] - audio[key]["mean"], "difference_error": error}
        parts.append(f"{what} {signed(c, 2)}")
    return f"Is the order of an image that of speech? Correlation of ranks, image less speech: with {', with '.join(parts)}."
