"""Whether the geometry of scenes is like that of real ones: distribution of depth, and density that floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from nfldm_ns.scenes.voxel_grid import VoxelGrid

BINS = 512
SOLID = 0.5  # opacity over one voxel's edge from which on a voxel counts as solid
ALL_NEIGHBOURS = np.ones((3, 3, 3), bool)


# Depth


@dataclass
class DepthHistogram:
    """Planar depths of many pixels, in `BINS` equal bins from 0 to `far`.

    Attributes:
        counts: `[BINS + 1]`, pixels per bin, and last the pixels that show no surface.
        far: end of the last bin in metres; what lies beyond is counted there.
    """

    counts: Int[Tensor, " bins_and_one"]
    far: float

    @staticmethod
    def of(depths: Float[Tensor, "*pixels"], surface: Bool[Tensor, "*pixels"], far: float) -> DepthHistogram:
        """Of depths in metres; pixels that are not `surface` are counted as such, whatever their depth."""
        index = (depths[surface] / far * BINS).long().clamp(0, BINS - 1)
        counts = torch.bincount(index.cpu(), minlength=BINS + 1)
        counts[BINS] = (~surface).sum()
        return DepthHistogram(counts, far)

    @staticmethod
    def total(histograms: Sequence[DepthHistogram]) -> DepthHistogram:
        """All pixels together."""
        return DepthHistogram(torch.stack([h.counts for h in histograms]).sum(dim=0), histograms[0].far)

    @property
    def num_pixels(self) -> int:
        return int(self.counts.sum())

    @property
    def surface_share(self) -> float:
        """Share of pixels that show a surface."""
        return 1 - int(self.counts[BINS]) / max(self.num_pixels, 1)

    @property
    def bin_width(self) -> float:
        """In metres."""
        return self.far / BINS

    @property
    def cumulative(self) -> Float[Tensor, " bins"]:
        """Share of surface pixels up to the end of each bin.

        Raises:
            ValueError: if there are none.
        """
        total = self.counts[:BINS].sum()
        if total == 0:
            raise ValueError("no pixel shows a surface")
        return self.counts[:BINS].double().cumsum(dim=0) / total

    def quantile(self, share: float) -> float:
        """Depth in metres that `share` of the surface pixels do not exceed, up to the width of a bin."""
        index = int(torch.searchsorted(self.cumulative, torch.tensor(share, dtype=torch.float64)))
        return (min(index, BINS - 1) + 0.5) * self.bin_width

    def wasserstein(self, other: DepthHistogram) -> float:
        """Wasserstein-1 distance in metres of two distributions of surface depth: the area between their cumulatives.

        It is how far depth must be moved on average to turn one into the other, up to the width of a bin.
        """
        if self.far != other.far:
            raise ValueError(f"histograms up to {self.far} m and {other.far} m do not compare")
        return float((self.cumulative - other.cumulative).abs().sum()) * self.bin_width

    def density(self, bins: int = 64) -> tuple[list[float], list[float]]:
        """Middles of coarser bins in metres, and the density of depth in each in 1/m, to be drawn."""
        parts = self.counts[:BINS].view(bins, -1).sum(dim=1).double()
        width = self.far / bins
        middles = (torch.arange(bins) + 0.5) * width
        return middles.tolist(), (parts / parts.sum().clamp(min=1) / width).tolist()


# Density that floats


def floating_density(grid: VoxelGrid) -> Float[Tensor, "batch 2"]:
    """Shares of each scene's opacity that floats in the air, and that is haze.

    The opacity of a voxel is `1 - exp(-density * edge)`, edge being the mean edge length. Voxels of opacity `SOLID` or
    more form components (26 neighbours). A component floats if it is not the largest (by opacity) and does not touch
    the border of the box, beyond which it may be held. Opacity of all other voxels is haze. Both are shares of the
    opacity of the whole scene; real scenes have some of either, so compare.

    Returns:
        (floating, haze) per scene; zeros for an empty scene.
    """
    opacity = 1 - torch.exp(-grid.density[:, 0].double().cpu() * float(grid.voxel_size.mean()))
    return torch.tensor([_floating_and_haze(scene) for scene in opacity.numpy()], dtype=torch.float64).view(-1, 2)


def _floating_and_haze(opacity: Float[np.ndarray, "z y x"]) -> tuple[float, float]:
    total = opacity.sum()
    if total == 0:
        return 0.0, 0.0
    solid = opacity >= SOLID
    labels, count = ndimage.label(solid, ALL_NEIGHBOURS)
    haze = opacity[~solid].sum() / total
    if count == 0:
        return 0.0, float(haze)
    masses = np.bincount(labels.ravel(), weights=opacity.ravel(), minlength=count + 1)
    masses[0] = 0
    held = {int(masses.argmax())}
    for axis in range(3):
        for side in (0, -1):
            held |= set(np.unique(np.take(labels, side, axis=axis)).tolist())
    floating = masses.sum() - masses[sorted(held)].sum()
    return max(float(floating / total), 0.0), float(haze)
