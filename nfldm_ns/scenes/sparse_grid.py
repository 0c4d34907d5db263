"""A scene whose features are kept only where rays can read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nfldm_ns.scenes.voxel_grid import VoxelGrid


@dataclass
class SparseGrid:
    """One scene with all of its density, but features of some voxels alone.

    Density stays whole: it is one channel of many, and what is behind a surface makes meshes and crops what they are.

    Attributes:
        density: `[Z, Y, X]`, 1/m.
        kept: `[Z, Y, X]`, whose features there are.
        features: `[N, C]`, of the kept voxels in the order of `kept.nonzero()`; all others have none (0).
        aabb: `[2, 3]`, metres.
        background: `[K, 4]` or None, see `VoxelGrid`.
    """

    density: Float[Tensor, "z y x"]
    kept: Bool[Tensor, "z y x"]
    features: Float[Tensor, "kept channels"]
    aabb: Float[Tensor, "2 3"]
    background: Float[Tensor, "codes 4"] | None = None

    def __post_init__(self) -> None:
        if self.kept.shape != self.density.shape or self.density.ndim != 3:
            raise ValueError(f"density {tuple(self.density.shape)} and kept {tuple(self.kept.shape)} do not match")
        if self.features.ndim != 2 or len(self.features) != int(self.kept.sum()):
            raise ValueError(f"features {tuple(self.features.shape)} are not of {int(self.kept.sum())} voxels")

    @staticmethod
    def from_dense(grid: VoxelGrid, threshold: float = 0.0) -> SparseGrid:
        """Leaves out features that no sample reads that lies where density is above the threshold (1/m).

        With the threshold 0 no rendering changes at all, from wherever.

        Raises:
            ValueError: if the grid holds more than one scene.
        """
        if grid.batch_size != 1:
            raise ValueError(f"one scene at a time, not {grid.batch_size}")
        kept = readable(grid.density[0, 0], threshold)
        background = None if grid.background is None else grid.background[0]
        return SparseGrid(grid.density[0, 0], kept, grid.features[0].movedim(0, -1)[kept], grid.aabb, background)

    def to_dense(self) -> VoxelGrid:
        """The grid, to the bit where features are kept, and with features 0 elsewhere."""
        features = self.features.new_zeros(*self.density.shape, self.features.shape[1])
        features[self.kept] = self.features
        background = None if self.background is None else self.background[None]
        return VoxelGrid(self.density[None, None], features.movedim(-1, 0)[None], self.aabb, background)


def readable(density: Float[Tensor, "z y x"], threshold: float) -> Bool[Tensor, "z y x"]:
    """Voxels that have density above the threshold or a neighbour (of 26) that has: interpolation reads no others."""
    return F.max_pool3d(density[None, None].float(), 3, stride=1, padding=1)[0, 0] > threshold
