"""Joins the voxels of scenes with soft seams."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.scenes.voxel_grid import VoxelGrid

EMPTY_DENSITY = 0.05  # 1/m: how much the features of an empty voxel count, for surfaces near it read them


def blend_voxels(first: VoxelGrid, second: VoxelGrid, weights: Float[Tensor, "*voxels y x"]) -> VoxelGrid:
    """Voxels that are those of `first` where the weight is 0, of `second` where it is 1, and mixed between.

    Densities are interpolated; features likewise, but each counts as much as its density, so that what empty voxels
    hold does not stain surfaces. With weights of 0, with weights of 1, and where both grids agree, the values are
    theirs bit for bit. The background is that of `first`: it belongs to no column.

    Args:
        first, second: of one shape and box.
        weights: in [0, 1], of columns `[Y, X]` or of voxels `[1, 1, Z, Y, X]`.
    """
    share = weights.to(first.density)
    kept, added = ((grid.density + EMPTY_DENSITY) * part for grid, part in ((first, 1 - share), (second, share)))
    return replace(
        first,
        density=torch.lerp(first.density, second.density, share.expand_as(first.density)),
        features=torch.lerp(first.features, second.features, (added / (kept + added)).expand_as(first.features)),
    )
