"""Long work says where it stands, also where nobody draws a bar."""

import io
import re
import time
from functools import partial

from rich.console import Console

from hfsparse.profiler.progress import bar
from hfsparse.progress import Bar, Clock


def test_a_log_says_each_minute_where_the_work_stands(monkeypatch):
    monkeypatch.setattr(Bar, "minute", 0.02)
    log = io.StringIO()
    with Bar(Console(file=log)) as shown:
        task = shown.add_task("niah [first]", total=4)
        shown.update(task, advance=1)
        time.sleep(0.3)
    lines = log.getvalue().splitlines()
    assert len(lines) > 1
    assert re.fullmatch(r"25 % after 0:00:00(, about .* left)?: niah \[first\]", lines[-1])


def test_a_log_speaks_of_long_work_that_is_done_in_short_stretches(monkeypatch, capsys):
    monkeypatch.setattr(Bar, "minute", 0.3)
    progress = partial(bar, Clock())
    for label in map(str, range(10)):
        for wait in progress([(label, 0.05), (label, 0.05)]):
            time.sleep(wait)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(re.match(r"\d+ % after 0:00:00", line) for line in lines)


def test_a_log_of_short_work_is_empty():
    log = io.StringIO()
    with Bar(Console(file=log)) as shown:
        shown.add_task("quick", total=1)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    with Bar(Console(file=screen, force_terminal=True)) as shown:
        shown.advance(shown.add_task("niah [first]", total=2))
    assert "niah [first]" in screen.getvalue()
    assert "50%" in screen.getvalue()
