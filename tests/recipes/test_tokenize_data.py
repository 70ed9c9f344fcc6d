"""Token shards: written here or by Ray to the same bytes, gone on with after a kill, and trained on as the raw data are."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from components.data.shards import TokenShards
from components.data.sources import Folder
from mdm.cli import load_recipe
from mdm.config import UserError
from mdm.processor import Processor
from mdm.run import read_history
from tests.recipes.conftest import ROOT

IMAGES = "{_component_: components.tokenizers.image.GreyPatchTokenizer, size: 8, patch: 2, levels: 3}"
TEXT = "{_component_: components.tokenizers.text.TextTokenizer.train, vocab_size: 300}"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(25):
        grey = np.random.default_rng(i).integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"grey number {i}")
    return folder


def settings(photos, out, *further):
    source = f"source={{_component_: components.data.sources.Folder, path: {photos}, kind: image}}"
    common = [source, f"tokenizers={{text: {TEXT}, image: {IMAGES}}}", f"output_dir={out}", "shard_size=4"]
    return ["run", "tokenize_data", *common, *further]


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("shard_*.safetensors"))}


def test_shards_hold_what_the_tokenizers_say_and_train_as_the_raw_data_do(photos, run, config, tmp_path):
    out = tmp_path / "tokens"
    assert "25 samples in 7 shards, 0 corrupt" in run(*settings(photos, out)).stdout
    shards, processor, raw = TokenShards(str(out)), Processor.load(out), Folder(str(photos), "image")
    assert len(shards) == len(raw) == 25
    for i in (0, 3, 4, 24):
        for modality in ("text", "image"):
            assert torch.equal(shards[i][modality], processor.tokenizers[modality].encode(raw[i][modality]))
    saved = "{{_component_: mdm.processor.saved_tokenizer, path: {}, modality: {}}}"
    common = [f"tokenizers.{m}={saved.format(out, m)}" for m in ("text", "image")]
    common += ["canvas.text=16", "data.text=null", "tokens=2000"]
    sources = {
        "raw": f"{{_component_: components.data.sources.Folder, path: {photos}, kind: image}}",
        "shards": f"{{_component_: components.data.shards.TokenShards, path: {out}}}",
    }
    losses = {}
    for name, node in sources.items():
        settings_ = [f"data.digits.train={node}", "data.digits.validation=null", f"output_dir={tmp_path / name}"]
        run("run", "pretrain", "--config", config, *common, *settings_)
        losses[name] = [line["loss"] for line in read_history(tmp_path / name / "history.jsonl") if "loss" in line]
    assert losses["raw"] == losses["shards"]
    assert len(losses["raw"]) > 3


def test_one_and_two_ray_workers_write_the_same_bytes(photos, run, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("MDM_TYPECHECK", "0")  # of the workers, which import everything anew
    shutdown = ray.shutdown
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # one cluster for both: its workers have imported it all
    run(*settings(photos, tmp_path / "here"))
    for workers in (1, 2):
        run(*settings(photos, tmp_path / str(workers), f"ray_workers={workers}"))
        assert digests(tmp_path / str(workers)) == digests(tmp_path / "here")
        assert (tmp_path / str(workers) / "index.json").read_text() == (tmp_path / "here" / "index.json").read_text()
    shutdown()


def test_killed_and_begun_again_nothing_is_missing_or_twice(photos, run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*settings(photos, whole))
    slow = "import time; from components.tokenizers.image import GreyPatchTokenizer as G; e = G.encode\n"
    slow += "G.encode = lambda self, raw: (time.sleep(0.2), e(self, raw))[1]\nfrom mdm.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", slow, *map(str, settings(photos, parts))]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(list(parts.glob("shard_*.json"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(parts.glob("shard_*.json")))
    assert 2 <= finished < 7
    assert not (parts / "index.json").exists()
    (parts / "shard_00006.partial").write_bytes(b"half")
    kept = {p: p.stat().st_mtime_ns for p in parts.glob("shard_*.safetensors") if p.with_suffix(".json").exists()}
    run(*settings(photos, parts))
    assert digests(parts) == digests(whole)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert (parts / "index.json").read_text() == (whole / "index.json").read_text()


def test_a_corrupt_sample_is_counted_and_named_and_the_rest_goes_on(photos, run, tmp_path):
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save(photos / "05.png")  # it can be read, but is not of the size
    done = run(*settings(photos, tmp_path / "out"))
    assert "24 samples in 7 shards, 1 corrupt" in done.stdout
    assert "sample 5: ValueError: image tokenizer: expected 8x8 pixels, got 8x9" in done.stdout
    assert json.loads((tmp_path / "out" / "index.json").read_text())["corrupt"][0][0] == 5
    assert len(TokenShards(str(tmp_path / "out"))) == 24


def test_a_streamed_dataset_is_tokenized_too(run, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"body": [f"line {i}" for i in range(10)]}).save_to_disk(str(tmp_path / "set"))
    source = f"{{_component_: components.data.sources.hugging_face, path: {tmp_path / 'set'}, text: body, streaming: true}}"
    common = ["run", "tokenize_data", f"source={source}", f"tokenizers={{text: {TEXT}}}", "shard_size=4"]
    common.append(f"output_dir={tmp_path / 'out'}")
    assert "10 samples in 3 shards" in run(*common).stdout
    shards, processor = TokenShards(str(tmp_path / "out")), Processor.load(tmp_path / "out")
    assert [processor.tokenizers["text"].decode(s["text"]) for s in shards] == [f"line {i}" for i in range(10)]
    done = run(*common, "ray_workers=2", check=False)
    assert "ray_workers: a streamed source is read by one process" in done.stderr


def test_damaged_shards_are_named(photos, run, tmp_path):
    out = tmp_path / "tokens"
    run(*settings(photos, out))
    shard = out / "shard_00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"shard_00002\.safetensors has another checksum than index\.json says"):
        TokenShards(str(out))
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"shard_00002\.safetensors has \d+ bytes, and index\.json says"):
        TokenShards(str(out), check=False)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"token shard not found: .*shard_00002"):
        TokenShards(str(out))
    with pytest.raises(FileNotFoundError, match=r"holds no index\.json: `mdm run tokenize_data` has not finished there"):
        TokenShards(str(tmp_path))
    done = run(*settings(photos, out), "tokenizers.image.levels=4", check=False)
    assert "holds shards of other settings" in done.stderr


def test_shards_of_other_tokenizers_than_the_runs_are_refused(photos, run, config, tmp_path):
    run(*settings(photos, tmp_path / "tokens"))
    node = f"{{_component_: components.data.shards.TokenShards, path: {tmp_path / 'tokens'}}}"
    done = run("run", "pretrain", "--config", config, f"data.digits.train={node}", check=False)
    assert done.returncode == 2
    assert "data.digits: the token shards' text has codebooks of (290,), tokenizers.text of (300,)" in done.stderr


def test_mistakes_are_one_sentence(tmp_path):
    recipe = load_recipe("tokenize_data")
    source = {"_component_": "components.data.digits.digits", "split": "test"}
    cfg = recipe.Settings(output_dir=str(tmp_path), source=source, tokenizers={})
    with pytest.raises(UserError, match="tokenizers: name at least one"):
        recipe.validate(cfg)
