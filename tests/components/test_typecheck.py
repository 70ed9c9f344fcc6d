"""Run-time checks are for the packages that ask for them: what these import is compiled once, and found again."""

import importlib
import sys

import pytest
from jaxtyping import TypeCheckError

from components import typecheck

OURS = """
from importlib import _bootstrap_external as reader

import theirs_of_test

named = reader.cache_from_source("x.py")

def add(x: int) -> int:
    return x
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    (tmp_path / "ours_of_test.py").write_text(OURS)
    (tmp_path / "theirs_of_test.py").write_text("def add(x: int) -> int:\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    typecheck.install(["ours_of_test"])
    yield tmp_path
    for name in ("ours_of_test", "theirs_of_test"):
        sys.modules.pop(name, None)


def test_only_what_is_checked_is_compiled_under_another_name(packages):
    for _ in range(2):  # compiled, and read from what was compiled
        ours = importlib.import_module("ours_of_test")
        with pytest.raises(TypeCheckError):
            ours.add("a")
        assert ours.theirs_of_test.add("a") == "a"
        assert "jaxtyping" not in ours.named
        kept = {file.name.split(".")[0]: "jaxtyping" in file.name for file in (packages / "__pycache__").iterdir()}
        assert kept == {"ours_of_test": True, "theirs_of_test": False}
        for name in ("ours_of_test", "theirs_of_test"):
            del sys.modules[name]
