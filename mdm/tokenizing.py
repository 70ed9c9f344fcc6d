"""Raw samples -> token shards, a shard at a time: here, or by the actors of a Ray cluster. What a shard holds is a function of
its number alone, so that it does not matter who writes it, or how often the work is killed and begun again."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from components.data.shards import INDEX, write_shard
from mdm.config import UserError
from mdm.data import open_source
from mdm.processor import Processor


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def record_of(folder: Path, number: int) -> dict[str, Any] | None:
    """What is written about a finished shard; None if there is none."""
    path = folder / f"shard_{number:05d}.json"
    return json.loads(path.read_text()) if path.is_file() and (folder / shard_name(number)).is_file() else None


class ShardWriter:
    """Writes shards of a source with the tokenizers of a folder; called with a shard's number, it returns its record."""

    def __init__(self, folder: str, source: Mapping[str, Any], shard_size: int) -> None:
        self.folder, self.shard_size = Path(folder), shard_size
        self.processor = Processor.load(folder)
        self.source = open_source(source, "source")

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        number = int(item["shard"])
        start = number * self.shard_size
        stop = min(start + self.shard_size, len(self.source))
        return write(self.folder, number, self.processor, ((i, self._read(i)) for i in range(start, stop)))

    def _read(self, index: int) -> Any:
        try:
            return self.source[index]
        except Exception as error:  # a decoder's, a file system's: the sample is named, and the rest goes on
            return error


def write(folder: Path, number: int, processor: Processor, samples: Iterable[tuple[int, Any]]) -> dict[str, Any]:
    """One shard and its record: {"shard", "file", "count", "bytes", "sha256", "corrupt": [[index, why], ...]}."""
    coded, corrupt = [], []
    for index, sample in samples:
        try:
            if isinstance(sample, Exception):
                raise sample
            processor.check_rate(sample)
            coded.append({m: t.encode(sample[m]) for m, t in processor.tokenizers.items() if m in sample})
        except Exception as error:
            corrupt.append([index, f"{type(error).__name__}: {error}"])
    path = folder / shard_name(number)
    digest = write_shard(path, coded, list(processor.tokenizers))
    about = {"shard": number, "file": path.name, "count": len(coded), "bytes": path.stat().st_size, "sha256": digest}
    record = {**about, "corrupt": corrupt}
    partial = folder / f"shard_{number:05d}.json.partial"
    partial.write_text(json.dumps(record))
    os.replace(partial, folder / f"shard_{number:05d}.json")
    return record


def stream_shards(folder: Path, source: Any, shard_size: int, processor: Processor) -> Iterator[dict[str, Any]]:
    """The shards of a source that has no length, in its order; those that are there already are read over."""
    samples = enumerate(source)
    for number in itertools.count():
        block = list(itertools.islice(samples, shard_size))
        if not block:
            return
        yield record_of(folder, number) or write(folder, number, processor, block)


def ray_shards(
    folder: Path, source: Mapping[str, Any], shard_size: int, numbers: list[int], workers: int, address: str | None
) -> Iterator[dict[str, Any]]:
    """The records of these shards, written by `workers` actors of a Ray cluster that sees the same folder (Ray Data).

    Raises UserError where Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("ray_workers: Ray is not installed; pip install -e '.[scale]', or set ray_workers=null") from error
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        tasks = ray.data.from_items([{"shard": n} for n in numbers], override_num_blocks=len(numbers))
        arguments = (str(folder.resolve()), dict(source), shard_size)
        yield from tasks.map(ShardWriter, fn_constructor_args=arguments, concurrency=workers).iter_rows()
    finally:
        ray.shutdown()


def write_index(folder: Path, records: list[dict[str, Any]], processor: Processor) -> dict[str, Any]:
    """index.json, from the records of all shards; returns it."""
    shards = [{k: v for k, v in r.items() if k not in ("shard", "corrupt")} for r in sorted(records, key=lambda r: r["shard"])]
    corrupt = [list(entry) for r in sorted(records, key=lambda r: r["shard"]) for entry in r["corrupt"]]
    codebooks = {modality: list(t.codebooks) for modality, t in processor.tokenizers.items()}
    samples = sum(s["count"] for s in shards)
    index = {"samples": samples, "codebooks": codebooks, "corrupt": corrupt, "shards": shards}
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=1))
    os.replace(partial, folder / INDEX)
    return index
