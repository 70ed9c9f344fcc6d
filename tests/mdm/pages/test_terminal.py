"""What is seen of a text that is drawn over and over: read back by a small terminal."""

import io
import os
import re

import pytest

from mdm.pages import terminal
from mdm.pages.terminal import Drawing, is_live, printable, wrapped

M = "▒"


class Screen:
    """A terminal: lines of cells, a cursor, and the few sequences that a drawing uses; anything else is an error."""

    def __init__(self, columns=20):
        self.columns, self.lines, self.row, self.column, self.dim = columns, [[]], 0, 0, False
        self.dimmed = ""

    def feed(self, written):
        for steer, digits, final, c in re.findall(r"(\x1b\[(\d*)([A-Za-z]))|(.)", written, re.DOTALL):
            if steer:
                self.steer(final, digits)
            elif c == "\n":  # as a terminal's driver passes it on
                self.row, self.column = self.row + 1, 0
            elif c == "\r":
                self.column = 0
            else:
                self.put(c)
            while len(self.lines) <= self.row:
                self.lines.append([])
        return self

    def steer(self, final, digits):
        line = self.lines[self.row]
        if final == "A":
            assert int(digits) <= self.row
            self.row -= int(digits)
        elif final in "KJ":
            del line[min(self.column, self.columns - 1) :]
            if final == "J":
                del self.lines[self.row + 1 :]
        else:
            assert final == "m"
            assert digits in ("2", "22")
            self.dim = digits == "2"

    def put(self, c):
        assert c.isprintable()
        wide = terminal.cells(c)
        if self.column + wide > self.columns:
            self.row, self.column = self.row + 1, 0
            self.lines.append([])
        line = self.lines[self.row]
        line[self.column : self.column + wide] = [c, *[""] * (wide - 1)]
        self.column += wide
        self.dimmed += c if self.dim else ""

    def shown(self):
        return ["".join(line) for line in self.lines]


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(terminal, "PAUSE", 0.0)
    out = io.StringIO()
    drawing = Drawing(out, lambda: os.terminal_size((20, 6)))

    def after(*texts, finished=None):
        for text in texts:
            drawing.show(text)
        if finished is not None:
            drawing.finish(finished)
        return Screen().feed(out.getvalue())

    return after


def test_a_text_is_drawn_in_place_and_masks_are_dim(drawn):
    screen = drawn(M * 4, f"a{M}{M}b")
    assert screen.shown() == [f"a{M}{M}b"]
    assert screen.dimmed == M * 6
    assert drawn(f"a{M}cb", finished="a b").shown() == ["a b", ""]


def test_lines_that_are_gone_are_cleared_and_a_text_may_grow(drawn):
    """What blocks do, and an end token that comes earlier than what was there."""
    assert drawn("one\n" + "x" * 25, "one\nx", f"one{M}").shown() == [f"one{M}"]
    assert drawn("one\ntwo", "one\ntwo\nsix", "one\ntwo\nsix\nten").shown() == ["one", "two", "six", "ten"]
    assert drawn(finished="one\ntwo").shown() == ["one", "two", ""]


def test_a_line_as_wide_as_the_terminal_and_wide_characters(drawn):
    assert drawn("x" * 20, "y" * 20, "z" * 41).shown() == ["z" * 20, "z" * 20, "z"]
    assert drawn("字" * 11, finished="字" * 11).shown() == ["字" * 10, "字", ""]
    assert wrapped("a字字", 4) == ["a字", "字"]
    assert wrapped("e\u0301" * 3, 3) == ["e\u0301" * 3]


def test_of_a_text_higher_than_the_terminal_the_last_lines_are_shown_until_it_is_finished(drawn):
    tall = "\n".join(map(str, range(9)))
    assert drawn(tall, tall + M).shown() == ["4", "5", "6", "7", f"8{M}"]
    assert drawn(finished=tall).shown() == [*tall.split("\n"), ""]


def test_nothing_that_a_model_writes_steers_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\n\tc\r\x9b1A\ud800") == "a\ufffd[2Jb\ufffd\n    c\ufffd\ufffd1A\ufffd"
    assert printable("née 字 👩‍👧") == "née 字 👩‍👧"


def test_drawings_in_quick_succession_are_left_out_and_the_last_is_not(monkeypatch):
    monkeypatch.setattr(terminal, "PAUSE", 60.0)
    out = io.StringIO()
    drawing = Drawing(out, lambda: os.terminal_size((20, 6)))
    for text in (M * 2, f"a{M}", "ab"):
        drawing.show(text)
    assert Screen().feed(out.getvalue()).shown() == [M * 2]
    drawing.finish("ab")
    assert Screen().feed(out.getvalue()).shown() == ["ab", ""]
    drawing.show("one\ntwo")  # the next is not kept waiting
    drawing.clear()
    drawing.show(M)
    drawing.leave()
    assert Screen().feed(out.getvalue()).shown() == ["ab", M, ""]


def test_a_file_is_not_drawn_over(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w") as out:
        assert not is_live(out)
    terminal_ = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setenv("TERM", "xterm")
    assert is_live(terminal_)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(terminal_)
