"""How far a piece of work is: a bar where somebody watches, lines where nobody does.

    with progress("scoring", 4000, "tokens") as advance:
        advance(1000)

A bar on a terminal and in a notebook; elsewhere, for logs, a plain line every LINE_EVERY_S. All say
the same: how many of how many, how fast or what the caller has to tell, how long it will take.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_EVERY_S = 30.0


def duration(seconds: float) -> str:
    """3661.0 -> 1:01:01"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Progress:
    """A line every LINE_EVERY_S; calling it advances it.

    total: None where it is not known
    done: what was done before, in another process
    """

    def __init__(self, label: str, total: int | None, unit: str = "", done: int = 0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.text = ""
        self.started_s = self.now_s = self.said_s = time.monotonic()

    def __call__(self, count: int, text: str = "") -> None:
        """text: what to say in place of the rate, until there is another"""
        self.done += count
        self.text = text or self.text
        self.now_s = time.monotonic()
        self.show(count)

    def show(self, count: int) -> None:
        if self.now_s - self.said_s >= LINE_EVERY_S:
            self.said_s = self.now_s
            self.say(self.left())

    def say(self, time_text: str) -> None:
        words = [f"{self.label} {self.counted()}", self.speed(), time_text]
        print("  ".join(filter(None, words)), file=sys.stderr, flush=True)

    def counted(self) -> str:
        of = "" if self.total is None else f"/{self.total:,}"
        return f"{self.done:,}{of} {self.unit}".rstrip()

    def rate(self) -> float:
        return (self.done - self.first) / max(1e-9, self.now_s - self.started_s)

    def speed(self) -> str:
        if self.done == self.first:  # nothing is known yet
            return self.text
        rate = self.rate()
        return self.text or (f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")

    def left(self) -> str:
        if self.total is None or self.done == self.first:
            return ""
        return f"{duration((self.total - self.done) / max(1e-9, self.rate()))} left"

    def close(self) -> None: ...

    def end(self) -> None:
        """Close it and say how long it took, where lines are shown."""
        self.say(f"{duration(time.monotonic() - self.started_s)} in all")


class Bar(Progress):
    """tqdm's, which is a widget in a notebook that has ipywidgets, else text."""

    def __init__(self, label: str, total: int | None, unit: str = "", done: int = 0):
        from tqdm.auto import tqdm  # here: a command that shows no bar need not wait for it

        super().__init__(label, total, unit, done)
        form = "{unit} |{bar}| {desc}"  # unit: any text that stays
        # On a terminal that does not say how large it is, tqdm would show nothing.
        fixed: dict[str, Any] = {}
        if sys.stderr.isatty():
            fixed["ncols"], fixed["nrows"] = shutil.get_terminal_size()
        options = {"bar_format": form, "unit": label, "file": sys.stderr}
        self.bar = tqdm(total=total, initial=done, **options, **fixed)

    def show(self, count: int) -> None:
        said = "  ".join(filter(None, [self.counted(), self.speed(), self.left()]))
        self.bar.set_description_str(said, refresh=False)
        self.bar.update(count)

    def close(self) -> None:
        self.bar.close()

    def end(self) -> None:
        self.close()


def is_notebook() -> bool:
    """This process is a notebook's kernel; one that runs notebooks may import ipykernel as well."""
    module = sys.modules.get("ipykernel.kernelapp")
    return module is not None and module.IPKernelApp.initialized()


def new_progress(label: str, total: int | None, unit: str = "", done: int = 0) -> Progress:
    return (Bar if sys.stderr.isatty() or is_notebook() else Progress)(label, total, unit, done)


@contextmanager
def progress(label: str, total: int | None, unit: str, done: int = 0) -> Iterator[Progress]:
    """Yields what to call with each count that was done (and, by choice, a text)."""
    shown = new_progress(label, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()
