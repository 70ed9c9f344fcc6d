"""Every reader of lines in mdm/ reads them alike: records end at line ends alone, whatever stands inside a string."""

import json

import pytest

from components.data.bad import BadSample
from components.metrics import geneval
from mdm.config import UserError
from mdm.generation import prompts
from mdm.pages import comparison
from mdm.studies.inference.sweep import Cells
from mdm.training.history import read_history

INSIDE = "a\u2028b\x85c\u2029d"


def written(path, *rows):
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    return path


def read_cells(path):
    return list(Cells(path.parent, {}).known.values())


CELL = {"modality": INSIDE, "setting": {}}


@pytest.mark.parametrize(
    ("name", "read", "row"),
    [
        ("p.jsonl", lambda p: [row for _, row in prompts.read_jsonl(p)], {"text": INSIDE}),
        ("g.jsonl", lambda p: [{k: v for k, v in s.items() if k != "text"} for s in geneval.prompts(str(p))], {
            "prompt": INSIDE, "tag": "t", "include": [],
        }),
        ("history.jsonl", read_history, {"step": 1, "note": INSIDE}),
        ("outputs.jsonl", lambda p: [{"text": s["text"]} for s in comparison.lines(p.parent)], {"text": INSIDE}),
        ("cells.jsonl", read_cells, CELL),
    ],
    ids=["prompts", "geneval", "history", "outputs", "cells"],
)  # fmt: skip
def test_a_line_separator_inside_a_string_ends_no_record(tmp_path, name, read, row):
    other = {**row, "setting": {"n": 2}} if row is CELL else row
    assert read(written(tmp_path / name, row, other)) == [row, other]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "prompts: line 2 of .*: it is not JSON"),
        (b'{"text": "\xe4"}', r"prompts: line 2 of .*: it is not UTF-8 \(byte 0xe4 at 10\); save it as UTF-8"),
        (b"null", 'prompts: line 2 of .* must be like {"text": "..."}, got null'),
    ],
)
def test_a_prompt_that_is_none_is_named(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(UserError, match=message):
        prompts.read_jsonl(tmp_path / "p.jsonl")


@pytest.mark.parametrize(("line", "message"), [("{", "line 1: it is not JSON"), ("3", "must hold keys and values, got int")])
def test_a_line_of_geneval_that_is_none_is_named(tmp_path, line, message):
    (tmp_path / "g.jsonl").write_text(line)
    with pytest.raises(BadSample, match=message):
        geneval.prompts(str(tmp_path / "g.jsonl"))


def test_the_torn_last_line_of_a_history_or_a_sweep_is_left_out(tmp_path):
    for name in ("history.jsonl", "cells.jsonl"):
        (tmp_path / name).write_text(json.dumps({"step": 1, "modality": "text", "setting": {}}) + '\n{"step": 2, "mod')
    assert [line["step"] for line in read_history(tmp_path / "history.jsonl")] == [1]
    assert [cell["step"] for cell in read_cells(tmp_path / "cells.jsonl")] == [1]
