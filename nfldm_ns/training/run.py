"""A training run on disk: what it is, its checkpoints and its logs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import atomic_path, clear_unfinished, write_json
from nfldm_ns.training.posthoc_ema import PowerAverages
from nfldm_ns.training.schedule import Schedule
from nfldm_ns.training.trackers import Pictures, Trackers

PROFILES = "ema_profiles.safetensors"


class RunFolder:
    """A training run on disk.

    ```
    run.json               what is trained on what; a run of something else is refused
    metrics.jsonl          one line per logged step
    tensorboard/           the same for TensorBoard, and sample renders
    wandb.json             which run of Weights & Biases this is, if it reports there
    checkpoint-<step>/     {model,optimizer,ema}.safetensors and state.json; only the newest is kept
    ema-<step>.safetensors snapshots of averages, if there are any (see `posthoc_ema.py`); all are kept
    ```

    A run that is killed at any moment, also within a checkpoint, goes on from the newest whole one. Of several
    processes the main one writes; all of them read, so on several machines the folder lies on a shared disk.

    Args:
        root: the folder; made if there is none.
        identity: settings that must not change between an interrupted run and its continuation.
        accelerator: which process this is; None if there are no others.

    Raises:
        UserInputError: if the folder holds a run with another identity.
    """

    def __init__(self, root: Path | str, identity: dict[str, Any], accelerator: Accelerator | None = None) -> None:
        self.root = Path(root)
        self.identity = json.loads(json.dumps(identity))
        path = self.root / "run.json"
        if accelerator is None or accelerator.is_main_process:
            self.root.mkdir(parents=True, exist_ok=True)
            clear_unfinished(self.root)
            if not path.exists():
                write_json(path, self.identity)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if not path.exists():
            raise UserInputError(f"{self.root} is not shared between the machines: choose a folder that all can read.")
        self._check_identity(path, self.identity)
        self._trackers: Trackers | None = None

    def _check_identity(self, path: Path, identity: dict[str, Any]) -> None:
        before = read_json(path)
        for key in sorted({*identity, *before}):
            if before.get(key) != identity.get(key):
                there, here = _first_difference(before.get(key), identity.get(key))
                raise UserInputError(
                    f"{self.root} holds a training run of another preset or of other data ({key}: {there} there, "
                    f"{here} here): choose another output folder, or delete it to start again."
                )

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(self.root.glob("checkpoint-*/state.json"))
        return found[-1].parent if found else None

    @property
    def steps(self) -> int:
        """Optimiser steps of the newest whole checkpoint; a time budget may end a training before its last one."""
        return 0 if self.checkpoint is None else int(read_json(self.checkpoint / "state.json")["step"])

    def save(
        self,
        step: int,
        seconds: float,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel | None,
        scaler: torch.amp.GradScaler | None = None,
        profiles: PowerAverages | None = None,
    ) -> None:
        """Writes a checkpoint and removes older ones."""
        old = sorted(self.root.glob("checkpoint-*"))
        destination = self.root / f"checkpoint-{step:08d}"
        with atomic_path(destination) as folder:
            folder.mkdir()
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
            save_file(_optimizer_tensors(optimizer), folder / "optimizer.safetensors")
            state: dict[str, Any] = {"step": step, "seconds": seconds}
            if ema is not None:
                shadow = {str(i): parameter.contiguous() for i, parameter in enumerate(ema.shadow_params)}
                save_file(shadow, folder / "ema.safetensors")
                state["ema_steps"] = ema.optimization_step
            if profiles is not None:
                save_file(profiles.state_dict(), folder / PROFILES)
            if scaler is not None:
                state["scaler"] = scaler.state_dict()
            write_json(folder / "state.json", state)
        for path in old:
            if path != destination:
                shutil.rmtree(path, ignore_errors=True)

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel | None,
        scaler: torch.amp.GradScaler | None = None,
        profiles: PowerAverages | None = None,
    ) -> tuple[int, float]:
        """Restores the newest checkpoint.

        Returns:
            steps done and seconds spent; (0, 0) if there is no checkpoint.

        Raises:
            UserInputError: if the checkpoint is broken or belongs to another model.
        """
        folder = self.checkpoint
        if folder is None:
            return 0, 0.0
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
            _load_optimizer_tensors(optimizer, load_file(folder / "optimizer.safetensors"))
            state = read_json(folder / "state.json")
            if ema is not None:
                shadow = load_file(folder / "ema.safetensors")
                ema.shadow_params = [shadow[str(i)].to(p.device) for i, p in enumerate(ema.shadow_params)]
                ema.optimization_step = state["ema_steps"]
            if profiles is not None:
                profiles.load_state_dict(load_file(folder / PROFILES))
            if scaler is not None and "scaler" in state:
                scaler.load_state_dict(state["scaler"])
            return int(state["step"]), float(state["seconds"])
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserInputError(
                f"The checkpoint {folder} cannot be used ({reason}): delete it to start this training again."
            ) from error

    def start_logging(self, step: int, accelerator: Accelerator, schedule: Schedule) -> None:
        """Opens the logs and forgets entries after `step`, which will be made again."""
        path = self.root / "metrics.jsonl"
        last_step = 0.0
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            steps = [_step_of(line) for line in lines]
            last_step = max((s for s in steps if s < math.inf), default=0.0)
            kept = [line for line, line_step in zip(lines, steps, strict=True) if line_step <= step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._trackers = Trackers(accelerator, self.root, {**self.identity, **asdict(schedule)}, step, last_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds one line to the logs."""
        assert self._trackers is not None
        with (self.root / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._trackers.log(step, values)

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Shows pictures in the trackers."""
        assert self._trackers is not None
        self._trackers.log_pictures(step, pictures)

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.finish()


def read_metrics(root: Path | str) -> list[dict[str, float]]:
    """The logged lines of a run, oldest first; empty if there are none."""
    path = Path(root) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) < math.inf]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was cut off


def _first_difference(there: Any, here: Any) -> tuple[Any, Any]:
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(k for k in sorted({*there, *here}) if there.get(k) != here.get(k))
        return f"{key} {there.get(key)}", f"{key} {here.get(key)}"
    return there, here


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value.contiguous() for i, entry in state.items() for name, value in entry.items()}


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
