"""The training loop of stages 2 and 3: seeded by step, logged, and resumable to the bit."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import atomic_path, clear_unfinished, write_json
from nfldm_ns.tracking import Pictures, ReportTo, Trackers, tracker_names

ProgressCallback = Callable[[float, dict[str, float]], None]
LossFunction = Callable[[int], dict[str, Tensor]]
Render = Callable[[], Pictures]


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
    log_every: int = 10
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always one."""
    validation_steps: int = 0
    """Steps between sample renders in the trackers; 0 for none."""
    report_to: ReportTo = "tensorboard"
    """Trackers, as diffusers' training scripts name them."""

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, 1 at the end."""
        by_time = seconds / self.time_budget_s if self.time_budget_s else 0.0
        return max(step / self.max_steps, by_time)

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


class RunFolder:
    """A training run on disk.

    ```
    run.json               what is trained on what; a run of something else is refused
    metrics.jsonl          one line per logged step
    tensorboard/           the same for TensorBoard, and sample renders
    wandb.json             which run of Weights & Biases this is, if it reports there
    checkpoint-<step>/     {model,optimizer,ema}.safetensors and state.json; only the newest is kept
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


def batch_positions(batch_size: int, number: int, rank: int = 0, world_size: int = 1) -> range:
    """Places of one process's items of one pass in the endless sequence of all items of all epochs.

    Passes and processes take turns, so that the items of a step are the same however they are split up.

    Args:
        number: of the pass, counted over all steps.
    """
    first = (number * world_size + rank) * batch_size
    return range(first, first + batch_size)


def batch_indices(
    num_items: int, batch_size: int, number: int, seed: int, rank: int = 0, world_size: int = 1
) -> list[int]:
    """Items of one pass: every item once per epoch, in an order that only the seed decides."""
    indices = []
    for position in batch_positions(batch_size, number, rank, world_size):
        epoch, index = divmod(position, num_items)
        indices.append(int(np.random.default_rng((seed, epoch)).permutation(num_items)[index]))
    return indices


class ItemDraws:
    """Random numbers of the items of a batch, which depend on their places in the sequence, not on the batch.

    Attributes:
        generators: one per item, on the device.
    """

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        seeds = [_mix(seed, position, 0, 1) for position in positions]
        self._on_cpu = [torch.Generator().manual_seed(value) for value in seeds]
        self.generators = self._on_cpu
        if self.device.type != "cpu":
            self.generators = [torch.Generator(self.device).manual_seed(value) for value in seeds]

    def normal(self, like: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Standard normal numbers of the shape of a tensor."""
        return randn_tensor(like.shape, generator=self.generators, device=self.device, dtype=like.dtype)

    def integers(self, high: int) -> Int[Tensor, "batch"]:
        """One number below `high` per item, on the CPU."""
        return torch.cat([torch.randint(high, (1,), generator=generator) for generator in self._on_cpu])

    def uniform(self) -> Float[Tensor, "batch"]:
        """One number in [0, 1) per item, on the CPU."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self._on_cpu])

    def permutation(self, item: int, count: int) -> Int[Tensor, "count"]:
        """An order of an item's `count` parts, on the CPU."""
        return torch.randperm(count, generator=self._on_cpu[item])


def seed_step(seed: int, number: int, rank: int = 0) -> int:
    """Seeds torch for one pass, so that a resumed run draws what an uninterrupted one would; returns the seed used."""
    value = _mix(seed, number, rank)
    torch.manual_seed(value)
    return value


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train(
    folder: RunFolder,
    model: nn.Module,
    make_losses: Callable[[nn.Module], LossFunction],
    schedule: Schedule,
    accelerator: Accelerator,
    *,
    ema: EMAModel | None = None,
    render: Render | None = None,
    description: str = "Training",
    on_progress: ProgressCallback | None = None,
) -> None:
    """Trains a model to the end of its schedule, from the newest checkpoint if there is one.

    All randomness of a pass derives from the seed, its number and the rank, so an interrupted and resumed run gives the
    same weights, on the CPU bit by bit.

    Args:
        make_losses: given the (wrapped) model, returns a function from the number of a pass to weighted losses by name,
            all means over its items; their sum is minimised, and names that start with `_` are logged only. A step
            takes the mean over all passes and processes.
        ema: moving averages of the model's parameters.
        render: makes pictures of what the model can do by now, every `validation_steps`; called with the averaged
            weights, in evaluation mode, and with a random state of its own.
        on_progress: called with the share done and the last losses, instead of a progress bar.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    step, spent = folder.load(model, optimizer, ema, accelerator.scaler)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    compute_losses = make_losses(wrapped)
    main = accelerator.is_main_process
    if main:
        folder.start_logging(step, accelerator, schedule)
    model.train()
    window: list[dict[str, Tensor]] = []
    start = time.monotonic() - spent

    def save() -> None:
        folder.save(step, time.monotonic() - start, model, prepared.optimizer, ema, accelerator.scaler)

    try:
        with _progress_bar(description, on_progress, main) as report:
            while (progress := schedule.progress(step, seconds := _seconds(start, schedule, accelerator))) < 1:
                rate = schedule.rate(step, seconds)
                for group in prepared.param_groups:
                    group["lr"] = rate
                window += _step(step, wrapped, compute_losses, prepared, schedule, accelerator)
                if ema is not None:
                    ema.step(model.parameters())
                step += 1
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
    finally:
        if main:
            folder.close()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()


def is_due(step: int, every: int) -> bool:
    """Whether something happens after this many steps; never if `every` is 0."""
    return every > 0 and step % every == 0


def _step(
    step: int,
    wrapped: nn.Module,
    compute_losses: LossFunction,
    optimizer: AcceleratedOptimizer,
    schedule: Schedule,
    accelerator: Accelerator,
) -> list[dict[str, Tensor]]:
    """One step of the optimiser; returns the losses of its passes."""
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
