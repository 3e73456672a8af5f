"""The one progress bar: on a terminal, in a log, with a total and without."""

import io
import sys

import pytest

from slm import console
from slm.console import duration, new_progress, progress


def test_lines_come_at_most_every_so_often(capsys, monkeypatch):
    now = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with progress("scoring", 4000, "tokens") as advance:
        for _ in range(4):
            advance(1000)
    assert capsys.readouterr().err.splitlines() == [
        "scoring 2,000/4,000 tokens  65/s  0:00:31 left",
        "scoring 4,000/4,000 tokens  65/s  0:00:00 left",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch) -> Terminal:
    """In no fixture: pytest puts its own stream back before a test's body."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    return found


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with progress("scoring", 4000, "tokens") as advance:
        advance(1000)
        advance(3000)
    said = terminal.getvalue()
    assert "scoring" in said and "4,000/4,000 tokens" in said and "/s" in said


def test_a_kernel_gets_a_bar_and_a_process_that_runs_notebooks_lines(monkeypatch):
    from ipykernel.kernelapp import IPKernelApp

    assert type(new_progress("x", 1)) is console.Progress
    monkeypatch.setattr(IPKernelApp, "initialized", lambda: True)
    bar = new_progress("x", 1)
    assert type(bar) is console.Bar
    bar.close()


def test_nothing_to_do_is_no_division_by_zero(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    with progress("verifying", 0, "bytes") as advance:
        advance(0)
    assert "verifying 0/0 bytes" in capsys.readouterr().err


def test_a_slow_rate_is_no_zero_and_none_is_known_at_first(capsys, monkeypatch):
    now = iter([0.0, 0.0, 40.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    with progress("train", 8, "") as advance:
        advance(0)
        advance(1)
    assert capsys.readouterr().err.splitlines() == ["train 0/8", "train 1/8  0.025/s  0:04:40 left"]


def test_duration():
    assert [duration(s) for s in (0.4, 59.6, 3661.0, 360000)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "100:00:00",
    ]


def test_without_a_total_what_is_done_is_said(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    with progress("prepare", None, "bytes") as advance:
        advance(1234)
        advance(1, "12k tokens/s")
        advance(2)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("prepare 1,234 bytes  ") and first.endswith("/s")
    assert others == ["prepare 1,235 bytes  12k tokens/s", "prepare 1,237 bytes  12k tokens/s"]


def test_a_bar_without_a_total_and_of_what_was_done_before(monkeypatch):
    terminal = terminal_of(monkeypatch)
    bar = new_progress("train", None, done=40)
    bar(2, "{loss}")
    bar.end()
    assert "train |" in terminal.getvalue() and "| 42  {loss}" in terminal.getvalue()


@pytest.mark.parametrize("total", [4, None])
def test_an_error_closes_the_bar(monkeypatch, total):
    terminal = terminal_of(monkeypatch)
    with pytest.raises(KeyError), progress("scoring", total, "tokens") as advance:
        advance(1)
        raise KeyError
    assert terminal.getvalue().endswith("\n")
