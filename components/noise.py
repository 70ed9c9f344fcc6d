"""Noise belongs to the sample, not to the machine.

Every random decision about a sample (its time, its mask, its task, whether its prompt is dropped) is drawn from a generator
keyed by (seed, stream, index). So gradient accumulation, a resume and another number of devices all see the same noise.
"""

import hashlib

import numpy as np

STREAMS = ("time", "mask", "group", "task", "order", "mix", "sample", "window", "level", "replacement", "start", "second")


def seed_of(seed: int, name: str) -> int:
    """The seed of one stream of data, of 63 bits: so that its row r and row r of another have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()) >> 1


def sample_rng(seed: int, stream: str, index: int) -> np.random.Generator:
    """An independent generator for one purpose (`stream`) and one sample (or group) index.

    Philox is counter-based: another key or counter is another, independent sequence (Salmon et al., SC 2011).

    Raises ValueError for a stream that does not exist.
    """
    if stream not in STREAMS:
        raise ValueError(f"sample_rng: stream {stream!r} is not one of {', '.join(STREAMS)}")
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, STREAMS.index(stream), index]))
