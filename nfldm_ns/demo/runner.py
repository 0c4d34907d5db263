"""Runs stages one after the other so that an interrupted run continues where it stopped.

Every stage leaves a marker, `<root>/stages/<name>.json`: its settings, whether it has ended, what it cost. A stage that
has ended with the same settings, after the same earlier stages, is not repeated.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nfldm_ns.demo.console import StageConsole
from nfldm_ns.demo.settings import fingerprint, plain
from nfldm_ns.errors import UserInputError
from nfldm_ns.reports.resources import ResourceMeter
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import write_json

MARKERS = "stages"
SAVE_EVERY_S = 5.0


class Report(Protocol):
    """Told how much of a stage is done, from 0 to 1, and what there is to say about it."""

    def __call__(self, share: float, note: str = "") -> None: ...


@dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Attributes:
        name: of its marker.
        title: what it does, for people.
        run: does it; continues what an interrupted run left, and may return results to keep in the marker.
        settings: all that its results depend on besides the earlier stages.
        outputs: files and folders it makes, relative to the root; removed before the stage is done anew.
    """

    name: str
    title: str
    run: Callable[[Report], dict[str, Any] | None]
    settings: Any = None
    outputs: tuple[str, ...] = ()


@dataclass
class Marker:
    """What is known about a stage.

    Attributes:
        identity: fingerprint of its settings and of all before it.
        seconds: wall time, that of interrupted attempts included.
        peak_rss_gib: largest resident memory of the process and its children.
        results: what the stage returned.
    """

    identity: str
    settings: Any = None
    finished: bool = False
    seconds: float = 0.0
    peak_rss_gib: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)


def read_marker(root: Path, name: str) -> Marker | None:
    """The marker of a stage, None if it has not begun."""
    path = root / MARKERS / f"{name}.json"
    try:
        return Marker(**read_json(path)) if path.is_file() else None
    except (TypeError, UserInputError):
        return None  # broken or of another version: the stage is repeated


def write_marker(root: Path, name: str, marker: Marker) -> None:
    """Keeps the marker of a stage."""
    write_json(root / MARKERS / f"{name}.json", vars(marker))


def claim_folder(root: Path) -> None:
    """Makes the demo's folder.

    Raises:
        UserInputError: if it holds anything else, because stages replace what they find.
    """
    if root.is_dir() and any(root.iterdir()) and not (root / MARKERS).is_dir():
        raise UserInputError(f"{root} is not empty and holds no demo: choose another --output-dir.")
    (root / MARKERS).mkdir(parents=True, exist_ok=True)


def run_stages(root: Path, stages: Sequence[Stage], console: StageConsole, redo: str | None = None) -> None:
    """Runs what has not been done yet.

    Args:
        redo: repeats this stage and all later ones.
    """
    claim_folder(root)
    previous = ""
    for index, stage in enumerate(stages):
        identity = fingerprint([stage.name, stage.settings, previous])
        marker = None if stage.name == redo else read_marker(root, stage.name)
        if marker is not None and marker.identity == identity and marker.finished and _is_whole(root, stage):
            console.skip(stage.name, marker.seconds)
        else:
            if marker is None or marker.identity != identity or marker.finished:
                _clear(root, stages[index:])
                marker = Marker(identity, plain(stage.settings))
            _run(root, stage, marker, console)
        previous = identity


def _is_whole(root: Path, stage: Stage) -> bool:
    return all((root / path).exists() for path in stage.outputs)


def _clear(root: Path, stages: Sequence[Stage]) -> None:
    """Removes outputs and markers of stages that are out of date, the last one first."""
    for stage in reversed(stages):
        (root / MARKERS / f"{stage.name}.json").unlink(missing_ok=True)
        for path in (root / output for output in stage.outputs):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _run(root: Path, stage: Stage, marker: Marker, console: StageConsole) -> None:
    before = marker.seconds
    write_marker(root, stage.name, marker)
    console.start(stage.name, before)
    saved = time.monotonic()
    meter = ResourceMeter()

    def record() -> None:
        marker.seconds = round(before + meter.use.seconds, 2)
        marker.peak_rss_gib = round(max(marker.peak_rss_gib, meter.use.peak_rss_gib), 3)
        write_marker(root, stage.name, marker)

    def report(share: float, note: str = "") -> None:
        nonlocal saved
        console.progress(min(max(share, 0.0), 1.0), note)
        if time.monotonic() - saved > SAVE_EVERY_S:  # so that the time of a run that is killed counts, too
            saved = time.monotonic()
            record()

    try:
        with meter:
            marker.results = plain(stage.run(report) or {})
        marker.finished = True
    finally:
        console.stop()
        record()
    console.finish(marker.seconds, marker.peak_rss_gib)
