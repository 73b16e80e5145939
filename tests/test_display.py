"""What is seen while a verb works: in terminals of several widths, and elsewhere."""

import io
import logging
import os
import re
import sys
import threading
import time

import pytest
from rich.console import Console

from zsplg_ray.display import MOST_LINES, Block, Display, View, is_live, plain_line, speaks_at

VIEW = View(
    "tune labels",
    elapsed_s=125,
    done=1234,
    total=5000,
    unit="images",
    facts=("12.3 images/s", "GPUs busy 93%", "2/4 actors up", "17 errors"),
    left_s=3725,
)


class Terminal(io.StringIO):
    """Says that it is one."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def drawn(view: View, width: int, **options) -> list[str]:
    stream = io.StringIO()
    options = {"force_terminal": True, "color_system": "standard", **options}
    Console(file=stream, width=width, **options).print(Block(lambda: view))
    return stream.getvalue().splitlines()


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("width", [20, 40, 45, 80, 120, 300])
def test_the_block_fits_and_says_all_that_there_is_room_for(width):
    lines = [bare(line) for line in drawn(VIEW, width)]
    assert len(lines) <= MOST_LINES and all(len(line) < width for line in lines)
    assert lines[0].startswith("tune labels")
    told = " ".join(" ".join(lines).split())
    if width >= 40:
        assert "1,234/5,000 images" in told
        for fact in (*VIEW.facts, "2 min 05 s so far", "1 h 02 min left"):
            assert fact in told, "none is broken over two lines"


@pytest.mark.parametrize("width", [40, 80])
def test_what_is_waited_for_is_said_while_nothing_can_be_counted(width):
    lines = [bare(line) for line in drawn(View("label", 12, waits="starting Ray"), width)]
    assert lines[0].startswith("label ") and lines[1] == "  starting Ray, 12 s"


def test_no_color_has_none():
    lines = drawn(VIEW, 80, no_color=True)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", "\n".join(lines)) and "1,234" in lines[0]
    full = drawn(View("label", 1, done=1, total=2), 80, no_color=True)
    assert 0 < full[0].count("━") < 30, "what is not done is not drawn as if it were"


def test_long_names_and_wide_letters_are_cut():
    view = View("label", 1, waits="讀" * 100, done=1, total=2, facts=("x" * 500,))
    assert all(len(bare(line)) < 40 for line in drawn(view, 40))


def test_a_terminal_gets_a_block_that_goes_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, out = Terminal(), Terminal()
    monkeypatch.setattr("sys.stdout", out)
    with Display(lambda: VIEW, stream=stream) as display:
        display.say("trial 1 [red]done[/red] \x1b[2J")
    told = stream.getvalue()
    assert "1,234/5,000 images" in bare(told) and out.getvalue() == ""
    assert "trial 1 [red]done[/red] \\x1b[2J\n" in bare(told)
    assert "\x1b[?25" not in told, "the cursor is left alone: a kill would leave it hidden"
    assert told.rstrip().endswith("\x1b[2K"), "the block was removed"


def test_a_last_line_stays_where_work_was_interrupted_or_stdout_goes_elsewhere(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    stream = Terminal()
    with Display(lambda: VIEW, stream=stream):
        pass
    assert bare(stream.getvalue()).endswith(plain_line(VIEW) + "\n")
    monkeypatch.setattr("sys.stdout", Terminal())
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Display(lambda: VIEW, stream=stream):
        raise KeyboardInterrupt
    assert bare(stream.getvalue()).endswith(plain_line(VIEW) + "\n")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_lines(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    stream = Terminal()
    assert not is_live(stream)
    with Display(lambda: VIEW, stream=stream):
        pass
    assert stream.getvalue() == plain_line(VIEW) + "\n"


def test_lines_come_every_ten_seconds_and_then_rarer():
    times = [speaks_at(spoken) for spoken in range(20)]
    assert times[:6] == [10, 20, 30, 40, 50, 60] and times[6:9] == [90, 120, 150]
    assert times[14:] == [360, 420, 480, 540, 600, 660]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_elsewhere_there_are_plain_lines_without_control_characters():
    stream, clock, seen = io.StringIO(), Clock(), threading.Event()

    def look() -> View:
        seen.set()
        return View("label", clock.now, done=1, total=2, facts=("a\x1b[2Jb",))

    with Display(look, stream=stream, clock=clock) as display:
        clock.now = 10.0
        assert seen.wait(10)
        display.say("a line\nof another")
    lines = stream.getvalue().splitlines()
    assert lines.count("label: 1/2 images, a\\x1b[2Jb, 10 s") == 2, "one in time, and the last"
    assert "a line\\nof another" in lines and all(line.isprintable() for line in lines)


def test_quiet_is_quiet(capfd):
    with Display(lambda: VIEW, show=False) as display:
        display.say("x")
        time.sleep(0.01)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_said_of_work_that_never_began(capfd):
    with pytest.raises(ValueError), Display(lambda: View("label", 1, waits="listing")):
        raise ValueError
    assert capfd.readouterr() == ("", "")


def test_whoever_does_not_listen_stops_nothing():
    stream = io.StringIO()
    with Display(lambda: VIEW, stream=stream):
        stream.close()


class Gone(Terminal):
    """A terminal whose window was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_has_gone_stops_nothing(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with Display(lambda: VIEW, stream=Gone()) as display:
        for _ in range(3):
            display.say("x")
        assert display._live is not None
        assert not display._live.console._buffer, "what cannot be written is not kept"


def test_who_kept_stderr_while_there_was_a_block_still_reaches_it(monkeypatch):
    """As Ray's log does, which is set up when Ray is imported."""
    monkeypatch.setenv("TERM", "xterm")
    real, stream = io.StringIO(), Terminal()
    monkeypatch.setattr("sys.stderr", real)
    with Display(lambda: VIEW, stream=stream):
        handler = logging.StreamHandler()
        record = logging.makeLogRecord({"msg": "[red]told[/red]"})
        handler.emit(record)
        handler.stream.write("begun")
        assert real.getvalue() == ""
    assert sys.stderr is real and "\n[red]told[/red]\n" in bare(stream.getvalue()).replace(
        "\r", "\n"
    )
    stream.close()
    handler.emit(record)
    assert real.getvalue() == "begun[red]told[/red]\n"


def test_without_stderr_nothing_is_shown(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with Display(lambda: VIEW) as display:
        display.say("x")


def test_a_notebook_gets_plain_lines_where_its_reader_looks(monkeypatch):
    """Its stderr names its server's file descriptor, and says that it is a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    read, server = os.pipe()
    stream = Terminal()
    monkeypatch.setattr(stream, "fileno", lambda: server, raising=False)
    monkeypatch.setattr("sys.stderr", stream)
    with Display(lambda: VIEW):
        pass
    os.close(server)
    assert stream.getvalue() == plain_line(VIEW) + "\n" and os.read(read, 9) == b""
    os.close(read)
