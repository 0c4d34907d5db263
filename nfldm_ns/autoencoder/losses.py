"""Losses of stage 1 (the paper's scene auto-encoder): perceptual reconstruction and depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.autoencoder.renderer import FeatureMaps
from nfldm_ns.autoencoder.scene_autoencoder import RenderedViews, downsample_depth
from nfldm_ns.scenes.views import Views
from nfldm_ns.scenes.voxel_grid import VoxelGrid

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]


@dataclass
class StageOneLossConfig:
    """Weights of the losses.

    Attributes:
        lpips_mult: perceptual distance of rendered and real images (the paper's reconstruction loss).
        lpips_views: how many target views of each scene, drawn at random, the perceptual distance sees in a step; None
            for all. Its network costs more than everything else together; few views give the same gradient on average.
        rgb_mult: mean absolute error of colours; steadies short trainings.
        depth_mult: error of expected depth, over known pixels.
        depth_norm: "l2" is the mean squared error in m^2 (the paper's), "l1" the mean absolute error in m, which edges
            dominate less.
        feature_mult: mean square of voxel features: keeps V simple for the later stages.
    """

    lpips_mult: float = 1.0
    lpips_views: int | None = None
    rgb_mult: float = 1.0
    depth_mult: float = 0.02
    depth_norm: Literal["l1", "l2"] = "l2"
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
        chosen = torch.randperm(target.shape[1])[: config.lpips_views]
        images = (views[:, chosen].flatten(0, 1) * 2 - 1 for views in (rendered.rgb, target.images))
        losses["lpips_loss"] = config.lpips_mult * lpips(*images).mean()
    if target.depths is not None:
        losses["depth_loss"] = config.depth_mult * depth_loss(rendered.maps, target, config.depth_norm)
    if config.feature_mult:
        losses["feature_loss"] = config.feature_mult * grid.features.square().mean()
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
