"""Stage 1 through nerfstudio's own trainer: `ns-train` as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nfldm_ns.demo.runner import Report
from nfldm_ns.demo.settings import METHOD
from nfldm_ns.errors import UserInputError

EXPERIMENT, TIMESTAMP = "stage1", "run"
STEPS_PER_SAVE = 100
POLL_S = 0.5
_STEP = re.compile(r"^\s*(\d+) \(\d+(?:\.\d+)?%\)", re.MULTILINE)
_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)


def run_folder(root: Path, method: str = METHOD) -> Path:
    """Where nerfstudio puts the run."""
    return root / EXPERIMENT / method / TIMESTAMP


def train_command(
    root: Path, data: Path, steps: int, seed: int, options: Sequence[str] = (), method: str = METHOD
) -> list[str]:
    """The arguments of `ns-train`, continuing the run in `root` if there is one.

    Args:
        root: the demo's folder.
        steps: of the whole training; an interrupted one does what is left.
        options: further ones.
        method: of nerfstudio.
    """
    done = steps_done(root, method)
    load = ["--load-dir", str(run_folder(root, method) / "nerfstudio_models")] if done else []
    return [
        method,
        *("--data", str(data)),
        *("--output-dir", str(root)),
        *("--experiment-name", EXPERIMENT),
        *("--timestamp", TIMESTAMP),
        *("--max-num-iterations", str(steps - done)),
        *("--steps-per-save", str(STEPS_PER_SAVE)),
        *("--machine.seed", str(seed)),
        *("--vis", "tensorboard"),
        *load,
        *options,
    ]


def steps_done(root: Path, method: str = METHOD) -> int:
    """Training steps in the newest checkpoint, 0 if there is none."""
    checkpoints = sorted((run_folder(root, method) / "nerfstudio_models").glob("step-*.ckpt"))
    return int(checkpoints[-1].stem.removeprefix("step-")) + 1 if checkpoints else 0


def train_scene_autoencoder(
    root: Path,
    data: Path,
    steps: int,
    seed: int,
    options: Sequence[str],
    log: Path,
    report: Report,
    method: str = METHOD,
    time_budget_s: float | None = None,
) -> None:
    """Trains stage 1 to its last step.

    Args:
        time_budget_s: ends it after so many seconds of training, if that is earlier.

    Raises:
        UserInputError: if `ns-train` fails; what it said is in `log`.
    """
    if steps_done(root, method) >= steps:
        return
    if time_budget_s is not None:
        options = (*options, "--time-budget-s", f"{time_budget_s:.1f}")
    arguments = train_command(root, data, steps, seed, options, method)
    command = [sys.executable, "-m", "nerfstudio.scripts.train", *arguments]
    begun = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        begins = file.tell()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while (code := _wait(process)) is None:
                step = _last_step(log, begins)
                by_time = (time.monotonic() - begun) / time_budget_s if time_budget_s else 0.0
                note = f"step {step}" if time_budget_s else f"step {step} of {steps}"
                report(max(step / steps, by_time), note if step else "starting nerfstudio")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code != 0:
        said = _ERROR.findall(_tail(log, begins))
        raise UserInputError(said[-1] if said else f"ns-train ended with exit code {code}: see {log} for the reason.")


def _wait(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return None


def _tail(log: Path, begins: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begins, log.stat().st_size - 20_000))
        return file.read().decode(errors="replace")


def _last_step(log: Path, begins: int) -> int:
    """The last step that nerfstudio printed."""
    steps = _STEP.findall(_tail(log, begins))
    return int(steps[-1]) if steps else 0
