"""What an editor knows of the library, by pyright: not in the suite, since each look takes it many seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch
from torch import Tensor

from components.samplers import Confidence, sample

def logits(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, 5)

tokens = torch.full((1, 4), 4)
right = sample(Confidence(num_steps=8, temperature=1), logits, tokens, mask_id=4)
steps_of_half = Confidence(num_steps=8.5)
no_sampler = sample(logits, logits, tokens, mask_id=4)
no_field = right.probability
"""


def pyright(*arguments: str, cwd: Path = ROOT) -> str:
    """What it prints, of the environment that runs this test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # --verifytypes asks the first python in it
    return subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    ).stdout


def test_the_library_is_clean():
    found = pyright()
    assert found.startswith("0 errors, 0 warnings"), found


def test_every_public_symbol_of_the_components_has_a_type():
    found = pyright("--verifytypes", "components", "--ignoreexternal")
    assert "Type completeness score: 100%" in found, found


def test_a_users_mistake_is_underlined_where_it_stands_and_nothing_else_is(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    found = json.loads(pyright("--outputjson", "script.py", cwd=tmp_path))["generalDiagnostics"]
    lines = SCRIPT.splitlines()
    underlined = {lines[d["range"]["start"]["line"]].split(" = ")[0]: d["message"] for d in found}
    assert set(underlined) == {"steps_of_half", "no_sampler", "no_field"}
    assert '"float" is not assignable to "int"' in underlined["steps_of_half"]
