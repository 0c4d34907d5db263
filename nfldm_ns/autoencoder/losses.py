"""Losses of stage 1 (paper, Sec. 3.1): perceptual reconstruction and depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.lifting import box_exit_depth
from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, downsample_depth
from nfldm_ns.scenes.views import Views, camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]


@dataclass
class StageOneLossConfig:
    """Weights of the losses.

    Attributes:
        lpips_mult: perceptual distance of rendered and real images (the paper's reconstruction loss).
        rgb_mult: mean absolute error of colours; steadies short trainings.
        depth_mult: mean squared error of expected depth in m^2, over known pixels.
        feature_mult: mean square of voxel features: keeps V simple for the later stages.
    """

    lpips_mult: float = 1.0
    rgb_mult: float = 1.0
    depth_mult: float = 0.02
    feature_mult: float = 0.0


def stage_one_losses(
    config: StageOneLossConfig,
    rendered: RenderedViews,
    target: Views,
    grid: VoxelGrid,
    lpips: PerceptualDistance | None,
) -> dict[str, Float[Tensor, ""]]:
    """Weighted losses by name.

    Args:
        target: views of batch shape `[B, M]`; pixels of unknown depth never supervise depth.
        lpips: a distance of images in [-1, 1]; needed unless `lpips_mult` is 0.
    """
    losses = {"rgb_loss": config.rgb_mult * F.l1_loss(rendered.rgb, target.images)}
    if config.lpips_mult:
        if lpips is None:
            raise ValueError("lpips_mult is set, but no perceptual distance was given")
        images = (rendered.rgb.flatten(0, 1) * 2 - 1, target.images.flatten(0, 1) * 2 - 1)
        losses["lpips_loss"] = config.lpips_mult * lpips(*images).mean()
    if target.depths is not None:
        losses["depth_loss"] = config.depth_mult * depth_loss(rendered.maps, target, grid.aabb)
    if config.feature_mult:
        losses["feature_loss"] = config.feature_mult * grid.features.square().mean()
    return losses


def depth_loss(maps: FeatureMaps, target: Views, aabb: Float[Tensor, "2 3"]) -> Float[Tensor, ""]:
    """Mean squared depth error in m^2 at the rays' resolution, over known pixels.

    Surfaces beyond the box count as lying on its border: that is where the encoder paints them.
    """
    assert target.depths is not None
    h, w = maps.depth.shape[-2:]
    depth = downsample_depth(target.depths, h, w)
    known = depth > 0
    error = (maps.depth - torch.minimum(depth, maps.exit_depth)).square()
    return (error * known).sum() / known.sum().clamp(min=1)


def inside_box(views: Views, aabb: Float[Tensor, "2 3"]) -> Tensor:
    """`[*B, 1, H, W]` mask of the pixels whose known surface lies inside the box."""
    assert views.depths is not None
    height, width = views.image_size
    origins, directions = camera_rays(views.cameras, height, width)
    _, leave = box_exit_depth(origins[..., None, None, :].expand_as(directions), directions, aabb)
    return (views.depths > 0) & (views.depths < leave[..., None, :, :])
