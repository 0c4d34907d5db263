"""What of a place some posed images show: the voxels before the surfaces that their pixels end on, and these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.views import project_points
from nfldm_ns.scenes.voxel_grid import voxel_centres

MARGIN = 0.75  # diagonals of a voxel that a surface may lie before the centre of the voxel that stands for it


def seen_points(
    points: Float[Tensor, "*shape 3"],
    cameras: Cameras,
    depths: Float[Tensor, "views 1 height width"],
    margin: float,
    masks: Bool[Tensor, "views 1 height width"] | None = None,
) -> Bool[Tensor, "*shape"]:
    """Points that at least one view shows: in its image, and at most `margin` metres behind what its ray ends on.

    Args:
        cameras: batch shape `[N]`.
        depths: planar, in metres: where each pixel's ray ends.
        masks: pixels that are not masked; masked ones show nothing.
    """
    ends = depths if masks is None else torch.where(masks, depths, -torch.inf)
    seen = torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)
    height, width = depths.shape[-2:]
    for i in range(cameras.shape[0]):
        column, row, depth = (v.reshape(seen.shape) for v in project_points(cameras[i], points.reshape(-1, 3)))
        column, row = column / cameras.width[i], row / cameras.height[i]
        inside = (depth > 0) & (column >= 0) & (column < 1) & (row >= 0) & (row < 1)
        # The nearest pixel: a mean across an edge would lie where nothing is.
        r, c = ((part * size).long().clamp(0, size - 1) for part, size in ((row, height), (column, width)))
        seen |= inside & (depth <= ends[i, 0][r, c] + margin)
    return seen


def seen_voxels(
    cameras: Cameras,
    depths: Float[Tensor, "views 1 height width"],
    shape: tuple[int, int, int],
    aabb: Float[Tensor, "2 3"],
    masks: Bool[Tensor, "views 1 height width"] | None = None,
) -> Bool[Tensor, "z y x"]:
    """Voxels of a `(Z, Y, X)` grid whose centres at least one view shows, or the surface in them; see `seen_points`."""
    voxel = (aabb[1] - aabb[0]) / aabb.new_tensor(shape[::-1])
    return seen_points(voxel_centres(shape, aabb), cameras, depths, MARGIN * float(voxel.norm()), masks)


def ends_of_rays(
    depths: Float[Tensor, "views 1 height width"] | None,
    rendered: Float[Tensor, "views 1 height width"],
) -> Float[Tensor, "views 1 height width"]:
    """Measured depth where there is any (0 is unknown), else that of the voxels."""
    return rendered if depths is None else torch.where(depths > 0, depths, rendered)


@dataclass(frozen=True)
class Visibility:
    """Which voxels and cells of latents given images show.

    Attributes:
        voxels: `[Z, Y, X]`.
        column_share: share of its voxels that a column needs to be known.
        cell_share: share of its columns that a cell of c needs to be known.
    """

    voxels: Bool[Tensor, "z y x"]
    column_share: float = 0.1
    cell_share: float = 0.25

    @property
    def columns(self) -> Bool[Tensor, "y x"]:
        """Known columns of V."""
        return self.voxels.float().mean(0) >= self.column_share

    def known_cells(self, factor: int) -> Bool[Tensor, "yc xc"]:
        """Known cells of `factor` x `factor` columns, as c has them."""
        share = F.avg_pool2d(self.columns.float()[None, None], factor)[0, 0]
        return share >= self.cell_share

    def unknown(self, factor: int) -> tuple[Bool[Tensor, "yc xc"], Bool[Tensor, "y x"]]:
        """Cells of c and columns of f that have to be sampled. f is what its cell of c leaves over, so that none is
        known where that is not."""
        known = self.known_cells(factor)
        around = known.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        return ~known, ~(around & self.columns)

    def weights(self) -> Float[Tensor, "1 1 z y x"]:
        """1 for voxels of which all neighbours are seen, falling to 0 where none is: soft seams of one voxel."""
        return F.avg_pool3d(self.voxels.float()[None, None], 3, 1, 1, count_include_pad=False)


def cameras_inside(cameras: Cameras, aabb: Float[Tensor, "2 3"]) -> Bool[Tensor, " views"]:
    """Which cameras of batch shape `[N]` stand in the box."""
    places = cameras.camera_to_worlds[..., 3]
    return ((places >= aabb[0]) & (places <= aabb[1])).all(-1)
