"""The training loop of stages 2 and 3: seeded by step, logged, and resumable to the bit."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import atomic_path, write_json

ProgressCallback = Callable[[float, dict[str, float]], None]
LossFunction = Callable[[int], dict[str, Tensor]]


@dataclass
class Schedule:
    """How long and how fast to train."""

    max_steps: int = 1000
    """Optimiser steps."""
    time_budget_s: float | None = None
    """Ends after this many seconds if that comes first; the learning rate then follows the clock, so results depend on
    the machine's speed."""
    batch_size: int = 4
    """Scenes per step and process."""
    learning_rate: float = 1e-3
    """Peak; it rises over `warmup_steps` and falls to zero as a cosine."""
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    mixed_precision: str = "no"
    """"no", "bf16" or "fp16"."""
    log_every: int = 10
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always one."""

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, 1 at the end."""
        by_time = seconds / self.time_budget_s if self.time_budget_s else 0.0
        return max(step / self.max_steps, by_time)

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of a step."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress(step, seconds), 1.0)))
        return self.learning_rate * warmup * cosine


class RunFolder:
    """A training run on disk.

    ```
    run.json               what is trained on what; a run of something else is refused
    metrics.jsonl          one line per logged step
    tensorboard/           the same for TensorBoard
    checkpoint-<step>/     {model,optimizer,ema}.safetensors and state.json; only the newest is kept
    ```

    Args:
        root: the folder; made if there is none.
        identity: settings that must not change between an interrupted run and its continuation.

    Raises:
        UserInputError: if the folder holds a run with another identity.
    """

    def __init__(self, root: Path | str, identity: dict[str, Any]) -> None:
        self.root = Path(root)
        identity = json.loads(json.dumps(identity))
        path = self.root / "run.json"
        if path.exists():
            self._check_identity(path, identity)
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(path, identity)
        self._writer: Any = None

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

    def save(
        self, step: int, seconds: float, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None
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
            write_json(folder / "state.json", state)
        for path in old:
            if path != destination:
                shutil.rmtree(path, ignore_errors=True)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel | None) -> tuple[int, float]:
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
            return int(state["step"]), float(state["seconds"])
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserInputError(
                f"The checkpoint {folder} cannot be used ({reason}): delete it to start this training again."
            ) from error

    def start_logging(self, step: int) -> None:
        """Opens the logs and forgets entries after `step`, which will be made again."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        path = self.root / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._writer = SummaryWriter(str(self.root / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds one line to the logs."""
        with (self.root / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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


def batch_indices(
    num_items: int, batch_size: int, step: int, seed: int, rank: int = 0, world_size: int = 1
) -> list[int]:
    """Items of a step's batch: every item once per epoch, in an order that only the seed decides."""
    first = (step * world_size + rank) * batch_size
    indices = []
    for position in range(first, first + batch_size):
        epoch, index = divmod(position, num_items)
        indices.append(int(np.random.default_rng((seed, epoch)).permutation(num_items)[index]))
    return indices


def seed_step(seed: int, step: int, rank: int = 0) -> int:
    """Seeds torch for one step, so that a resumed run draws what an uninterrupted one would; returns the seed used."""
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(value)
    return value


def train(
    folder: RunFolder,
    model: nn.Module,
    make_losses: Callable[[nn.Module], LossFunction],
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    ema: EMAModel | None = None,
    description: str = "Training",
    on_progress: ProgressCallback | None = None,
) -> None:
    """Trains a model to the end of its schedule, from the newest checkpoint if there is one.

    All randomness of a step derives from the seed, the step and the rank, so an interrupted and resumed run gives the
    same weights, on the CPU bit by bit.

    Args:
        make_losses: given the (wrapped) model, returns a function from the step to weighted losses by name; their sum
            is minimised, and names that start with `_` are logged only.
        ema: moving averages of the model's parameters.
        on_progress: called with the share done and the last losses, instead of a progress bar.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    step, spent = folder.load(model, optimizer, ema)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    compute_losses = make_losses(wrapped)
    main = accelerator.is_main_process
    if main:
        folder.start_logging(step)
    model.train()
    window: list[dict[str, Tensor]] = []
    start = time.monotonic() - spent
    with _progress_bar(description, on_progress, main) as report:
        while (progress := schedule.progress(step, _agreed_seconds(start, schedule, accelerator))) < 1:
            for group in prepared.param_groups:
                group["lr"] = schedule.rate(step, time.monotonic() - start)
            seed_step(schedule.seed, step, accelerator.process_index)
            with accelerator.autocast():
                losses = compute_losses(step)
            total = sum(value for name, value in losses.items() if not name.startswith("_"))
            accelerator.backward(total)
            accelerator.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
            prepared.step()
            prepared.zero_grad(set_to_none=True)
            if ema is not None:
                ema.step(model.parameters())
            step += 1
            window.append({name: value.detach() for name, value in losses.items()})
            if step % schedule.log_every == 0:
                means = _means(window)
                window = []
                _require_finite(means, step, folder)
                if main:
                    folder.log(step, {**means, "learning_rate": group["lr"], "seconds": time.monotonic() - start})
                    report(progress, means)
            if main and step % schedule.checkpoint_every == 0:
                folder.save(step, time.monotonic() - start, model, prepared.optimizer, ema)
    if main:
        if folder.checkpoint is None or folder.checkpoint.name != f"checkpoint-{step:08d}":
            folder.save(step, time.monotonic() - start, model, prepared.optimizer, ema)
        folder.close()
    accelerator.wait_for_everyone()
    model.eval()


def _agreed_seconds(start: float, schedule: Schedule, accelerator: Accelerator) -> float:
    """Seconds since the start; with a time budget all processes use the first one's clock."""
    seconds = time.monotonic() - start
    if schedule.time_budget_s is None or accelerator.num_processes == 1:
        return seconds
    clock = torch.tensor([seconds if accelerator.is_main_process else 0.0], device=accelerator.device)
    return float(accelerator.reduce(clock, reduction="sum"))


def _means(window: list[dict[str, Tensor]]) -> dict[str, float]:
    names = {name for losses in window for name in losses}
    return {
        name.lstrip("_"): float(torch.stack([losses[name].float() for losses in window if name in losses]).mean())
        for name in sorted(names)
    }


def _require_finite(means: dict[str, float], step: int, folder: RunFolder) -> None:
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise UserInputError(
            f"The training in {folder.root} diverged ({', '.join(broken)} is not finite near step {step}): continue it "
            "from its last checkpoint with a smaller learning rate."
        )


class _progress_bar:
    """A rich progress bar, or the caller's own function."""

    def __init__(self, description: str, on_progress: ProgressCallback | None, visible: bool) -> None:
        self.on_progress = on_progress
        self.bar = None
        if on_progress is None and visible:
            text = (TextColumn("{task.description}"), TextColumn("{task.fields[losses]}"))
            self.bar = Progress(text[0], BarColumn(), TimeRemainingColumn(), text[1])
            self.task = self.bar.add_task(description, total=1.0, losses="")

    def __enter__(self) -> Callable[[float, dict[str, float]], None]:
        if self.bar is not None:
            self.bar.start()
        return self.report

    def report(self, progress: float, losses: dict[str, float]) -> None:
        if self.on_progress is not None:
            self.on_progress(progress, losses)
        elif self.bar is not None:
            shown = {name: value for name, value in losses.items() if name.endswith("loss")}
            text = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
            self.bar.update(self.task, completed=progress, losses=text)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
