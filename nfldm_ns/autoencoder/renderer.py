"""Volume rendering of voxel grids to feature maps and depth: the paper's r(V, k)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.lifting import EPS, box_exit_depth, occupancy_along_rays
from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels


@dataclass
class FeatureMaps:
    """What the rays of a batch of cameras see, `*B` = `[B, M]`.

    Attributes:
        features: `[*B, C, h, w]`, sum of weights times features.
        depth: `[*B, 1, h, w]`, expected planar depth in metres; rays that end nowhere reach the box's border.
        accumulation: `[*B, 1, h, w]` in [0, 1].
        exit_depth: `[*B, 1, h, w]`, planar depth at which the rays leave the box.
        directions: `[*B, 3, h, w]`, world-space ray directions of unit planar depth.
        background: `[*B, C, h, w]`, features of what lies beyond the box in these directions; None without one.
    """

    features: Float[Tensor, "batch views channels h w"]
    depth: Float[Tensor, "batch views 1 h w"]
    accumulation: Float[Tensor, "batch views 1 h w"]
    exit_depth: Float[Tensor, "batch views 1 h w"]
    directions: Float[Tensor, "batch views 3 h w"]
    background: Float[Tensor, "batch views channels h w"] | None = None


def render_feature_maps(
    grid: VoxelGrid,
    cameras: Cameras,
    height: int,
    width: int,
    near: float,
    num_samples: int,
    num_feature_samples: int | None = None,
) -> FeatureMaps:
    """Renders `height` x `width` rays per camera by trilinear interpolation and volume rendering.

    Samples lie front to back at equal distances between `near` and the border of the box. Density is read at all of
    them; features only at the `num_feature_samples` that carry the largest weights, scaled to the whole weight of the
    ray: near surfaces few samples matter. With None features are read everywhere and the sum is exact.

    Args:
        cameras: batch shape `[B, M]`; where their poses want gradients, the samples' places carry them.
        near: planar depth of the first sample in metres.
    """
    batch, views = cameras.shape
    moving = torch.is_grad_enabled() and cameras.camera_to_worlds.requires_grad
    with torch.set_grad_enabled(moving):
        origins, directions = camera_rays(cameras, height, width)
        origins = origins[:, :, None, None].expand_as(directions).reshape(batch, -1, 3)
        directions = directions.reshape(batch, -1, 3)
        enter, leave = box_exit_depth(origins, directions, grid.aabb)
        start = torch.minimum(enter.clamp(min=near), leave)
        step = (leave - start) / num_samples
        centres = torch.arange(num_samples, device=grid.device) + 0.5
        depth = start[..., None] + step[..., None] * centres
        delta = (step * directions.norm(dim=-1))[..., None]
        # Points are computed in the voxels' normalised coordinates, where a ray stays a line.
        start_points = grid.normalise(origins)
        slopes = directions * (2 / (grid.aabb[1] - grid.aabb[0]))
        points = start_points[:, :, None] + slopes[:, :, None] * depth[..., None]
    density = sample_voxels(grid.density, points)[..., 0]
    weights, _ = occupancy_along_rays(density.float(), delta)
    accumulation = weights.sum(-1)
    expected_depth = (weights * depth).sum(-1) + (1 - accumulation) * leave

    if num_feature_samples is not None and num_feature_samples < num_samples:
        kept, index = weights.topk(num_feature_samples, dim=-1)
        depth = depth.gather(-1, index)
        weights = kept * (accumulation / (kept.sum(-1) + EPS))[..., None]
        points = start_points[:, :, None] + slopes[:, :, None] * depth[..., None]
    features = sample_voxels(grid.features.contiguous(memory_format=torch.channels_last_3d), points)
    features = (weights[..., None].to(features.dtype) * features).sum(-2)

    def image(values: Tensor) -> Tensor:
        return values.reshape(batch, views, height, width, -1).permute(0, 1, 4, 2, 3)

    return FeatureMaps(image(features), image(expected_depth), image(accumulation), image(leave), image(directions))
