"""A study's page shows what is there: of a table alone neither curves nor samples, but its finding, its figure, every run."""

import importlib
import json
import shutil
import subprocess

import pytest

from mdm.config import UserError
from mdm.studies.page import QUESTIONS, write_page
from mdm.studies.table import write_table

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of a question, whose finding costs nothing here."""
    module = importlib.import_module("mdm.studies.schedules")
    monkeypatch.setattr(module, "conclude", lambda rows: ({}, f"**{len(rows)}** runs (90 % interval: 1 to 2)."))
    monkeypatch.setattr(module, "draw", lambda rows, summary: b"png")
    rows = [{"cell": f"c{i}", "seed": i, "loss": i / 3, "tokens": 5, "note": "long " * 40} for i in range(4)]
    write_table(tmp_path / "schedules_mine.parquet", rows)
    return tmp_path / "schedules_mine.parquet"


def test_a_table_alone_is_a_page_with_what_it_holds(table):
    page = write_page(table).read_text()
    assert (table.parent / "schedules_mine.html").is_file()
    assert "<title>Schedules: " in page  # what is asked, and not where it lies
    assert str(table.parent) not in page
    assert "4 runs; made from schedules_mine.parquet alone." in page
    assert "<strong>4</strong> runs (90 % interval: 1 to 2)." in page
    assert "There is no folder runs/ beside the table" in page
    for absent in ("<h2>Curves", "<h2>Samples", "<select"):
        assert absent not in page


def test_a_runs_curves_are_a_choice_of_all_quantities(table):
    own = table.parent / "runs" / "c1"
    own.mkdir(parents=True)
    (own / "history.jsonl").write_text("".join(json.dumps({"step": i, "tokens": i, "mine": i}) + "\n" for i in range(3)))
    page = write_page(table).read_text()
    assert "<h2>Curves" in page
    assert "tick runs to see their curves." in page
    assert "<h2>Samples" not in page


def test_a_table_is_named_after_its_question_or_told_so(table):
    other = table.rename(table.parent / "mine.parquet")
    with pytest.raises(UserError, match=f"named after the question that it answers: {', '.join(QUESTIONS)}"):
        write_page(other)
    with pytest.raises(UserError, match=r"no table of a study; .* \(did you mean 'mine.parquet'\?\)"):
        write_page(table.parent / "mime.parquet")


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_what_is_the_same_in_every_run_is_said_once_and_nothing_is_cut(table):
    """The script runs to its end, in a browser, without the elements that a table alone has no use for."""
    page = write_page(table)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    shown = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "4 of 4 runs" in shown
    assert "The same in every run: tokens 5, note long" in shown
