"""Clocks and rates on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nfldm_ns.reports.resources import GIB, resident_bytes


def wait(device: str) -> None:
    """Until all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def median_seconds(work: Callable[[], object], device: str, repeats: int, budget_s: float) -> float:
    """Median wall time of calls after a first one, in which a GPU picks its kernels; at least of one.

    Args:
        repeats: at most so many.
        budget_s: no further call begins after so many seconds.
    """
    work()
    begun, times = time.perf_counter(), [seconds_of(work, device)]
    while len(times) < repeats and time.perf_counter() - begun < budget_s:
        times.append(seconds_of(work, device))
    return statistics.median(times)


def flops_of(work: Callable[[], object]) -> int:
    """Multiplications and additions of convolutions, matrix products and attention in a call, backward passes too."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(device: str, dtype: torch.dtype, size: int, budget_s: float = 2.0) -> float:
    """FLOPs per second of products of `size` x `size` matrices: what the device can do at its best here."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: a @ a, device, 20, budget_s)


class Memory:
    """The most memory in GiB since it was made: of tensors on a GPU, else what the process has by now."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        used = torch.cuda.max_memory_allocated() if self.device == "cuda" else resident_bytes()
        return used / GIB


def measured_step(step: Callable[[], Any], device: str, rate: float, repeats: int, budget_s: float) -> dict[str, float]:
    """A training step's speed and memory.

    Args:
        rate: FLOPs per second of large matrix products (`matrix_rate`).

    Returns:
        `steps_per_second`, `seconds` per step, `peak_gib`, `tflops` that a step needs, and `of_peak`, the share of
        `rate` that it reaches.
    """
    memory = Memory(device)
    flops = flops_of(step)
    seconds = median_seconds(step, device, repeats, budget_s)
    return {
        "steps_per_second": 1 / seconds,
        "seconds": seconds,
        "peak_gib": memory.peak_gib(),
        "tflops": flops / 1e12,
        "of_peak": flops / seconds / rate,
    }
