"""Folders of nerfstudio runs: found again when they were moved, and their checkpoints checked."""

from __future__ import annotations

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nerfstudio.engine.trainer import TrainerConfig

from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.plugin.command_line import check_camera_path, config_folder


@dataclass
class MovableTrainerConfig(TrainerConfig):
    """A trainer's configuration whose run folder may be moved or copied to another machine.

    nerfstudio's commands read `config.yml` as text and do not pass on where it lay. Where the folder it names is gone,
    the one given to the running command as `--load-config` takes its place.
    """

    def get_base_dir(self) -> Path:
        folder = super().get_base_dir()
        if not folder.exists():
            return config_folder(sys.argv) or folder
        return folder

    @exit_on_bad_input()
    def get_checkpoint_dir(self) -> Path:
        """Where checkpoints are; a truncated latest one ends the command with a sentence, as does a useless path."""
        check_camera_path(sys.argv)
        folder = super().get_checkpoint_dir()
        checkpoints = sorted(folder.glob("step-*.ckpt")) if folder.is_dir() else []
        if checkpoints and not zipfile.is_zipfile(checkpoints[-1]):
            raise UserInputError(
                f"The checkpoint {checkpoints[-1]} is damaged: delete it to use an older one, or train again."
            )
        return folder
