"""`config.yml` of a generated scene, without nerfstudio's trainer, whose import takes seconds."""

from __future__ import annotations

import copy
import importlib.metadata
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

if TYPE_CHECKING:
    from nfldm_ns.plugin.generated_scene import GeneratedSceneTrainerConfig

TEMPLATE = Path(__file__).parent / "scene_config.yml"


def scene_config_yml(folder: Path) -> str:
    """The `config.yml` by which nerfstudio's commands open a generated scene.

    The configuration is always the same but for the folder and the device, so it is kept as text, of the version of
    nerfstudio in its first line. Other versions, whose configurations may have other values, write their own.

    Args:
        folder: the scene's, absolute.
    """
    template = _template()
    if template is None:
        return dumped_config(folder)
    name = folder.name
    return (
        template.replace("device_type: <device_type>\n", yaml.dump({"device_type": device_type()}))
        .replace("<experiment_name>\n", yaml.dump({"experiment_name": name}))
        .replace("<timestamp>\n", yaml.dump({"timestamp": name}))
        .replace("<folder>\n", yaml.dump(list(folder.parts)))
    )


def dumped_config(folder: Path) -> str:
    """The same from nerfstudio's own classes."""
    return yaml.dump(scene_run_config(folder))


def scene_run_config(folder: Path) -> GeneratedSceneTrainerConfig:
    """The configuration of a generated scene's folder as a run."""
    from nfldm_ns.plugin.generated_scene import scene_trainer_config

    config = copy.deepcopy(scene_trainer_config())
    config.folder = folder
    config.data = folder
    config.experiment_name = folder.name
    config.timestamp = folder.name
    config.pipeline.datamanager.data = folder
    config.pipeline.datamanager.dataparser.data = folder
    config.pipeline.model.scene = folder
    return config


def device_type() -> str:
    """The device that is there."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def _template() -> str | None:
    """The text, if it is of the nerfstudio that is installed."""
    first, text = TEMPLATE.read_text(encoding="utf-8").split("\n", 1)
    of = first.removeprefix("# nerfstudio ").split(":")[0]
    return text if of == importlib.metadata.version("nerfstudio") and os.name == "posix" else None
