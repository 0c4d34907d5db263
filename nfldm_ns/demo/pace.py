"""How long the demo may train, so that it ends in time on slow machines too."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from nfldm_ns.demo.runner import MARKERS
from nfldm_ns.demo.settings import TRAININGS
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import write_json

LENGTHS = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)
LIMIT_S = 19 * 60.0  # of the 20 minutes that the demo promises
UNCERTAINTY = 1.3  # neighbours of a virtual machine change its measured speed by so much from minute to minute
LENGTH = f"{MARKERS}/length.json"


def measure_gflops(seconds: float = 4.0) -> float:
    """Speed of training a convolution like those of the demo with all threads, in 10^9 operations per second.

    Of many short trials the fastest counts: what else the machine does for a moment says little about it.
    """
    layer = nn.Conv2d(64, 64, 3, padding=1)
    images = torch.randn(8, 64, 32, 32, requires_grad=True)
    operations = 3 * 2 * images.numel() * 64 * 9  # multiplications and additions of three convolutions

    def run() -> None:
        layer(images).sum().backward()

    run()
    fastest, end = float("inf"), time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.perf_counter()
        for _ in range(5):
            run()
        fastest = min(fastest, (time.perf_counter() - begun) / 5)
    return operations / fastest / 1e9


def choose_length(expected_seconds: Mapping[str, float], slowness: float, limit_s: float = LIMIT_S) -> float:
    """The largest of `LENGTHS` that ends in time; the smallest if none does.

    Args:
        expected_seconds: by stage, on a machine of slowness 1.
        slowness: how many times longer everything seems to take here; up to `UNCERTAINTY` it counts as 1.
    """
    if slowness <= UNCERTAINTY:
        slowness = min(slowness, 1.0)
    training = sum(expected_seconds[name] for name in TRAININGS)
    rest = sum(expected_seconds.values()) - training
    return next((length for length in LENGTHS if slowness * (rest + length * training) <= limit_s), LENGTHS[-1])


def keep_length(root: Path, length: float) -> None:
    """Remembers the length of a demo's trainings: a continued one keeps it, however busy the machine is then."""
    write_json(root / LENGTH, {"length": length})


def kept_length(root: Path) -> float | None:
    """What `keep_length` wrote, None if there is nothing."""
    try:
        return float(read_json(root / LENGTH)["length"]) if (root / LENGTH).is_file() else None
    except (UserInputError, KeyError, TypeError, ValueError):
        return None  # broken: it is chosen anew
