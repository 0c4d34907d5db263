"""A generated scene in nerfstudio: the method `nfldm-scene`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManager, VanillaDataManagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.models.base_model import ModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor, nn

from nfldm_ns.autoencoder.model_configs import check_state
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.errors import UserInputError, exit_on_bad_input
from nfldm_ns.generated.scene_files import DESCRIPTION, GeneratedScene, check_dataset, load_generated_scene
from nfldm_ns.plugin.command_line import config_folder
from nfldm_ns.plugin.pictures import ray_lengths
from nfldm_ns.plugin.run_folder import MovableTrainerConfig
from nfldm_ns.plugin.scene_config import device_type
from nfldm_ns.plugin.viewer_start import FirstView, LatePanel
from nfldm_ns.plugin.voxel_model import VoxelGridField, VoxelModel, picture_dict, single_camera
from nfldm_ns.scenes.collection import DEPTH_UNIT_M, read_depth
from nfldm_ns.scenes.voxel_grid import VoxelGrid

METHOD = "nfldm-scene"


class SceneViewsDataset(InputDataset):
    """Images, and where there are any, depths as `depth_image` `[H, W, 1]`: metres along the ray, 0 is unknown."""

    exclude_batch_keys_from_device = [*InputDataset.exclude_batch_keys_from_device, "depth_image"]  # noqa: RUF012

    def get_metadata(self, data: dict[str, Any]) -> dict[str, Tensor]:
        index = data["image_idx"]
        filenames = self.metadata.get("depth_filenames")
        if filenames is None:
            return {}
        height, width = data["image"].shape[:2]
        depth = torch.from_numpy(read_depth(filenames[index], (width, height)))[..., None]
        return {"depth_image": depth * ray_lengths(self.cameras[index : index + 1])[0]}


class GeneratedSceneDataManager(VanillaDataManager[SceneViewsDataset]):
    """nerfstudio's own datamanager over a generated scene's images and depths."""


def metric_dataparser() -> NerfstudioDataParserConfig:
    """Reads `transforms.json` without moving, turning or scaling anything: metres, z up."""
    return NerfstudioDataParserConfig(
        orientation_method="none",
        center_method="none",
        auto_scale_poses=False,
        downscale_factor=1,
        depth_unit_scale_factor=DEPTH_UNIT_M,
    )


@dataclass
class GeneratedSceneModelConfig(ModelConfig):
    """Configuration of `GeneratedSceneModel`."""

    _target: type = field(default_factory=lambda: GeneratedSceneModel)
    """target class to instantiate"""
    enable_collider: bool = False
    """scenes are bounded by their box"""
    scene: Path | None = None
    """folder of the generated scene to start from; the data folder if not given or no longer there"""


class GeneratedSceneModel(VoxelModel):
    """One scene: its voxels and its background are the parameters, the renderer is frozen."""

    config: GeneratedSceneModelConfig

    def populate_modules(self) -> None:
        assert self.config.scene is not None
        scene = load_generated_scene(self.config.scene)
        self.scene_box = SceneBox(aabb=scene.grid.aabb.clone())
        super().populate_modules()
        self.field = VoxelGridField(scene.grid, trainable=True)
        self.decoder = scene.renderer
        self.on_show = scene

    def show(self, scene: GeneratedScene) -> None:
        """Puts another scene, of the same box and renderer, in the place of the one on show.

        Its voxels are new parameters: pictures that are being rendered are still wholly of the scene before.
        """
        self.field = VoxelGridField(scene.grid, trainable=True).to(self.device)
        self.on_show = scene

    def shown_grid(self) -> VoxelGrid:
        return self.field.grid()

    def renderer(self) -> SceneAutoencoder:
        return self.decoder

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"voxels": list(self.field.parameters())}

    def get_loss_dict(
        self, outputs: Mapping[str, Any], batch: Mapping[str, Any], metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        """Mean absolute error of colours `[H, W, 3]`."""
        return {"rgb_loss": F.l1_loss(outputs["rgb"], batch["image"].to(outputs["rgb"]))}

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR (dB), SSIM, LPIPS and depth error (metres along the ray) of one image, and it beside the true one.

        Raises:
            UserInputError: if the weights of LPIPS are not on this machine.
        """
        from nfldm_ns.metrics.images import depth_mae, lpips_distance, psnr, ssim
        from nfldm_ns.pretrained.weights import load_lpips

        if not hasattr(self, "_perceptual"):
            self._perceptual = (load_lpips("vgg").to(self.device),)  # a tuple keeps its weights out of our checkpoints
        rgb, true = (image.to(self.device).movedim(-1, -3) for image in (outputs["rgb"], batch["image"]))
        metrics = {
            "psnr": float(psnr(rgb, true)),
            "ssim": float(ssim(rgb, true)),
            "lpips": float(lpips_distance(self._perceptual[0], rgb, true)),
        }
        if "depth_image" in batch:
            error, pixels = depth_mae(outputs["depth"], batch["depth_image"].to(outputs["depth"]))
            metrics["depth_mae_m"] = float(error / pixels.clamp(min=1))
        return metrics, {"img": torch.cat([batch["image"].to(self.device), outputs["rgb"]], dim=1)}


@dataclass
class GeneratedScenePipelineConfig(VanillaPipelineConfig):
    """Configuration of `GeneratedScenePipeline`."""

    _target: type = field(default_factory=lambda: GeneratedScenePipeline)
    """target class to instantiate"""
    datamanager: VanillaDataManagerConfig = field(
        default_factory=lambda: VanillaDataManagerConfig(
            _target=GeneratedSceneDataManager, dataparser=metric_dataparser()
        )
    )
    """specifies the datamanager config"""
    model: GeneratedSceneModelConfig = field(default_factory=GeneratedSceneModelConfig)
    """specifies the model config"""
    panel: str = "nfldm_ns.studio.panel"
    """module of the panel that the viewer gets, to sample and edit; empty for none"""


class GeneratedScenePipeline(VanillaPipeline):
    """Shows, renders, evaluates and tunes one generated scene."""

    config: GeneratedScenePipelineConfig
    datamanager: GeneratedSceneDataManager
    model: GeneratedSceneModel  # type: ignore[assignment]

    @exit_on_bad_input()
    def __init__(
        self,
        config: GeneratedScenePipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        config.datamanager.data = present_folder(config.datamanager.data)
        config.model.scene = _scene_folder(config.model.scene, config.datamanager.data)
        if not (config.model.scene / DESCRIPTION).is_file():
            raise UserInputError(f"{config.model.scene} is no generated scene: make some with 'nfldm-sample'.")
        if config.datamanager.data == config.model.scene:
            check_dataset(config.model.scene)
        super().__init__(config, device, test_mode, world_size, local_rank, grad_scaler)
        self.viewer_control = FirstView(self.cameras_on_show)
        if config.panel:
            self.viewer_panel = LatePanel(config.panel, self)

    def cameras_on_show(self) -> Cameras:
        """Those of the scene that the viewer shows now."""
        cameras = self.model.on_show.cameras
        return self.datamanager.train_dataset.cameras if cameras is None else cameras

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Tunes the voxels on one of the scene's images."""
        dataset = self.datamanager.train_dataset
        index = int(np.random.default_rng((0, step)).integers(len(dataset)))
        cameras = single_camera(dataset.cameras[index : index + 1].to(self.device))
        # Density that is clamped at 0 can grow in empty space only if rays look there.
        rendered = self.model.renderer().render(self.model.shown_grid(), cameras, skipping=False)
        outputs = picture_dict(rendered, cameras)
        batch = {"image": dataset[index]["image"]}
        return outputs, self.model.get_loss_dict(outputs, batch), {}

    def get_eval_loss_dict(self, step: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The training loss on the next evaluation image."""
        camera, batch = self.datamanager.next_eval_image(step)
        with self.model.as_trained():
            outputs = self.model.get_outputs_for_camera(camera)
        return outputs, self.model.get_loss_dict(outputs, batch), {}

    @exit_on_bad_input()
    def get_eval_image_metrics_and_images(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        with self.model.as_trained():
            return super().get_eval_image_metrics_and_images(step)

    @exit_on_bad_input()
    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, float]:
        with self.model.as_trained():
            return super().get_average_eval_image_metrics(step, output_path, get_std)

    @exit_on_bad_input()
    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Loads a checkpoint, which must be of a scene of this very size."""
        prefix = "_model."
        state = {key.removeprefix(prefix): value for key, value in loaded_state.items() if key.startswith(prefix)}
        check_state(self.model, state, f"The checkpoint of step {step}")
        super().load_pipeline(loaded_state, step)


def _scene_folder(scene: Path | None, data: Path) -> Path:
    """The scene of a pipeline: its data are of it, too, so that --data finds the scene of a run that was moved."""
    if scene is None or scene.is_dir():
        return scene or data
    CONSOLE.print(f"There is no folder {scene} any more: the scene is that of the data, {data}.")
    return data


def present_folder(folder: Path | None) -> Path:
    """A scene's folder; if it was moved, where the running command found its `config.yml`.

    Raises:
        UserInputError: if it is nowhere.
    """
    if folder is not None and folder.is_dir():
        return folder
    found = config_folder(sys.argv)
    if found is None:
        raise UserInputError(
            f"There is no folder {folder}: name the folder of a generated scene with --data, or its config.yml with "
            "--load-config."
            if folder
            else "No data were given: name the folder of a generated scene with --data."
        )
    return found


@dataclass
class GeneratedSceneTrainerConfig(MovableTrainerConfig):
    """A trainer's configuration whose run folder is the scene's folder."""

    folder: Path | None = None
    """folder of the generated scene; None, as for a new training, follows nerfstudio's rules"""

    def get_base_dir(self) -> Path:
        if self.folder is None:
            return super().get_base_dir()
        return self.folder if self.folder.is_dir() else config_folder(sys.argv) or self.folder


def scene_trainer_config() -> GeneratedSceneTrainerConfig:
    """The configuration of the method `nfldm-scene`, for the device that is there."""
    return GeneratedSceneTrainerConfig(
        method_name=METHOD,
        max_num_iterations=200,
        steps_per_save=100,
        steps_per_eval_batch=50,
        steps_per_eval_image=100,
        steps_per_eval_all_images=1_000_000,
        machine=MachineConfig(device_type=device_type()),  # type: ignore[arg-type]
        pipeline=GeneratedScenePipelineConfig(),
        optimizers={"voxels": {"optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-8), "scheduler": None}},
        viewer=ViewerConfig(quit_on_train_completion=True),
        vis="viewer+tensorboard",
    )
