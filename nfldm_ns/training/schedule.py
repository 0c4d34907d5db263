"""How long and how fast to train, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from nfldm_ns.errors import UserInputError
from nfldm_ns.training.draws import BatchShare
from nfldm_ns.training.options import ReportTo
from nfldm_ns.training.posthoc_ema import check_profiles
from nfldm_ns.training.trackers import tracker_names


@dataclass
class Schedule:
    """How long and how fast to train."""

    max_steps: int = 1000
    """Optimiser steps."""
    time_budget_s: float | None = None
    """Ends after this many seconds if that comes first; the learning rate then follows the clock, so results depend on
    the machine's speed."""
    batch_size: int = 4
    """Scenes per pass and process."""
    gradient_accumulation_steps: int = 1
    """Passes per optimiser step: a step learns from `batch_size` x passes x processes scenes, and however these are
    split up it is, up to rounding, the same step."""
    learning_rate: float = 1e-3
    """Peak; it rises over `warmup_steps` and falls to zero as a cosine."""
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    mixed_precision: str | None = None
    """"no", "bf16" or "fp16"; None for what `accelerate launch` says, else "no"."""
    compile_with: str | None = None
    """Backend of `torch.compile`, as "inductor", by which the model's passes are compiled; None compiles nothing."""
    log_every: int = 10
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always one."""
    validation_steps: int = 0
    """Steps between sample renders in the trackers; 0 for none."""
    ema_profiles: tuple[float, ...] = ()
    """Relative lengths of averages of the weights that snapshots are taken of, see `posthoc_ema.py`; none for none."""
    ema_snapshot_every: int = 0
    """Steps between these snapshots, the last step is always one; 0 for as many as between checkpoints."""
    report_to: ReportTo = "tensorboard"
    """Trackers, as diffusers' training scripts name them."""

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, 1 at the end."""
        by_time = seconds / self.time_budget_s if self.time_budget_s else 0.0
        return max(step / self.max_steps, by_time)

    def is_snapshot(self, step: int) -> bool:
        """Whether a snapshot of the averages is taken after this many steps."""
        return bool(self.ema_profiles) and step % (self.ema_snapshot_every or self.checkpoint_every) == 0

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of a step."""
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress(step, seconds), 1.0)))
        return self.learning_rate * warmup * cosine


def new_accelerator(schedule: Schedule, output_dir: Path | str) -> Accelerator:
    """What runs a training on a CPU, a GPU, or all processes of `accelerate launch`.

    Buffers (statistics, codebooks) are equal on all processes by themselves, and every parameter has a gradient, so
    neither is looked after in each pass.

    Raises:
        UserInputError: if a tracker is not installed, or the schedule makes no sense.
    """
    if schedule.gradient_accumulation_steps < 1 or schedule.batch_size < 1:
        raise UserInputError("--batch-size and --gradient-accumulation-steps must be at least 1: give larger numbers.")
    check_profiles(schedule.ema_profiles, schedule.ema_snapshot_every)
    AcceleratorState._reset_state()  # one process may train one model after another, with other precisions
    return Accelerator(
        mixed_precision=schedule.mixed_precision,
        gradient_accumulation_steps=schedule.gradient_accumulation_steps,
        log_with=tracker_names(schedule.report_to) or None,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(Path(output_dir) / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def joint_batch_size(schedule: Schedule, accelerator: Accelerator) -> int:
    """Scenes that one optimiser step learns from, over all passes and processes."""
    return schedule.batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes


def batch_share(schedule: Schedule, accelerator: Accelerator | None = None) -> BatchShare:
    """What a process works on in every step; without an accelerator it is alone and a pass is a step."""
    if accelerator is None:
        return BatchShare(schedule.seed, schedule.batch_size, schedule.batch_size)
    joint = joint_batch_size(schedule, accelerator)
    return BatchShare(schedule.seed, schedule.batch_size, joint, accelerator.process_index, accelerator.num_processes)
