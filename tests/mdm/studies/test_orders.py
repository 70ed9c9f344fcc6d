"""The study of orders concludes from its table alone: bounds, likelihoods, decoders, one pass, and what order was learned."""

import json

import numpy as np
import pytest

from components.samplers import FirstHitting, InOrder
from mdm.config import UserError
from mdm.models import builders
from mdm.studies import orders
from mdm.studies.orders.measures import Orders
from mdm.studies.orders.question import correlation, order_of

GROUPS = {  # what changes, and how much better one is
    "masked": ({}, 0.0),
    "left to right": ({"model.autoregressive": True}, 0.3),
    "random orders": ({"model.orders": "two_streams"}, 0.1),
    "learned": ({"model.orders": "learned"}, 0.05),
}


def row(name, seed):
    changed, better = GROUPS[name]
    off = 0.01 * (seed - 1)
    found = {"cell": f"{name}_{seed}", "group": name, "status": "finished", "seed": seed, "loss": 3.0, **changed}
    found |= {"bits/text_to_image": 2.5 - better + off, "bits/text_to_speech": 4 - better + off}
    found |= {"left_to_right/text_to_image": 2.4 - better + off, "training_flops": 2e6 if name == "random orders" else 1e6}
    decoders = ("left to right",) if name == "left to right" else ("random order", "left to right", "confidence 8")
    for modality, length in (("image", 16.0), ("audio", 56.0)):
        for decoder in decoders:
            worse = 0.3 * (name == "random orders" and modality == "audio")
            figures = {"accuracy": 0.5 - worse + off, "forwards": 8.0 if "8" in decoder else length, "seconds": 0.01}
            found |= {f"{modality}/{figure}/{decoder}": value for figure, value in figures.items()}
    if name == "random orders":
        found |= {"one_pass/text_to_image/passes": 16.0, "one_pass/text_to_image/seconds": 9.0 + seed}
    if name == "learned":
        image = np.arange(1.0, 17).reshape(4, 4) if seed < 3 else np.full((4, 4), 8.5)
        found |= {"order/image/ranks": json.dumps(image.tolist()), "order/image/content": 0.5}
        speech = np.array([[50.0, 40, 20, 4]] * 14)
        found |= {"order/audio/ranks": json.dumps(speech.tolist()), "order/audio/content": 0.5 + seed}
    return found


@pytest.fixture
def rows():
    return [row(name, seed) for name in GROUPS for seed in range(3)]


def test_what_each_groups_bits_are_is_said_and_they_are_compared_with_the_first(rows):
    summary, finding = orders.conclude(rows)
    assert "Held-out bits per token of masked (a bound): text to image 2.500 +-0.006, text to speech 4.000" in finding
    assert "left to right (the likelihood itself): text to image 2.200 +-0.006 (-0.300 +-0.008)" in finding
    assert "random orders (the mean over orders, which is masked diffusion's bound)" in finding
    assert "text to image: masked 2.400 +-0.006, left to right 2.100 +-0.006" in finding
    assert "against masked: masked 1.00x, left to right 1.00x, random orders 2.00x, learned 1.00x." in finding
    assert "text to image 16x fewer passes, 10.0 +-0.6x less time" in finding
    assert summary["groups"]["learned"]["decoders"]["image"]["confidence 8"]["forwards"]["mean"] == 8


def test_two_streams_reach_the_accuracy_or_do_not_and_a_learned_bound_is_lower_or_not(rows):
    _, finding = orders.conclude(rows)
    said = next(p for p in finding.split("\n\n") if p.startswith("**Accuracy of random orders against masked**"))
    assert "image +0.000 +-0.008 (within noise), reaches it within 0.03" in said
    assert (
        "audio -0.300 +-0.008, does not reach it within 0.03; the best decoder of each, random order against random order, -0.3"
        in said
    )
    below = "**The bound of learned** is below that of masked by more than two standard errors: text to image, text to speech."
    assert below in finding
    for r in rows:
        if r["group"] == "learned":
            r |= {k: v + 0.05 for k, v in r.items() if k.startswith("bits/")}
    assert "**The bound of learned** is surely lower on no task." in orders.conclude(rows)[1]


def test_a_learned_order_is_told_by_its_spread_its_seeds_and_what_it_goes_with(rows):
    summary, finding = orders.conclude(rows)
    image, audio = (summary["groups"]["learned"]["order"][m] for m in ("image", "audio"))
    assert (image["spread"], image["noise"]) == (pytest.approx(image["most"]), 0)  # one order for all
    assert (image["along"]["mean"], image["agreement"]) == (pytest.approx(1), pytest.approx(1))
    assert image["middle"]["mean"] == pytest.approx(0, abs=1e-9)
    assert np.array(image["error"]).max() == 0
    assert audio["content"]["mean"] == 1.5
    said = "image: they spread by 4.61 (noise: 0.00; not equal turns; two seeds' correlate by 1.00), in one order for all by"
    assert said in finding
    assert (
        "masked: random order 0.500 +-0.006 (16), left to right 0.500 +-0.006 (16), confidence 8 0.500 +-0.006 (8)." in finding
    )
    assert "by codebook 50.0, 40.0, 20.0, 4.0" in finding
    assert "Correlation of ranks, image less speech: with the position +1." in finding
    equal = order_of([row("learned", 3), row("learned", 4)], "image")
    assert (equal["spread"], equal["agreement"], equal["along"]["mean"]) == (0, 0, 0)
    assert correlation(np.arange(4.0), np.arange(4.0)[::-1]) == pytest.approx(-1)


def test_what_is_missing_is_said_and_the_rest_is_drawn(rows):
    rows[4] |= {"status": "crashed", "loss": float("nan")}
    rows[8] = {k: v for k, v in rows[8].items() if not k.startswith("audio/")}
    summary, finding = orders.conclude(rows)
    assert (summary["left_out"], summary["not_measured"]) == (["left to right_1"], ["random orders_2"])
    assert "Fewer than three seeds: no difference here is a finding." in finding
    assert orders.draw(rows, summary)[:4] == b"\x89PNG"
    bare = [{k: v for k, v in r.items() if "/" not in k or k.startswith("bits/")} for r in rows if r["seed"] == 0]
    summary, finding = orders.conclude(bare)
    assert orders.draw(bare, summary)[:4] == b"\x89PNG"
    with pytest.raises(UserError, match=r"groups\.masked: none of its runs finished"):
        orders.conclude([{**r, "status": "diverged"} if r["group"] == "masked" else r for r in rows])


def test_a_model_is_decoded_in_the_orders_that_it_knows():
    measure = Orders("text", [], streams=3, steps=5)

    def of(**settings):
        return measure.decoders(builders.model(8, 8, 32, 1, 2, **settings).config)

    assert list(of(autoregressive=True)) == ["left to right"]
    masked, streams, learned = of(), of(orders="two_streams"), of(orders="learned")
    assert list(masked) == list(streams) == ["random order", "left to right", "strided", "confidence 5", "ancestral 5"]
    assert isinstance(masked["random order"], FirstHitting)
    assert isinstance(streams["random order"], InOrder)  # it asks for the positions alone whose turn it is
    assert list(learned)[5:] == ["learned order", "learned order 5"]
