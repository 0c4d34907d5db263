"""Losses of stage 1 (the paper's scene auto-encoder): perceptual reconstruction, adversarial and depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nfldm_ns.autoencoder.discriminator import discriminator_loss, generator_loss
from nfldm_ns.autoencoder.perceptual import PerceptualNetwork
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, downsample_depth
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid


@dataclass
class StageOneLossConfig:
    """Weights of the losses.

    Attributes:
        lpips_mult: perceptual distance of rendered and real images (the paper's reconstruction loss).
        lpips_views: how many target views of each scene, drawn at random, the perceptual distance and the discriminator
            see in a step; None for all. The perceptual network costs more than everything else together; few views give
            the same gradient on average.
        adversarial_mult: of the loss that the discriminator gives rendered images; 0 trains without one.
        adversarial_start: first step with a discriminator: before, it would only learn that images are blurred.
        adversarial_levels: levels of the perceptual network whose features the discriminator looks at, 0 the finest.
        rgb_mult: mean absolute error of colours; steadies short trainings.
        depth_mult: error of expected depth, over known pixels.
        depth_norm: "l2" is the mean squared error in m^2 (the paper's), "l1" the mean absolute error in m, which edges
            dominate less.
        feature_mult: mean square of voxel features: keeps V simple for the later stages.
    """

    lpips_mult: float = 1.0
    lpips_views: int | None = None
    adversarial_mult: float = 0.0
    adversarial_start: int = 0
    adversarial_levels: tuple[int, ...] = (1, 2)
    rgb_mult: float = 1.0
    depth_mult: float = 0.02
    depth_norm: Literal["l1", "l2"] = "l2"
    feature_mult: float = 0.0


def stage_one_losses(
    config: StageOneLossConfig,
    rendered: RenderedViews,
    target: Views,
    grid: VoxelGrid,
    perceptual: PerceptualNetwork | None,
    discriminator: nn.Module | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Weighted losses by name.

    Args:
        target: views of batch shape `[B, M]`; pixels of unknown depth never supervise depth.
        perceptual: needed unless `lpips_mult` is 0 and there is no discriminator.
        discriminator: adds the adversarial loss and its own, whose gradients do not mix.
    """
    losses = {"rgb_loss": config.rgb_mult * F.l1_loss(rendered.rgb, target.images)}
    if config.lpips_mult or discriminator is not None:
        if perceptual is None:
            raise ValueError("lpips_mult or a discriminator is set, but no perceptual network was given")
        losses.update(_perceptual_losses(config, rendered, target, perceptual, discriminator))
    if target.depths is not None:
        losses["depth_loss"] = config.depth_mult * depth_loss(rendered.maps, target, config.depth_norm)
    if config.feature_mult:
        losses["feature_loss"] = config.feature_mult * grid.features.square().mean()
    return losses


def _perceptual_losses(
    config: StageOneLossConfig,
    rendered: RenderedViews,
    target: Views,
    perceptual: PerceptualNetwork,
    discriminator: nn.Module | None,
) -> dict[str, Float[Tensor, ""]]:
    """The losses that look at features of a few views."""
    chosen = torch.randperm(target.shape[1])[: config.lpips_views]
    fake, real = (
        perceptual.features(views[:, chosen].flatten(0, 1) * 2 - 1) for views in (rendered.rgb, target.images)
    )
    losses = {}
    if config.lpips_mult:
        losses["lpips_loss"] = config.lpips_mult * perceptual.distance(fake, real).mean()
    if discriminator is not None:
        fake, real = ([features[level] for level in config.adversarial_levels] for features in (fake, real))
        losses["adversarial_loss"] = config.adversarial_mult * generator_loss(discriminator, fake)
        losses["discriminator_loss"] = discriminator_loss(discriminator, fake, real)
    return losses


def depth_loss(maps: FeatureMaps, target: Views, norm: Literal["l1", "l2"] = "l2") -> Float[Tensor, ""]:
    """Mean squared (m^2) or absolute (m) error of expected depth at the rays' resolution, over known pixels.

    Surfaces beyond the box count as lying on its border: that is where the encoder paints them.
    """
    assert target.depths is not None
    h, w = maps.depth.shape[-2:]
    depth = downsample_depth(target.depths, h, w)
    known = depth > 0
    error = (maps.depth - torch.minimum(depth, maps.exit_depth)).abs()
    if norm == "l2":
        error = error.square()
    return (error * known).sum() / known.sum().clamp(min=1)
