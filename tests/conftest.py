"""Every test runs with shapes and types checked, on one thread: two test processes share the machine."""

import os

os.environ["MDM_TYPECHECK"] = "1"

import pytest
import torch

import mdm  # noqa: F401  (the checks are installed before any component is imported)
from components.sequences import collate, task_sequence
from components.vocabulary import Vocabulary

torch.set_num_threads(1)


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: a file that was written as the tests were collected may hold the time."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """Three modalities, small: text of 7 ids, images of 5, audio of two codebooks."""
    tasks = ("text", "text_to_image", "text_to_speech", "image_to_text", "speech_to_text", "joint_text_image")
    return Vocabulary.build({"text": (7,), "image": (5,), "audio": (4, 3)}, ("text", "audio"), tasks=tasks)


@pytest.fixture(scope="session")
def make_batch(vocabulary):
    """A batch of pairs: captions of 3 tokens, images of 4, one task a row."""

    def make(rows: int = 4, seed: int = 0, task: str = "text_to_image", first_index: int = 0):
        g = torch.Generator().manual_seed(seed)
        sequences = []
        for _ in range(rows):
            parts = {
                "text": torch.randint(0, 7, (2,), generator=g),
                "image": vocabulary.to_global("image", torch.randint(0, 5, (4,), generator=g)),
                "audio": vocabulary.to_global("audio", torch.randint(0, 3, (6,), generator=g)),
            }
            sequences.append(task_sequence(vocabulary, task, parts, {"text": 3, "image": 4, "audio": 8}))
        return collate([[s] for s in sequences], [[first_index + i] for i in range(rows)], vocabulary.pad_id)

    return make
