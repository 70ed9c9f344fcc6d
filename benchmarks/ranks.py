"""What one rank of many pays for its own rows: its loader alone, the batch per rank fixed, for each kind of source.

A loader is built as rank 0 of 1, of 8, of 64, ...; it makes its own rows and nobody waits for it. So the figures of all numbers
of ranks should be one: nothing that a rank does grows with how many there are. `bytes_against_share` is what it reads in an
epoch of the whole, over its share of what one rank alone reads.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.data.shards import TokenShards
from components.data.sources import hugging_face
from components.maskers import FixedCountMasker
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from mdm.data.pipeline import next_step, streams, training_loader
from mdm.data.processor import Processor
from mdm.data.settings import LossSettings, StreamSettings
from mdm.data.tokenizing import write, write_index

from .measure import Result, interleaved, rows

ROWS = 16  # of a step, on each rank
LENGTH = 128  # of a packed row


def run_ranks(preset: str, settings: Mapping[str, int], ranks: Sequence[int]) -> Result:
    """Tokens a second of rank 0's own rows, for every kind of source and number of ranks."""
    lanes, found, unit = max(64, *ranks), [], "tokens/s"
    per_rank: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kinds = sources(Path(folder), settings["documents"], max(ranks))
        for kind, source in kinds.items():
            loaders = {f"{kind}, {w} ranks": Loader(source, w, lanes) for w in ranks}
            steps = settings["steps"]
            timings = interleaved({k: functools.partial(a.make, steps) for k, a in loaders.items()}, 1, settings["repeats"])
            found += rows(timings, {k: a.tokens / a.made * steps for k, a in loaders.items()}, group=kind)
            per_rank[kind] = {str(w): row.rate for w, row in zip(ranks, found[-len(ranks) :], strict=True)}
            read = {w: Loader(source, w, lanes, own=1).epoch() for w in ranks}
            shares[kind] = {str(w): read[w] * w / read[ranks[0]] / ranks[0] for w in ranks}
    last, first = str(ranks[-1]), str(ranks[0])
    figures = {
        "per_rank_rate": per_rank,
        "per_rank_ratio": min(rate[last] / rate[first] for rate in per_rank.values()),
        "bytes_against_share": shares,
    }
    return Result("ranks", preset, unit, {**settings, "ranks": list(ranks), "lanes": lanes}, found, figures)


@dataclass(frozen=True)
class Kind:
    """A source, how it is trained on, the bytes that were read from it so far, and the tokens of an epoch."""

    open: Callable[[], Any]
    settings: StreamSettings
    processor: Processor
    read: Callable[[Any], float]
    tokens: float


class Loader:
    """Rank 0 of `ranks`, with so many rows a step."""

    def __init__(self, kind: Kind, ranks: int, lanes: int, own: int = ROWS) -> None:
        self.kind, self.source, self.ranks = kind, kind.open(), ranks
        masker = {"x": FixedCountMasker(kind.processor.vocabulary.mask_id)}
        mix = streams({"x": kind.settings}, {"x": self.source}, kind.processor, masker, 0, 0.0, None, lanes)
        step = (lambda _: own * ranks, own, LossSettings(), 0, 0, ranks, 0)
        self.batches = iter(training_loader(mix, masker, kind.processor, *step))
        self.tokens = self.made = 0

    def make(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.tokens += sum(micro.num_tokens for micro in next_step(self.batches))
            self.made += 1

    def epoch(self) -> float:
        """Bytes that it reads for its share of an epoch, row by row."""
        while self.tokens < self.kind.tokens / self.ranks:
            self.make(1)
        return self.kind.read(self.source)


TOKENS = 40  # of a document, roughly
WORDS = "the value of a statement is an object that holds names for which no binding exists in this block"


class Texts:
    """Documents that are made up as they are drawn, with the bytes that were."""

    def __init__(self, count: int, image: bool = False) -> None:
        self.count, self.image, self.bytes = count, image, 0.0
        self.words = WORDS.split()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        text = " ".join(self.words[i] for i in rng.integers(len(self.words), size=2 if self.image else TOKENS))
        self.bytes += len(text)
        if not self.image:
            return {"text": text}
        self.bytes += 64
        return {"text": text, "image": Image.fromarray(rng.integers(256, size=(8, 8), dtype=np.uint8))}


class Streaming:
    """A streamed dataset, with the bytes of the rows that were read."""

    def __init__(self, inner: Any, counter: list[float]) -> None:
        self.inner, self.counter, self.num_shards = inner, counter, inner.num_shards

    def shard(self, num_shards: int, index: int) -> Streaming:
        return Streaming(self.inner.shard(num_shards, index), self.counter)

    def rows(self) -> Any:
        for row in self.inner.rows():
            self.counter[0] += len(row[0]["text"])
            yield row

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __iter__(self) -> Any:
        return map(self.inner.made, self.rows())


def sources(folder: Path, documents: int, ranks: int) -> dict[str, Kind]:
    """One of each kind; tokenized as it is drawn, but for the token shards."""
    import datasets

    text = TextTokenizer.train([Texts(200)[i]["text"] for i in range(200)], vocab_size=320)
    packed = Processor.build({"text": text}, {})
    pairs = Processor.build({"text": text, "image": GreyPatchTokenizer(8, 2, 3)}, {"text": 16, "image": 16})
    running = StreamSettings({"text": 1.0}, pack=LENGTH)
    written = Texts(documents)
    datasets.Dataset.from_dict({"text": [written[i]["text"] for i in range(documents)]}).save_to_disk(str(folder / "streamed"))
    count, shards = 2 * ranks, folder / "shards"
    packed.save(shards)
    edges = [documents * k // count for k in range(count + 1)]
    records = [
        write(shards, k, packed, ((i, str(i), lambda i=i: written[i]) for i in range(edges[k], edges[k + 1])))
        for k in range(count)
    ]
    write_index(shards, records, packed)

    def streamed() -> Streaming:
        return Streaming(hugging_face(str(folder / "streamed"), streaming=True), [0.0])

    def of_shards(source: Any) -> float:
        return float(sum(source.shards[i]["bytes"] for i in source.checked))

    def token_shards() -> TokenShards:
        source = TokenShards(str(shards), open_shards=1).lazily()
        source.lazily = lambda: source  # itself, so that what it opened is seen
        return source

    some = [len(packed.text_document(written[i])) for i in range(min(documents, 1000))]
    tokens = sum(some) / len(some) * documents  # and a little more: every document has its task's token and boundaries
    of_pairs = float(documents * (sum(pairs.canvas.values()) + pairs.overhead("text_to_image")))
    drawn = StreamSettings({"text_to_image": 1.0})
    return {
        "packed text": Kind(lambda: Texts(documents), running, packed, lambda s: s.bytes, tokens),
        "pairs": Kind(lambda: Texts(documents, image=True), drawn, pairs, lambda s: s.bytes, of_pairs),
        "streamed": Kind(streamed, running, packed, lambda s: s.counter[0], tokens),
        "token shards": Kind(token_shards, running, packed, of_shards, tokens),
    }
