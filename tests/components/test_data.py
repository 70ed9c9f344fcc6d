import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchdata.nodes import Loader, Prefetcher

from components.data.bad import BadSample, Refused, usable
from components.data.clips import read_audio
from components.data.digits import digits
from components.data.draws.endless import Draws, Placed, Prepared, Streamed
from components.data.draws.order import WholeOrder
from components.data.nodes import Lanes, MicroBatches, Mix, Stream
from components.data.packing import Packed
from components.data.reference import language_reference
from components.data.shards import TokenShards, write_shard
from components.data.sources import Folder, hugging_face
from components.data.speech import VOICES
from components.sequences import task_sequence
from components.tokenizers.clips import write_wav


def make_pipeline(vocabulary, pairs=(False, False), rank=0, world_size=1, batch_size=12):
    """A stream of two modalities and one of packed text, 2 : 1; `pairs`: anti-masking for each."""

    def pair(sample, rng):
        parts = {"text": torch.tensor([sample % 7]), "image": vocabulary.to_global("image", torch.full((4,), sample % 5))}
        task = ["text_to_image", "image_to_text"][int(rng.integers(2))]
        return [task_sequence(vocabulary, task, parts, {"text": 2, "image": 4})]

    documents = [torch.arange(n) % 7 for n in (5, 30, 11, 3)]

    def packed(lane):
        return Packed(draws(documents, 0, lane, 4), lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {}), length=24)

    streams = [
        Stream("pairs", placed(range(10), 1), 2, pair, pairs=pairs[0]),
        Stream("text", Lanes(4, packed), 1, lambda row, rng: row, length=24, pairs=pairs[1]),
    ]
    return MicroBatches(Mix(streams, 0), batch_size, 6 // world_size, vocabulary.pad_id, rank, world_size)


def placed(samples, seed):
    return Placed(Prepared(samples), WholeOrder(len(samples), seed))


def draws(samples, seed, lane=0, lanes=1):
    return Draws(Prepared(samples), WholeOrder(len(samples), seed), lanes, lane)


def flat(step):
    return [(b.tokens, b.document) for _, b, _ in step]


@pytest.mark.parametrize("pairs", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_the_pipeline_resumes_at_the_very_next_sample(vocabulary, pairs, stop):
    loader = Loader(Prefetcher(make_pipeline(vocabulary, pairs), 3))
    steps = iter(loader)
    for _ in range(stop):
        next(steps)
    state = loader.state_dict()
    expected = [flat(next(steps)) for _ in range(4)]
    again = Loader(Prefetcher(make_pipeline(vocabulary, pairs), 3))
    again.load_state_dict(state)
    resumed = iter(again)
    for want in expected:
        for (tokens, document), (t, d) in zip(want, flat(next(resumed)), strict=True):
            assert_close(tokens, t)
            assert_close(document, d)


def test_shares_are_exact_and_batches_have_one_make_up(vocabulary):
    node = make_pipeline(vocabulary)
    for _ in range(5):
        step = next(node)
        assert [(name, *b.tokens.shape) for name, b, _ in step] == [("pairs", 4, 11), ("pairs", 4, 11), ("text", 4, 24)]


def test_windows_of_the_mix_have_orders_of_their_own_from_the_seed():
    """Two of a, one of b a window: 3 orders. That 20 windows, or two seeds, have the same by chance: 3^-19."""

    def orders(seed):
        mix = Mix([Stream(name, placed([0], 0), weight, lambda s, rng: []) for name, weight in (("a", 2), ("b", 1))], seed)
        drawn = [next(name for name, rows in zip("ab", mix.between(r, r + 1), strict=True) if rows) for r in range(60)]
        return ["".join(drawn[r : r + 3]) for r in range(0, 60, 3)]

    assert all(sorted(window) == ["a", "a", "b"] for window in orders(0))
    assert len(set(orders(0))) == 3
    assert orders(0) == orders(0) != orders(1)


def test_every_row_draws_its_task_for_itself(vocabulary):
    numbers, row = [], [task_sequence(vocabulary, "text", {"text": torch.tensor([1])}, {})]
    stream = Stream("x", placed([0], 0), 1, lambda s, rng: numbers.append(rng.random()) or row)
    next(MicroBatches(Mix([stream], 0), 16, 16, vocabulary.pad_id))
    assert len(set(numbers)) == 16


def test_streams_draw_their_tasks_by_seeds_of_their_own(vocabulary):
    numbers, row = [], [task_sequence(vocabulary, "text", {"text": torch.tensor([1])}, {})]
    for seed in (1, 2):
        stream = Stream("x", placed([0], 0), 1, lambda s, rng: numbers.append(rng.random()) or row, seed=seed)
        next(MicroBatches(Mix([stream], 0), 4, 4, vocabulary.pad_id))
    assert len(set(numbers)) == 8


def test_a_window_is_of_the_smallest_numbers_that_have_the_shares(vocabulary):
    for pairs, window in ((False, 3), (True, 6)):
        mix = Mix([Stream(n, placed([0], 0), w, lambda s, rng: [], pairs=pairs) for n, w in (("a", 4), ("b", 2))], 0)
        assert mix.window == window


def test_rows_of_a_packed_stream_have_its_length_whatever_is_in_them(vocabulary):
    row = [task_sequence(vocabulary, "text", {"text": torch.tensor([1])}, {})]
    node = MicroBatches(Mix([Stream("x", placed([0], 0), 1, lambda s, rng: row, length=24)], 0), 2, 2, vocabulary.pad_id)
    assert [batch.tokens.shape for _, batch, _ in next(node)] == [(2, 24)]


def test_the_rows_of_a_rank_are_in_their_order():
    lanes = Stream("x", Lanes(6, lambda lane: None), 1, lambda s, rng: [])
    assert lanes.own(range(7, 23), 1, 4) == [7, 11, 13, 17, 19]  # of lanes 1 and 5


def test_a_noise_index_is_given_once_in_a_stream_and_counts_its_rows(vocabulary):
    node = make_pipeline(vocabulary)
    seen = [(name, b.document[b.document >= 0].unique().tolist()) for _ in range(4) for name, b, _ in next(node)]
    pairs, text = ([i for name, indices in seen if name == own for i in indices] for own in ("pairs", "text"))
    assert sorted(pairs) == list(range(32))
    assert len(set(text)) == len(text)
    assert sorted(i for i in text if i < 2**40) == list(range(16))  # the first document of each row
    assert {i % 2**40 for i in text} == set(range(16))
    assert max(text) >= 2**40  # a document behind the first has its place above them


def test_pairs_are_the_same_sequence_twice(vocabulary):
    for _, batch, _ in next(make_pipeline(vocabulary, pairs=(True, True))):
        assert_close(batch.tokens[0::2], batch.tokens[1::2])
        assert_close(batch.document[0::2] + (batch.document[0::2] >= 0).long(), batch.document[1::2])
        assert (batch.document[0::2] % 2 <= 0).logical_or(batch.document[0::2] < 0).all()


@pytest.mark.parametrize("paired", ["pairs", "text"])
def test_a_stream_without_pairs_beside_one_with_them_keeps_its_share_in_samples_of_its_own(vocabulary, paired):
    node = make_pipeline(vocabulary, pairs=(paired == "pairs", paired == "text"))
    seen = []
    for step in [next(node) for _ in range(4)]:
        assert [(name, len(b.tokens)) for name, b, _ in step] == [("pairs", 4), ("pairs", 4), ("text", 4)]
        for name, batch, _ in step:
            first = batch.document[:, 0]
            if name == paired:
                assert_close(first[0::2] % 2, torch.zeros(2, dtype=torch.long))
                assert_close(first[0::2] + 1, first[1::2])
                assert_close(batch.tokens[0::2], batch.tokens[1::2])
            seen.append((name, batch.document[batch.document >= 0].unique().tolist()))
    assert len({(name, i) for name, own in seen for i in own}) == sum(len(own) for _, own in seen)


def test_the_batch_may_change_with_the_rows_seen(vocabulary):
    """The same samples in the same order, cut into other steps: also where it goes on from the state after two."""
    one = make_pipeline(vocabulary, batch_size=12)
    grows = make_pipeline(vocabulary, batch_size=lambda rows: 12 if rows < 24 else 24)
    expected = [b for _ in range(6) for _, b, _ in next(one)]
    steps = [next(grows) for _ in range(2)]
    again = make_pipeline(vocabulary, batch_size=lambda rows: 12 if rows < 24 else 24)
    again.reset(grows.state_dict())
    steps += [next(again) for _ in range(2)]
    assert [sum(len(b.tokens) for _, b, _ in step) for step in steps] == [12, 12, 24, 24]
    for name in ("tokens", "document"):
        seen = [sorted(row.tolist() for row in getattr(b, name) if b.tokens.shape[1] == 11) for b in expected]
        rows = sorted(row for batch in seen for row in batch)
        assert (
            sorted(r.tolist() for step in steps for _, b, _ in step if b.tokens.shape[1] == 11 for r in getattr(b, name))
            == rows
        )


def test_the_size_of_a_step_is_asked_for_by_the_rows_before_it_pairs_as_two(vocabulary):
    asked = []
    node = make_pipeline(vocabulary, (True, False), batch_size=lambda rows: asked.append(rows) or 12)
    for _ in range(3):
        next(node)
    assert list(dict.fromkeys(asked)) == [0, 12, 24]


def test_an_epoch_shows_every_sample_once_in_a_new_order():
    node = draws(range(20), seed=0)
    first, second = ([next(node) for _ in range(20)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_packing_loses_no_token(vocabulary):
    documents = [torch.arange(n) % 7 for n in (50, 9, 2, 31)]
    node = Packed(draws(documents, 0), lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {}), 24)
    rows = [next(node) for _ in range(12)]
    assert all(sum(len(s) for s in row) <= 24 for row in rows)
    packed = torch.cat([s.tokens[s.maskable] for row in rows for s in row])
    source = draws(documents, 0)
    stream = torch.cat([next(source) for _ in range(20)])
    assert_close(packed, stream[: len(packed)])


def test_mistakes_are_named(vocabulary):
    with pytest.raises(ValueError, match="has no samples"):
        Prepared([])
    with pytest.raises(ValueError, match="too short to pack"):
        Packed(draws([1], 0), lambda d: d, 5)
    with pytest.raises(ValueError, match=r"weight must be a positive integer, got 0"):
        Mix([Stream("x", placed([1], 0), 0, lambda s, r: [])], 0)
    with pytest.raises(ValueError, match="must be even"):
        make_pipeline(vocabulary, pairs=(True, True), batch_size=13)


def test_splits_are_disjoint():
    images = {s: {np.asarray(d["image"]).tobytes() for d in digits(s)} for s in ("train", "judge", "test")}
    assert len(images["train"]) > 1000
    assert not images["train"] & images["test"]
    assert not images["judge"] & images["test"]
    voices = {s: set(v.split()) for s, v in VOICES.items()}
    assert not voices["train"] & voices["test"]
    assert not voices["judge"] & (voices["test"] | voices["train"])
    train, test = ({d["text"] for d in language_reference(s)} for s in ("train", "test"))
    assert not train & test
    lines = {line for t in train for line in t.split("\n")}
    assert not [line for t in test for line in t.split("\n") if line and line in lines]


def test_speech_is_the_same_in_every_process_whatever_was_said_before():
    """Breathy voices (f2, f5) add noise, and the synthesiser remembers; a resumed run must see the clips it began with."""
    code = (
        "import hashlib, sys\nfrom components.data.speech import Espeak\n"
        "def clip(espeak, voice):\n    espeak.set_voice(f'en-us+{voice}')\n    return espeak.say('seven', 190, 50)\n"
        "for voice in sys.argv[1:]:\n    clip(Espeak(), voice)\n"
        "espeak = Espeak()\n"
        "for voice in ('f2', 'f5', 'klatt4'):\n    print(hashlib.md5(clip(espeak, voice).tobytes()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, *said], capture_output=True, check=True).stdout for said in ([], ["m1"])
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) == 3


def test_a_clip_is_scaled_to_its_peak_and_freed_of_the_silence_around_it():
    """0.1 s of silence, 0.2 s of a tone, 0.1 s of silence, in frames of 10 ms; a pause inside stays."""
    from components.data.speech import trim

    tone, silence = 0.1 * np.sin(np.arange(800) * 0.3), np.zeros(800)
    found = trim(np.concatenate([silence, tone, silence, tone, silence]))
    assert len(found) == 2400
    assert np.abs(found).max() == pytest.approx(0.7)
    assert_close(found[:800], 0.7 / np.abs(tone).max() * tone)


@pytest.mark.parametrize("kind", ["float32", "float64", "int16"])
def test_a_filter_that_is_designed_once_is_scipys_own(kind):
    """To the bit, at every call: what scipy does to its filter stays its own."""
    from scipy.signal import resample_poly

    from components.resampling import resample

    clip = (1000 * np.random.default_rng(0).normal(size=900)).astype(kind)
    for rate, to, up, down in ((22050, 8000, 160, 441), (8000, 16000, 2, 1), (22050, 8000, 160, 441)):
        assert np.array_equal(resample(clip, rate, to), resample_poly(clip, up, down).astype(np.float32))


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 12), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}\n")
        write_wav(tmp_path / f"{i}.wav", np.sin(np.arange(1600) * 0.1), 16_000)
    return tmp_path


def test_a_folder_of_images_and_of_clips(folder):
    images = Folder(str(folder), "image", size=8)
    assert len(images) == 3
    assert images[1]["text"] == "caption 1"
    assert images[1]["image"].size == (8, 8)
    clips = Folder(str(folder), "audio", sample_rate=8000)
    assert clips[0]["audio"].dtype == np.float32
    assert len(clips[0]["audio"]) == 800
    assert [d["text"].strip() for d in Folder(str(folder), "text")] == ["caption 0", "caption 1", "caption 2"]


def test_corrupt_files_are_skipped_with_a_count_or_refused(folder, capsys):
    (folder / "3.png").write_bytes(b"not a picture")
    (folder / "3.txt").write_text("x")
    (folder / "4.wav").write_bytes(b"RIFFgarbage")
    (folder / "4.txt").write_text("x")
    images = Folder(str(folder), "image")
    assert "skipped 1 corrupt of 4 files, the first is" in capsys.readouterr().out
    assert [s["text"] for s in usable(images)] == ["caption 0", "caption 1", "caption 2"]
    assert len(images) == 4  # it keeps its place
    with pytest.raises(BadSample, match=r"3\.png: it is no image of a known format"):
        images[3]
    assert len(list(usable(Folder(str(folder), "audio")))) == 3
    for kind, name in (("image", r"3\.png"), ("audio", r"4\.wav")):
        with pytest.raises(ValueError, match=f"corrupt file .*{name}"):
            Folder(str(folder), kind, on_corrupt="refuse")


def test_folder_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder not found"):
        Folder(str(tmp_path / "absent"), "text")
    with pytest.raises(ValueError, match="no image files"):
        Folder(str(tmp_path), "image")


@pytest.fixture
def saved_dataset(folder, tmp_path_factory):
    import datasets

    path = str(tmp_path_factory.mktemp("hf") / "set")
    rows = {"caption": [f"caption {i}" for i in range(30)], "clip": [str(folder / f"{i % 3}.wav") for i in range(30)]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("clip", datasets.Audio(decode=False))
    dataset.save_to_disk(path)
    return path


def test_a_hugging_face_dataset_from_disk(saved_dataset, folder):
    source = hugging_face(saved_dataset, text="caption", audio="clip")
    assert len(source) == 30
    assert source[4]["text"] == "caption 4"
    assert_close(source[4]["audio"], read_audio(folder / "1.wav", 8000))
    with pytest.raises(ValueError, match="no column 'title' for text; it has caption, clip"):
        hugging_face(saved_dataset, text="title")


@pytest.mark.parametrize("streaming", [False, True])
def test_clips_that_are_too_long_are_left_out(tmp_path, streaming):
    import datasets
    import soundfile

    for i, seconds in enumerate((0.1, 0.3, 0.2)):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(int(8000 * seconds)), 8000)
    rows = {"text": ["a", "b", "c"], "audio": [str(tmp_path / f"{i}.wav") for i in range(3)]}
    datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False)).save_to_disk(str(tmp_path / "set"))
    source = hugging_face(str(tmp_path / "set"), audio="audio", streaming=streaming, max_seconds=0.2)
    assert [s["text"] for s in source] == ["a", "c"]


def test_the_hubs_corpora_of_the_ready_config_give_samples(tmp_path):
    """`pretrain_hub` on local datasets of the same columns and splits."""
    import datasets
    import soundfile
    from omegaconf import OmegaConf

    soundfile.write(tmp_path / "a.flac", np.zeros(1600), 16000)
    Image.new("RGB", (300, 260), (9, 8, 7)).save(tmp_path / "a.jpg")
    sound, picture = datasets.Audio(decode=False), datasets.Image()
    columns = {
        "captions": datasets.Dataset.from_dict({"jpg": [str(tmp_path / "a.jpg")], "txt": ["grey"], "json": ["{}"]}).cast_column(
            "jpg", picture
        ),
        "speech": datasets.Dataset.from_dict({"audio": [str(tmp_path / "a.flac")], "text": ["A"], "id": ["1"]}).cast_column(
            "audio", sound
        ),
        "text": datasets.Dataset.from_dict({"text": ["A page."], "url": ["u"], "score": [3.0]}),
    }
    config = OmegaConf.load("recipes/configs/pretrain_hub.yaml")
    for name, rows in columns.items():
        node = {k: v for k, v in config.data[name].train.items() if k not in ("_component_", "path")}
        datasets.DatasetDict({node["split"]: rows}).save_to_disk(str(tmp_path / name))
        (sample,) = hugging_face(str(tmp_path / name), **node)
        expected = {"captions": {"text", "image"}, "speech": {"text", "audio", "sample_rate"}, "text": {"text"}}[name]
        assert set(sample) == expected
        if name == "captions":
            assert (sample["text"], sample["image"].size) == ("grey", (256, 256))
        if name == "speech":
            assert (len(sample["audio"]), sample["sample_rate"]) == (2400, 24000)


def test_a_streamed_dataset_resumes_at_the_next_sample(saved_dataset):
    def node():
        dataset = hugging_face(saved_dataset, text="caption", streaming=True)
        list(dataset)  # somebody read it before: a tokenizer that was trained on it
        return Streamed(dataset, seed=0, block_size=8)

    first = node()
    for _ in range(7):
        next(first)
    state = first.state_dict()
    expected = [next(first)["text"] for _ in range(40)]  # into the second epoch
    again = node()
    again.reset(state)
    assert [next(again)["text"] for _ in range(40)] == expected
    epoch = node()
    assert sorted(next(epoch)["text"] for _ in range(30)) == sorted(f"caption {i}" for i in range(30))


@pytest.mark.parametrize("stop", [8, 13, 29, 30, 52])
def test_a_stream_resumes_in_any_of_its_blocks(saved_dataset, stop):
    """Blocks of 8 of 30 captions: at a border, inside the second, at the end of an epoch, inside the next."""

    def node():
        return Streamed(hugging_face(saved_dataset, text="caption", streaming=True), seed=0, block_size=8)

    first, again = node(), node()
    first.reset()
    for _ in range(stop):
        next(first)
    again.reset(first.state_dict())
    assert [next(again)["text"] for _ in range(20)] == [next(first)["text"] for _ in range(20)]


def test_every_block_of_a_stream_has_an_order_of_its_own(saved_dataset):
    """Three blocks of ten captions: that two have the same order by chance has probability 3 / 10!."""
    node = Streamed(hugging_face(saved_dataset, text="caption", streaming=True), seed=0, block_size=10)
    node.reset()
    places = [int(next(node)["text"].split()[1]) for _ in range(30)]
    blocks = [tuple(p - 10 * k for p in places[10 * k : 10 * k + 10]) for k in range(3)]
    assert all(sorted(block) == list(range(10)) for block in blocks)
    assert len(set(blocks)) == 3


def test_jsonl_lines_are_samples_and_mistakes_name_their_line(tmp_path):
    from components.data.sources import Jsonl

    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    lines = ['{"text": "one", "image": "a.png", "more": 1}', "", '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = Jsonl(str(tmp_path))
    assert [s["text"] for s in source] == ["one", "two"]
    assert (source[0]["image"].size, set(source[0])) == ((8, 8), {"text", "image"})
    (tmp_path / "b.jsonl").write_text('{"q": "why", "a": "so"}\n')
    source = Jsonl(str(tmp_path / "b.jsonl"), {"prompt": "q", "text": "a"}, template="Q: {} A:")
    assert source[0] == {"prompt": "Q: why A:", "text": "so"}
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: it has no field 'x'; it has q, a"):
        Jsonl(str(tmp_path / "b.jsonl"), {"text": "x"})
    (tmp_path / "c.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"c\.jsonl, line 1: it is not JSON"):
        Jsonl(str(tmp_path / "c.jsonl"))
    with pytest.raises(FileNotFoundError, match="no JSONL file at"):
        Jsonl(str(tmp_path / "absent.jsonl"))


def test_webdataset_shards_are_a_source(tmp_path, monkeypatch):
    import io
    import tarfile

    from components.data.sources import hugging_face

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i in range(3):
            picture = io.BytesIO()
            Image.new("L", (8, 8), 80 * i).save(picture, "PNG")
            for name, content in ((f"{i:03d}.png", picture.getvalue()), (f"{i:03d}.txt", f"grey {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for streaming in (False, True):
        source = hugging_face("webdataset", text="txt", image="png", data_files=str(tmp_path / "*.tar"), streaming=streaming)
        samples = list(source)
        assert [s["text"] for s in samples] == ["grey 0", "grey 1", "grey 2"]
        assert [s["image"].getpixel((0, 0)) for s in samples] == [0, 80, 160]


def test_a_source_is_adapted_to_a_tokenizer():
    from components.data.sources import adapted

    clip = np.sin(np.arange(800) / 20).astype(np.float32)
    raw = [{"image": Image.new("L", (8, 8), 9), "audio": clip, "sample_rate": 8000, "text": str(i)} for i in range(3)]
    source = adapted(raw, size=32, sample_rate=24000, count=2)
    assert len(source) == 2
    assert source[0]["image"].size == (32, 32)
    assert (len(source[0]["audio"]), source[0]["sample_rate"]) == (2400, 24000)


def test_token_shards_of_unequal_sizes_are_one_row_of_samples(tmp_path):
    """Shards of 3, 0, 1 and 2 samples, of codes that count: the n-th is n, wherever it lies."""
    shards, n = [], 0
    for k, count in enumerate((3, 0, 1, 2)):
        path = tmp_path / f"shard_{k}.safetensors"
        digest, size = write_shard(path, [{"text": torch.full((i % 2 + 1,), i)} for i in range(n, n + count)], ["text"])
        shards.append({"file": path.name, "count": count, "bytes": size, "sha256": digest})
        n += count
    (tmp_path / "index.json").write_text(json.dumps({"codebooks": {"text": [6]}, "shards": shards}))
    found = TokenShards(str(tmp_path))
    assert [s["text"].tolist() for s in found] == [[0], [1, 1], [2], [3, 3], [4], [5, 5]]


def shards_of(folder, count, **more):
    """So many shards of one sample each, the n-th of which is n twice and a frame of audio in two codebooks."""
    about = []
    for n in range(count):
        sample = {"text": torch.full((2,), n), "audio": torch.tensor([3, 2, 1, 0])}
        digest, size = write_shard(folder / f"{n}.safetensors", [sample], ["text", "audio"])
        about.append({"file": f"{n}.safetensors", "count": 1, "bytes": size, "sha256": digest})
    (folder / "index.json").write_text(json.dumps({"codebooks": {"text": [9], "audio": [4, 3]}, "shards": about}))
    return TokenShards(str(folder), **more)


def test_a_shard_that_has_changed_since_it_was_opened_is_held_against_its_checksum_again(tmp_path):
    source = shards_of(tmp_path, 1)
    assert source.open_shard(0).count == 1
    file = tmp_path / "0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)
    file.write_bytes(content)
    with pytest.raises(Refused, match=r"0\.safetensors has another checksum than index\.json says"):
        source.open_shard(0)
    assert TokenShards(str(tmp_path), check=False).lazily().open_shard(0).count == 1
    assert TokenShards(str(tmp_path), open_shards=3).lazily().open_shards == 3


def test_shards_that_are_read_by_spans_are_looked_at_once(tmp_path, monkeypatch):
    source = shards_of(tmp_path, 1)
    source.opened(0)
    (tmp_path / "index.json").unlink()
    monkeypatch.setattr("components.data.shards.sha256", None)  # it was held against its checksum already
    assert source.lazily().opened(0).count == 1
    assert isinstance(source[0]["text"], torch.Tensor)  # which is still not lazy


def test_of_many_shards_those_used_last_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("components.data.shards.KEPT_OPEN", 2)
    source = shards_of(tmp_path, 3)
    assert [source[n]["text"].tolist() for n in (0, 1, 0, 2)] == [[0, 0], [1, 1], [0, 0], [2, 2]]
    assert [*source._open] == [0, 2]


def test_a_span_of_codes_is_held_against_the_codebooks_of_its_places(tmp_path):
    codes = shards_of(tmp_path, 1).lazily()[0]["audio"]
    assert codes[1:3].tolist() == [2, 1]
    codes.codebooks = [4, 2]
    with pytest.raises(BadSample, match="a code is outside its codebook"):
        codes[1:2]
    codes.codebooks = [3, 4]
    assert codes[1:4].tolist() == [2, 1, 0]
