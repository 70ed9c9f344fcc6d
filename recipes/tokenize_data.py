"""Tokenize a dataset once, into shards that train as the raw data would.

    mdm run tokenize_data                                           the quickstart's spoken words
    mdm run tokenize_data source.path=photos source.kind=image ...  your own: any source that pretrain takes
    mdm run tokenize_data ray_workers=2                             on a Ray cluster (pip install -e '.[scale]')

Writes shards, their checksums (index.json) and the tokenizers to output_dir. Run it again to go on where it was killed. A
sample that cannot be read is left out, counted and named. (A recipe called tokenize.py would hide Python's own module.)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from components.data.bad import BadSample, drawn
from components.data.sources import LOOKED_AT
from components.places import AnyPath, exists, place, publish, read_bytes
from components.progress import Bar, working
from mdm.config import UserError, at_least_one, check
from mdm.data.pipeline import corpus, open_source, tokenizers
from mdm.data.processor import Processor
from mdm.data.settings import check_tokenizers
from mdm.data.tokenizing import Planned, ShardWriter, ray_shards, records, stream_shards, write_index
from mdm.recipe import run_recipe
from mdm.training.output import check_output_dir

CONFIG = "tokenize_data"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/tokenize_data.yaml` explains each."""

    output_dir: str = MISSING
    source: dict[str, Any] = MISSING
    tokenizers: dict[str, dict[str, Any]] = MISSING
    shard_size: int = 1000
    ray_workers: int | None = None
    ray_address: str | None = None


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before data loads. Raises UserError."""
    check_output_dir(cfg.output_dir, far=True)
    check(cfg.source, "source")
    if not cfg.tokenizers:
        raise UserError("tokenizers: name at least one")
    check_tokenizers(cfg.tokenizers)
    at_least_one(cfg, "shard_size", "ray_workers")


def main(cfg: Settings) -> None:
    folder = place(cfg.output_dir)
    same_work(cfg, folder)
    try:
        written, processor = write_records(cfg, folder)
    except ValueError as error:  # a sample that is refused, a stream that ends in its midst
        raise UserError(str(error)) from error
    index = write_index(folder, written, processor)
    print(f"{index['samples']:,} samples in {len(index['shards'])} shards, {len(index['corrupt'])} corrupt ones left out")
    for number, why in index["corrupt"][:10]:
        print(f"  sample {number}: {why}")
    print(f"Written to {folder}. Train on it with a source of components.data.shards.TokenShards, path: {folder}")


def write_records(cfg: Settings, folder: AnyPath) -> tuple[list[dict[str, Any]], Processor]:
    """The records of all shards, and the tokenizers that they are of."""
    with working("reading the source, building the tokenizers"):
        source = open_source(cfg.source, "source")
        say_left_out(cfg, source)
        processor = kept_tokenizers(cfg, source, folder)
    written = []
    total = len(source) if hasattr(source, "__len__") else None
    with Bar(total=total, desc="tokenizing", unit="sample") as bar:
        for record in write_shards(cfg, source, processor, folder):
            written.append(record)
            bar.update(record["count"] + len(record["corrupt"]))
    return written, processor


def say_left_out(cfg: Settings, source: Any) -> None:
    """Prints what samples hold that no tokenizer is named for: no shard will have it. Raises UserError where that is all."""
    first = next((s for s in itertools.islice(drawn(source), LOOKED_AT) if not isinstance(s, BadSample)), {})
    lost = [part for part in first if part not in (*cfg.tokenizers, "sample_rate")]
    if first and not any(modality in first for modality in cfg.tokenizers):
        raise UserError(
            f"tokenizers: {', '.join(cfg.tokenizers)}; the source's samples hold {', '.join(first)}, and nothing of them would "
            "be kept; name a tokenizer for what is to be"
        )
    if lost:
        print(f"tokenizers.{lost[0]} is not named: the shards will be without the {' and '.join(lost)} of the source")


def same_work(cfg: Settings, folder: AnyPath) -> None:
    """Raises UserError where the folder holds shards of another source, other tokenizers or another size."""
    header = folder / "tokenize.json"
    work = {"source": cfg.source, "tokenizers": cfg.tokenizers, "shard_size": cfg.shard_size}
    if exists(header) and json.loads(read_bytes(header)) != json.loads(json.dumps(work)):
        raise UserError(f"output_dir {folder} holds shards of other settings; choose another, or delete it")
    publish(header, json.dumps(work, indent=1))


def kept_tokenizers(cfg: Settings, source: Any, folder: AnyPath) -> Processor:
    """Those of the config, saved beside the shards; of an earlier start, as they were saved then (one may be trained)."""
    if not exists(folder / "processor.json"):
        Processor.build(tokenizers(cfg.tokenizers, lambda modality: corpus({"source": source}, modality)), {}).save(folder)
    return Processor.load(folder)


def write_shards(cfg: Settings, source: Any, processor: Processor, folder: AnyPath) -> Iterator[dict[str, Any]]:
    """The records of all shards, as they are finished or found."""
    if not hasattr(source, "__len__"):
        if cfg.ray_workers is not None:
            raise UserError("ray_workers: a streamed source is read by one process; set streaming: false, or ray_workers=null")
        yield from stream_shards(folder, source, cfg.shard_size, processor)
        return
    numbers = range(-(-len(Planned(folder, source)) // cfg.shard_size))
    found = records(folder, numbers)
    yield from found.values()
    missing = [n for n in numbers if n not in found]
    if missing and cfg.ray_workers is not None:
        yield from ray_shards(folder, cfg.source, cfg.shard_size, missing, cfg.ray_workers, cfg.ray_address)
    elif missing:
        writer = ShardWriter(str(folder), cfg.source, cfg.shard_size)
        yield from (writer(n) for n in missing)


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on with the shards that are missing")
