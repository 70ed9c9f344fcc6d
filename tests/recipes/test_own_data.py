"""The guide "your own data", done as it stands: a newcomer's files, the page's own commands, samples at the end.

A hundredth of the steps by default; `MDM_OWN_DATA=1 pytest -n 0 tests/recipes/test_own_data.py` takes all of them, compiled,
and then looks at what is drawn.
"""

import json
import os
import re
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from components.tokenizers.fsq import FSQAutoencoder, FSQConfig
from mdm.config import recipe_root
from tests.recipes.conftest import ROOT
from tests.recipes.newcomer import bring

PAGE = (ROOT / "docs/guides/your-own-data.md").read_text()
SHARE = float(os.environ.get("MDM_OWN_DATA", 0.01))
STEPS = {"train_tokenizer": 600, "pretrain": 1_500_000}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def commands(block):
    joined = block.replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in joined.splitlines() if line.startswith("mdm ")]


def shortened(words):
    """A command of the page, with fewer steps where not all are asked for."""
    if SHARE >= 1 or words[0] != "run":
        return words
    key = "steps" if words[1] == "train_tokenizer" else "tokens"
    return [*words, f"{key}={int(STEPS[words[1]] * SHARE)}", *(["compile=false"] if key == "tokens" else [])]


def test_the_page_shows_the_data_of_the_config():
    config = (recipe_root() / "configs/pretrain_folder.yaml").read_text()
    assert re.search(r"^data:\n.*?\n(?=\n)", config, re.M | re.S)[0] == blocks("yaml")[0]


def test_a_newcomer_gets_from_files_to_samples_by_the_pages_own_commands(run, tmp_path):
    bring(tmp_path / "data")
    first, second, *_ = blocks("bash")
    said = [run(*shortened(words), cwd=tmp_path, timeout=600).stdout for words in commands(first)]
    assert "seen: data.speech.train: text " in said[2]
    assert (tmp_path / "look/samples.png").is_file()
    assert (tmp_path / "look/0014_given.wav").is_file()
    made = tmp_path / "runs/generate"
    with Image.open(made / "0000.png") as image:
        assert (image.size, image.mode) == ((48, 48), "RGB")
        middle = np.asarray(image)[20:28, 20:28].mean(axis=(0, 1))
    if SHARE >= 0.5:
        assert middle[0] > 1.5 * middle[1:].max()  # red
    *spoken_and_read, again, longer = commands(second)
    for words in spoken_and_read:
        run(*shortened(words), cwd=tmp_path)
    lines = [json.loads(line) for line in (made / "outputs.jsonl").read_text().splitlines()]
    assert [sorted(set(line) - {"given_text", "given_image"}) for line in lines[::4]] == [["image"], ["audio"], ["text"]]
    assert "Resuming from" in run(*shortened(again), cwd=tmp_path).stdout
    history = [json.loads(line) for line in (tmp_path / "runs/mine/history.jsonl").read_text().splitlines()]
    assert {"bits/text_to_image", "bits/text_to_speech", "bits/text"} <= {key for line in history for key in line}
    assert longer[:4] == ["run", "pretrain", "--config", "my.yaml"]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """All that the page says files may look like, and an image tokenizer that has learned nothing."""
    folder = tmp_path_factory.mktemp("layouts")
    bring(folder / "data")
    data, images = folder / "data", sorted((folder / "data/images").glob("*.png"))
    captions = [image.with_suffix(".txt").read_text(encoding="utf-8-sig").strip() for image in images]
    for name in ("photos", "LJSpeech/wavs", "pictures/img", "shards", *(f"hub/train/{c}" for c in ("wild_rose", "lily"))):
        (data / name).mkdir(parents=True)
    shutil.copytree(data / "hub/train", data / "flowers")
    for i, image in enumerate(images):
        for place in (
            f"photos/{i}.png",
            f"pictures/img/{i}.png",
            *(f"{d}/{('wild_rose', 'lily')[i % 2]}/{i}.png" for d in ("flowers", "hub/train")),
        ):
            shutil.copy(image, data / place)
    (data / "photos/captions.csv").write_text("file_name,text\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(captions)))
    rows = [{"file_name": f"img/{i}.png", "caption": c} for i, c in enumerate(captions)]
    (data / "pictures/all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clips = sorted((data / "clips").glob("*.wav"))
    for clip in clips:
        shutil.copy(clip, data / "LJSpeech/wavs")
    said = "".join(f"{clip.stem}|{clip.with_suffix('.txt').read_text()}|\n" for clip in clips)
    (data / "LJSpeech/metadata.csv").write_text(said)
    with tarfile.open(data / "shards/0.tar", "w") as tar:
        for i, image in enumerate(images):
            small = folder / f"{i}.jpg"
            with Image.open(image) as opened:
                opened.save(small)
            tar.add(small, f"{i:04d}.jpg")
            tar.add(image.with_suffix(".txt"), f"{i:04d}.txt")
    torch.manual_seed(0)
    config = FSQConfig(kind="image", patch=8, size=48, channels=3, width=8, levels=(8, 5, 5, 5))
    FSQAutoencoder(config).save(folder / "runs/my_tokenizer/tokenizer")
    shutil.copy(recipe_root() / "configs/pretrain_folder.yaml", folder / "my.yaml")
    return folder


@pytest.mark.parametrize("block", blocks("yaml")[1:], ids=lambda text: re.search(r"path: ([\w/.]+)", text)[1])
def test_every_layout_of_the_page_is_taken(run, layouts, block, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(layouts / "cache"))
    (layouts / "other.yaml").write_text(f"base: my.yaml\n{block}")
    unused = ["data.text=null"] + (["data.speech=null"] if "speech" not in block else [])
    done = run("validate", "pretrain", "--config", "other.yaml", *unused, cwd=layouts)
    assert "tried: 8" in done.stdout
    assert re.search(r"seen: data\.images\.train: text \S.* tokens .*image 36 tokens", done.stdout)
    assert "cannot be used" not in done.stdout + done.stderr


def test_the_command_for_sounds_is_right(run, layouts):
    *_, block = blocks("bash")
    ((_, *words),) = commands(block)
    assert "The config is valid." in run("validate", *words, cwd=layouts).stdout
