"""Hold token shards against their index, all of them: sizes, checksums, lengths, codes.

    mdm run check_shards path=runs/tokens
    mdm run check_shards path=s3://bucket/tokens workers=32

A run looks at a shard when it opens it; this looks at every one beforehand, several at a time, and changes nothing. Ends with
exit code 2 where a shard is not whole, and says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from omegaconf import MISSING

from components.data.bad import BadSample, Refused
from components.data.shards import TokenShards
from components.files import Unreachable
from components.progress import Bar
from mdm.config import UserError, at_least_one
from mdm.recipe import run_recipe

CONFIG = "check_shards"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/check_shards.yaml` explains each."""

    path: str = MISSING
    workers: int = 8


def validate(cfg: Settings) -> None:
    """Raises UserError."""
    at_least_one(cfg, "workers")


def main(cfg: Settings) -> None:
    try:
        source = TokenShards(cfg.path)
    except (OSError, ValueError) as error:
        raise UserError(f"path={cfg.path}: {error}") from error
    faults, tokens = [], dict.fromkeys(source.codebooks, 0)
    with Bar(total=len(source.shards), desc="checking", unit="shard") as bar:
        for found, fault in check_all(source, cfg.workers):
            for modality, count in found.items():
                tokens[modality] += count
            if fault is not None:
                faults.append(fault)
                bar.write(fault)
            bar.update(1)
    counts = ", ".join(f"{count:,} of {modality}" for modality, count in tokens.items())
    print(f"{len(source):,} samples in {len(source.shards):,} shards; tokens: {counts or 'none'}")
    if faults:
        raise UserError(f"{len(faults)} of {len(source.shards)} shards are not whole, the first: {faults[0]}; write them again")
    print("All are whole.")


def check_all(source: TokenShards, workers: int) -> Iterator[tuple[dict[str, int], str | None]]:
    """Tokens of each shard by modality, and what is wrong with it, if anything."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda number: check_one(source, number), range(len(source.shards)))


def check_one(source: TokenShards, number: int) -> tuple[dict[str, int], str | None]:
    """The same of one shard: every sample of it is read."""
    tokens = dict.fromkeys(source.codebooks, 0)
    try:
        shard = source.open_shard(number)
        for row in range(shard.count):
            for modality, codes in shard.spans(row).items():
                tokens[modality] += len(codes[:])
    except (Refused, BadSample, Unreachable) as error:
        return tokens, str(error)
    said = source.shards[number].get("tokens", tokens)
    return tokens, None if said == tokens else f"token shard {source.file(number)} holds {tokens}, and index.json says {said}"


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
