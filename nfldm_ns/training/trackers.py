"""TensorBoard and Weights & Biases for the trainings of stages 2 and 3, through accelerate's trackers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import is_wandb_available
from PIL import Image

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.writing import write_json
from nfldm_ns.training.options import ReportTo

Pictures = Mapping[str, Image.Image]
PROJECT = "nfldm-ns"


def tracker_names(report_to: ReportTo) -> list[str]:
    """Names of accelerate's trackers; `all` is TensorBoard, and Weights & Biases where it is installed.

    Raises:
        UserInputError: if Weights & Biases is asked for, but not installed.
    """
    if report_to == "wandb" and not is_wandb_available():
        raise UserInputError(
            "The package wandb, which --report-to wandb needs, is not installed: run 'pip install wandb' or choose "
            "--report-to tensorboard."
        )
    wandb = ["wandb"] if is_wandb_available() else []
    return {"tensorboard": ["tensorboard"], "wandb": wandb, "all": ["tensorboard", *wandb], "none": []}[report_to]


class Trackers:
    """The trackers of one training, on the main process.

    TensorBoard's files lie in `<root>/tensorboard`; a resumed run tells it to forget what is made again. Weights &
    Biases cannot forget, so the run goes on under its own id (`<root>/wandb.json`) behind its last entry.

    Args:
        root: the run folder.
        config: settings to show with the run in Weights & Biases.
        step: steps done.
        last_step: of the last entry that an interrupted run made.

    Raises:
        UserInputError: if Weights & Biases cannot start.
    """

    def __init__(
        self, accelerator: Accelerator, root: Path, config: dict[str, Any], step: int, last_step: float
    ) -> None:
        names = [str(name) for name in accelerator.log_with]
        options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
        self.wandb_after: float = 0
        if "wandb" in names:
            known = root / "wandb.json"
            if known.is_file():
                self.wandb_after = last_step
            else:
                write_json(known, {"id": uuid.uuid4().hex[:8]})
            run_id = read_json(known)["id"]
            options["wandb"] = {
                "id": run_id,
                "resume": "allow",
                "name": root.resolve().name,
                "dir": str(root),
                "config": config,
            }
        self.accelerator = accelerator
        accelerator.trackers = []
        try:
            accelerator.init_trackers(PROJECT, init_kwargs={name: options[name] for name in names})
        except Exception as error:
            if not type(error).__module__.startswith("wandb"):
                raise
            reason = str(error).splitlines()[0]
            raise UserInputError(
                f"Weights & Biases cannot start ({reason}): run 'wandb login', set WANDB_MODE=offline, or choose "
                "--report-to tensorboard."
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers."""
        for tracker in self._open(step):
            tracker.log(values, step=step)

    def log_pictures(self, step: int, pictures: Pictures) -> None:
        """Adds pictures."""
        arrays = {name: np.asarray(picture.convert("RGB"))[None] for name, picture in pictures.items()}
        for tracker in self._open(step):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(arrays, step=step, **layout)

    def _open(self, step: int) -> list[Any]:
        return [t for t in self.accelerator.trackers if t.name != "wandb" or step > self.wandb_after]

    def finish(self) -> None:
        """Closes all; the process group stays, unlike with `Accelerator.end_training`."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
