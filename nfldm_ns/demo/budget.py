"""How the time of a demo with a time budget is shared out over its stages."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nfldm_ns.demo.runner import read_marker
from nfldm_ns.demo.shares import TIME_SHARES
from nfldm_ns.errors import UserInputError

SHORTEST_S = 60.0
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(text: str, option: str = "--time-budget") -> float:
    """Seconds of `90`, `8m`, `1h30m` or `45s`.

    Raises:
        UserInputError: for anything else, and for less than a minute.
    """
    words = text.strip().lower()
    found = _DURATION.fullmatch(words)
    if re.fullmatch(r"\d+(\.\d+)?", words):
        seconds = float(words)
    elif found and words:
        hours, minutes, rest = (int(part or 0) for part in found.groups())
        seconds = 3600.0 * hours + 60.0 * minutes + rest
    else:
        raise UserInputError(f"{option} is {text!r}, which is no time: give seconds, or such as 8m or 1h30m.")
    if seconds < SHORTEST_S:
        raise UserInputError(f"{option} is {text!r}, in which nothing can be trained: give at least 1m.")
    return seconds


@dataclass(frozen=True)
class TimeBudget:
    """What each stage may take.

    Attributes:
        root: the demo's folder, whose markers say what earlier stages took.
        total_s: of all stages.
        shares: of it, by stage in order.
    """

    root: Path
    total_s: float
    shares: Mapping[str, float] = field(default_factory=lambda: TIME_SHARES)

    def expected(self) -> dict[str, float]:
        """Seconds by stage, if each takes what it may."""
        return {name: self.total_s * share for name, share in self.shares.items() if name != "reserve"}

    def clock(self, stage: str) -> Clock:
        """The time of a stage that begins now: its share of what earlier stages left, by the shares still to come."""
        names = list(self.shares)
        before, after = names[: names.index(stage)], names[names.index(stage) :]
        markers = [read_marker(self.root, name) for name in before]
        left = self.total_s - sum(marker.seconds for marker in markers if marker is not None)
        return Clock(max(left, 0.0) * self.shares[stage] / sum(self.shares[name] for name in after))


@dataclass
class Clock:
    """Tells a stage how long it has still got.

    Attributes:
        limit_s: seconds from now on; None for no limit.
    """

    limit_s: float | None = None
    _begun: float = field(default_factory=time.monotonic)

    def left(self, share: float = 1.0) -> float | None:
        """Seconds until a share of the time is over, at least one; None without a limit."""
        if self.limit_s is None:
            return None
        return max(share * self.limit_s - (time.monotonic() - self._begun), 1.0)

    def share(self) -> float:
        """How much of the time has passed; 0 without a limit."""
        return (time.monotonic() - self._begun) / self.limit_s if self.limit_s else 0.0

    def over(self, share: float = 1.0) -> bool:
        """Whether a share of the time has passed."""
        return self.limit_s is not None and time.monotonic() - self._begun >= share * self.limit_s
