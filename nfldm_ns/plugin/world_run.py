"""What makes a world's folder a nerfstudio run, and its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.generated.world_files import World
from nfldm_ns.plugin.generated_run import render_views
from nfldm_ns.plugin.generated_scene import scene_trainer_config
from nfldm_ns.plugin.pictures import render_perspective
from nfldm_ns.plugin.voxel_model import single_camera
from nfldm_ns.plugin.world_model import VIEWS, WorldModelConfig, WorldPipelineConfig
from nfldm_ns.reports.galleries import density_from_above
from nfldm_ns.scenes.views import Views, index_cameras
from nfldm_ns.scenes.writing import atomic_path, write_scene

CHECKPOINTS = "nerfstudio_models"


def write_world_run(world: World, cameras: Cameras, eval_cameras: Cameras) -> None:
    """Writes `config.yml`, a checkpoint of the renderer and the data set `views/` into a world's folder.

    Args:
        cameras, eval_cameras: of its training views, and of its validation and test views; batch shape `[N]`.
    """
    write_scene(world.folder / VIEWS, world_views(world, cameras), world_views(world, eval_cameras))
    with atomic_path(world.folder / "config.yml") as temporary:
        temporary.write_text(_config_yml(world.folder.resolve()), encoding="utf-8")
    state = {"device_indicator_param": torch.empty(0)}
    state |= {f"decoder.{name}": value for name, value in world.base_renderer.state_dict().items()}
    checkpoint = {"step": 0, "pipeline": {f"_model.{name}": value for name, value in state.items()}}
    checkpoint |= {"optimizers": {}, "schedulers": {}, "scalers": {}}
    with atomic_path(world.folder / CHECKPOINTS) as temporary:
        temporary.mkdir()
        torch.save(checkpoint, temporary / "step-000000000.ckpt")


def _config_yml(folder: Path) -> str:
    config = scene_trainer_config()
    config.folder = config.data = folder
    config.experiment_name = config.timestamp = folder.name
    config.pipeline = WorldPipelineConfig(model=WorldModelConfig(scene=folder))
    config.pipeline.datamanager.data = folder / VIEWS
    config.optimizers = {}
    return yaml.dump(config)


def world_views(world: World, cameras: Cameras) -> Views:
    """Images and planar depths of cameras of batch shape `[N]`, each of what is near it, as training renders them."""
    parts = []
    for i in range(cameras.shape[0]):
        camera = index_cameras(cameras, slice(i, i + 1))
        parts.append(render_views(world.scene_near(camera.camera_to_worlds[0, :, 3]), camera))
    return Views.cat(parts)


@torch.inference_mode()
def world_frames(world: World, cameras: Cameras) -> Iterator[Float[Tensor, "3 height width"]]:
    """Pictures for people to look at, one after the other."""
    for i in range(cameras.shape[0]):
        camera = index_cameras(cameras, slice(i, i + 1))
        scene = world.scene_near(camera.camera_to_worlds[0, :, 3])
        yield render_perspective(scene.renderer, scene.grid, single_camera(camera))["rgb"].movedim(-1, 0)


def world_from_above(world: World) -> Float[Tensor, "3 y x"]:
    """The heights of the highest surfaces below half a metre above eye height, north up, one pixel per column."""
    described = world.description
    scale, windows = described.voxels, described.windows
    picture = np.ones((3, *world.shape[1:]), dtype=np.float32)
    for tile, grid in world.blocks():
        y, x = described.tiles[tile]
        part = slice((windows.y[1] - y[1]) * scale, (windows.y[1] - y[0]) * scale)
        across = slice((x[0] - windows.x[0]) * scale, (x[1] - windows.x[0]) * scale)
        picture[:, part, across] = density_from_above(grid, described.camera_height + 0.5)[0].numpy()
    return torch.from_numpy(picture)
