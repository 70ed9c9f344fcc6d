"""What is printed while a bar is open has a line of its own, and a bar moves while nothing is finished."""

import contextlib
import functools
import io
import sys
import threading
import time
import warnings

import pytest
from tqdm import tqdm

from components import progress
from components.progress import Bar, working


@contextlib.contextmanager
def one_terminal():
    """stdout and stderr as a terminal shows them: both in one text."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        yield shown


def on_a_terminal(test):
    """Gives a test that terminal. It is made in the test itself: pytest has other streams where fixtures are."""

    @functools.wraps(test)
    def run(monkeypatch):
        with one_terminal() as shown, monkeypatch.context() as patch:
            test(shown, patch)

    del run.__wrapped__
    return run


def lines(terminal):
    """What stands on each line in the end: a carriage return goes back to its beginning."""
    found = []
    for written in terminal.getvalue().split("\n"):
        line = ""
        for part in written.split("\r"):
            line = part + line[len(part) :]
        found.append(line.rstrip())
    return found


@on_a_terminal
def test_what_is_printed_in_a_loop_has_a_line_of_its_own(streams, monkeypatch):
    with Bar(total=3, desc="training") as bar:
        for i in range(3):
            print("step", i)
            print("to stderr", i, file=sys.stderr)
            bar.update()
    assert lines(streams)[:6] == ["step 0", "to stderr 0", "step 1", "to stderr 1", "step 2", "to stderr 2"]
    assert lines(streams)[6].startswith("training: 100%")
    assert sys.stdout is streams


@on_a_terminal
def test_a_line_that_is_written_in_parts_is_one(streams, monkeypatch):
    with Bar(total=1):
        print("a", end=" ", flush=True)
        print("b", end=" ")
        with pytest.warns(UserWarning, match="of a library"):
            warnings.warn("of a library", stacklevel=1)
        print("c")
        print("no end", end="")
    assert "a b c" in lines(streams)
    assert "no end" in lines(streams)


@on_a_terminal
def test_a_bar_that_is_left_open_by_an_error_gives_the_streams_back(streams, monkeypatch):
    def fail():
        bar = Bar(total=1)
        bar.update()
        raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert sys.stdout is streams


@on_a_terminal
def test_a_bar_of_another_process_changes_nothing(streams, monkeypatch):
    with Bar(total=1, disable=True):
        assert sys.stdout is streams
    with Bar([1, 2], file=io.StringIO()) as bar:
        assert list(bar) == [1, 2]


@on_a_terminal
def test_a_bar_moves_while_nothing_is_finished(streams, monkeypatch):
    monkeypatch.setattr(progress, "BEAT", 0.02)
    with Bar(total=2, desc="compiling"):
        before, until = streams.getvalue().count("\r"), time.monotonic() + 5
        while streams.getvalue().count("\r") < before + 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert streams.getvalue().count("\r") >= before + 3


@on_a_terminal
def test_what_is_quick_shows_no_clock(streams, monkeypatch):
    with working("reading"):
        print("a line")
    assert streams.getvalue() == "a line\n"
    with working("reading") as clock:
        clock.start_t -= 70
        clock.beat()
        print("another")
    assert lines(streams)[1:] == ["another", ""]
    assert "reading: 01:10" in streams.getvalue()


@on_a_terminal
def test_a_beat_leaves_the_measured_rate_alone(streams, monkeypatch):
    monkeypatch.setattr(progress, "BEAT", 0.0)
    with Bar(total=10, mininterval=0, smoothing=1) as bar:
        bar.start_t -= 10
        bar.last_print_t -= 10
        bar.beat()
        bar.update(5)
        assert bar.format_dict["rate"] == pytest.approx(0.5, rel=0.1)


def test_a_stream_that_breaks_stops_nobody_else():
    """`mdm run ... 2>&1 | head`: whoever draws the bar when the pipe breaks leaves the lock to the others."""

    class Pipe(io.StringIO):
        broken = False

        def write(self, text):
            if self.broken:
                raise BrokenPipeError
            return super().write(text)

    def draw(bar):
        with contextlib.suppress(BrokenPipeError):
            bar.refresh()

    pipe = Pipe()
    with one_terminal(), Bar(total=2, file=pipe) as bar:
        pipe.broken = True
        drawing = threading.Thread(target=draw, args=(bar,))
        drawing.start()
        drawing.join()
        pipe.broken = False
        other = threading.Thread(target=draw, args=(bar,), daemon=True)
        other.start()
        other.join(5)
        if other.is_alive():
            tqdm.set_lock(threading.RLock())  # or what comes after would hang
    assert not other.is_alive()


def test_without_a_stderr_nothing_is_drawn(monkeypatch):
    with one_terminal() as shown, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        with Bar(total=2) as bar:
            bar.update()
            print("said")
    assert shown.getvalue() == "said\n"
