"""The training loop of stages 2 and 3 and of priors: seeded by step, logged, and resumable to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.writing import atomic_path
from nfldm_ns.training.compiling import compiled_model, compiler_told
from nfldm_ns.training.draws import seed_step
from nfldm_ns.training.posthoc_ema import PowerAverages, forget_snapshots
from nfldm_ns.training.run import RunFolder
from nfldm_ns.training.schedule import Schedule
from nfldm_ns.training.trackers import Pictures

ProgressCallback = Callable[[float, dict[str, float]], None]
LossFunction = Callable[[int], dict[str, Tensor]]
Render = Callable[[], Pictures]
EMA_POWER = 0.75  # of their warm-up: the decay rises as 1 - (1 + step)^-0.75
RATE = "rate_multiple"  # of a group of parameters
HELD_OUT_SPLITS = ("val", "test", "train")


def train(
    folder: RunFolder,
    model: nn.Module,
    make_losses: Callable[[nn.Module], LossFunction],
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    rates: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    ema: EMAModel | None = None,
    render: Render | None = None,
    description: str = "Training",
    on_progress: ProgressCallback | None = None,
) -> None:
    """Trains a model to the end of its schedule, from the newest checkpoint if there is one.

    All randomness of a pass derives from the seed, its number and the rank, so an interrupted and resumed run gives the
    same weights, on the CPU bit by bit.

    Args:
        make_losses: given the (wrapped, compiled) model, returns a function from the number of a pass to weighted
            losses by name, all means over its items; their sum is minimised, and names that start with `_` are logged
            only. A step takes the mean over all passes and processes.
        rates: learning rates of the model's parts (by name, together the whole model) as multiples of the schedule's.
        betas: of AdamW.
        ema: moving averages of the model's parameters.
        render: makes pictures of what the model can do by now, every `validation_steps`; called with the averaged
            weights, in evaluation mode, and with a random state of its own.
        on_progress: called with the share done and the last losses, instead of a progress bar.
    """
    groups = _parameter_groups(model, rates or {})
    optimizer = torch.optim.AdamW(groups, schedule.learning_rate, betas, weight_decay=schedule.weight_decay)
    profiles = PowerAverages(model, schedule.ema_profiles) if schedule.ema_profiles else None
    step, spent = folder.load(model, optimizer, ema, accelerator.scaler, profiles)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    compute_losses = make_losses(compiled_model(wrapped, schedule.compile_with))
    main = accelerator.is_main_process
    if main:
        folder.start_logging(step, accelerator, schedule)
        if profiles is not None:
            forget_snapshots(folder.root, step)
    model.train()
    window: list[dict[str, Tensor]] = []
    start = time.monotonic() - spent

    def save() -> None:
        folder.save(step, time.monotonic() - start, model, prepared.optimizer, ema, accelerator.scaler, profiles)

    try:
        with _progress_bar(description, on_progress, main) as report:
            while (progress := schedule.progress(step, seconds := _seconds(start, schedule, accelerator))) < 1:
                rate = schedule.rate(step, seconds)
                for group in prepared.param_groups:
                    group["lr"] = rate * group[RATE]
                with compiler_told(schedule.compile_with):
                    window += take_step(step, wrapped, compute_losses, prepared, schedule, accelerator)
                if ema is not None:
                    ema.step(model.parameters())
                step += 1
                if profiles is not None:
                    profiles.step(model, step)
                    if main and schedule.is_snapshot(step):
                        profiles.save_snapshot(folder.root, step)
                if step % schedule.log_every == 0:
                    means = _means(window, accelerator)
                    window = []
                    _require_finite(means, step, folder)
                    if main:
                        folder.log(step, {**means, "learning_rate": rate, "seconds": time.monotonic() - start})
                        report(progress, means)
                if main and step % schedule.checkpoint_every == 0:
                    save()
                if main and render and accelerator.log_with and is_due(step, schedule.validation_steps):
                    folder.log_pictures(step, _pictures(render, model, ema, accelerator))
        if main and (folder.checkpoint is None or folder.checkpoint.name != f"checkpoint-{step:08d}"):
            save()
        if main and profiles is not None:
            profiles.save_snapshot(folder.root, step)
    finally:
        if main:
            folder.close()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()


def _parameter_groups(model: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parts that `rates` names, or the whole model."""
    if not rates:
        return [{"params": list(model.parameters()), RATE: 1.0}]
    return [{"params": list(model.get_submodule(name).parameters()), RATE: rate} for name, rate in rates.items()]


def moving_averages(model: nn.Module, decay: float) -> EMAModel:
    """Averages of a model's parameters, which are what is kept of it; their decay rises to `decay` while training."""
    return EMAModel(model.parameters(), decay=decay, use_ema_warmup=True, power=EMA_POWER)


def held_out_split(splits: Mapping[str, Sequence[str]]) -> str:
    """The split that a training is looked at by: validation, else test, else that of the training scenes."""
    return next((split for split in HELD_OUT_SPLITS if splits[split]), "train")


def keep_result(destination: Path, accelerator: Accelerator, save: Callable[[Path], None]) -> None:
    """Has the main process write what came of a training, whole or not at all, while the others wait."""
    if accelerator.is_main_process:
        with atomic_path(destination) as temporary:
            save(temporary)
    accelerator.wait_for_everyone()


def is_due(step: int, every: int) -> bool:
    """Whether something happens after this many steps; never if `every` is 0."""
    return every > 0 and step % every == 0


def take_step(
    step: int,
    wrapped: nn.Module,
    compute_losses: LossFunction,
    optimizer: AcceleratedOptimizer,
    schedule: Schedule,
    accelerator: Accelerator,
) -> list[dict[str, Tensor]]:
    """One step of the optimiser, the `step`-th; returns the losses of its passes.

    Args:
        wrapped, optimizer: as the accelerator prepared them.
    """
    passes = []
    count = accelerator.gradient_accumulation_steps
    for number in range(step * count, (step + 1) * count):
        seed_step(schedule.seed, number, accelerator.process_index)
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                losses = compute_losses(number)
            accelerator.backward(sum(value for name, value in losses.items() if not name.startswith("_")))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), schedule.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        passes.append({name: value.detach() for name, value in losses.items()})
    return passes


def _pictures(render: Render, model: nn.Module, ema: EMAModel | None, accelerator: Accelerator) -> Pictures:
    """What `render` shows of the averaged weights; the training goes on as if it had not been asked."""
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    model.eval()
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        pictures = render()
    model.train()
    if ema is not None:
        ema.restore(model.parameters())
    return pictures


def _seconds(start: float, schedule: Schedule, accelerator: Accelerator) -> float:
    """Seconds since the start; with a time budget all processes use the first one's clock."""
    seconds = time.monotonic() - start
    if schedule.time_budget_s is None or accelerator.num_processes == 1:
        return seconds
    clock = torch.tensor([seconds if accelerator.is_main_process else 0.0], device=accelerator.device)
    return float(accelerator.reduce(clock, reduction="sum"))


def _means(window: list[dict[str, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    """Mean losses over the passes and all processes."""
    names = sorted({name for losses in window for name in losses})
    means = [torch.stack([losses[name].float() for losses in window if name in losses]).mean() for name in names]
    reduced = accelerator.reduce(torch.stack(means), reduction="mean")
    return {name.lstrip("_"): float(value) for name, value in zip(names, reduced, strict=True)}


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
