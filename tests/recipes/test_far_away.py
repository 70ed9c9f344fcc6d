"""Data in a bucket of a real S3 server (moto, on the loopback): written there, checked, trained from while it breaks."""

import io
import json
import socket
import tarfile
import threading
import time

import boto3
import fsspec
import pytest
import safetensors.torch
import torch
from moto.server import ThreadedMotoServer
from PIL import Image

from components.places import place, publish, read_bytes

SHARDS = 14


class Proxy:
    """Passes bytes on to a server; `cut` closes every connection and accepts none, for so many seconds.

    after: shards that are asked for through it before it is cut, once, by itself
    """

    def __init__(self, port, after=None, seconds=3.0):
        self.port, self.after, self.seconds = port, after, seconds
        self.asked, self.open, self.cuts, self.refused = 0, set(), 0, 0
        self.until = 0.0
        self.lock = threading.Lock()
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def _accept(self):
        while True:
            client, _ = self.server.accept()
            if time.monotonic() < self.until:
                self.refused += 1
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.port))
            with self.lock:
                self.open |= {client, server}
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source, target, counts):
        try:
            while data := source.recv(65536):
                if counts:
                    self._count(data)
                target.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, target):
                end.close()

    def _count(self, data):
        with self.lock:
            self.asked += data.count(b"GET /data/tokens/shard_") * (b".safetensors" in data)
            if self.after is None or self.cuts or self.asked < self.after:
                return
            self.cuts += 1
            self.until = time.monotonic() + self.seconds
            for end in self.open:
                end.close()
            self.open.clear()


@pytest.fixture(scope="module")
def server():
    running = ThreadedMotoServer("127.0.0.1", port=0)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """An empty bucket, as a user's environment names it."""
    use(monkeypatch, f"http://127.0.0.1:{server}")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # of the client by itself, many seconds long: how often is ours to say
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    s3 = boto3.resource("s3", endpoint_url=f"http://127.0.0.1:{server}")
    own = s3.create_bucket(Bucket="data")
    own.objects.all().delete()
    yield "s3://data"
    fsspec.filesystem("s3").clear_instance_cache()


def use(monkeypatch, url):
    """Another way to the server, for what is opened from now on."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


TOKENIZE = [
    "run", "tokenize_data", "source={_component_: components.data.digits.digits, split: test}", "shard_size=26",
    "tokenizers={text: {_component_: TextTokenizer.train, vocab_size: 300}, "
    "image: {_component_: components.tokenizers.image.GreyPatchTokenizer, size: 8, patch: 2, levels: 3}}",
]  # fmt: skip


def trained(run, config, tokens, out, *more, **options):
    """A run on the shards: two of a lane's four are open at a time."""
    saved = [f"tokenizers.{m}={{_component_: saved_tokenizer, path: {tokens}, modality: {m}}}" for m in ("text", "image")]
    node = f"data.digits.train={{_component_: TokenShards, path: {tokens}, open_shards: 1}}"
    small = ["tokens=9000", "lanes=3", "data.digits.validation=null", "checkpoint_every_tokens=100000"]
    return run("run", "pretrain", "--config", config, f"output_dir={out}", node, *saved, *small, *more, **options)


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def test_tokenized_to_a_bucket_and_trained_from_it_through_a_connection_that_breaks(
    bucket, server, run, config, tmp_path, monkeypatch
):
    tokens = f"{bucket}/tokens"
    done = run(*TOKENIZE, f"output_dir={tokens}")
    assert f"359 samples in {SHARDS} shards, 0 corrupt ones left out" in done.stdout
    again = run(*TOKENIZE, f"output_dir={tokens}")  # finds all of them
    assert f"359 samples in {SHARDS} shards" in again.stdout
    run(*TOKENIZE, f"output_dir={tmp_path / 'tokens'}")
    for name in ("shard_00003.safetensors", "processor.json"):
        assert read_bytes(f"{tokens}/{name}") == (tmp_path / "tokens" / name).read_bytes()
    assert "All are whole." in run("run", "check_shards", f"path={tokens}").stdout

    trained(run, config, tmp_path / "tokens", tmp_path / "near")
    proxy = Proxy(server, after=6)
    use(monkeypatch, proxy.url)
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "another"))
    trained(run, config, tokens, tmp_path / "far")
    assert proxy.cuts == 1
    assert proxy.refused > 0
    assert proxy.asked > 6
    near, far = weights(tmp_path / "near"), weights(tmp_path / "far")
    assert all(torch.equal(near[name], far[name]) for name in near)


def test_a_webdataset_in_a_bucket_is_streamed_by_its_shards(bucket, run, config, tmp_path):
    for k in range(4):
        with io.BytesIO() as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for i in range(6):
                    image = io.BytesIO()
                    Image.new("L", (8, 8), 40 * k + i).save(image, "PNG")
                    for ending, content in ((".png", image.getvalue()), (".txt", f"grey {i}".encode())):
                        info = tarfile.TarInfo(f"{k}_{i}{ending}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
            publish(f"{bucket}/web/{k}.tar", file.getvalue())
    node = (
        f"_component_: hugging_face, path: webdataset, data_files: '{bucket}/web/*.tar', streaming: true, text: txt, image: png"
    )
    settings = ["data.digits.validation=null", "tokens=2000", f"data.digits.train={{{node}}}", "canvas.text=24"]
    run("run", "pretrain", "--config", config, *settings)
    state = json.loads(next((tmp_path / "out" / "checkpoints").glob("step_*/state.json")).read_text())
    inner = state["data"]
    while "lanes" not in inner:
        inner = next(value for value in inner.values() if isinstance(value, dict))
    assert sorted(inner["lanes"]["digits"]) == ["0", "1", "2", "3"]  # its four shards are four lanes


def one_line(done):
    assert done.returncode == 2, done.stderr[-1500:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mdm: ")]
    return line


def test_what_is_wrong_with_a_bucket_is_one_line_before_any_step(bucket, run, config, tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_PATIENCE", "1")
    tokens = f"{bucket}/tokens"
    run(*TOKENIZE, f"output_dir={tokens}")
    out = tmp_path / "out"
    absent = one_line(trained(run, config, "s3://data/absent", out, check=False))
    assert "s3://data/absent" in absent
    assert "s3://other" in one_line(trained(run, config, "s3://other/tokens", out, check=False))
    content = bytearray(read_bytes(f"{tokens}/shard_00002.safetensors"))
    content[-1] ^= 1
    publish(place(tokens) / "shard_00002.safetensors", bytes(content))
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "fresh"))
    assert "shard_00002.safetensors has another checksum" in one_line(
        trained(run, config, tokens, tmp_path / "begun", check=False)
    )
    assert "1 of 14 shards are not whole" in one_line(run("run", "check_shards", f"path={tokens}", check=False))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert "Unable to locate credentials" in one_line(trained(run, config, tokens, out, check=False))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    use(monkeypatch, f"http://127.0.0.1:{port}")
    line = one_line(trained(run, config, tokens, out, check=False))
    assert "does not answer, for" in line
    assert not (out / "history.jsonl").exists()
    assert "a run is written to a disk of this machine" in one_line(trained(run, config, tokens, "s3://data/run", check=False))
