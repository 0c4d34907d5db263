"""What a stage cost: wall time and peak memory; and what it ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

GIB = 1024**3
PACKAGES = (
    "nfldm-ns",
    "nerfstudio",
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "lpips",
    "torchmetrics",
    "numpy",
    "vizdoom",
)


@dataclass(frozen=True)
class ResourceUse:
    """What a stage cost.

    Attributes:
        seconds: wall time.
        peak_rss_gib: largest sum of the resident memory of this process and its children, in GiB. Memory that they
            share counts for each, so this is an upper bound.
        peak_gpu_gib: largest memory in tensors on the current CUDA device, in GiB; None without one.
    """

    seconds: float
    peak_rss_gib: float
    peak_gpu_gib: float | None = None

    def as_dict(self) -> dict[str, float]:
        """For `report.json`; leaves out what was not measured."""
        return {key: round(value, 3) for key, value in asdict(self).items() if value is not None}


class ResourceMeter:
    """Measures the block it is entered for.

    Example:
        ```
        with ResourceMeter() as meter:
            train()
        print(meter.use.seconds, meter.use.peak_rss_gib)
        ```
    `use` can be read inside the block, too.
    """

    def __init__(self, interval_s: float = 0.2) -> None:
        """The memory is sampled every `interval_s` seconds by a thread."""
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._process = psutil.Process()
        self._peak_bytes = 0
        self._start = self._end = 0.0

    def __enter__(self) -> ResourceMeter:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._stop.clear()
        self._peak_bytes, self._end = 0, 0.0
        self._start = time.perf_counter()
        self._sample()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="resource-meter")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end = time.perf_counter()
        self._stop.set()
        self._thread.join()
        self._sample()

    @property
    def use(self) -> ResourceUse:
        gpu = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
        return ResourceUse((self._end or time.perf_counter()) - self._start, self._peak_bytes / GIB, gpu)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        self._peak_bytes = max(self._peak_bytes, resident_bytes(self._process))


def resident_bytes(process: psutil.Process | None = None) -> int:
    """Resident memory of a process (by default this one) and its children at this moment."""
    process = process or psutil.Process()
    total = 0
    with contextlib.suppress(psutil.Error):
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # a child may have ended meanwhile
                total += member.memory_info().rss
    return total


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def device_info() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, threads of torch, and GPU if there is one."""
    info: dict[str, Any] = {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["gpu_memory_gib"] = round(
            torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB, 1
        )
    return info


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
