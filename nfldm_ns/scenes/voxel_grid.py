"""A scene as density and feature voxels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.scenes.rotations import quarter_turn


@dataclass
class VoxelGrid:
    """Density and feature voxels of a batch of scenes (the paper's V).

    Attributes:
        density: `[B, 1, Z, Y, X]`, non-negative, in 1/m.
        features: `[B, C, Z, Y, X]`.
        aabb: `[2, 3]`, minimum and maximum corner (x, y, z) in metres.
        background: `[B, K, 4]`, a code of what lies beyond the box: functions `a_k + b_k . d` of a direction d, with
            (a, b_x, b_y, b_z) along the last axis; None if nothing is known of it.
    """

    density: Float[Tensor, "batch 1 z y x"]
    features: Float[Tensor, "batch channels z y x"]
    aabb: Float[Tensor, "2 3"]
    background: Float[Tensor, "batch codes 4"] | None = None

    def __post_init__(self) -> None:
        if self.density.ndim != 5 or self.density.shape[1] != 1:
            raise ValueError(f"density must be [B, 1, Z, Y, X], not {tuple(self.density.shape)}")
        if self.features.ndim != 5 or self.features.shape[2:] != self.density.shape[2:]:
            raise ValueError(
                f"features {tuple(self.features.shape)} and density {tuple(self.density.shape)} do not match"
            )
        if self.aabb.shape != (2, 3):
            raise ValueError(f"aabb must be [2, 3], not {tuple(self.aabb.shape)}")
        if self.background is not None and (self.background.ndim != 3 or self.background.shape[2] != 4):
            raise ValueError(f"background must be [B, K, 4], not {tuple(self.background.shape)}")

    @property
    def batch_size(self) -> int:
        return self.density.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxel counts (Z, Y, X)."""
        return tuple(self.density.shape[2:])  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.density.device

    @property
    def voxel_size(self) -> Float[Tensor, " 3"]:
        """Edge lengths (x, y, z) of one voxel in metres."""
        z, y, x = self.shape
        return (self.aabb[1] - self.aabb[0]) / self.aabb.new_tensor([x, y, z])

    def to(self, *args, **kwargs) -> VoxelGrid:
        """Moves the voxels as `Tensor.to` does; the box keeps float32."""
        density = self.density.to(*args, **kwargs)
        background = None if self.background is None else self.background.to(*args, **kwargs)
        return VoxelGrid(density, self.features.to(*args, **kwargs), self.aabb.to(density.device), background)

    def __getitem__(self, index: int | slice) -> VoxelGrid:
        """Selects scenes; an integer keeps the batch axis."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        background = None if self.background is None else self.background[index]
        return replace(self, density=self.density[index], features=self.features[index], background=background)

    @staticmethod
    def cat(grids: list[VoxelGrid]) -> VoxelGrid:
        """Joins grids of one box along the batch axis, with backgrounds if all have one."""
        backgrounds = [grid.background for grid in grids if grid.background is not None]
        return VoxelGrid(
            torch.cat([grid.density for grid in grids]),
            torch.cat([grid.features for grid in grids]),
            grids[0].aabb,
            torch.cat(backgrounds) if len(backgrounds) == len(grids) else None,
        )

    def fold(self) -> Float[Tensor, "batch channels_times_z y x"]:
        """Density and features with z folded into channels, for the bird's-eye-view networks."""
        voxels = torch.cat([self.density, self.features], dim=1)
        return voxels.flatten(1, 2)

    @staticmethod
    def unfold(
        folded: Float[Tensor, "batch channels_times_z y x"], num_z: int, aabb: Float[Tensor, "2 3"]
    ) -> VoxelGrid:
        """The inverse of `fold`."""
        voxels = folded.unflatten(1, (-1, num_z))
        return VoxelGrid(voxels[:, :1], voxels[:, 1:], aabb)

    def rotate90(self, quarter_turns: int) -> VoxelGrid:
        """The scene turned counter-clockwise (seen from above) about the z axis.

        Exact for boxes that are square and centred in x and y.
        """
        if self.shape[1] != self.shape[2]:
            raise ValueError(f"only square grids can be turned, not {self.shape}")
        turn = partial(
            torch.rot90, k=-quarter_turns, dims=(-2, -1)
        )  # y grows with the row: rot90 runs clockwise from above
        background = None if self.background is None else _turn_background(self.background, quarter_turns)
        return replace(self, density=turn(self.density), features=turn(self.features), background=background)

    def normalise(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """World points in metres to `grid_sample` coordinates: the box becomes [-1, 1]^3."""
        return normalise_points(points, self.aabb)

    def sample(
        self, points: Float[Tensor, "batch *points 3"]
    ) -> tuple[Float[Tensor, "batch *points 1"], Float[Tensor, "batch *points channels"]]:
        """Trilinear density and features at world points; zero outside the box."""
        voxels = torch.cat([self.density, self.features], dim=1)
        values = sample_voxels(voxels, self.normalise(points))
        return values[..., :1], values[..., 1:]


def _turn_background(code: Float[Tensor, "batch codes 4"], quarter_turns: int) -> Float[Tensor, "batch codes 4"]:
    """The functions on the sphere turned counter-clockwise about the z axis."""
    return torch.cat([code[..., :1], code[..., 1:] @ quarter_turn(quarter_turns).to(code).T], dim=-1)


def normalise_points(points: Float[Tensor, "*batch 3"], aabb: Float[Tensor, "2 3"]) -> Float[Tensor, "*batch 3"]:
    """World points in metres to `grid_sample` coordinates: the box becomes [-1, 1]^3."""
    return (points - aabb[0]) / (aabb[1] - aabb[0]) * 2 - 1


def sample_voxels(
    voxels: Float[Tensor, "batch channels z y x"], points: Float[Tensor, "batch *points 3"]
) -> Float[Tensor, "batch *points channels"]:
    """Trilinear interpolation at normalised points (x, y, z in [-1, 1]); zero outside."""
    batch, *shape, _ = points.shape
    flat = points.reshape(batch, -1, 1, 1, 3).to(voxels.dtype)
    values = F.grid_sample(voxels, flat, mode="bilinear", padding_mode="zeros", align_corners=False)
    return values.flatten(2).transpose(1, 2).reshape(batch, *shape, voxels.shape[1])


def voxel_centres(shape: tuple[int, int, int], aabb: Float[Tensor, "2 3"]) -> Float[Tensor, "z y x 3"]:
    """World positions of the centres of a `(Z, Y, X)` grid, in metres."""
    z, y, x = (torch.arange(n, device=aabb.device, dtype=aabb.dtype).add(0.5) / n for n in shape)
    unit = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)
    return aabb[0] + unit * (aabb[1] - aabb[0])
