"""nerfstudio's model of stage 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.base_model import ModelConfig
from torch import Tensor, nn

from nfldm_ns.autoencoder.checkpoints import (
    WEIGHTS,
    learned_refinement,
    load_initial_weights,
    read_safetensors,
    scene_autoencoder_folder,
)
from nfldm_ns.autoencoder.losses import StageOneLossConfig, make_discriminator, stage_one_losses
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.metrics.images import psnr
from nfldm_ns.plugin.voxel_model import VoxelModel
from nfldm_ns.scenes.views import SceneBatch, Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid


@dataclass
class SceneNetworkConfig:
    """Sizes of `SceneAutoencoder`; box, depth range and image size come from the data."""

    grid_shape: tuple[int, int, int] = (16, 48, 48)
    """voxels (Z, Y, X)"""
    feature_channels: int = 16
    """channels of the voxels' features"""
    feature_stride: int = 2
    """image pixels per feature pixel, a power of two"""
    num_depth_bins: int = 40
    """depths along a pixel's ray at which densities are predicted"""
    depth_spacing: Literal["linear", "inverse", "log"] = "linear"
    """how those depths are spaced; log: widths grow with depth"""
    encoder_input: Literal["rgb", "rgbd"] = "rgbd"
    """rgbd: depth is an input and a prior where a view has it; rgb: as in the paper"""
    density_from: Literal["views", "voxels"] = "views"
    """views: explicit, along the rays, as in the paper; voxels: predicted from the fused features, its ablation"""
    fusion: Literal["attention", "occupancy", "mean"] = "attention"
    """how views are fused; mean: as in the paper; attention: by learned weights"""
    splatting: Literal["filled", "nearest", "trilinear"] = "filled"
    """voxels that get what a ray sees: the nearest, with holes between rays filled or not, or eight"""
    background_channels: int = 8
    """functions of direction in the code of what lies beyond the box"""
    background_implementation: Literal["torch", "tcnn"] = "torch"
    """of the background's network; tcnn needs tiny-cuda-nn wherever the model is used"""
    num_samples: int = 48
    """density samples per rendered ray"""
    num_feature_samples: int | None = 8
    """of which so many, those of the largest weight, also read features; None reads all"""
    encoder_channels: tuple[int, ...] = (32, 64)
    """widths of the image encoder"""
    encoder_blocks: int = 1
    """residual blocks per width"""
    decoder_channels: tuple[int, ...] = (48, 24)
    """widths of the image decoder, one per doubling of the size and one before"""
    decoder_blocks: int = 1
    """residual blocks per width"""
    decoder_upsampling_channels: int = 0
    """width of what makes images twice as large as the widths above do; 0 leaves it out"""
    refinement_channels: int = 0
    """width of the learned refinement of voxels; 0 leaves it out"""
    refinement_steps: int = 2
    """how often it changes the voxels"""


@dataclass
class SceneAutoencoderModelConfig(ModelConfig):
    """Configuration of `SceneAutoencoderModel`."""

    _target: type = field(default_factory=lambda: SceneAutoencoderModel)
    """target class to instantiate"""
    enable_collider: bool = False
    """scenes are bounded by their box"""
    network: SceneNetworkConfig = field(default_factory=SceneNetworkConfig)
    """sizes of the auto-encoder"""
    loss: StageOneLossConfig = field(default_factory=StageOneLossConfig)
    """weights of the losses"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """arithmetic of the convolutions in training"""
    initial_weights: Path | None = None
    """a trained scene auto-encoder to start from: the config.yml of its run, its folder, or its scene_autoencoder
    folder; the networks' sizes must be its own, but box, voxels and image size may be others; its refinement of
    voxels is kept, and may be new if it has none"""

    def keep_refinement(self) -> None:
        """Gives a network without refinement of voxels that which the initial weights have, if they have one."""
        if self.initial_weights is not None and not self.network.refinement_channels:
            self.network = replace(self.network, **learned_refinement(self.initial_weights))


class SceneAutoencoderModel(VoxelModel):
    """Trains a `SceneAutoencoder` on batches of scenes, and renders the one scene on show."""

    config: SceneAutoencoderModelConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        data = self.kwargs["metadata"]
        self.autoencoder = SceneAutoencoder(
            **asdict(self.config.network),
            aabb=tuple(tuple(corner) for corner in self.scene_box.aabb.tolist()),
            **{key: data[key] for key in ("near", "far", "image_size", "focal_length", "max_focal_length")},
        )
        self.autoencoder.pack_channels_last()
        self._perceptual: tuple[PerceptualNetwork, ...] = ()  # a tuple, so that its weights stay out of checkpoints
        self.discriminator = make_discriminator(self.config.loss, data["image_size"])
        self._step = 0
        self._shown_views: Views | None = None
        self._shown_grid: VoxelGrid | None = None

    def prepare_training(self) -> None:
        """Loads the initial weights, and the perceptual network where a loss needs it.

        Raises:
            UserInputError: if weights are missing or do not fit.
        """
        if self.config.initial_weights is not None:
            path = scene_autoencoder_folder(self.config.initial_weights) / WEIGHTS
            load_initial_weights(self.autoencoder, read_safetensors(path), path)
        if self.config.loss.needs_perceptual_network:
            from nfldm_ns.pretrained.weights import load_lpips

            dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
            self._perceptual = (PerceptualNetwork(load_lpips("vgg"), dtype).to(self.device),)

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"autoencoder": list(self.autoencoder.parameters())}
        if self.discriminator is not None:
            groups["discriminator"] = list(self.discriminator.parameters())
        return groups

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        return [TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], self._begin_step)]

    def _begin_step(self, step: int) -> None:
        self._step = step

    def get_outputs(self, ray_bundle: Any) -> dict[str, Any]:
        """Encodes a `SceneBatch` and renders its target views: `rendered`, `grid`. Else as `VoxelModel`.

        In training the losses come with them (`losses`): they are part of what `DistributedDataParallel` wraps, so that
        it averages the gradients of all parameters.
        """
        if not isinstance(ray_bundle, SceneBatch):
            return super().get_outputs(ray_bundle)
        self._shown_grid = None  # made by other weights
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            grid = self.autoencoder.encode(ray_bundle.source)
            outputs: dict[str, Any] = {
                "rendered": self.autoencoder.render(grid, ray_bundle.target.cameras),
                "grid": grid,
            }
        if self.training:
            outputs["losses"] = self._losses(outputs, ray_bundle.target)
        return outputs

    def get_loss_dict(
        self, outputs: Mapping[str, Any], batch: Mapping[str, Any], metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        """Weighted losses of a batch of scenes; `batch["target"]` holds the true views."""
        return outputs["losses"] if "losses" in outputs else self._losses(outputs, batch["target"])

    def _losses(self, outputs: Mapping[str, Any], target: Views) -> dict[str, Tensor]:
        perceptual = self._perceptual[0] if self._perceptual else None
        discriminator = self.discriminator if self._step >= self.config.loss.adversarial_start else None
        return stage_one_losses(
            self.config.loss, outputs["rendered"], target, outputs["grid"], perceptual, discriminator, self._step
        )

    @torch.no_grad()
    def get_metrics_dict(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """PSNR of the batch in dB."""
        target = batch["target"]
        return {"psnr": psnr(outputs["rendered"].rgb, target.images, target.masks).mean()}

    def get_image_metrics_and_images(
        self, outputs: dict[str, Any], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """PSNR of one scene's target views, and a picture of real above rendered views."""
        from nfldm_ns.autoencoder.novel_views import comparison

        rgb, target = outputs["rendered"].rgb, batch["target"]
        return {"psnr": float(psnr(rgb, target.images, target.masks).mean())}, {"img": comparison(rgb[0], target[0])}

    def show(self, source: Views) -> None:
        """Puts a scene on show.

        Args:
            source: its source views, batch shape `[1, N]`.
        """
        self._shown_views = source.to(self.device)
        self._shown_grid = None

    @torch.no_grad()
    def shown_grid(self) -> VoxelGrid:
        """The scene on show, encoded by the present weights."""
        if self._shown_grid is None:
            if self._shown_views is None:
                raise RuntimeError("no scene was put on show")
            self._shown_grid = self.autoencoder.encode(self._shown_views)
        return self._shown_grid

    def renderer(self) -> SceneAutoencoder:
        return self.autoencoder
