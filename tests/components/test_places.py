"""Paths of disks and URLs, by an in-memory file system of fsspec."""

import errno
import os
import time

import fsspec
import numpy as np
import pytest
from PIL import Image

from components.copies import copied, fetched
from components.data.bad import Refused, attempt
from components.data.shards import TokenShards, sha256, write_shard
from components.data.sources import Folder, Jsonl
from components.files import Unreachable
from components.places import exists, folders, listing, of_network, patiently, place, publish, read_bytes, remove, sizes, within


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty folder in memory, and an empty cache."""
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("components.places.FIRST_PAUSE", 0.01)
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return "memory://data"


class Flaky:
    """Fails so many times, each with the next error."""

    def __init__(self, *errors):
        self.errors, self.asked = list(errors), 0

    def __call__(self):
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return "there"


def test_what_is_written_is_read_from_disk_and_from_afar(memory, tmp_path):
    for root in (str(tmp_path / "disk"), memory):
        file = place(root) / "a" / "b.txt"
        assert not exists(file)
        publish(file, "one")
        publish(place(root) / "c.txt", b"three")
        publish(place(root) / ".hidden" / "d.txt", "four")
        assert read_bytes(file) == b"one"
        assert [str(within(place(root), f)) for f in listing(root)] == ["a/b.txt", "c.txt"]
        assert sizes(root) == {"c.txt": 5}
        assert sizes(place(root) / "absent") == {}
        local = tmp_path / "made"
        local.write_text("moved")
        publish(place(root) / "c.txt", local)
        assert not local.exists()
        assert read_bytes(f"{root}/c.txt") == b"moved"
        assert not exists(place(root) / "a")  # a folder is no file
        copy = copied(root, but="c")
        assert (copy / "a" / "b.txt").read_text() == "one"
        assert (copy / "c.txt").exists() == (root != memory)
        remove(file)
        remove(file)
        assert not exists(file)
        with pytest.raises(FileNotFoundError):
            read_bytes(file)
        with pytest.raises(FileNotFoundError, match="folder not found"):
            listing(f"{root}/absent")


def test_a_copy_is_made_once_and_again_where_what_lies_there_has_changed(memory):
    publish(f"{memory}/x.bin", b"first")
    one = fetched(f"{memory}/x.bin", "v1")
    assert one.read_bytes() == b"first"
    publish(f"{memory}/x.bin", b"second")
    assert fetched(f"{memory}/x.bin", "v1") == one
    assert fetched(f"{memory}/x.bin", "v2").read_bytes() == b"second"
    assert one.read_bytes() == b"first"


def test_the_cache_forgets_what_was_not_used_for_longest(memory, monkeypatch):
    monkeypatch.setenv("MDM_CACHE_GB", str(2.5 * 1000 / 2**30))
    copies = []
    for k in range(4):
        publish(f"{memory}/{k}", bytes(1000))
        copies.append(fetched(f"{memory}/{k}", "v"))
        time.sleep(0.02)
        if k:
            fetched(f"{memory}/0", "v")  # used again and again
            time.sleep(0.02)
        publish(f"{memory}/0", b"other")
    assert [copy.exists() for copy in copies] == [True, False, False, True]
    assert copies[0].stat().st_size == 1000  # it never went


def test_a_full_cache_keeps_what_is_asked_for_and_what_another_process_is_fetching(memory, monkeypatch, tmp_path):
    monkeypatch.setenv("MDM_CACHE_GB", "0")
    (tmp_path / "cache").mkdir()
    partial, left = (tmp_path / "cache" / name for name in ("partial_a", "partial_b"))
    for file, age in ((partial, 60), (left, 86400)):  # of one that was killed yesterday nobody will make more
        file.write_bytes(bytes(10))
        os.utime(file, (time.time() - age,) * 2)
    lock = tmp_path / "cache" / "a.lock"  # of somebody
    lock.touch()
    publish(f"{memory}/a", b"one")
    assert fetched(f"{memory}/a").read_bytes() == b"one"
    assert partial.exists()
    assert not left.exists()
    assert lock.exists()


def test_what_lies_there_is_asked_for_where_no_version_is_known(memory):
    publish(f"{memory}/a", b"one")
    assert fetched(f"{memory}/a").read_bytes() == b"one"
    publish(f"{memory}/a", b"other")
    assert fetched(f"{memory}/a").read_bytes() == b"other"


def test_a_copy_that_cannot_be_made_leaves_nothing_behind(memory, tmp_path):
    with pytest.raises(FileNotFoundError):
        fetched(f"{memory}/absent", "v")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_nobody_waits_longer_than_the_patience(memory, monkeypatch):
    monkeypatch.setenv("MDM_PATIENCE", "0.1")
    ask = Flaky(*[ConnectionError("gone")] * 8)
    with pytest.raises(Unreachable, match="does not answer"):
        patiently(place(memory), ask, seconds=60)
    assert ask.asked < 7  # the pauses grow: 10, 20, 40, ... thousandths


@pytest.mark.parametrize("said", ["lots", "-1", "inf"])
def test_a_variable_that_is_no_amount_is_named_and_no_samples_fault(memory, monkeypatch, said):
    publish(f"{memory}/x.bin", b"first")
    for variable in ("MDM_CACHE_GB", "MDM_PATIENCE"):
        with monkeypatch.context() as here:
            here.setenv(variable, said)
            with pytest.raises(Refused, match=f"^{variable}={said} in the environment: a number, 0 or more"):
                attempt(lambda v=variable: fetched(f"{memory}/x.bin", v), lambda file: file, "sample 1")


def test_what_does_not_answer_is_asked_again_and_an_answer_is_final(memory, capsys):
    ask = Flaky(ConnectionResetError("gone"), TimeoutError("slow"), RuntimeError("odd"))
    assert patiently(place(memory), ask) == "there"
    assert ask.asked == 4
    (said,) = capsys.readouterr().err.splitlines()  # once
    assert said.endswith("does not answer (ConnectionResetError: gone); it is tried for 600 seconds")
    for final in (FileNotFoundError("no"), OSError(errno.ENOSPC, "full")):
        ask = Flaky(final)
        with pytest.raises(type(final)):
            patiently(place(memory), ask)
        assert ask.asked == 1
    refusal = type("NoCredentialsError", (Exception,), {})
    for refused in (PermissionError("403"), ValueError("no bucket"), refusal("Unable to locate credentials")):
        with pytest.raises(Unreachable, match=f"memory://.* cannot be opened .{type(refused).__name__}: {refused}"):
            patiently(place(memory), Flaky(refused))
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"does not answer, for \d+ seconds .ConnectionError: gone"):
        patiently(place(memory), Flaky(*[ConnectionError("gone")] * 99), seconds=0.3)
    assert time.monotonic() - started < 3
    ask = Flaky(ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        patiently("/a/local/path", ask)


def test_errors_of_connections_are_told_from_others():
    theirs = type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})
    wrapped = ValueError("cannot be read")
    wrapped.__cause__ = theirs("no route")
    assert of_network(wrapped)
    assert of_network(ConnectionResetError())
    raised = ValueError("cannot be read")
    raised.__context__ = ConnectionResetError("gone")  # not said to be the cause
    assert of_network(raised)
    assert not of_network(FileNotFoundError())
    assert not of_network(OSError("disk"))
    assert not of_network(type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})())


def test_urls_that_nothing_opens_are_one_sentence():
    with pytest.raises(ValueError, match=r"^nope://x: nope:// is no file system that is known; s3, gs, hf, https, memory are$"):
        place("nope://x")
    with pytest.raises(ValueError, match=r"^gs://x: gs:// needs a package: pip install gcsfs$"):
        place("gs://x")


def test_folders_lines_and_shards_are_read_from_afar(memory, tmp_path):
    picture = tmp_path / "a.png"
    for k in range(4):
        Image.new("L", (8, 8), 60 * k).save(picture)
        publish(f"{memory}/photos/red_{k}/{k}.png", picture.read_bytes())
        publish(f"{memory}/photos/red_{k}/{k}.txt", f"grey {k}")
    publish(f"{memory}/photos/captions.csv", "file,text\nred_1/1.png,one\n3.png,three\n")
    here = tmp_path / "photos"
    for file in listing(f"{memory}/photos"):
        publish(here / str(within(place(f"{memory}/photos"), file)), read_bytes(file))
    for more in ({}, {"captions": "folder"}, {"captions": "captions.csv"}, {"captions": None}, {"split": "validation"}):
        far, near = (Folder(root, "image", **more) for root in (f"{memory}/photos", str(here)))
        assert [s.get("text") for s in far] == [s.get("text") for s in near]
        assert [np.asarray(s["image"]).mean() for s in far] == [np.asarray(s["image"]).mean() for s in near]
        assert far.name_of(0).startswith("memory://")
    publish(f"{memory}/lines/a.jsonl", '{"text": "one", "image": "../photos/red_2/2.png"}\n{"text": "two"}\nnothing\n')
    lines = Jsonl(f"{memory}/lines")
    assert lines[0]["image"].size == (8, 8)
    assert lines[1]["text"] == "two"
    with pytest.raises(FileNotFoundError, match="no JSONL file at"):
        Jsonl(f"{memory}/absent")


def test_a_shard_from_afar_is_held_against_its_checksum_whenever_it_is_fetched(memory, monkeypatch, tmp_path):
    import json

    import torch

    from components.data.bad import Refused

    folder = place(f"{memory}/tokens")
    codes = [{"text": torch.tensor([1, 2])}, {"text": torch.tensor([3])}]
    digest, size = write_shard(folder / "s.safetensors", codes, ["text"])
    shard = {"file": "s.safetensors", "count": 2, "bytes": size, "sha256": digest}
    publish(folder / "index.json", json.dumps({"codebooks": {"text": [9]}, "shards": [shard]}))
    assert [s["text"].tolist() for s in TokenShards(str(folder))] == [[1, 2], [3]]
    whole = read_bytes(folder / "s.safetensors")
    content = bytearray(whole)
    content[-1] ^= 1
    publish(folder / "s.safetensors", bytes(content))
    assert TokenShards(str(folder))[1]["text"].tolist() == [3]  # the copy is what it was
    monkeypatch.setenv("MDM_CACHE", str(fetched(folder / "s.safetensors").parent / "other"))
    with pytest.raises(Refused, match=r"token shard memory://.*s\.safetensors has another checksum than index\.json says"):
        TokenShards(str(folder))[1]
    publish(folder / "s.safetensors", bytes(content[:-1]))
    with pytest.raises(Refused, match=r"has \d+ bytes, and index\.json says"):  # the wrong copy was not kept
        TokenShards(str(folder))[1]
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "third"))
    publish(folder / "s.safetensors", whole)
    taken = []

    def evicted(file):
        """Another process takes the copy out of the cache, between two looks at it."""
        found = sha256(file)
        if not taken:
            taken.append(file.unlink())
        return found

    monkeypatch.setattr("components.data.shards.sha256", evicted)
    assert TokenShards(str(folder))[1]["text"].tolist() == [3]
    assert taken
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "fourth"))
    remove(folder / "s.safetensors")
    with pytest.raises(Refused, match="token shard not found: memory://"):
        TokenShards(str(folder))[1]


def test_folders_are_those_of_a_folder_itself(tmp_path):
    """Not what lies in them, however much that is: a bucket holds more than a run's checkpoints."""
    for root in (tmp_path / "run", place(f"memory://{tmp_path.name}/folders/run")):
        assert folders(root) == []
        for name in ("b/state.json", "a/deep/file", "file"):
            publish(root / name, b"x")
        assert [path.name for path in folders(root)] == ["a", "b"]
        assert folders(root)[0] == root / "a"


def test_a_folder_that_goes_while_it_is_looked_at_holds_nothing(tmp_path, monkeypatch):
    """As a checkpoint's does, when another process removes it: it was there a moment ago."""
    gone = tmp_path / "gone"
    monkeypatch.setattr("pathlib.Path.is_dir", lambda self: True)
    assert sizes(gone) == {}
    assert folders(gone) == []
    (tmp_path / "file").write_text("a file")
    assert sizes(tmp_path / "file") == {}
    assert folders(tmp_path / "file") == []
