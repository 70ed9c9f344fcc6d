"""Token shards: written here or by Ray to the same bytes, gone on with after a kill, and trained on as the raw data are."""

import errno
import hashlib
import json
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from components.data.bad import Refused
from components.data.shards import TokenShards
from components.data.sources import Folder
from components.tokenizers.image import GreyPatchTokenizer
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.recipe import load_recipe
from mdm.training.history import read_history
from tests.processes import begun

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
    saved = "{{_component_: mdm.data.processor.saved_tokenizer, path: {}, modality: {}}}"
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


def test_packed_shards_train_the_same_whatever_data_workers_says(run, config, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(f"word {i * k}" for k in range(i + 3)))
    out = tmp_path / "tokens"
    source = f"source={{_component_: Folder, path: {tmp_path / 'texts'}, kind: text}}"
    run("run", "tokenize_data", source, f"tokenizers={{text: {TEXT}, image: {IMAGES}}}", f"output_dir={out}", "shard_size=4")
    common = [f"tokenizers.text={{_component_: mdm.data.processor.saved_tokenizer, path: {out}, modality: text}}", "lanes=2"]
    common += [f"data.text.train={{_component_: TokenShards, path: {out}, open_shards: 1}}", "data.digits=null", "tokens=2000"]
    losses = []
    for workers in (0, 1):
        folder = tmp_path / f"by_{workers}"
        settings_ = [f"data_workers={workers}", "data.text.best_fit=4", f"output_dir={folder}"]
        run("run", "pretrain", "--config", config, *common, *settings_)
        losses.append([line["loss"] for line in read_history(folder / "history.jsonl") if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) > 3


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

    def slowly():
        encode = GreyPatchTokenizer.encode
        GreyPatchTokenizer.encode = lambda self, raw: (time.sleep(0.1), encode(self, raw))[1]
        run(*settings(photos, parts))

    process = begun(slowly)
    deadline = time.time() + 120
    while len(list(parts.glob("shard_*.json"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
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
    assert f"sample 5: {photos / '05.png'}: image tokenizer: expected 8x8 pixels, got 8x9" in done.stdout
    assert json.loads((tmp_path / "out" / "index.json").read_text())["corrupt"][0][0] == 5
    assert len(TokenShards(str(tmp_path / "out"))) == 24


class FakeRay:
    """Ray as far as it is used here, in this process; `dies` says whether a worker dies at a shard's number."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                super().__init__("a traceback")
                self.cause = cause

    def __init__(self, dies):
        self.dies, self.started, self.alive = dies, [], 0

    def init(self, **settings):
        pass

    def shutdown(self):
        pass

    def remote(self, num_cpus, max_retries):
        assert max_retries == 0
        return lambda function: type("Task", (), {"remote": staticmethod(lambda *args: self.start(function, args))})

    def start(self, function, args):
        self.started.append(args[-1])
        return (len(self.started), function, args)

    def wait(self, waiting, num_returns):
        self.alive = max(self.alive, len(waiting))
        return waiting[:1], waiting[1:]

    def get(self, task):
        _, function, args = task
        if self.dies(args[-1]):
            raise self.exceptions.RayError("The worker died unexpectedly\nof a signal")
        try:
            return function(*args)
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from error


def test_a_worker_that_dies_is_tried_three_times_and_the_next_start_writes_what_is_missing(photos, run, tmp_path, monkeypatch):
    from mdm.data import tokenizing

    whole, out = tmp_path / "whole", tmp_path / "out"
    run(*settings(photos, whole))
    deadly = FakeRay(lambda number: number == 2)
    monkeypatch.setitem(sys.modules, "ray", deadly)
    done = run(*settings(photos, out, "ray_workers=2"), check=False)
    assert done.returncode == 2
    assert "shard_00002.safetensors: its worker died 3 times (RayError: The worker died unexpectedly)" in done.stderr
    assert "one of its samples, 8 to 11, ends the process" in done.stderr
    assert deadly.started.count(2) == 3
    assert deadly.alive == 2
    kept = {p: p.stat().st_mtime_ns for p in out.glob("shard_*.safetensors")}
    assert len(kept) >= 2
    (photos / "09.png").unlink()  # the bad one: all that follow have another index now
    tokenizing._writer.cache_clear()  # of the dead processes
    healed = FakeRay(lambda number: False)
    monkeypatch.setitem(sys.modules, "ray", healed)
    said = run(*settings(photos, out, "ray_workers=2")).stdout
    assert "24 samples in 7 shards, 1 corrupt" in said
    assert f"sample 9: {photos / '09.png'}: it is gone from the source" in said
    assert sorted(healed.started) == [n for n in range(7) if out / f"shard_{n:05d}.safetensors" not in kept]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    there, before = digests(out), digests(whole)
    assert {n for n in before if before[n] != there[n]} == {"shard_00002.safetensors"}


def test_a_worker_that_raises_ends_the_work_with_the_shards_name(photos, run, tmp_path, monkeypatch):
    from mdm.data import tokenizing

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "ray", FakeRay(lambda number: False))
    monkeypatch.setattr(tokenizing, "write", full)
    done = run(*settings(photos, tmp_path / "out", "ray_workers=1"), check=False)
    assert "shard_00000.safetensors cannot be written: OSError: [Errno 28] No space left on device" in done.stderr


def test_a_source_that_has_changed_never_shifts_finished_shards(photos, run, tmp_path):
    lines = tmp_path / "lines"
    lines.mkdir()
    out = tmp_path / "out"
    run(*settings(photos, out))
    (out / "shard_00003.json").unlink()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(photos / "00b.png")
    (photos / "00b.txt").write_text("new")
    done = run(*settings(photos, out), check=False)
    assert f"was begun without 1 of the source's samples, e.g. {photos / '00b.png'}" in done.stderr

    from mdm.data.tokenizing import Planned

    Planned(lines, ["a", "b", "c"])
    assert Planned(lines, ["a", "b", "d"]).read(2) == "d"
    with pytest.raises(UserError, match=r"begun with 3 samples, and the source has 2: .* leave a bad sample in its place"):
        Planned(lines, ["a", "c"])


def test_a_refused_sample_ends_the_work_in_one_line(photos, run, tmp_path):
    rows = photos / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"image": "00.png"}\n{"text": "two", "image": "absent.png"}\n')
    inner = f"{{_component_: components.data.sources.Jsonl, path: {rows}}}"
    source = f"source={{_component_: components.data.sources.adapted, source: {inner}, on_corrupt: refuse}}"
    done = run(*settings(photos, tmp_path / "out", source), check=False)
    assert done.returncode == 2
    assert f"{rows}, line 3: absent.png: file not found (on_corrupt: skip leaves such samples out)" in done.stderr
    assert "Traceback" not in done.stderr


class Panic(BaseException):
    """As a Rust library raises it: no Exception."""


@pytest.mark.parametrize("where", ["reading", "encoding"])
def test_a_panic_is_a_sample_left_out_and_an_interrupt_is_not(where, photos, tmp_path, monkeypatch):
    from mdm.data.tokenizing import ShardWriter

    processor = Processor.build({"image": GreyPatchTokenizer(8, 2, 3)}, {})
    processor.save(tmp_path)
    writer = ShardWriter(
        str(tmp_path), {"_component_": "components.data.sources.Folder", "path": str(photos), "kind": "image"}, 4
    )
    owner, name = (Folder, "__getitem__") if where == "reading" else (GreyPatchTokenizer, "encode")
    plain, calls = getattr(owner, name), []

    def panics(error):
        def call(self, what):
            calls.append(what)
            if len(calls) % 4 == 2:
                raise error
            return plain(self, what)

        return call

    monkeypatch.setattr(owner, name, panics(Panic("stack overflow")))
    assert writer(0)["corrupt"] == [[1, f"{photos / '01.png'}: Panic: stack overflow"]]
    assert writer(0)["count"] == 3
    monkeypatch.setattr(owner, name, panics(OSError(errno.EIO, "Input/output error")))  # the disk, and not the sample
    with pytest.raises(Refused, match=r"01\.png: OSError: .*Input/output error"):
        writer(0)
    calls.clear()
    monkeypatch.setattr(owner, name, panics(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        writer(0)


def test_a_record_of_half_a_shard_is_none(photos, run, tmp_path):
    from mdm.data.tokenizing import records

    run(*settings(photos, tmp_path / "out"))
    shard = tmp_path / "out" / "shard_00002.safetensors"
    assert records(tmp_path / "out", [2])[2]["count"] == 4
    shard.write_bytes(shard.read_bytes()[:-1])
    assert records(tmp_path / "out", [2]) == {}


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
        TokenShards(str(out))[8]
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"shard_00002\.safetensors has \d+ bytes, and index\.json says"):
        TokenShards(str(out), check=False)[8]
    shard.unlink()
    with pytest.raises(Refused, match=r"token shard not found: .*shard_00002"):
        TokenShards(str(out))[8]
    assert len(TokenShards(str(out))[:8]) == 8  # nobody opened it
    with pytest.raises(
        FileNotFoundError, match=r"holds no index\.json: no such folder, or `mdm run tokenize_data` has not finished"
    ):
        TokenShards(str(tmp_path))
    done = run(*settings(photos, out), "tokenizers.image.levels=4", check=False)
    assert "holds shards of other settings" in done.stderr


def test_shards_of_other_tokenizers_than_the_runs_are_refused(photos, run, config, tmp_path):
    run(*settings(photos, tmp_path / "tokens"))
    node = f"{{_component_: components.data.shards.TokenShards, path: {tmp_path / 'tokens'}}}"
    done = run("run", "pretrain", "--config", config, f"data.digits.train={node}", check=False)
    assert done.returncode == 2
    assert "data.digits: the token shards' text has codebooks of (290,), tokenizers.text of (300,)" in done.stderr


def test_what_no_tokenizer_is_named_for_is_said_before_it_is_left_out(photos, run, tmp_path):
    out = f"output_dir={tmp_path / 'tokens'}"
    only = f"source={{_component_: Folder, path: {photos}, kind: image, captions: null}}"
    done = run("run", "tokenize_data", only, out, check=False)
    assert done.returncode == 2
    assert "mdm: tokenizers: text, audio; the source's samples hold image, and nothing of them would be kept" in done.stderr
    said = run("run", "tokenize_data", only.replace(", captions: null", ""), out.replace("tokens", "other")).stdout
    assert "tokenizers.image is not named: the shards will be without the image of the source" in said
    assert "will be without" not in run(*settings(photos, tmp_path / "all")).stdout


def test_mistakes_are_one_sentence(tmp_path):
    recipe = load_recipe("tokenize_data")
    source = {"_component_": "components.data.digits.digits", "split": "test"}
    cfg = recipe.Settings(output_dir=str(tmp_path), source=source, tokenizers={})
    with pytest.raises(UserError, match="tokenizers: name at least one"):
        recipe.validate(cfg)
