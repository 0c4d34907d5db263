"""Volume rendering of voxel grids to feature maps and depth: the paper's r(V, k)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.compiled_march import compiled, compiled_what_rays_see
from nfldm_ns.autoencoder.lifting import EPS, box_exit_depth, occupancy_along_rays
from nfldm_ns.autoencoder.packed_samples import nerfacc_works, traversed_samples
from nfldm_ns.autoencoder.skipping import (
    SampledRays,
    bordered_density,
    empty_space,
    feature_table,
    march,
    sampled_rays,
    what_rays_see,
)
from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels

FEW_SAMPLES = {"compiled": 2**15, "torch": 2**19}
"""Samples per image up to which, on the CPU, reading all of them is about as fast as finding out which matter."""


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
    skipping: bool | None = None,
) -> FeatureMaps:
    """Renders `height` x `width` rays per camera by trilinear interpolation and volume rendering.

    Samples lie front to back at equal distances between `near` and the border of the box. Density is read at all of
    them; features only at the `num_feature_samples` that carry the largest weights, scaled to the whole weight of the
    ray: near surfaces few samples matter. With None features are read everywhere and the sum is exact.

    With `skipping` density is read only where there may be some and where a ray still gets to, and features only where
    the weight is above `skipping.WEIGHT_BOUND`: no sample of a larger weight is left out.

    Args:
        cameras: batch shape `[B, M]`; where their poses want gradients, the samples' places carry them.
        near: planar depth of the first sample in metres.
        skipping: whether to skip empty and hidden space; None decides by `skips`.
    """
    rays = _rays(grid, cameras, height, width, near, num_samples)
    if skipping is None:
        skipping = not rays.start.requires_grad and skips(grid, height * width * num_samples)
    if skipping:
        seen = _skipped(grid, rays, num_samples, num_feature_samples)
    else:
        seen = _dense(grid, rays, num_samples, num_feature_samples)
    features, accumulation, expected_depth = seen

    def image(values: Tensor) -> Tensor:
        return values.reshape(*cameras.shape, height, width, -1).permute(0, 1, 4, 2, 3)

    maps = (features, expected_depth, accumulation, rays.leave, rays.directions)
    return FeatureMaps(*(image(values) for values in maps))


def skips(grid: VoxelGrid, samples_per_camera: int) -> bool:
    """Whether rays skip empty space unless told: on CUDA where nerfacc works, else without gradients in large images.

    Small images on the CPU are faster without. It depends on the size of one image and not on how many there are, so
    that images do not depend on which others are rendered with them.
    """
    if grid.device.type == "cuda" and nerfacc_works():
        return True
    few = FEW_SAMPLES["torch" if compiled() is None else "compiled"]
    return not learns(grid) and samples_per_camera > few


def learns(grid: VoxelGrid) -> bool:
    """Whether renderings of the grid have gradients."""
    return torch.is_grad_enabled() and (grid.density.requires_grad or grid.features.requires_grad)


@dataclass
class _Rays:
    """Rays of all cameras of each scene, `[B, N]`, in metres and in the voxels' normalised coordinates."""

    directions: Float[Tensor, "batch rays 3"]
    start: Float[Tensor, "batch rays"]
    leave: Float[Tensor, "batch rays"]
    step: Float[Tensor, "batch rays"]
    delta: Float[Tensor, "batch rays"]
    start_points: Float[Tensor, "batch rays 3"]
    slopes: Float[Tensor, "batch rays 3"]


def _rays(grid: VoxelGrid, cameras: Cameras, height: int, width: int, near: float, num_samples: int) -> _Rays:
    """With gradients where the poses of cameras learn."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and cameras.camera_to_worlds.requires_grad):
        origins, directions = camera_rays(cameras, height, width)
        origins = origins[:, :, None, None].expand_as(directions).reshape(cameras.shape[0], -1, 3)
        directions = directions.reshape(cameras.shape[0], -1, 3)
        enter, leave = box_exit_depth(origins, directions, grid.aabb)
        start = torch.minimum(enter.clamp(min=near), leave)
        step = (leave - start) / num_samples
        # Points are computed in the voxels' normalised coordinates, where a ray stays a line.
        slopes = directions * (2 / (grid.aabb[1] - grid.aabb[0]))
        return _Rays(directions, start, leave, step, step * directions.norm(dim=-1), grid.normalise(origins), slopes)


def _dense(
    grid: VoxelGrid, rays: _Rays, num_samples: int, num_feature_samples: int | None
) -> tuple[Float[Tensor, "batch rays channels"], Float[Tensor, "batch rays"], Float[Tensor, "batch rays"]]:
    """Features, accumulation and expected planar depth by reading all samples: the reference."""
    with torch.set_grad_enabled(rays.start.requires_grad):
        centres = torch.arange(num_samples, device=grid.device) + 0.5
        depth = rays.start[..., None] + rays.step[..., None] * centres
        points = rays.start_points[:, :, None] + rays.slopes[:, :, None] * depth[..., None]
    density = sample_voxels(grid.density, points)[..., 0]
    weights, _ = occupancy_along_rays(density.float(), rays.delta[..., None])
    accumulation = weights.sum(-1)
    expected_depth = (weights * depth).sum(-1) + (1 - accumulation) * rays.leave

    if num_feature_samples is not None and num_feature_samples < num_samples:
        kept, index = weights.topk(num_feature_samples, dim=-1)
        depth = depth.gather(-1, index)
        weights = kept * (accumulation / (kept.sum(-1) + EPS))[..., None]
        points = rays.start_points[:, :, None] + rays.slopes[:, :, None] * depth[..., None]
    features = sample_voxels(grid.features.contiguous(memory_format=torch.channels_last_3d), points)
    return (weights[..., None].to(features.dtype) * features).sum(-2), accumulation, expected_depth


def _skipped(
    grid: VoxelGrid, rays: _Rays, num_samples: int, num_feature_samples: int | None
) -> tuple[Float[Tensor, "batch rays channels"], Float[Tensor, "batch rays"], Float[Tensor, "batch rays"]]:
    """The same, scene by scene, without what hardly weighs."""
    seen = []
    for index in range(grid.batch_size):
        scene = grid if grid.batch_size == 1 else grid[index]
        sampled = sampled_rays(
            scene,
            rays.start_points[index],
            rays.slopes[index],
            rays.start[index],
            rays.step[index],
            rays.delta[index],
            num_samples,
        )
        seen.append(_skipped_scene(scene, sampled, num_feature_samples))
    features, accumulation, numbers = (torch.stack(values) for values in zip(*seen, strict=True))
    expected_depth = accumulation * rays.start + numbers * rays.step + (1 - accumulation) * rays.leave
    return features.to(grid.features.dtype), accumulation, expected_depth


def _skipped_scene(
    grid: VoxelGrid, rays: SampledRays, num_feature_samples: int | None
) -> tuple[Float[Tensor, "rays channels"], Float[Tensor, " rays"], Float[Tensor, " rays"]]:
    """What rays of one scene see, by the fastest way that its device has."""
    space, table = empty_space(grid, rays.num_samples), feature_table(grid)
    if grid.device.type == "cpu" and not learns(grid) and compiled() is not None:
        return compiled_what_rays_see(bordered_density(grid), space, rays, table, num_feature_samples)
    if grid.device.type == "cuda" and nerfacc_works():
        samples = traversed_samples(grid.density, space, rays)
    else:
        samples = march(grid.density, space, rays)
    return what_rays_see(rays, samples, table, grid.shape, num_feature_samples)
