"""From densities and features along camera rays to voxels: the occupancy, frustums and fusion of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.views import camera_rays
from nfldm_ns.scenes.voxel_grid import VoxelGrid

Fusion = Literal["attention", "occupancy", "mean"]
Splatting = Literal["filled", "nearest", "trilinear"]
DepthSpacing = Literal["linear", "inverse", "log"]
EPS = 1e-6
FILLING = 0.05  # weight of the coarser grid's mean in a voxel, relative to an entry of its own
SEEN = 1e-3  # entries that rays end at with a lower probability carry no features


def depth_bins(
    near: float, far: float, num_bins: int, spacing: DepthSpacing = "linear"
) -> tuple[Float[Tensor, " bins"], Float[Tensor, " bins"]]:
    """Centres and widths of planar-depth bins between near and far, in metres, on the CPU.

    Their edges are equally spaced in depth ("linear"), in its inverse, so that widths grow with the square of depth, or
    in its logarithm ("log"), so that they grow with depth.
    """
    cpu = torch.device("cpu")  # also where a model is built without memory, for which linspace would want the compiler
    if spacing == "linear":
        edges = torch.linspace(near, far, num_bins + 1, device=cpu)
    elif spacing == "inverse":
        edges = 1 / torch.linspace(1 / near, 1 / far, num_bins + 1, device=cpu)
    else:
        edges = torch.linspace(math.log(near), math.log(far), num_bins + 1, device=cpu).exp()
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


def fuse_frustums(
    density: Float[Tensor, "batch views bins h w"] | None,
    features: Float[Tensor, "batch views channels h w"],
    cameras: Cameras,
    centres: Float[Tensor, " bins"],
    widths: Float[Tensor, " bins"],
    aabb: Float[Tensor, "2 3"],
    shape: tuple[int, int, int],
    fusion: Fusion = "occupancy",
    splatting: Splatting = "nearest",
    attention: Float[Tensor, "batch views h w"] | None = None,
    valid: Bool[Tensor, "batch views h w"] | None = None,
) -> VoxelGrid:
    """Places all frustums in the world and fuses them into one grid, at once for all views of all scenes.

    One scatter adds up all entries. On the CPU those that count are selected first, as most are outside of the box,
    empty or hidden; elsewhere all are added, the others with weight 0, as a selection would wait for the device.

    Every frustum entry is the paper's `F(h, w, d) = [O(h, w, d) phi(h, w), sigma(h, w, d)]`. `splatting` says which
    entries a voxel gets:

    - `"nearest"`: an entry goes to the voxel that contains its bin's centre.
    - `"trilinear"`: to the eight voxels around its bin's centre, with trilinear weights.
    - `"filled"`: as `"nearest"`, and voxels between the rays, where pixels are wider than a voxel, take the mean of the
      entries in the voxel of half the resolution around them (push-pull).

    `fusion` says how a voxel combines its entries:

    - `"mean"`, the paper's: the plain mean of the entries.
    - `"occupancy"`: features weighted by O, densities by the probability that the ray reaches the entry; a view that
      does not see a voxel then has no say in it.
    - `"attention"`: as `"occupancy"`, the weights multiplied by the exponential of `attention`, a logit that the image
      encoder gives each of its pixels.

    Args:
        density: sigma in 1/m at the bins' centres; None, where densities are not of the views, counts all bins of a
            ray alike and gives a grid of density 0.
        cameras: batch shape `[B, N]`.
        centres, widths: planar depth of the bins in metres.
        shape: (Z, Y, X).
        valid: rays whose entries count; None for all.
    """
    if (attention is not None) != (fusion == "attention"):
        raise ValueError(f"fusion {fusion!r} does not go with attention {'given' if attention is not None else 'None'}")
    frustums = _frustum_values(density, features, cameras, widths, attention)
    trilinear, selects = splatting == "trilinear", features.device.type == "cpu"
    entries = _splat(frustums, features, cameras, centres, aabb, shape, trilinear, valid, selects)
    return _fuse(entries, fusion, features.shape[0], aabb, shape, splatting == "filled")


def _frustum_values(
    density: Float[Tensor, "batch views bins h w"] | None,
    features: Float[Tensor, "batch views channels h w"],
    cameras: Cameras,
    widths: Float[Tensor, " bins"],
    attention: Float[Tensor, "batch views h w"] | None,
) -> Float[Tensor, "batch views values bins h w"]:
    """Sigma, the probability that the ray reaches the bin, O, and where there is attention its weight."""
    if density is None:
        density = features.new_zeros(*features.shape[:2], len(widths), *features.shape[-2:])
        transmittance = occupancy = torch.ones_like(density)
    else:
        with torch.no_grad():
            _, directions = camera_rays(cameras, *density.shape[-2:])
            delta = widths * directions.norm(dim=-1, keepdim=True)
        along = occupancy_along_rays(density.movedim(2, -1), delta)
        occupancy, transmittance = (values.movedim(-1, 2) for values in along)
    values = [density, transmittance, occupancy]
    if attention is not None:
        values.append(attention.exp()[:, :, None].expand_as(density))
    return torch.stack(values, dim=2)


@dataclass
class _Entries:
    """Frustum entries and their voxels.

    Attributes:
        index: the voxel of each, counted over all scenes of the batch.
        share: how much of the entry the voxel gets, 1 for all of it; 0 outside of the box, unless they were left out.
        values: sigma, the probability that the ray reaches the entry, O, and where there is attention its weight.
        seen: entries whose O is large enough to carry features, most are empty or hidden; or all of them.
        features: of these entries' pixels.
    """

    index: Int[Tensor, " entries"]
    share: Float[Tensor, " entries"]
    values: Float[Tensor, "entries values"]
    seen: Int[Tensor, " seen"] | slice
    features: Float[Tensor, "seen channels"]


def _splat(
    frustums: Float[Tensor, "batch views values bins h w"],
    features: Float[Tensor, "batch views channels h w"],
    cameras: Cameras,
    centres: Float[Tensor, " bins"],
    aabb: Float[Tensor, "2 3"],
    shape: tuple[int, int, int],
    trilinear: bool,
    valid: Bool[Tensor, "batch views h w"] | None,
    selects: bool,
) -> _Entries:
    """Every entry of a valid ray to the voxel, or the eight voxels, at its bin's centre.

    Args:
        selects: leave out entries that add nothing, whose number the host then has to know.
    """
    batch, _, num_values, bins, h, w = frustums.shape
    with torch.no_grad():
        origins, directions = camera_rays(cameras, h, w)
        corners = frustum_voxels(origins, directions, centres, aabb, shape, trilinear)
        if valid is not None:
            corners = [(index, share * valid[..., None]) for index, share in corners]
        scene = torch.arange(batch, device=frustums.device).view(-1, 1, 1, 1, 1) * math.prod(shape)
        index = torch.cat([(index + scene).flatten() for index, _ in corners])
        share = torch.cat([share.flatten() for _, share in corners])
        entry = torch.arange(index.numel(), device=index.device) % (index.numel() // len(corners))
        if selects:
            inside = share.nonzero()[:, 0]
            index, share, entry = index[inside], share[inside], entry[inside]
    values = frustums.permute(0, 1, 4, 5, 3, 2).reshape(-1, num_values)[entry]
    seen = (values[:, 2] > SEEN).nonzero()[:, 0] if selects else slice(None)
    pixels = features.permute(0, 1, 3, 4, 2).reshape(-1, features.shape[2])
    return _Entries(index, share, values, seen, pixels[entry[seen] // bins])


def frustum_voxels(
    origins: Float[Tensor, "*batch 3"],
    directions: Float[Tensor, "*batch h w 3"],
    depths: Float[Tensor, " bins"],
    aabb: Float[Tensor, "2 3"],
    shape: tuple[int, int, int],
    trilinear: bool = False,
) -> list[tuple[Int[Tensor, "*batch h w bins"], Float[Tensor, "*batch h w bins"]]]:
    """The flat index of a voxel at each depth of each ray and its share: one pair, or eight with trilinear shares.

    Voxels outside the box have index 0 and share 0.
    """
    size = origins.new_tensor(shape[::-1])
    scale = size / (aabb[1] - aabb[0])
    start = ((origins - aabb[0]) * scale)[..., None, None, :] - (0.5 if trilinear else 0.0)
    slope = directions * scale
    places = [start[..., axis, None] + slope[..., axis, None] * depths for axis in range(3)]
    lows = [place.floor() for place in places]
    corners = []
    for steps in product((0, 1), repeat=3) if trilinear else [(0, 0, 0)]:
        share = torch.ones_like(places[0])
        flat = torch.zeros_like(places[0], dtype=torch.long)
        for axis in (2, 1, 0):
            cell = lows[axis] + steps[axis]
            share = share * ((cell >= 0) & (cell < size[axis]))
            if trilinear:
                share = share * (1 - (places[axis] - cell).abs())
            flat = flat * shape[2 - axis] + cell.long()
        corners.append((flat * (share > 0), share))
    return corners


def _fuse(
    entries: _Entries,
    fusion: Fusion,
    batch: int,
    aabb: Float[Tensor, "2 3"],
    shape: tuple[int, int, int],
    filled: bool,
) -> VoxelGrid:
    """Weighted means of the entries of every voxel."""
    rows = batch * math.prod(shape)
    density, transmittance, occupancy, *attention = entries.values.unbind(1)
    share = entries.share * attention[0] if attention else entries.share
    weight = share if fusion == "mean" else share * transmittance
    values = torch.stack([weight * density, weight], dim=1)
    density_sums = _scatter(values, entries.index, rows).reshape(batch, *shape, 2)

    index = entries.index[entries.seen]
    weight = torch.where(occupancy > SEEN, share * occupancy, 0.0)[entries.seen]
    values = torch.cat([weight[:, None] * entries.features, weight[:, None]], dim=1)
    feature_sums = _scatter(values, index, rows).reshape(batch, *shape, -1)
    if fusion == "mean":
        feature_sums = torch.cat([feature_sums[..., :-1], density_sums[..., 1:]], dim=-1)
    if filled:
        density_sums, feature_sums = fill_holes(density_sums), fill_holes(feature_sums)
    least = EPS if fusion == "mean" else SEEN
    return VoxelGrid(
        (density_sums[..., :1] / (density_sums[..., 1:] + EPS)).movedim(-1, 1),
        (feature_sums[..., :-1] / (feature_sums[..., -1:] + least)).movedim(-1, 1),
        aabb,
    )


def fill_holes(sums: Float[Tensor, "batch z y x channels"]) -> Float[Tensor, "batch z y x channels"]:
    """Adds to every voxel's sums (weighted values, and weights) a little of those of the 2 x 2 x 2 voxels around it."""
    around = F.avg_pool3d(sums.movedim(-1, 1), 2, ceil_mode=True, count_include_pad=False)
    for axis, size in enumerate(sums.shape[1:4], start=2):
        around = around.repeat_interleave(2, dim=axis).narrow(axis, 0, size)
    return sums + FILLING * around.movedim(1, -1)


def _scatter(values: Float[Tensor, " entries *channels"], index: Int[Tensor, " entries"], num_rows: int) -> Tensor:
    """Sums of the entries of each row, `[rows, *channels]`."""
    return values.new_zeros(num_rows, *values.shape[1:]).index_add(0, index, values)
