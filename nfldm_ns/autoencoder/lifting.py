"""From densities and features along camera rays to voxels: the occupancy, frustums and fusion of the paper."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid

Fusion = Literal["occupancy", "mean"]
EPS = 1e-6
SEEN = 1e-3  # entries that rays end at with a lower probability carry no features


def depth_bins(
    near: float, far: float, num_bins: int, spacing: Literal["linear", "inverse"] = "linear"
) -> tuple[Float[Tensor, "bins"], Float[Tensor, "bins"]]:
    """Centres and widths of planar-depth bins between near and far, in metres."""
    if spacing == "linear":
        edges = torch.linspace(near, far, num_bins + 1)
    else:
        edges = 1 / torch.linspace(1 / near, 1 / far, num_bins + 1)
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def occupancy_along_rays(
    density: Float[Tensor, "*batch bins"], delta: Float[Tensor, "*#batch bins"]
) -> tuple[Float[Tensor, "*batch bins"], Float[Tensor, "*batch bins"]]:
    """The paper's O(h, w, d): the probability that the ray ends in bin d, and that it reaches bin d at all.

    `O_d = exp(-sum_{j<d} sigma_j delta_j) (1 - exp(-sigma_d delta_d))`, and the first factor by itself.

    Args:
        density: sigma, in 1/m, along the last axis from near to far.
        delta: metres of ray within each bin.
    """
    optical_depth = density * delta
    transmittance = torch.exp(-(optical_depth.cumsum(-1) - optical_depth))
    return transmittance * -torch.expm1(-optical_depth), transmittance


def box_exit_depth(
    origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], aabb: Float[Tensor, "2 3"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Ray parameters where rays enter and leave the box; entry is at least 0, and exit = entry for a miss."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    t0 = (aabb[0] - origins) / safe
    t1 = (aabb[1] - origins) / safe
    enter = torch.minimum(t0, t1).amax(-1).clamp(min=0)
    leave = torch.maximum(t0, t1).amin(-1)
    return enter, torch.maximum(leave, enter)


def frustum_voxels(
    origins: Float[Tensor, "*batch 3"],
    directions: Float[Tensor, "*batch h w 3"],
    depths: Float[Tensor, "bins"],
    aabb: Float[Tensor, "2 3"],
    shape: tuple[int, int, int],
) -> tuple[Int[Tensor, "*batch h w bins"], Float[Tensor, "*batch h w bins"]]:
    """The flat index of the voxel at each depth of each ray, and 1 or 0 for inside or outside the box.

    Points outside get the index of voxel 0.
    """
    z, y, x = shape
    size = origins.new_tensor([x, y, z])
    scale = size / (aabb[1] - aabb[0])
    start = ((origins - aabb[0]) * scale)[..., None, None, :]
    slope = directions * scale
    cells = [(start[..., axis, None] + slope[..., axis, None] * depths).floor().to(torch.int32) for axis in range(3)]
    inside = torch.ones_like(cells[0], dtype=torch.bool)
    for cell, count in zip(cells, (x, y, z), strict=True):
        inside &= (cell >= 0) & (cell < count)
    index = ((cells[2] * y + cells[1]) * x + cells[0]) * inside
    return index.long(), inside.to(origins.dtype)


def fuse_frustums(
    density: Float[Tensor, "batch views bins h w"],
    features: Float[Tensor, "batch views channels h w"],
    cameras: Cameras,
    centres: Float[Tensor, "bins"],
    widths: Float[Tensor, "bins"],
    aabb: Float[Tensor, "2 3"],
    shape: tuple[int, int, int],
    fusion: Fusion = "occupancy",
) -> VoxelGrid:
    """Places all frustums in the world and fuses them into one grid, by one scatter over all views of all scenes.

    Every frustum entry is the paper's `F(h, w, d) = [O(h, w, d) phi(h, w), sigma(h, w, d)]` and falls into the voxel
    that contains its bin's centre. `fusion` says how a voxel combines its entries:

    - `"mean"`, the paper's: the plain mean of the entries.
    - `"occupancy"`: features weighted by O, densities by the probability that the ray reaches the entry; a view that
      does not see a voxel then has no say in it.

    Args:
        density: sigma in 1/m at the bins' centres.
        cameras: batch shape `[B, N]`.
        centres, widths: planar depth of the bins in metres.
        shape: (Z, Y, X).
    """
    batch, _, bins, h, w = density.shape
    channels = features.shape[2]
    num_voxels = shape[0] * shape[1] * shape[2]
    with torch.no_grad():
        origins, directions = camera_rays(cameras, h, w)
        delta = widths * directions.norm(dim=-1, keepdim=True)
        index, inside = frustum_voxels(origins, directions, centres, aabb, shape)
        scene = torch.arange(batch, device=density.device).view(-1, 1, 1, 1, 1)
        index = (index + scene * num_voxels).flatten()
    density = density.permute(0, 1, 3, 4, 2)
    occupancy, transmittance = occupancy_along_rays(density, delta)

    weight = transmittance * inside if fusion == "occupancy" else inside
    density_sum = _scatter((weight * density).flatten(), index, batch * num_voxels)
    weight_sum = _scatter(weight.flatten(), index, batch * num_voxels)
    fused_density = density_sum / (weight_sum + EPS)

    # Most entries are empty or hidden: features go only where rays may end.
    seen = ((occupancy * inside).flatten() > SEEN).nonzero()[:, 0]
    kept = occupancy.flatten()[seen]
    phi = features.permute(0, 1, 3, 4, 2).reshape(-1, channels)[seen // bins]
    feature_sum = _scatter(phi * kept[:, None], index[seen], batch * num_voxels)
    occupancy_fusion = fusion == "occupancy"
    norm = _scatter(kept, index[seen], batch * num_voxels) + SEEN if occupancy_fusion else weight_sum + EPS
    fused_features = feature_sum / norm[:, None]
    return VoxelGrid(
        fused_density.reshape(batch, 1, *shape),
        fused_features.reshape(batch, *shape, channels).permute(0, 4, 1, 2, 3),
        aabb,
    )


def _scatter(values: Float[Tensor, "entries *channels"], index: Int[Tensor, "entries"], num_rows: int) -> Tensor:
    """Sums of the entries of each row, `[rows, *channels]`."""
    sums = values.new_zeros(num_rows, *values.shape[1:])
    return sums.index_add(0, index, values) if values.ndim > 1 else sums.scatter_add(0, index, values)
