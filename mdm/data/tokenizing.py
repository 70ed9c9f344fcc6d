"""Raw samples -> token shards, a shard at a time: here, or by the actors of a Ray cluster. What a shard holds is a function of
its number alone, so that it does not matter who writes it, or how often the work is killed and begun again.

A sample whose reading or encoding raises is left out by name; one that is refused, or a machine at fault, ends the work. One
that ends its whole process (a decoder's segmentation fault, memory) is tried a few times, and then ends the work with its
shard's name; what is finished stays. The next start writes what is missing: of a folder, files may have been taken out since,
for `samples.txt` remembers the order that they had.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.data.bad import BadSample, as_it_is, attempt, name_of
from components.data.shards import INDEX, write_shard
from components.files import read_json
from components.places import AnyPath, exists, place, publish, read_bytes, sizes
from mdm.config import UserError
from mdm.data.pipeline import open_source
from mdm.data.processor import Processor

PLAN = "samples.txt"
TRIES = 3  # of a shard whose worker dies


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def record_name(number: int) -> str:
    return f"shard_{number:05d}.json"


def records(folder: AnyPath, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
    """What is written about those of these shards that are finished."""
    there = sizes(folder)
    written = [n for n in numbers if record_name(n) in there and shard_name(n) in there]
    with ThreadPoolExecutor(16) as readers:  # which may be far away
        contents = readers.map(lambda n: read_bytes(folder / record_name(n)), written)
        found = {n: read_json(folder / record_name(n), content=content) for n, content in zip(written, contents, strict=True)}
    return {n: record for n, record in found.items() if record.get("bytes") == there[shard_name(n)]}


class Planned:
    """The samples of a source in the order of the first start, each at the index that it had then.

    folder: where `samples.txt` keeps the names of a source's files (`source.files`, one for each sample); of another source,
            how many there were: its indices are all the names it has

    Raises UserError where files have come, or another source has another number of samples: then an index means another sample,
    and finished shards would hold some twice and others not at all.
    """

    def __init__(self, folder: AnyPath, source: Any) -> None:
        self.source, self.place = source, None
        files = getattr(source, "files", None)
        names = [str(file) for file in files] if isinstance(files, list) and len(files) == len(source) else None
        path = folder / PLAN
        if not exists(path):
            lines = [json.dumps(name) for name in names] if names is not None else [str(len(source))]
            publish(path, "\n".join(lines) + "\n")
        self.planned = [json.loads(line) for line in read_bytes(path).decode().split("\n")[:-1]]
        if names is None:
            if self.planned != [len(source)]:
                raise UserError(
                    f"output_dir {folder} was begun with {self.planned[0]} samples, and the source has {len(source)}: finished "
                    "shards would hold some twice, or lack some; leave a bad sample in its place (empty it), or start elsewhere"
                )
            self.planned = [f"sample {i}" for i in range(len(source))]
            return
        self.place = {name: i for i, name in enumerate(names)}
        new = sorted(set(names) - set(self.planned))
        if new:
            raise UserError(
                f"output_dir {folder} was begun without {len(new)} of the source's samples, e.g. {new[0]}; take them out until "
                "it is finished, or start elsewhere"
            )

    def __len__(self) -> int:
        return len(self.planned)

    def name_of(self, index: int) -> str:
        return name_of(self.source, index) if self.place is None else self.planned[index]

    def read(self, index: int) -> Any:
        """The sample. Raises BadSample for one that is gone, and whatever the source raises."""
        place = index if self.place is None else self.place.get(self.planned[index])
        if place is None:
            raise BadSample(self.planned[index], "it is gone from the source")
        return self.source[place]


class ShardWriter:
    """Writes shards of a source with the tokenizers of a folder; called with a shard's number, it returns its record."""

    def __init__(self, folder: str, source: Mapping[str, Any], shard_size: int) -> None:
        self.folder, self.shard_size = place(folder), shard_size
        self.processor = Processor.load(folder)
        self.samples = Planned(self.folder, open_source(source, "source"))

    def __call__(self, number: int) -> dict[str, Any]:
        start = number * self.shard_size
        stop = min(start + self.shard_size, len(self.samples))
        reads = ((i, self.samples.name_of(i), functools.partial(self.samples.read, i)) for i in range(start, stop))
        return write(self.folder, number, self.processor, reads)


def write(
    folder: AnyPath, number: int, processor: Processor, samples: Iterable[tuple[int, str, Callable[[], Any]]]
) -> dict[str, Any]:
    """One shard and its record: {"shard", "file", "count", "tokens", "bytes", "sha256", "corrupt": [[index, why], ...]}.

    samples: of each its index, its name, and what reads it

    Raises Refused for a sample that ends the work.
    """
    coded, corrupt = [], []

    def encode(sample: Any) -> dict[str, Any]:
        processor.check_rate(sample)
        return {m: t.encode(sample[m]) for m, t in processor.tokenizers.items() if m in sample}

    for index, name, read in samples:
        made = attempt(read, encode, name)
        if isinstance(made, BadSample):
            corrupt.append([index, made.why if made.name == f"sample {index}" else str(made)])
        else:
            coded.append(made)
    digest, size = write_shard(folder / shard_name(number), coded, list(processor.tokenizers))
    tokens = {m: sum(len(sample[m]) for sample in coded if m in sample) for m in processor.tokenizers}
    about = {"shard": number, "file": shard_name(number), "count": len(coded), "tokens": tokens, "bytes": size}
    record = {**about, "sha256": digest, "corrupt": corrupt}
    publish(folder / record_name(number), json.dumps(record))
    return record


def stream_shards(folder: AnyPath, source: Any, shard_size: int, processor: Processor) -> Iterator[dict[str, Any]]:
    """The shards of a source that has no length, in its order; those that are there already are read over."""
    samples = ((i, f"sample {i}", functools.partial(as_it_is, sample)) for i, sample in enumerate(source))
    for number in itertools.count():
        block = list(itertools.islice(samples, shard_size))
        if not block:
            return
        yield records(folder, [number]).get(number) or write(folder, number, processor, block)


@functools.lru_cache(maxsize=1)
def _writer(folder: str, source: str, shard_size: int) -> ShardWriter:
    return ShardWriter(folder, json.loads(source), shard_size)


def _write_shard(folder: str, source: str, shard_size: int, places: tuple[str, ...], number: int) -> dict[str, Any]:
    """In a worker of Ray, which keeps its tokenizers from shard to shard.

    places: where modules are found, those beside the config among them
    """
    sys.path.extend(place for place in places if place not in sys.path)
    return _writer(folder, source, shard_size)(number)


def ray_shards(
    folder: AnyPath, source: Mapping[str, Any], shard_size: int, numbers: list[int], workers: int, address: str | None
) -> Iterator[dict[str, Any]]:
    """The records of these shards, written by `workers` processes of a Ray cluster that sees the same folder.

    Raises UserError where Ray is not installed, and naming the shard whose worker has died `TRIES` times, or whose writing
    raises; what else is finished stays.
    """
    try:
        import ray
        from ray import exceptions
    except ImportError as error:
        raise UserError("ray_workers: Ray is not installed: pip install 'trimodal-mdm[scale]', or ray_workers=null") from error
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(num_cpus=1, max_retries=0)(_write_shard)  # Ray itself would try one that is out of memory for ever
    where = str(folder.resolve() if isinstance(folder, Path) else folder)
    arguments = (where, json.dumps(dict(source)), shard_size, tuple(sys.path))
    left, running, tries = iter(numbers), {}, Counter()
    try:
        running = {task.remote(*arguments, n): n for n in itertools.islice(left, workers)}
        while running:
            done = ray.wait(list(running), num_returns=1)[0][0]
            number = running.pop(done)
            tries[number] += 1
            try:
                yield ray.get(done)
            except exceptions.RayTaskError as error:  # Python's own, in the worker: the disk, the source
                raise UserError(f"{shard_name(number)} cannot be written: {_said(error.cause)}") from error
            except exceptions.RayError as error:
                if tries[number] == TRIES:
                    first, last = number * shard_size, (number + 1) * shard_size - 1
                    raise UserError(
                        f"{shard_name(number)}: its worker died {TRIES} times ({_said(error)}); one of its samples, {first} to "
                        f"{last}, ends the process that reads it. Mend or remove it, and start again: finished shards stay"
                    ) from error
                running[task.remote(*arguments, number)] = number
                continue
            running |= {task.remote(*arguments, n): n for n in itertools.islice(left, 1)}
    finally:
        ray.shutdown()


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def write_index(folder: AnyPath, written: list[dict[str, Any]], processor: Processor) -> dict[str, Any]:
    """index.json, from the records of all shards; returns it."""
    shards = [{k: v for k, v in r.items() if k not in ("shard", "corrupt")} for r in sorted(written, key=lambda r: r["shard"])]
    corrupt = [list(entry) for r in sorted(written, key=lambda r: r["shard"]) for entry in r["corrupt"]]
    codebooks = {modality: list(t.codebooks) for modality, t in processor.tokenizers.items()}
    samples = sum(s["count"] for s in shards)
    index = {"samples": samples, "codebooks": codebooks, "corrupt": corrupt, "shards": shards}
    publish(folder / INDEX, json.dumps(index, indent=1))
    return index
