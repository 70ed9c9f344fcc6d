"""Training, evaluating and sampling with other noise than masks, as a user configures it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from components.kernels import Hybrid, Uniform
from components.maskers import FixedCountMasker, LowDiscrepancyTimes
from components.samplers import Ancestral, Blocks, Confidence, Editing, LinearScale
from components.types import Batch
from components.vocabulary import Vocabulary
from components.weightings import Noise
from mdm.config import UserError, find_config
from mdm.data.corruption import bound_corruption, learned_noise
from mdm.data.settings import LossSettings, StreamSettings
from mdm.generation.checks import edits_unlearned
from mdm.generation.defaults import Defaults
from mdm.generation.editing import infill
from mdm.generation.generate import generate
from mdm.models.folder import load_config, load_model
from mdm.training.history import read_history
from tests.processes import in_processes
from tests.recipes.conftest import CONFIG, in_process

KERNEL = "components.corruption.KernelCorruption"
MIXED = {
    "_component_": KERNEL,
    "kernel": {"text": {"_component_": "Hybrid", "p_u": 0.2}, "image": {"_component_": "Uniform"}},
    "pairs": True,
    "weighting": "dynamic",
}


def config_of(folder, masker):
    raw = yaml.safe_load(CONFIG.format(output_dir=folder / "out"))
    raw["masker"] = masker
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of two modalities, each with noise of its own."""
    folder = tmp_path_factory.mktemp("mixed")
    in_process("pretrain", config_of(folder, MIXED), "tokens=3000")
    return folder / "out"


def test_the_models_config_keeps_the_noise_of_each_modality(trained):
    noise = load_config(trained).noise
    assert noise == {"text": Noise(Hybrid(0.2), "dynamic"), "image": Noise(Uniform(), "dynamic")}
    assert load_model(trained)[0].config.noise == noise
    raw = json.loads((trained / "model" / "config.json").read_text())["noise"]
    assert raw["image"] == {"kernel": "uniform", "weighting": "dynamic"}


def test_bits_are_of_the_noises_own_bound_and_finite(trained):
    last = [line for line in read_history(trained / "history.jsonl") if "bits/text_to_image" in line][-1]
    assert 0 < last["bits/text_to_image"] < 40


def test_two_processes_train_as_one(trained, tmp_path):
    """The noise is a function of the sample: how rows are shared changes no loss, whatever kinds of noise they have."""
    in_processes(2, in_process, "pretrain", config_of(tmp_path, MIXED), "tokens=3000")
    one, two = ([line for line in read_history(f / "history.jsonl") if "loss" in line] for f in (trained, tmp_path / "out"))
    assert len(one) > 5
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_a_run_goes_on_with_its_own_noise_alone(trained, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    with pytest.raises(UserError, match="holds a run with another `masker`"):
        in_process("pretrain", config_of(tmp_path, {**MIXED, "weighting": "exact"}), "tokens=4000")
    in_process("pretrain", config_of(tmp_path, MIXED), "tokens=4000")
    assert load_config(folder).noise == load_config(trained).noise


def test_a_model_of_masks_says_nothing_of_noise(untrained):
    assert "noise" not in json.loads((untrained / "model" / "config.json").read_text())
    assert load_config(untrained).noise == {}


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({"image": {"kernel": "fog"}}, "must name one of the kernels mask, uniform, hybrid"),
        ({"image": {"kernel": "hybrid", "p_u": 2}}, "p_u, the share of uniform noise, must be in"),
        ({"image": {"kernel": "hybrid", "p_u": "0.1"}}, "takes numbers for p_u, gamma, clip"),
        ({"image": {"kernel": "uniform", "depth": 1}}, "takes numbers for clip"),
        ({"image": {"kernel": "uniform", "weighting": "heavy"}}, "weighting 'heavy' is not one of"),
        ({"smell": {"kernel": "uniform"}}, "noise of smell: the modalities are image, text"),
        ([1], "noise must name modalities"),
        ({"image": {"kernel": "hybrid_log_snr", "shift": 10**400}}, "takes numbers for shift, slope, clip"),
        ({"image": {"kernel": "hybrid", "p_u": -(10**400)}}, "takes numbers for p_u, gamma, clip"),
        ({"image": {"kernel": "uniform", "weighting": "clipped", "clip": 10**400}}, "takes numbers for clip"),
        ({"image": {"kernel": "uniform", "weighting": "clipped", "clip": float("inf")}}, "takes numbers for clip"),
        ({"image": {"kernel": "hybrid", "gamma": float("nan")}}, "takes numbers for p_u, gamma, clip"),
        ({"image": {"kernel": "uniform", "weighting": "y" * 10**5}}, "weighting 'yyy.*' is not one of"),
        ({"image": {"kernel": "uniform", "weighting": ["exact"] * 10**4}}, r"weighting .* is not one of"),
        ({"y\n" * 10**4: {"kernel": "uniform"}}, "noise of y y y .*: the modalities are image, text"),
    ],
)
def test_a_config_that_names_no_noise_is_said_in_one_line(trained, tmp_path, noise, words):
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "noise": noise}))
    with pytest.raises(UserError, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_a_mixed_model_generates_stands_where_it_may(trained):
    model, processor = load_model(trained)
    made = generate(model, processor, "text_to_image", [{"text": "a seven"}] * 4, Ancestral(num_steps=3), 0.5, film=True)
    assert made.forwards.tolist() == [3] * 4
    own = made.batch.modality == processor.vocabulary.modalities.index("image")
    ids = made.tokens[own & made.batch.maskable]
    (r,) = (processor.vocabulary.ranges[i] for i in processor.vocabulary.ranges_of("image"))
    assert bool(((ids >= r.start) & (ids < r.stop)).all())
    first = made.steps[0].tokens[own & made.batch.maskable]
    assert not bool((first == processor.vocabulary.mask_id).any())  # uniform noise: no mask, from the start
    assert len(first.unique()) > 5


def test_given_positions_stay_as_they_are(trained):
    model, processor = load_model(trained)
    made = generate(model, processor, "text", [{"text": infill(processor, "The [mask:3] of the")}] * 3, Ancestral(num_steps=4))
    given = made.batch.tokens != processor.vocabulary.mask_id
    assert torch.equal(made.tokens[given], made.batch.tokens[given])
    assert not bool((made.tokens == processor.vocabulary.mask_id).any())


def test_a_bound_is_of_what_each_modality_learned():
    """Streams of different modalities may have weights of their own, and so maskers: each one's tilt is its own."""
    vocabulary = Vocabulary.build({"text": (4,), "image": (4,)}, may_end=())
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]] * 40)
    image = (tokens > 3).long()
    batch = replace(Batch.of(tokens, 0), modality=image, id_range=image)
    noise = {"text": Noise(Uniform(), "low_variance"), "image": Noise(Uniform(), "cross_entropy")}
    for own in (noise, dict(reversed(noise.items()))):
        noisy = bound_corruption(own, vocabulary, LowDiscrepancyTimes(40), 0)(batch)
        assert (noisy.replaced.tilt[:, :4] == 0).all()
        assert (noisy.replaced.tilt[:, 4:] > 0).all()


def test_what_a_model_undid_stays_where_nothing_else_is_learned():
    data = {"spoken": StreamSettings(tasks={"text_to_audio": 1.0}), "seen": StreamSettings(tasks={"image_to_text": 1.0})}
    before = {"text": Noise(Uniform()), "image": Noise(Hybrid(0.2), "dynamic")}
    masker = dict.fromkeys(data, FixedCountMasker(0))
    assert learned_noise(data, masker, LossSettings(), before) == {"image": before["image"]}
    assert learned_noise(data, masker, LossSettings()) == {}


@pytest.mark.parametrize(
    ("task", "sampler", "settings", "words"),
    [
        (
            "text_to_image",
            Confidence(num_steps=2),
            {},
            r"Confidence fills in masks, and the noise .* Uniform\(\), ends in none",
        ),
        (
            "text_to_image",
            Blocks(Ancestral(), 4),
            {"cache": "dual"},
            "cache 'dual' keeps what lies outside a block",
        ),
        ("text_to_image", Ancestral(), {"guidance_scale": LinearScale()}, "changes with the share of masked tokens"),
    ],
)
def test_what_counts_masks_is_refused_where_there_are_none(trained, task, sampler, settings, words):
    model, processor = load_model(trained)
    with pytest.raises(ValueError, match=words) as caught:
        generate(model, processor, task, [{"text": "a seven"}], sampler, **{"guidance_scale": 0.0, **settings})
    assert "\n" not in str(caught.value)


def test_a_sampler_of_masks_may_fill_in_what_ends_in_masks(trained):
    model, processor = load_model(trained)
    made = generate(model, processor, "text", [{}], Confidence(num_steps=2), 0.0, length=8)
    assert 1 <= int(made.forwards) <= 2


def test_a_default_for_masks_gives_way_where_noise_ends_in_none():
    noise = {"text": Noise(Uniform())}
    assert Defaults.packaged().of("image_to_text", ["text", "image"], noise).sampler == Ancestral(num_steps=2, temperature=0.0)
    assert isinstance(Defaults.packaged().of("image_to_text", ["text", "image"], {}).sampler, Confidence)
    assert isinstance(Defaults.packaged().of("image_to_text", ["text"], {"text": Noise(Hybrid())}).sampler, Confidence)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("masker.kernel.text.p_u=1.0", r"masker.kernel.text: Hybrid: p_u, .* must be in \[0, 1\), got 1.0"),
        ("masker.kernel.text={_component_: HybridLogSNR, slope: 1.5}", "slope must be in .*: beyond, a rate of"),
        ("masker.kernel.smell={_component_: Uniform}", "a kernel for each of image, text, got one for image, text, smell"),
        ("masker.weighting=heavy", "masker: corruption: weighting 'heavy' is not one of exact"),
        ("masker.weighting=clipped", "clip, a positive number, goes with weighting=clipped"),
        ("masker.t_min=0.6", "t_min must be in"),
        ("loss.weighting=plain", "loss.weighting=plain is for masks"),
        ("data.text.masker={_component_: FixedCountMasker}", "text is corrupted by Mask.*, and in data.digits by Hybrid"),
    ],
)
def test_a_mistake_is_one_line_before_any_data_is_read(tmp_path, monkeypatch, override, words):
    monkeypatch.setattr("components.data.digits.digits", lambda **_: pytest.fail("data was read"))
    with pytest.raises(UserError, match=words) as caught:
        in_process("pretrain", config_of(tmp_path, MIXED), override)
    assert "\n" not in str(caught.value)


def test_masks_and_tokens_are_learned_in_blocks_and_edited_inside_them(tmp_path):
    """LLaDA2.1's mixture, by the packaged config's masker; a model that saw masks alone is edited with a warning."""
    own = yaml.safe_load(find_config("quickstart_blocks_editing").read_text())
    assert own["data"]["reading_digits"]["masker"]["weighting"] == own["masker"]["weighting"] == "cross_entropy"
    config = yaml.safe_load(CONFIG.format(output_dir=tmp_path / "out"))
    config["model"] |= {"blocks": {"text": 4}, "causal": True}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**config, "masker": own["masker"], "loss": {"next_token": 0.3}}))
    in_process("pretrain", tmp_path / "own.yaml", "tokens=800", "validation_samples=4")
    model, processor = load_model(tmp_path / "out")
    assert str(model.config.noise["text"].kernel) == "Hybrid(p_u=0.1, gamma=1.0)"
    settings = (
        "image_to_text",
        [{"image": torch.arange(16) + i} for i in range(3)],
        Editing(threshold=0.3, edit_threshold=0.0),
        0.0,
    )
    made = {cache: generate(model, processor, *settings, cache=cache) for cache in ("exact", "off")}
    assert torch.equal(made["exact"].tokens, made["off"].tokens)
    assert not bool((made["exact"].tokens == processor.vocabulary.mask_id).any())
    plain = generate(model, processor, *settings[:2], Editing(threshold=0.3, edit_threshold=1.0), 0.0)
    assert not torch.equal(made["exact"].tokens, plain.tokens)
    assert edits_unlearned(["text"], settings[2], model.config) is None
    masked = replace(model.config, noise={})
    line = edits_unlearned(["text"], settings[2], masked)
    assert line is not None
    assert line.startswith("the model was trained to fill in masks of text, never to replace a token that is wrong")
    assert edits_unlearned(["text"], Editing(edit_threshold=1.0), masked) is None
    assert edits_unlearned(["text"], Confidence(), masked) is None
