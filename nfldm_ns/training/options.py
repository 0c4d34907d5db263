"""What the commands that train stages 2 and 3 and priors share."""

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from nfldm_ns.errors import UserInputError

if TYPE_CHECKING:
    import torch

ReportTo = Literal["tensorboard", "wandb", "all", "none"]
MixedPrecision = Literal["no", "bf16", "fp16"]


@dataclass
class ScheduleOptions:
    """How long and how fast to train, of each network; by default as the preset says."""

    max_steps: int | None = None
    """Optimiser steps."""
    time_budget_s: float | None = None
    """Ends after this many seconds if that comes first."""
    batch_size: int | None = None
    """Scenes (of priors: images) per pass and process."""
    gradient_accumulation_steps: int | None = None
    """Passes per optimiser step: a step learns from this many times `--batch-size` (times the processes)."""
    learning_rate: float | None = None
    """Its peak."""
    mixed_precision: MixedPrecision | None = None
    """By default the preset's, else what `accelerate launch` says; on a CPU single precision, as the presets' bf16 is
    for GPUs, and many times slower there."""
    compile: bool = False
    """Compile the network's passes with torch.compile: the first step takes a minute or more, and later ones less; it
    needs Triton on a GPU, a C++ compiler on a CPU."""
    validation_steps: int | None = None
    """Steps between sample pictures in the trackers; 0 for none."""
    report_to: ReportTo = "tensorboard"
    """Where losses and pictures are shown, besides metrics.jsonl; wandb needs `pip install wandb`."""
    seed: int = 0
    """Of weights, order and noise."""

    def given(self) -> dict[str, Any]:
        """Fields of `nfldm_ns.training.schedule.Schedule` that the user gave; the preset has the others."""
        values = asdict(self)
        values["compile_with"] = "inductor" if values.pop("compile") else None
        values["mixed_precision"] = precision_here(self.mixed_precision)
        return {name: value for name, value in values.items() if value is not None}


def precision_here(asked_for: str | None) -> str | None:
    """What was asked for here or of `accelerate launch`; else "no" on a CPU, and None, the preset's, on a GPU."""
    if asked_for is not None or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return asked_for
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") or not torch.cuda.is_available()
    return "no" if on_cpu else None


def looks_at_maps(condition: str, bev_dropout: float | None) -> bool:
    """Whether a training sees semantic maps; `UserInputError` if it is to drop maps that it does not see."""
    if bev_dropout is not None and condition != "bev":
        raise UserInputError("--bev-dropout drops maps, which --condition bev alone looks at: add it.")
    return condition == "bev"


def is_first_process() -> bool:
    """Whether this process is the one that writes and talks."""
    from accelerate import Accelerator

    return Accelerator().is_main_process


def process_device() -> "torch.device":
    """The device of this process."""
    from accelerate import Accelerator

    return Accelerator().device
