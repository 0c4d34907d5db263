"""What the commands that train stages 2 and 3 share."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

ReportTo = Literal["tensorboard", "wandb", "all", "none"]
NAMES = (
    *("max_steps", "time_budget_s", "batch_size", "gradient_accumulation_steps", "learning_rate", "mixed_precision"),
    *("validation_steps", "report_to", "seed"),
)


def given_settings(command: Any) -> dict[str, Any]:
    """Fields of `nfldm_ns.training.Schedule` that a command's user gave; the preset has the others."""
    return {name: getattr(command, name) for name in NAMES if getattr(command, name) is not None}


def is_first_process() -> bool:
    """Whether this process is the one that writes and talks."""
    from accelerate import Accelerator

    return Accelerator().is_main_process


def process_device() -> "torch.device":
    """The device of this process."""
    from accelerate import Accelerator

    return Accelerator().device
