"""`mdm validate` finds what no look at the keys can tell, of every recipe that has sources, and leaves nothing behind."""

import os
import time

import fsspec
import numpy as np
import pytest
import tiktoken
from PIL import Image

from components.places import patience
from mdm.training import reach, trial
from tests.recipes.conftest import mdm
from tests.recipes.test_bad_input import one_line

MINE = """
from components.data.bad import Refused
from components.maskers import FixedCountMasker
from components.samplers import Confidence


class NoPairs:
    def __init__(self, mask_id):
        self.mask_id = mask_id

    def __call__(self, batch):
        return batch


class NoCall:
    pairs = False


class Fails(FixedCountMasker):
    def __call__(self, batch):
        return self.absent(batch)


class HalfSchedule:
    def alpha(self, t):
        return 1 - t


class OneWay:
    codebooks = (8,)

    def encode(self, raw):
        return raw


class NoItems:
    def __len__(self):
        return 3


class NoState:
    def __iter__(self):
        return iter([{"text": "a"}])


class Tuples:
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return ("a", "b")


class NoSteps:
    pass


class NoJudge:
    def __init__(self, samples):
        pass


class NoLogger:
    def log_dict(self, payload, step):
        pass


def asked(long=False):
    return [{"prompt": "what?", "text": "it is " * (40 if long and i == 9 else 1)} for i in range(10)]


def wordy():
    return [{"prompt": "what is it? " * 20, "text": "it is"}] * 9


class Strict:
    def __len__(self):
        return 9

    def __getitem__(self, i):
        if i == 8:
            raise Refused("corrupt line 9 (on_corrupt: skip leaves such lines out)")
        return {"text": "good"}


def offline(path="a/hub"):
    raise ConnectionError(f"Couldn't reach {path!r} on the Hub")


class Far:
    def __init__(self):
        try:
            offline()
        except ConnectionError as error:
            raise ValueError("no tokenizer") from error
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def validate(config, folder, *settings, check=True, recipe="pretrain"):
    return mdm("validate", recipe, "--config", config, *settings, cwd=folder, check=check)


def instruct(long):
    return f"data.a={{train: {{_component_: mine.asked, long: {long}}}, tasks: {{instruct: 1}}}}"


WRONG = {
    "a masker without pairs": (["masker={_component_: mine.NoPairs}"], "masker: mine.NoPairs lacks pairs"),
    "a masker that is not called": (["masker={_component_: mine.NoCall}"], "masker: mine.NoCall lacks __call__"),
    "a stream's masker": (["data.text.masker={_component_: mine.NoPairs}"], "data.text.masker: mine.NoPairs lacks pairs"),
    "a masker that fails": (["masker={_component_: mine.Fails}"], "AttributeError: 'Fails' object has no attribute 'absent'"),
    "a schedule": (
        ["masker.schedule={_component_: mine.HalfSchedule}"],
        "masker.schedule: mine.HalfSchedule lacks complete, alpha_prime",
    ),
    "a tokenizer": (["tokenizers.image={_component_: mine.OneWay}"], "tokenizers.image: mine.OneWay lacks decode, save"),
    "a source without items": (
        ["data.text.train={_component_: mine.NoItems}"],
        "data.text.train: mine.NoItems lacks __getitem__",
    ),
    "a stream without a state": (
        ["data.text.train={_component_: mine.NoState}"],
        "data.text.train: mine.NoState lacks state_dict, load_state_dict",
    ),
    "samples that are no mappings": (["data.text.train={_component_: mine.Tuples}"], "sample 0 is of type tuple"),
    "a logger": (["metric_logger={_component_: mine.NoLogger}"], "metric_logger: mine.NoLogger lacks close"),
    "a model": (
        ["model={_component_: mine.NoSteps}"],
        "model: mine.NoSteps builds no MaskedDiffusionModel",
    ),
    "a decay that grows": (["ema=1.5"], "ema must be in (0, 1), or null for none; got 1.5"),
    "an image size": (["tokenizers.image.size=16", "canvas.image=64"], "data.digits"),
    "a response longer than its canvas": (["data.digits=null", instruct("true")], "canvas.text = 12"),
    "a prompt longer than the model": (
        ["data.digits=null", "data.a={train: {_component_: mine.wordy}, tasks: {instruct: 1}}"],
        "does not fit model.max_length = 64",
    ),
    "a sample that is refused": (["data.text.train={_component_: mine.Strict}"], "data.text.train: corrupt line 9 (on_corrupt"),
    "a caption longer than its canvas": (["canvas.text=2"], "does not fit canvas.text = 2"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda c: c.replace(" ", "_"))
def test_what_would_end_the_run_is_found_by_name(config, folder, case):
    settings, message = WRONG[case]
    line = one_line(validate(config, folder, *settings, check=False))
    assert message in line
    assert not (folder / "out").exists()


def test_what_is_right_is_valid_what_was_tried_is_said_and_no_folder_is_left(config, folder):
    (folder / "deep").mkdir()
    done = validate(config, folder, f"output_dir={folder / 'deep' / 'er' / 'out'}", instruct("false"), "data.text=null")
    assert done.stdout.endswith("The config is valid.\n")
    assert "tried: 8 of 10 samples of data.a.train" in done.stdout
    assert "tried: tokenizers.text" in done.stdout
    assert "tried: a batch of digits, a with the masker" in done.stdout
    assert list((folder / "deep").iterdir()) == []


def test_what_cannot_be_reached_is_named_and_the_rest_is_tried(config, folder):
    settings = ["data.text.train={_component_: mine.offline}", "tokenizers.image={_component_: mine.Far}"]
    done = validate(config, folder, *settings, "canvas={text: 12}", "data.digits=null", instruct("false"))
    assert "not tried: data.text.train: cannot be reached (Couldn't reach 'a/hub' on the Hub)" in done.stdout
    assert "not tried: tokenizers.image: cannot be reached" in done.stdout
    assert "tried: a batch of a with the masker" in done.stdout


def test_where_a_trial_trains_on_less_lengths_are_not_judged(config, folder, monkeypatch):
    """Fewer characters make other, longer pieces: a caption that fits must not be refused."""
    monkeypatch.setattr(trial, "CHARACTERS", 300)
    done = validate(config, folder, "canvas.text=7")
    assert "not tried: canvas.text: its tokenizer was trained on the first 300 characters alone" in done.stdout
    assert "tried: a batch of digits, text with the masker" in done.stdout


def test_other_recipes_are_tried_by_the_same_function(untrained, folder):
    def other(recipe, *settings, message=None):
        done = mdm("validate", recipe, *settings, f"output_dir={folder / 'out'}", cwd=folder, check=message is None)
        assert not (folder / "out").exists()
        assert message is None or message in one_line(done)
        return done.stdout

    digits = "{_component_: components.data.digits.digits, split: test}"
    tokenizer = ["tokenizers.text=null", "tokenizers.audio=null"]
    tokenizer += [
        "tokenizers.image={_component_: components.tokenizers.image.GreyPatchTokenizer, size: 8, patch: 2, levels: 3}"
    ]
    assert "8 of 359 samples of source" in other("tokenize_data", f"source={digits}", *tokenizer)
    text = "source={_component_: mine.asked}"
    other("tokenize_data", text, *tokenizer, message="source: none of 8 samples can be tokenized; the first: it has no image")
    assert "8 of 359 samples of validation" in other("train_tokenizer", f"train={digits}", f"validation={digits}")
    other("train_tokenizer", "train={_component_: mine.asked}", f"validation={digits}", message="it has no image")
    checkpoint = f"checkpoint={untrained}"
    data = ["data.speech=null", "data.text=null", f"data.digits.validation={digits}"]
    other("evaluate", checkpoint, "data.digits=null", message="its audio of 24 tokens does not fit canvas.audio = 16")
    assert "8 of 359 samples of data.digits.validation" in other("evaluate", checkpoint, *data, "judged={}", "crossed={}")
    judge = "judged={image: {judge: {_component_: mine.NoJudge, samples: " + digits + "}, test: " + digits
    judge += ", caption: '{}', write: text_to_image, read: image_to_text}}"
    lacks = "judged.image.judge: mine.NoJudge lacks classify, features"
    other("evaluate", checkpoint, *data, judge, "crossed={}", message=lacks)
    asked = ["task=text_to_image", "prompt=a", "sampler={_component_: mine.NoSteps}"]
    other("generate", checkpoint, *asked, message="sampler: mine.NoSteps lacks step")
    tuned = ["data.a={train: {_component_: mine.asked, long: true}, tasks: {instruct: 1}}", "canvas.text=12"]
    tuned += ["batch={logical: 4, micro: 4}"]
    other("finetune", checkpoint, *tuned, message="canvas.text = 12")
    tuned[0] = "data.a={train: {_component_: mine.wordy}, tasks: {instruct: 1}}"
    other("finetune", checkpoint, *tuned, message="does not fit model.max_length = ")


def test_a_training_looks_at_sources_that_it_reads_as_it_draws(config, run, tmp_path):
    """The last caption of a folder is too long: said before the model is built, and not after an epoch."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        Image.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(images / f"{i:02d}.png")
        (images / f"{i:02d}.txt").write_text("x" * (200 if i == 39 else 2))
    source = f"data.digits.train={{_component_: components.data.sources.Folder, path: {images}, kind: image, size: 8}}"
    done = run("run", "pretrain", "--config", config, source, "data.digits.validation=null", check=False)
    assert "does not fit canvas.text = 12" in one_line(done)
    assert "parameters" not in done.stdout


def test_a_source_of_which_no_sample_can_be_used_is_named_and_the_samples_it_leaves_out_are(config, folder):
    (folder / "mine.py").write_text(
        MINE + "class Broken:\n"
        "    def __init__(self, good):\n"
        "        self.good = good\n"
        "    def __len__(self):\n"
        "        return 71\n"
        "    def __getitem__(self, i):\n"
        "        if i in self.good:\n"
        "            return {'text': 'good'}\n"
        "        return {'text': open('/absent')}\n"
    )
    node = "data.text.validation={{_component_: mine.Broken, good: {}}}"
    line = one_line(validate(config, folder, node.format([]), check=False))
    assert "data.text.validation: none of 8 samples can be used; the first: sample 0: FileNotFoundError" in line
    assert "mine.py, line " in line
    done = validate(config, folder, node.format([0, 10, 20, 30, 40, 50, 70]))
    assert "tried: 7 of 71 samples of data.text.validation, 1 more cannot be used (sample 60: " in done.stdout


def test_draw_spreads_over_a_source_names_bad_samples_and_stops_in_time():
    from components.data.bad import BadSample

    class Source:
        drawn = []

        def __len__(self):
            return 701

        def __getitem__(self, i):
            self.drawn.append(i)
            if i == 300:
                raise BadSample("photo.png", "broken")
            return {"text": str(i)}

    kept = trial.draw(Source(), "source")
    assert Source.drawn == [0, 100, 200, 300, 400, 500, 600, 700]
    assert [s["text"] for s in kept] == ["0", "100", "200", "400", "500", "600", "700"]
    assert kept.bad == ["photo.png: broken"]
    assert kept.name_of(3) == "sample 400"
    assert len(trial.draw(Source(), "source", seconds=0.0)) == 1


def test_a_stream_is_tried_by_its_first_samples():
    assert [s["n"] for s in trial.draw(({"n": n} for n in range(100)), "source")] == list(range(8))


SHARDS = "data.text.train={_component_: TokenShards, path: s3://YOUR-BUCKET/tokens}"


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    """A laptop: nothing in its environment, no files, and no machine that would hand out some."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_bucket_without_credentials_is_named_by_a_trial_and_ends_a_training(config, folder, run, no_credentials):
    done = validate(config, folder, SHARDS)
    path = "s3://YOUR-BUCKET/tokens/index.json"
    why = f"cannot be reached ({path} cannot be opened (NoCredentialsError: Unable to locate credentials))"
    assert f"not tried: data.text.train: {why}\n" in done.stdout
    assert "tried: a batch of digits with the masker" in done.stdout
    assert "The config is valid." in done.stdout
    done = run("run", "pretrain", "--config", config, SHARDS, check=False)
    assert f"data.text.train: {path} cannot be opened (NoCredentialsError" in one_line(done)
    assert "parameters" not in done.stdout


def test_without_a_network_a_bucket_that_does_not_answer_is_not_waited_for(config, folder, no_credentials, monkeypatch):
    """Nobody listens there. The client tries five times by itself, which takes seconds; here once."""
    monkeypatch.setattr(reach, "_reached", lambda host: False)
    s3 = fsspec.get_filesystem_class("s3")
    monkeypatch.setattr(s3, "retries", 1)
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    began = time.monotonic()
    done = validate(config, folder, SHARDS)
    assert time.monotonic() - began < 15
    line = next(line for line in done.stdout.splitlines() if line.startswith("not tried: data.text.train: "))
    assert line.startswith("not tried: data.text.train: cannot be reached (s3://YOUR-BUCKET/tokens/index.json does not answer")
    assert "MDM_PATIENCE" not in os.environ


def test_how_long_a_trial_waits_is_what_the_environment_says(monkeypatch):
    """And as long as ever where the hub is reached."""
    for reached, said, waits in ((False, None, 0), (False, "7", 7), (True, None, 600), (True, "7", 7)):
        monkeypatch.setattr(reach, "_reached", lambda host, reached=reached: reached)
        monkeypatch.delenv("MDM_PATIENCE", raising=False)
        if said is not None:
            monkeypatch.setenv("MDM_PATIENCE", said)
        for name in ("HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        with reach.told_at_once():
            assert patience() == waits
        assert os.environ.get("MDM_PATIENCE") == said


def test_the_papers_run_is_valid_without_a_network_and_without_credentials(no_credentials, monkeypatch, tmp_path):
    """Its other tokenizers are named too, where this machine has no copy of them."""
    monkeypatch.setattr(reach, "_reached", lambda host: False)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})

    def absent(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken.load, "read_file", absent)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    done = mdm("validate", "pretrain", "--config", "pretrain_3b")
    named = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("not tried: ")]
    sources = [f"data.{name}.{part}" for name in ("text", "captions", "speech") for part in ("train", "validation")]
    assert {*sources, "tokenizers.text"} <= set(named) <= {*sources, "tokenizers.text", "tokenizers.image", "tokenizers.audio"}
    assert done.stdout.count("cannot be reached (") == len(named)
    assert done.stdout.endswith("The config is valid.\n")
