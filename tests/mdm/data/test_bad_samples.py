"""Samples of a run that do not fit or cannot be used: what becomes of them, and how they are counted."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.data.bad import BadSample, Note, Noted, Refused, attempt
from components.data.draws.order import WholeOrder
from components.data.shards import TokenShards, write_shard
from components.data.sources import Folder
from components.maskers import BernoulliMasker
from components.noise import seed_of
from components.sequences import collate, content
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from mdm.config import UserError
from mdm.data.pipeline import micro_batch, next_step, streams, training_loader
from mdm.data.processor import Processor
from mdm.data.rows import builder
from mdm.data.settings import LossSettings, StreamSettings, check_streams
from mdm.data.validation import held_out_order, validation_batches
from mdm.hardware import Hardware
from mdm.training.history import History, Notes, read_history

ALONE = Hardware(torch.device("cpu"), 0, 1, False)


@pytest.fixture(scope="module")
def processor():
    tokenizers = {
        "text": TextTokenizer.train(["a handwritten seven and more"] * 5, vocab_size=257),
        "image": GreyPatchTokenizer(8, 2, 3),
        "audio": Codec2Tokenizer(),
    }
    return Processor.build(tokenizers, {"text": 8, "image": 16, "audio": 8})


def caption(text="seven", tokens=16):
    return {"text": text, "image": torch.full((tokens,), 3)}


def settings(task="text_to_image", on_long="refuse", **changes):
    return StreamSettings(tasks={task: 1.0}, train={"_component_": "mine"}, on_long=on_long, **changes)


def prepared(processor, sample, on_long, task="text_to_image", max_length=None):
    build = builder("captions", settings(task, on_long), processor, 0.0, max_length)
    made = attempt(lambda: sample, build.prepare, "a.png")
    if isinstance(made, BadSample):
        return made, None
    sample, notes = (made.sample, made.notes) if isinstance(made, Noted) else (made, [])
    return build(sample, np.random.default_rng(0))[0], notes


LONG = {
    "text": (caption("seven is long"), "text_to_image", "its text of 13 tokens does not fit canvas.text = 8"),
    "audio": (
        {"text": "seven", "audio": torch.arange(12)[:, None].expand(12, 4).flatten() % 4},
        "speech_to_text",
        "its audio of 48 tokens does not fit canvas.audio = 8",
    ),
    "response": (
        {"prompt": "why", "text": "no end it"[:8]},
        "instruct",
        "its text of 8 tokens and its end does not fit canvas.text = 8",
    ),
}


@pytest.mark.parametrize("kind", LONG)
def test_what_does_not_fit_its_canvas_is_refused_skipped_or_cut(processor, kind):
    sample, task, why = LONG[kind]
    with pytest.raises(Refused) as refused:
        prepared(processor, sample, "refuse", task)
    assert str(refused.value) == (
        f"a.png: {why} (data.captions.on_long = refuse; skip leaves such samples out, cut shortens them)"
    )
    bad, _ = prepared(processor, sample, "skip", task)
    assert (bad.name, bad.why) == ("a.png", why)
    row, notes = prepared(processor, sample, "cut", task)
    assert notes == [Note("a.png", why, cut=True)]
    modality = "audio" if kind == "audio" else "text"
    own = row.tokens[(row.modality == processor.vocabulary.modalities.index(modality)) & (row.maskable | (kind != "response"))]
    assert own.tolist() == processor.encode(modality, sample[modality])[:8].tolist()  # no end: it goes on
    assert processor.vocabulary.end_id not in own


def test_a_text_that_fills_its_canvas_fits_and_an_image_is_never_cut(processor):
    for on_long in ("refuse", "skip", "cut"):
        _, notes = prepared(processor, caption("sevenses"), on_long)
        assert notes == []
    for on_long in ("refuse", "cut"):
        with pytest.raises(Refused, match=r"a\.png: its image of 9 tokens does not fit canvas\.image = 16 .* cannot be cut"):
            prepared(processor, caption(tokens=9), on_long)
    bad, _ = prepared(processor, caption(tokens=9), "skip")
    assert bad.why == "its image of 9 tokens does not fit canvas.image = 16"
    with pytest.raises(Refused, match=r"its prompt of 30 tokens, with 8 for its text, does not fit model\.max_length = 32"):
        prepared(processor, {"prompt": "w" * 30, "text": "a"}, "cut", "instruct", max_length=32)


def test_a_sample_that_lacks_a_part_is_bad_whatever_on_long_says(processor):
    for task, why in (("text_to_image", "it has no image; it has text"), ("instruct", "it has no prompt; it has text")):
        bad, _ = prepared(processor, {"text": "a text that is also too long"}, "refuse", task)
        assert bad.why == why
    bad, _ = prepared(processor, {"text": None, "image": torch.full((16,), 3)}, "refuse")
    assert bad.name == "a.png"


def test_on_long_is_checked_before_anything_loads():
    with pytest.raises(UserError, match=r"data\.a\.on_long: 'crop' is not one of refuse, skip, cut"):
        check_streams({"a": settings(on_long="crop")})
    with pytest.raises(UserError, match=r"data\.a\.on_long: packed text has no canvas"):
        check_streams({"a": settings("text", "cut", pack=32)})


class Lazy(Sequence):
    """A source that reads when it is drawn from and has names."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def name_of(self, index):
        return f"{index}.png"


class Iterated:
    def __init__(self, samples):
        self.samples = samples

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def __iter__(self):
        return iter(self.samples)


def loader(processor, source, on_long, pairs=False):
    data = {"captions": settings(on_long=on_long)}
    masker = {"captions": BernoulliMasker(processor.vocabulary.mask_id, pairs=pairs)}
    mix = streams(data, {"captions": source}, processor, masker, 0, 0.0)
    return iter(training_loader(mix, masker, processor, lambda _: 6, 6, LossSettings(), 0, prefetch=0))


@pytest.mark.parametrize("kind", [list, Lazy, Iterated])
def test_on_long_is_one_mechanism_for_samples_in_memory_read_as_drawn_and_streamed(processor, kind):
    samples = [caption("seven" if i != 4 else "seven is long") for i in range(12)]
    name = "4.png" if kind is Lazy else "sample 4"
    with pytest.raises((UserError, ValueError), match=rf"^data\.captions: {name}: its text of 13 tokens does not fit"):
        exhaust(loader(processor, kind(samples), "refuse"))
    for on_long in ("skip", "cut"):
        steps = loader(processor, kind(samples), on_long)
        micros = [micro for _ in range(6) for micro in next(steps)]
        notes = {note for micro in micros for note in micro.notes}
        assert {(n.stream, n.name, n.cut) for n in notes} == {("captions", name, on_long == "cut")}
        assert sum(micro.denominator for micro in micros) == 36  # one that is left out is replaced


def test_of_a_folder_with_a_hundredth_damaged_the_others_keep_index_order_and_mask(processor, tmp_path):
    """Through the training loader for two epochs, on both of two ranks; and the samples left out are those planted."""
    for name in ("whole", "damaged"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(300):
            Image.new("L", (8, 8), i % 256).save(folder / f"{i:03d}.png")
            (folder / f"{i:03d}.txt").write_text(f"grey {i % 7}")
    (folder / "041.png").write_bytes((folder / "041.png").read_bytes()[:-30])
    (folder / "120.txt").write_bytes("gräu".encode("latin-1"))
    (folder / "222.txt").unlink()
    (folder / "250.txt").write_text("a caption too long")
    data = {"photos": settings(on_long="skip")}
    data["photos"].tasks = {"text_to_image": 0.5, "image_to_text": 0.5}
    masker = {"photos": BernoulliMasker(processor.vocabulary.mask_id, pairs=True)}
    whole = list(Folder(str(tmp_path / "whole"), "image"))

    def steps(source, rank):
        mix = streams(data, {"photos": source}, processor, masker, 0, 0.1)
        return iter(training_loader(mix, masker, processor, lambda _: 60, 30, LossSettings(), 0, rank, 2, prefetch=0))

    order, planted = WholeOrder(300, seed_of(0, "photos")), (41, 120, 222, 250)
    named, replaced = set(), 0
    for rank in (0, 1):
        wanted, damaged = steps(whole, rank), steps(Folder(str(tmp_path / "damaged"), "image"), rank)
        for _ in range(20):  # 30 samples each, twice
            for want, found in zip(next(wanted), next(damaged), strict=True):
                rows = (want.noisy.clean.document[:, 0] // 2).tolist()
                left_out = torch.tensor([order(row) in planted for row in rows])
                assert left_out.any() == bool(found.notes)
                assert torch.equal(found.noisy.clean.document, want.noisy.clean.document)
                for field in ("noisy", "mask", "weight"):
                    assert torch.equal(getattr(found.noisy, field)[~left_out], getattr(want.noisy, field)[~left_out])
                for field in ("tokens", "document", "position"):
                    own, others = getattr(found.noisy.clean, field), getattr(want.noisy.clean, field)
                    assert torch.equal(own[~left_out], others[~left_out])
                named |= {(note.stream, Path(note.name).name) for note in found.notes}
                replaced += int(left_out.sum())
    assert named == {("photos", f"{i:03d}.png") for i in planted}
    assert replaced == 4 * 2 * 2  # in each epoch, in each row of a pair


def test_a_code_that_its_codebook_has_not_is_a_sample_of_the_shards_left_out(processor, tmp_path):
    codes = [{"text": torch.tensor([i]), "image": torch.full((16,), 1)} for i in range(9)]
    codes[4]["image"][3] = 99
    digest, size = write_shard(tmp_path / "a.safetensors", codes, ["text", "image"])
    shard = {"file": "a.safetensors", "count": 9, "bytes": size, "sha256": digest}
    codebooks = {m: list(processor.tokenizers[m].codebooks) for m in ("text", "image")}
    (tmp_path / "index.json").write_text(json.dumps({"codebooks": codebooks, "shards": [shard]}))
    steps = loader(processor, TokenShards(str(tmp_path)), "skip")
    (note,) = {note for _ in range(3) for micro in next(steps) for note in micro.notes}
    assert (note.stream, note.why) == (
        "captions",
        f"a code is outside its codebook of {processor.tokenizers['image'].codebooks}",
    )
    codes[4] = {"text": torch.zeros(9, dtype=torch.long), "image": torch.full((16,), 1)}
    _, shard["bytes"] = write_shard(tmp_path / "a.safetensors", codes, ["text", "image"])
    (tmp_path / "index.json").write_text(json.dumps({"codebooks": codebooks, "shards": [shard]}))
    steps = loader(processor, TokenShards(str(tmp_path), check=False), "skip")
    (note,) = {note for _ in range(3) for micro in next(steps) for note in micro.notes}
    assert str(note.name) == f"{tmp_path}, sample 4"
    assert note.why.startswith("its text of 9 tokens does not fit")


def exhaust(steps):
    for _ in range(4):
        next_step(steps)


def test_samples_in_memory_that_are_all_bad_are_found_at_the_start(processor):
    with pytest.raises(ValueError, match=r"^data\.captions: none of its samples can be used; the first is sample 0: it has no"):
        loader(processor, [{"text": "a"}] * 3, "refuse")


def test_a_held_out_sample_that_cannot_be_used_is_left_out_and_the_others_keep_their_noise(processor, capsys):
    held_out = [caption("seven" if i != 4 else "seven is long") for i in range(9)]  # the seventh in the order of validation

    def plan(samples, on_long):
        data = {"captions": settings(on_long=on_long)}
        return validation_batches(data, {"captions": Lazy(samples)}, processor, 9)["text_to_image"]

    with pytest.raises(ValueError, match=r"^data\.captions\.validation: 4\.png: its text of 13 tokens does not fit"):
        plan(held_out, "refuse")
    ((whole, tokens),) = plan([caption("seven")] * 9, "refuse")
    assert capsys.readouterr().out == ""
    ((part, fewer),) = plan(held_out, "skip")
    assert capsys.readouterr().out == (
        "data.captions.validation: 1 of the samples are left out, the first is "
        "4.png: its text of 13 tokens does not fit canvas.text = 8\n"
    )
    kept = [i for i in range(9) if i != 6]
    assert part.noisy.clean.document[:, 0].tolist() == kept
    assert fewer == tokens - 16
    assert torch.equal(part.noisy.mask, whole.noisy.mask[kept])
    with pytest.raises(ValueError, match=r"none of its samples can be used; the first is 0\.png"):
        plan([caption("seven is long")], "skip")


def test_a_few_of_any_number_of_held_out_samples_are_looked_at(processor):
    """Of ten billion, in no time; of fewer, the ones that every version has taken."""

    class Endless:
        def __len__(self):
            return 10**10

        def __getitem__(self, index):
            return caption(f"{index % 997}")

    data = {"captions": settings()}
    ((micro, tokens),) = validation_batches(data, {"captions": Endless()}, processor, 9)["text_to_image"]
    assert (len(micro.noisy.noisy), tokens) == (9, 9 * 16)
    assert len(set(held_out_order(10**10, 1000))) == 1000
    assert (
        held_out_order(10, 4) == np.random.Generator(np.random.Philox(key=0, counter=[0, 0, 4, 0])).permutation(10)[:4].tolist()
    )
    assert sorted(held_out_order(5, 9)) == [0, 1, 2, 3, 4]


def test_training_bits_count_content_up_to_the_first_end_token(processor, tmp_path):
    """Two texts of 5 and 8 tokens on canvases of 8: 6 (an end token follows) and 8, not 16."""
    build = builder("captions", settings("joint_text_image"), processor)
    rows = [build(build.prepare(caption(t)), np.random.default_rng(0))[0] for t in ("seven", "sevenses")]
    batch = collate([[row] for row in rows], [[0], [1]], processor.vocabulary.pad_id)
    micro = micro_batch(batch, BernoulliMasker(processor.vocabulary.mask_id), LossSettings(), processor.vocabulary)
    text, image = (processor.vocabulary.ranges_of(m)[0] for m in ("text", "image"))
    assert (micro.content[text], micro.content[image], sum(micro.content)) == (14, 32, 46)
    assert sum(micro.content) == int(content(batch, processor.vocabulary.end_id).sum())
    history = History(tmp_path / "history.jsonl", ALONE, None, 0)
    nats = torch.zeros(len(processor.vocabulary.ranges))
    nats[text], nats[image] = 14 * 3 * np.log(2), 32 * 5 * np.log(2)
    history.accumulate(nats, micro)
    history.count(torch.tensor(1.0), torch.tensor(1.0), 10, 1.0)
    history.write({"step": 1, "tokens": 10, "seconds": 0.0}, processor.vocabulary, 1e-3)
    history.close()
    (line,) = read_history(tmp_path / "history.jsonl")
    assert (line["train_bits/text"], line["train_bits/image"]) == pytest.approx((3.0, 5.0))
    assert "bad_samples" not in line
    assert not (tmp_path / "bad_samples.jsonl").exists()


def test_distinct_bad_samples_are_counted_over_epochs_and_resumes_and_named(processor, tmp_path, capsys):
    """What was found after the checkpoint that a run resumes from is found again, not counted twice."""
    build = builder("captions", settings(), processor)
    row = build(build.prepare(caption()), np.random.default_rng(0))
    batch = collate([row], [[0]], processor.vocabulary.pad_id)

    def micro(*notes):
        masker = BernoulliMasker(processor.vocabulary.mask_id)
        return micro_batch(batch, masker, LossSettings(), processor.vocabulary, notes=list(notes))

    def train(history, steps, first):
        for step, notes in enumerate(steps, first):
            history.accumulate(torch.zeros(len(processor.vocabulary.ranges)), micro(*notes))
            history.count(torch.tensor(1.0), torch.tensor(1.0), 10, 1.0)
            history.write({"step": step, "tokens": 10 * step, "seconds": 0.0}, processor.vocabulary, 1e-3)

    a, b, other = Note("a.png", "cut off", stream="x"), Note("b.png", "empty", stream="x"), Note("a.png", "cut off", stream="y")
    long = Note("c.png", "its text of 9 tokens", cut=True, stream="x")
    path = tmp_path / "history.jsonl"
    history = History(path, ALONE, None, 0)
    train(history, [[], [a, b], [a], [long, other]], 1)
    assert [line.get("bad_samples", 0) for line in read_history(path)] == [0, 2, 2, 3]
    assert [line.get("cut_samples", 0) for line in read_history(path)] == [0, 0, 0, 1]
    history.file.close()  # killed, and resumed from the checkpoint of step 3
    again = History(path, ALONE, None, 3)
    train(again, [[long, other], [b]], 4)
    again.close()
    assert [line.get("bad_samples", 0) for line in read_history(path)] == [0, 2, 2, 3, 3]
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [(n["step"], n["stream"], n["name"], n["why"], n["cut"]) for n in lines] == [
        (2, "x", "a.png", "cut off", False),
        (2, "x", "b.png", "empty", False),
        (4, "x", "c.png", "its text of 9 tokens", True),
        (4, "y", "a.png", "cut off", False),
    ]
    said = capsys.readouterr().out
    assert said == (
        "Samples left out: 3 and 1 cut to fit; the first is data.x: a.png: cut off. "
        f"All are in {tmp_path / 'bad_samples.jsonl'}\n"
    )
    History(path, ALONE, None, 0)  # a new run in the same folder
    assert not (tmp_path / "bad_samples.jsonl").exists()


class Beside(Hardware):
    """The main process beside another one, which finds the same sample and one more."""

    def sum(self, values):
        return values + 2

    def gather(self, values):
        return [*values, Note("a.png", "cut off", stream="x"), Note("b.png", "empty", stream="x")]


def test_what_several_ranks_find_is_written_once_and_nothing_is_sent_where_nothing_is_new(tmp_path):
    notes = Notes(tmp_path / "bad_samples.jsonl", Beside(torch.device("cpu"), 0, 2, False), 0)
    notes.add([Note("c.png", "dark", stream="x"), Note("a.png", "cut off", stream="x")])
    notes.gather(7)
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [(n["step"], n["name"]) for n in lines] == [(7, "a.png"), (7, "b.png"), (7, "c.png")]
    assert notes.counts() == {"bad_samples": 3}
    alone = Notes(tmp_path / "none.jsonl", ALONE, 0)
    alone.gather(7)
    assert alone.summary() is None
    assert not (tmp_path / "none.jsonl").exists()
