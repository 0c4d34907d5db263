"""What the demo says while it works: live bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

LINE_EVERY_S = 20.0


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Timetable:
    """How long all stages will take together.

    Args:
        expected: seconds by stage on some machine; what has run already tells how fast this one is.
    """

    def __init__(self, names: Sequence[str], expected: Mapping[str, float]) -> None:
        self.expected = {name: max(float(expected.get(name, 1.0)), 0.1) for name in names}
        self.actual: dict[str, float] = {}
        self._measured: set[str] = set()

    def finish(self, name: str, seconds: float, measured: bool) -> None:
        """A stage has ended; `measured` unless it was skipped."""
        self.actual[name] = seconds
        if measured:
            self._measured.add(name)

    def remaining(self, current: str | None = None, share: float = 0.0, seconds: float = 0.0) -> float:
        """Seconds until the end of all stages, with the current one at `share` after `seconds`."""
        planned = sum(self.expected[name] for name in self._measured)
        actual = sum(self.actual[name] for name in self._measured)
        if current is not None:
            planned, actual = planned + share * self.expected[current], actual + (seconds if share > 0 else 0.0)
        # The expectation weighs as much as half a minute of experience.
        pace = (actual + 30) / (planned + 30)
        later = sum(s for name, s in self.expected.items() if name not in self.actual and name != current)
        rest = 0.0 if current is None else (1 - share) * self.expected[current] * pace
        if current is not None and share > 0.05:
            rest = seconds * (1 - share) / share
        return later * pace + rest


class StageConsole:
    """Reports on stages one after the other.

    Args:
        names: of all stages, in order.
        titles: what each does.
        expected: seconds by stage.
    """

    def __init__(
        self, names: Sequence[str], titles: Sequence[str], expected: Mapping[str, float], console: Console | None = None
    ) -> None:
        self.console = console or Console(highlight=False)
        self.names, self.titles = list(names), list(titles)
        self.timetable = Timetable(names, expected)
        self.live = self.console.is_terminal
        self._bar: Progress | None = None
        self._name, self._begun, self._before, self._told = "", 0.0, 0.0, 0.0

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(escape(text), soft_wrap=True)

    def label(self, name: str) -> str:
        return f"[{self.names.index(name) + 1}/{len(self.names)}]"

    def skip(self, name: str, seconds: float) -> None:
        """A stage that an earlier run has finished."""
        self.timetable.finish(name, seconds, measured=False)
        self.say(f"{self.label(name)} {self.titles[self.names.index(name)]}: done before")

    def start(self, name: str, seconds_before: float = 0.0) -> None:
        """A stage begins; an earlier, interrupted run spent `seconds_before` on it."""
        self._name, self._before = name, seconds_before
        self._begun = self._told = time.monotonic()
        title = self.titles[self.names.index(name)]
        left = self.timetable.remaining(name)
        more = " (continued)" if seconds_before else ""
        if not self.live:
            self.say(f"{self.label(name)} {title}{more} ... about {clock(left)} left in all")
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(escape(f"{self.label(name)} {title}{more}"), total=1.0, note="")
        self._bar.start()
        self.progress(0.0)

    def progress(self, share: float, note: str = "") -> None:
        """How much of the stage is done, and what there is to say about it."""
        seconds = time.monotonic() - self._begun
        left = clock(self.timetable.remaining(self._name, share, seconds))
        text = f"{clock(seconds)}, about {left} left in all  {note}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=share, note=escape(text))
        elif time.monotonic() - self._told > LINE_EVERY_S:
            self._told = time.monotonic()
            self.say(f"{self.label(self._name)}   {share:4.0%} after {text}")

    def finish(self, seconds: float, peak_rss_gib: float) -> None:
        """The stage has ended."""
        self.stop()
        self.timetable.finish(self._name, seconds, measured=True)
        title = self.titles[self.names.index(self._name)]
        self.say(f"{self.label(self._name)} {title}: done in {clock(seconds)}, {peak_rss_gib:.1f} GiB at most")

    def stop(self) -> None:
        """Takes the live bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
