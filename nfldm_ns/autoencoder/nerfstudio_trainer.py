"""nerfstudio's trainer of stage 1: schedules as long as the run, and checkpoints that are never half-written."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from nerfstudio.engine.optimizers import OptimizerConfig, Optimizers
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from nerfstudio.engine.trainer import Trainer
from nerfstudio.utils import comms
from torch.optim import Optimizer, lr_scheduler

from nfldm_ns.autoencoder.checkpoints import FOLDER, read_training_record, save_scene_autoencoder
from nfldm_ns.autoencoder.nerfstudio_pipeline import SceneAutoencoderPipeline
from nfldm_ns.autoencoder.run_folder import MovableTrainerConfig
from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.scenes.writing import atomic_path


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW, quick to forget old gradients."""

    _target: type = torch.optim.AdamW
    """target class to instantiate"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of the running means of gradients and of their squares"""
    weight_decay: float = 1e-4
    """decoupled weight decay"""


@dataclass
class CosineScheduleConfig(SchedulerConfig):
    """Linear warm-up, then half a cosine."""

    _target: type = field(default_factory=lambda: CosineSchedule)
    """target class to instantiate"""
    warmup_steps: int = 100
    """steps of rising learning rate, at most a tenth of the run"""
    final_factor: float = 0.01
    """learning rate at the end, relative to the highest"""
    max_steps: int | None = None
    """length; None follows --max-num-iterations"""
    time_budget_s: float | None = None
    """length in seconds, whichever ends first; None follows --time-budget-s"""
    seconds_before: float = 0.0
    """of which so many passed before the training was resumed"""

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done: 1 at its end."""
        by_time = (self.seconds_before + seconds) / self.time_budget_s if self.time_budget_s else 0.0
        return max(step / self.max_steps if self.max_steps else 0.0, by_time)


class CosineSchedule(Scheduler):
    """Builds the schedule of a `CosineScheduleConfig` whose length is known."""

    config: CosineScheduleConfig

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> lr_scheduler.LambdaLR:
        config = self.config
        if config.max_steps is None:
            raise ValueError("the length of the schedule is not known")
        warmup = min(config.warmup_steps, config.max_steps // 10)
        start = time.monotonic()

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = min(config.progress(step, time.monotonic() - start), 1.0)
            return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

        return lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class SceneAutoencoderTrainerConfig(MovableTrainerConfig):
    """Configuration of `SceneAutoencoderTrainer`."""

    _target: type = field(default_factory=lambda: SceneAutoencoderTrainer)
    """target class to instantiate"""
    time_budget_s: float | None = None
    """ends after so many seconds of training if --max-num-iterations does not end it before; results then depend on the
    machine's speed"""

    @exit_on_bad_input()
    def save_config(self) -> None:
        """Looks at the data first; the file itself is written once data and model are there (`write_config`)."""
        manager = self.pipeline.datamanager
        parser_config = copy.copy(manager.dataparser)
        if manager.data is not None:
            parser_config.data = Path(manager.data)
        parser_config.setup().collection().require_train_and_test()

    def write_config(self) -> None:
        """Writes `config.yml` with absolute paths, so that it can be used from any folder."""
        saved = copy.deepcopy(self)
        saved.output_dir = self.output_dir.resolve()
        manager = saved.pipeline.datamanager
        for holder in (saved, manager, manager.dataparser):
            if holder.data is not None:
                holder.data = holder.data.resolve()
        with atomic_path(self.get_base_dir() / "config.yml") as temporary:
            temporary.write_text(yaml.dump(saved), encoding="utf-8")


class SceneAutoencoderTrainer(Trainer):
    """Trains stage 1; beside every checkpoint lies the auto-encoder as the later stages read it."""

    config: SceneAutoencoderTrainerConfig
    pipeline: SceneAutoencoderPipeline
    checkpoint_dir: Path

    def setup(self, *args: Any, **kwargs: Any) -> None:
        super().setup(*args, **kwargs)
        self._start_time = time.monotonic()

    def train_iteration(self, step: int) -> Any:
        if self.config.time_budget_s is not None and self.seconds() >= self.config.time_budget_s:
            self.stop_training = True  # after this iteration
        # A step's random numbers depend on nothing before it, so that a resumed run continues exactly.
        torch.manual_seed(
            np.random.SeedSequence((self.config.machine.seed, step, self.local_rank)).generate_state(1)[0]
        )
        return super().train_iteration(step)

    def seconds(self) -> float:
        """Spent in training so far, before a resumption too."""
        return self._seconds_before + time.monotonic() - self._start_time

    @exit_on_bad_input()
    def setup_optimizers(self) -> Optimizers:
        """Optimisers, with schedules that end with the run."""
        if comms.is_main_process():  # now, because the viewer needs the run's folder next
            self.config.write_config()
        self._seconds_before = seconds_before(self.config)
        groups = copy.deepcopy(self.config.optimizers)
        total = first_step(self.config) + self.config.max_num_iterations
        for group in groups.values():
            schedule = group["scheduler"]
            if isinstance(schedule, CosineScheduleConfig) and schedule.max_steps is None:
                schedule.max_steps = total
                schedule.time_budget_s = schedule.time_budget_s or self.config.time_budget_s
                schedule.seconds_before = self._seconds_before
        return Optimizers(groups, self.pipeline.get_param_groups())

    @exit_on_bad_input()
    def _load_checkpoint(self) -> None:
        path = checkpoint_to_load(self.config)
        try:
            super()._load_checkpoint()
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
            self._discard_config()
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserInputError(f"{path} cannot be resumed from ({reason}): give another --load-dir.") from error
        except SystemExit:
            self._discard_config()
            raise

    def _discard_config(self) -> None:
        """Leaves no run behind that never trained."""
        if not self.checkpoint_dir.exists():
            (self.base_dir / "config.yml").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.base_dir.rmdir()

    @exit_on_bad_input()
    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint and the auto-encoder, each in one step."""
        if not comms.is_main_process():
            return
        folder, name = self.checkpoint_dir, f"step-{step:09d}.ckpt"
        with atomic_path(folder / name) as temporary:
            self.checkpoint_dir = temporary.with_suffix(".folder")
            try:
                super().save_checkpoint(step)
                (self.checkpoint_dir / name).replace(temporary)
            except RuntimeError as error:  # torch's writer hides what the system said
                raise UserInputError(
                    f"The checkpoint could not be written to {folder} ({str(error).splitlines()[0]}): "
                    "free some disk space."
                ) from error
            finally:
                _remove_folder(self.checkpoint_dir)
                self.checkpoint_dir = folder
        if self.config.save_only_latest_checkpoint:
            for old in folder.glob("*.ckpt"):
                if old.name != name:
                    old.unlink()
        save_scene_autoencoder(self.pipeline.model.autoencoder, self.base_dir, self.record(step))

    def record(self, step: int) -> dict[str, Any]:
        """What the later stages and reports want to know about this training."""
        return {
            "method": self.config.method_name,
            "data": str(self.pipeline.datamanager.collection.root.resolve()),
            "step": step,
            "scenes_per_step": self.config.pipeline.datamanager.sampling.scenes_per_batch * self.world_size,
            "seconds": round(self.seconds(), 1),
            "device": self.device,
            "seed": self.config.machine.seed,
        }


def _remove_folder(folder: Path) -> None:
    if folder.is_dir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def checkpoint_to_load(config: SceneAutoencoderTrainerConfig) -> Path | None:
    """The checkpoint that a run resumes from, by nerfstudio's rules; None to start from scratch.

    Raises:
        UserInputError: if there is none where one was asked for.
    """
    if config.load_dir is None:
        path = config.load_checkpoint
    else:
        checkpoints = sorted(config.load_dir.glob("step-*.ckpt"))
        if not checkpoints:
            raise UserInputError(
                f"There is no checkpoint in {config.load_dir}: give the nerfstudio_models folder of a run."
            )
        step = config.load_step
        path = checkpoints[-1] if step is None else config.load_dir / f"step-{step:09d}.ckpt"
    if path is not None and not path.is_file():
        raise UserInputError(f"There is no checkpoint {path}: check --load-dir, --load-step and --load-checkpoint.")
    return path


def first_step(config: SceneAutoencoderTrainerConfig) -> int:
    """The step a run starts with: 0, or the one after the checkpoint it resumes from."""
    path = checkpoint_to_load(config)
    if path is None:
        return 0
    found = re.fullmatch(r"step-(\d+)", path.stem)
    return int(found[1]) + 1 if found else 0


def seconds_before(config: SceneAutoencoderTrainerConfig) -> float:
    """What the run that is resumed had spent; 0 for a new one."""
    path = checkpoint_to_load(config)
    if path is None or not (path.parent.parent / FOLDER).is_dir():
        return 0.0
    return float(read_training_record(path.parent.parent).get("seconds", 0.0))
