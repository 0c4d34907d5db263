"""A training that is stopped on its way."""

from __future__ import annotations


class Interrupted(Exception):
    """What stops it."""


def interrupt(share: float, losses: object) -> None:
    """An `on_progress` that stops a training when more than 60 % of it is done."""
    if share > 0.6:
        raise Interrupted
