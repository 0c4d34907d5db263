"""A world in nerfstudio: shown, rendered and evaluated like a scene, reading the tiles that a camera is near."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox, SceneBox
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from torch import Tensor, nn

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.generated.scene_files import check_dataset
from nfldm_ns.generated.world_files import World, load_world
from nfldm_ns.plugin.generated_scene import (
    GeneratedSceneModel,
    GeneratedSceneModelConfig,
    GeneratedScenePipeline,
    GeneratedScenePipelineConfig,
    present_folder,
)
from nfldm_ns.plugin.viewer_start import FirstView
from nfldm_ns.plugin.voxel_model import VoxelModel
from nfldm_ns.scenes.voxel_grid import VoxelGrid

VIEWS = "views"


@dataclass
class WorldModelConfig(GeneratedSceneModelConfig):
    """Configuration of `WorldModel`; `scene` is the folder of the world."""

    _target: type = field(default_factory=lambda: WorldModel)
    """target class to instantiate"""


class WorldModel(GeneratedSceneModel):
    """What is near the camera, as one grid. Nothing of a world is a parameter."""

    config: WorldModelConfig

    def populate_modules(self) -> None:
        assert self.config.scene is not None
        world = load_world(self.config.scene)
        self.scene_box = SceneBox(aabb=world.aabb)
        VoxelModel.populate_modules(self)
        self.decoder = world.base_renderer
        self._world = world
        self._look_from(world.aabb.mean(0))

    @property
    def world(self) -> World:
        return self._world

    def _look_from(self, position: Tensor) -> None:
        self._near = self._world.near(position.detach().cpu())

    def shown_grid(self) -> VoxelGrid:
        return self._near.to(self.device)

    def renderer(self) -> SceneAutoencoder:
        return self._world.renderer_for(self._near)

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        return {}

    @exit_on_bad_input()
    @torch.no_grad()
    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """As `VoxelModel` does, of what lies within the world's reach of the camera."""
        self._look_from(camera.camera_to_worlds.reshape(3, 4)[:, 3])
        return super().get_outputs_for_camera(camera, obb_box)

    def get_outputs(self, ray_bundle: Any) -> dict[str, Tensor]:
        if not isinstance(ray_bundle, Cameras):
            self._look_from(ray_bundle.origins.reshape(-1, 3).mean(0))
        return super().get_outputs(ray_bundle)


@dataclass
class WorldPipelineConfig(GeneratedScenePipelineConfig):
    """Configuration of `WorldPipeline`."""

    _target: type = field(default_factory=lambda: WorldPipeline)
    """target class to instantiate"""
    model: WorldModelConfig = field(default_factory=WorldModelConfig)
    """specifies the model config"""


class WorldPipeline(GeneratedScenePipeline):
    """Shows, renders and evaluates a world."""

    config: WorldPipelineConfig
    model: WorldModel  # type: ignore[assignment]

    @exit_on_bad_input()
    def __init__(
        self,
        config: WorldPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        folder = present_folder(config.model.scene)
        config.model.scene, views = folder, folder / VIEWS
        config.datamanager.data = config.datamanager.dataparser.data = views
        if not views.is_dir():
            raise UserInputError(f"{views} is missing: run the nfldm-world command that made the world again.")
        check_dataset(Path(views))
        VanillaPipeline.__init__(self, config, device, test_mode, world_size, local_rank, grad_scaler)
        self.viewer_control = FirstView(lambda: self.datamanager.train_dataset.cameras)

    @exit_on_bad_input()
    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Worlds are not tuned."""
        raise UserInputError("A world is shown and rendered, not trained: train nfldm-scene on a single scene.")
