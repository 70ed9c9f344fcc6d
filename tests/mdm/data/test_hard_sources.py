"""Sources as they come: few samples, none in a part of them, read by others; the pipeline goes on, or says why not."""

import itertools
import json
import os
import signal

import pytest
import torch

from components.data.shards import TokenShards, write_shard
from components.maskers import BernoulliMasker
from components.tokenizers.text import TextTokenizer
from components.types import PAD_DOCUMENT
from mdm.data.corruption import check_pairs
from mdm.data.pipeline import streams, training_loader
from mdm.data.position import load_state, whole_state
from mdm.data.processor import Processor
from mdm.data.settings import BatchSettings, LossSettings, StreamSettings


@pytest.fixture(scope="module")
def processor():
    return Processor.build({"text": TextTokenizer.train(["seven and more"] * 5, vocab_size=257)}, {"text": 8})


def loader(processor, source, rank=0, world_size=1, workers=0, lanes=8, task="instruct", **settings):
    data = {"a": StreamSettings(tasks={task: 1.0}, train={"_component_": "mine"}, on_long="refuse", **settings)}
    masker = {"a": BernoulliMasker(processor.vocabulary.mask_id)}
    mix = streams(data, {"a": source}, processor, masker, 0, 0.0, lanes=lanes, workers=workers)
    return training_loader(mix, masker, processor, lambda _: 16, 16, LossSettings(), 0, rank, world_size, prefetch=0)


def rows(micros):
    found = []
    for batch, mask in ((micro.noisy.clean, micro.noisy.mask) for micro in micros):
        for tokens, document, masked in zip(batch.tokens, batch.document, mask, strict=True):
            if (kept := document != PAD_DOCUMENT).any():
                found.append((tokens[kept].tolist(), document[kept].tolist(), masked[kept].tolist()))
    return sorted(found)


class Parts:
    """A stream of so many samples in each part."""

    def __init__(self, parts):
        self.parts, self.at, self.num_shards = parts, 0, len(parts)

    def shard(self, num_shards, index):
        return Parts(self.parts[index::num_shards])

    def __iter__(self):
        every = list(itertools.chain(*self.parts))
        while self.at < len(every):
            self.at += 1
            yield every[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = 0 if state is None else state["at"]


def parts(counts):
    return Parts([[{"prompt": "p" * i, "text": "seven"[: j + 1]} for j in range(count)] for i, count in enumerate(counts)])


def test_a_lane_whose_part_has_no_samples_reads_the_next_that_has_some(processor):
    """On one rank, on two, and after a resume of one by two."""
    counts = (3, 0, 0, 5, 2, 0)
    first, alone = loader(processor, parts(counts)), []
    steps = iter(first)
    for step in range(8):
        if step == 3:
            state = json.loads(json.dumps(whole_state(first, lambda own: own)))
        alone.append(rows(next(steps)))
    ranks = [iter(loader(processor, parts(counts), rank, 2)) for rank in range(2)]
    assert [rows(itertools.chain(*map(next, ranks))) for _ in range(8)] == alone
    again = [loader(processor, parts(counts), rank, 2) for rank in range(2)]
    for node in again:
        load_state(node, json.loads(json.dumps(state)))
    ranks = [iter(node) for node in again]
    assert [rows(itertools.chain(*map(next, ranks))) for _ in range(5)] == alone[3:]
    with pytest.raises(ValueError, match=r"^data\.a: the streamed dataset has no samples"):
        next(iter(loader(processor, parts((0, 0, 0)))))


def test_a_stream_that_cannot_be_cut_is_one_lane_and_says_so_to_two_ranks(processor):
    class Whole(Parts):
        shard = property()

    next(iter(loader(processor, Whole([[{"prompt": "p", "text": "a"}]] * 3))))
    with pytest.raises(ValueError, match=r"^data\.a has 1 lanes, fewer than the 2 processes .* \(`num_shards`\)$"):
        next(iter(loader(processor, Whole([[{"prompt": "p", "text": "a"}]] * 3), 0, 2)))


class Source:
    """Read as it is drawn; without a sample where there is no text."""

    def __init__(self, texts):
        self.texts, self.opened = texts, lambda: None  # which cannot be pickled

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        if self.texts[index] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"text": self.texts[index]} if self.texts[index] else {}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_one_sample_of_a_few_that_can_be_used_is_found_by_every_lane(processor, count):
    """A lane of many does not draw a small source to its end: it draws by chance."""
    steps = iter(loader(processor, Source(["seven"] + [None] * (count - 1)), lanes=64, task="text", pack=16))
    for _ in range(8):
        assert all(micro.num_rows for micro in next(steps))


def test_packed_token_shards_need_no_workers_and_may_have_some(processor, tmp_path):
    codes = [{"text": torch.arange(i) % 200} for i in range(30)]
    digest, size = write_shard(tmp_path / "a.safetensors", codes, ["text"])
    shard = {"file": "a.safetensors", "count": 30, "bytes": size, "sha256": digest}
    codebooks = {"text": list(processor.tokenizers["text"].codebooks)}
    (tmp_path / "index.json").write_text(json.dumps({"codebooks": codebooks, "shards": [shard]}))
    made = [
        iter(loader(processor, TokenShards(str(tmp_path)), workers=workers, task="text", pack=24, best_fit=4))
        for workers in (0, 1)
    ]
    for _ in range(3):
        alone, beside = (rows(next(steps)) for steps in made)
        assert alone == beside


def test_a_worker_that_dies_is_told_of_once_with_its_stream(processor):
    steps = iter(loader(processor, Source(["kill"] * 4), workers=1, task="text", pack=16))
    with pytest.raises(ValueError, match=r"^data\.a: a process that prepares samples has ended, .* data_workers=0"):
        next(steps)


def test_a_ramp_to_half_a_pair_is_found_at_the_start():
    batch = BatchSettings(logical=8, micro=8, ramp={0.25: 12, 0.5: 7})
    check_pairs(batch, {"a": BernoulliMasker(9)})
    with pytest.raises(ValueError, match=r"^batch\.ramp\.0\.5 = 7 must be even: data\.b is masked in pairs"):
        check_pairs(batch, {"a": BernoulliMasker(9), "b": BernoulliMasker(9, pairs=True)})
