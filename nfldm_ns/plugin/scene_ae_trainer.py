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
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils import comms
from torch.optim import Optimizer, lr_scheduler

from nfldm_ns.autoencoder.checkpoints import FOLDER, read_training_record, save_scene_autoencoder
from nfldm_ns.errors import BAD_INPUT_EXIT_CODE, UserInputError, exit_on_bad_input
from nfldm_ns.models import resolve_model
from nfldm_ns.plugin.run_folder import MovableTrainerConfig
from nfldm_ns.plugin.scene_ae_pipeline import SceneAutoencoderPipeline, diverged
from nfldm_ns.scenes.writing import atomic_path, clear_unfinished


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
    max_num_iterations: int = 1_000_000
    """steps of this run; after --load-dir so many further ones: give what is left of the planned steps, and the
    training goes on as if it had never stopped"""
    time_budget_s: float | None = None
    """ends after so many seconds of training if --max-num-iterations does not end it before; results then depend on the
    machine's speed; for one process"""

    @exit_on_bad_input()
    def save_config(self) -> None:
        """Looks at the data first; the file itself is written once data and model are there (`write_config`)."""
        if self.time_budget_s is not None and self.machine.num_devices * self.machine.num_machines > 1:
            raise UserInputError(
                "--time-budget-s is for one process, because several would not end together: give --max-num-iterations."
            )
        manager = self.pipeline.datamanager
        parser_config = copy.copy(manager.dataparser)
        if manager.data is not None:
            parser_config.data = Path(manager.data)
        parser_config.setup().collection().require_train_and_test()

    def write_config(self) -> None:
        """Writes `config.yml` with absolute paths, so that it can be used from any folder."""
        saved = copy.deepcopy(self)
        saved.output_dir = self.output_dir.resolve()
        if saved.pipeline.model.initial_weights is not None:
            saved.pipeline.model.initial_weights = resolve_model(saved.pipeline.model.initial_weights).resolve()
        manager = saved.pipeline.datamanager
        for holder in (saved, manager, manager.dataparser):
            if holder.data is not None:
                holder.data = holder.data.resolve()
        with atomic_path(self.get_base_dir() / "config.yml") as temporary:
            temporary.write_text(yaml.dump(saved), encoding="utf-8")


class CheckedOptimizers(Optimizers):
    """nerfstudio's optimisers, which never step along gradients that are not finite."""

    def optimizer_scaler_step_some(self, grad_scaler: Any, param_groups: list[str]) -> None:
        """Steps of some groups; `FloatingPointError` with the names of those that cannot, before any has."""
        if not grad_scaler.is_enabled():  # a scaler leaves such steps out by itself
            norms = {name: _gradient_norm(self.parameters[name]) for name in param_groups}
            broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
            if broken:
                raise FloatingPointError(*broken)
        super().optimizer_scaler_step_some(grad_scaler, param_groups)


def _gradient_norm(parameters: list[torch.nn.Parameter]) -> float:
    return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf))  # which clips nothing


class WholeCheckpointTrainer(Trainer):
    """nerfstudio's trainer with checkpoints that are never half-written, and refused with a sentence when damaged."""

    checkpoint_dir: Path

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self._clear_unfinished()
        super().setup(*args, **kwargs)

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

    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint in one step; the last good one stays if that fails."""
        self._clear_unfinished()
        folder, name = self.checkpoint_dir, f"step-{step:09d}.ckpt"
        # nerfstudio takes whatever lies in the checkpoints' folder for one, so the temporary lies beside it.
        with atomic_path(folder / name, folder.parent) as temporary:
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

    def _clear_unfinished(self) -> None:
        """Removes what was left by a killed run in this one's folder."""
        if comms.is_main_process():
            clear_unfinished(self.base_dir)


class SceneAutoencoderTrainer(WholeCheckpointTrainer):
    """Trains stage 1; beside every checkpoint lies the auto-encoder as the later stages read it.

    A step is a function of the seed, its number and the weights alone: a resumed run continues exactly, and several
    processes do what one does with the scenes of all.
    """

    config: SceneAutoencoderTrainerConfig
    pipeline: SceneAutoencoderPipeline

    @exit_on_bad_input()
    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.config.pipeline.model.keep_refinement()
        super().setup(*args, **kwargs)
        self._start_time = time.monotonic()

    def train(self) -> None:
        if not comms.is_main_process():
            del self.pipeline.datamanager.train_dataparser_outputs  # else every process would write a file about it
        super().train()

    @exit_on_bad_input()
    def train_iteration(self, step: int) -> Any:
        """One step; ends the run with a sentence if losses or gradients are not finite."""
        if self.config.time_budget_s is not None and self.seconds() >= self.config.time_budget_s:
            self.stop_training = True  # after this iteration
        # The same for all processes: what differs between scenes is drawn with them, by the sampler.
        torch.manual_seed(np.random.SeedSequence((self.config.machine.seed, step)).generate_state(1)[0])
        try:
            return super().train_iteration(step)
        except FloatingPointError as error:
            if not comms.is_main_process():  # averaged gradients are those of all processes
                raise SystemExit(BAD_INPUT_EXIT_CODE) from error
            gradients = [f"the gradient of the {name}" for name in error.args]
            scene_ids = self.pipeline.datamanager.train_batches.joint_batch_ids(step)
            raise diverged(gradients, step, scene_ids) from error

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
        return CheckedOptimizers(groups, self.pipeline.get_param_groups())

    @exit_on_bad_input()
    def save_checkpoint(self, step: int) -> None:
        """Writes the auto-encoder and a checkpoint, each in one step; the last good ones stay if that fails."""
        if not comms.is_main_process():
            return
        if not all(bool(parameter.isfinite().all()) for parameter in self.pipeline.parameters()):
            raise diverged(["a weight"], step, self.pipeline.datamanager.train_batches.joint_batch_ids(step))
        self._clear_unfinished()
        save_scene_autoencoder(self.pipeline.model.autoencoder, self.base_dir, self.record(step))
        super().save_checkpoint(step)

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


def checkpoint_to_load(config: TrainerConfig) -> Path | None:
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


def first_step(config: TrainerConfig) -> int:
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
