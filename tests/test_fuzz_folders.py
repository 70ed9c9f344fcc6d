"""Whatever has happened to a model folder, it is refused in one line or loaded right: never a mixture, never a traceback.

Files are taken out, cut, exchanged and added, values of their JSON changed; of our folders, plain and quantized, and of open
models', with shards and without. A few seconds and always the same examples; `MDM_FUZZ=100` tries a hundred times as many.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdm.config import UserError
from mdm.models.folder import load_model
from mdm.models.open_formats import FORMATS
from tests.mdm.models.test_open_models import CONFIGS, write
from tests.mdm.models.test_weights import ours, sharded

TIMES = int(os.environ.get("MDM_FUZZ", "1"))
TOKENS = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(0))
KINDS = ("ours", "quantized", *CONFIGS, *(f"{kind} in shards" for kind in CONFIGS))


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def make(kind, folder):
    """A folder of that kind."""
    if kind == "ours":
        ours(folder, num_experts=2)
    elif kind == "quantized":
        from tests.recipes.conftest import in_process

        ours(folder / "whole" / "model")
        to = f"output_dir={folder / 'packed'}"
        in_process("quantize", "recipes/configs/quantize.yaml", f"checkpoint={folder / 'whole'}", to, "dtype=fp32")
        return folder / "packed" / "model"
    else:
        state = write(folder, CONFIGS[kind.split()[0]])
        if kind.endswith("shards"):
            sharded(folder, state, 3)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole folder of each kind."""
    return {kind: Folder(make(kind, tmp_path_factory.mktemp("folder") / "it")) for kind in KINDS}


@torch.no_grad()
def logits(model):
    return model(TOKENS)


PLAIN = st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=6) | st.just(10**40) | st.just([])
VALUES = st.recursive(
    PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5
)
KEYS = ["sliding_window", "rope_scaling", "quantization_config", "head_dim", "logits_scaling", "layer_types", "causal"]
NAMES = st.sampled_from(KEYS)


class Files(dict):
    """name -> content of a folder's files; short where a failure is shown."""

    def __repr__(self):
        return ", ".join(f"{k}: {v[:400] if k.endswith('.json') else len(v)}" for k, v in self.items())


class Folder:
    """A whole folder of a kind: its files, and what is loaded from it."""

    def __init__(self, folder):
        self.files = Files(content(folder))
        self.model, self.processor = load_model(folder)
        self.logits = logits(self.model)


def changed(draw, value):
    """A JSON value with one thing in it another, gone or new."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        how = draw(st.sampled_from(["change", "change", "remove", "add"]))
        if how == "remove":
            return {k: v for k, v in value.items() if k != key}
        new = draw(NAMES | st.text(max_size=5)) if how == "add" else key
        return {**value, new: draw(VALUES) if how == "add" else changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(value) - 1))
        return [changed(draw, v) if i == place else v for i, v in enumerate(value)]
    return draw(VALUES)


@st.composite
def damage(draw, files, other):
    """The files of a folder after something has happened to one of them; `other` is a folder of another model."""
    files = Files(files)
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(["remove", "cut", "json", "json", "json", "bytes", "extra", "exchange"]))
    if how == "remove":
        del files[name]
    elif how == "cut":
        files[name] = files[name][: draw(st.integers(0, len(files[name]) - 1))]
    elif how == "json" and name.endswith(".json"):
        files[name] = json.dumps(changed(draw, json.loads(files[name]))).encode()
    elif how == "bytes" and not name.endswith(".safetensors"):
        place = draw(st.integers(0, len(files[name])))
        files[name] = files[name][:place] + draw(st.binary(min_size=1, max_size=4)) + files[name][place:]
    elif how == "extra":
        new = draw(st.sampled_from([*other, "model-00009-of-00009.safetensors", "notes.txt", "quantization.json"]))
        if new not in files:
            files[new] = other.get(new) or files[name]
    elif how == "exchange":
        another = draw(st.sampled_from(sorted(files)))
        files[name], files[another] = files[another], files[name]
    return files


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=40 * TIMES, deadline=None, derandomize=TIMES == 1, database=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
def test_a_damaged_folder_is_refused_in_one_line_or_loaded_right(folders, kind, data):
    whole, other = folders[kind], folders[KINDS[(KINDS.index(kind) + 1) % len(KINDS)]]
    now = data.draw(damage(whole.files, other.files))
    with tempfile.TemporaryDirectory() as folder:
        for name, raw in now.items():
            (Path(folder) / name).write_bytes(raw)
        try:
            model, processor = load_model(folder)
        except UserError as error:
            said = str(error)
            model = None
    if model is None:
        assert said.strip()
        assert "\n" not in said
        return
    if kind in ("ours", "quantized"):
        assert model.config == whole.model.config
        assert processor.vocabulary == whole.processor.vocabulary
        assert torch.equal(processor.encode("text", "a seven"), whole.processor.encode("text", "a seven"))
    elif now["config.json"] != whole.files["config.json"]:  # what it says is what is loaded
        form, raw = FORMATS[kind.split()[0]], json.loads(now["config.json"].decode("utf-8-sig"))
        for key, theirs in form.keys.items():
            says = raw.get(theirs)
            says = raw.get(form.instead.get(theirs)) if says is None else says
            says = (raw.get("rope_parameters") or raw.get("rope_scaling") or {}).get("rope_theta") if says is None else says
            says = form.absent.get(theirs) if says is None else says
            assert getattr(model.config, key) == says, key
    if model.config == whole.model.config:
        assert torch.equal(logits(model), whole.logits)
