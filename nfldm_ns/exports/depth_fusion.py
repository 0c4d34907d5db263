"""The surface that rendered depth maps show, as triangles: signed distances of all views are averaged on a lattice.

As in volumetric range image merging (Curless & Levoy, SIGGRAPH 1996) every view says of the places around what it sees
how far they lie before or behind it, within a truncation, and the surface is where the weighted mean is 0. There are
no triangles where no view has looked.

Depth is the renderer's expected depth. Along rays that graze a surface, as most do that see a floor, distances along
the ray are far longer than those to the surface, so each pixel stands for a plane: the inverse depth of a plane is
linear in the image, and its slopes give the plane's normal.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from skimage.measure import marching_cubes
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.isosurface import FACTORS, Triangles
from nfldm_ns.exports.surface_views import SurfaceViews
from nfldm_ns.scenes.views import camera_rays, project_points
from nfldm_ns.scenes.voxel_grid import VoxelGrid

EDGE = 0.15  # second difference of inverse depth, of itself, above which neighbouring pixels are on no one surface
BEHIND = 3.0  # truncations along the ray behind a surface, up to which a view says that there is something
LEAST_COSINE = 0.1


def fuse_depth(grid: VoxelGrid, views: Iterable[SurfaceViews], resolution_factor: int = 4) -> Triangles:
    """The surface that views of a grid have seen, open where they have not.

    Args:
        grid: of one scene, whose box and voxels the lattice follows; its density is not read.
        resolution_factor: cells of the lattice per voxel and axis: 1, 2, 4 or 8.

    Raises:
        UserInputError: if they have seen none.
        ValueError: for another factor.
    """
    if resolution_factor not in FACTORS:
        raise ValueError(f"the resolution factor must be one of {FACTORS}, not {resolution_factor}")
    lattice = DistanceLattice(grid, resolution_factor)
    for batch in views:
        for i in range(batch.cameras.shape[0]):
            lattice.add(batch.cameras[i], batch.expected[i, 0], batch.seen[i, 0])
    return lattice.surface()


class DistanceLattice:
    """Weighted means of truncated signed distances at the corners of cells that fill a grid's box.

    Attributes:
        total, weight: `[Z f + 1, Y f + 1, X f + 1]`; distances are in truncations, positive where there is nothing.
        truncation: metres, the longest edge of a voxel.
    """

    def __init__(self, grid: VoxelGrid, factor: int) -> None:
        sizes = [size * factor + 1 for size in grid.shape]
        self.low, self.cell = grid.aabb[0].cpu(), grid.voxel_size.cpu() / factor
        self.truncation = float(grid.voxel_size.max())
        self.total, self.weight = torch.zeros(sizes), torch.zeros(sizes)

    def add(self, camera: Cameras, depth: Float[Tensor, "height width"], seen: Bool[Tensor, "height width"]) -> None:
        """What one view says; `depth` is planar, and that at which rays leave the box where no surface is seen."""
        part = self._within_reach(camera, depth)
        if any(s.start >= s.stop for s in part):
            return
        points = self._points(part)
        columns, rows, z = project_points(camera, points)
        height, width = depth.shape
        inside = (z > 1e-3) & (columns > 0.5) & (columns < width - 0.5) & (rows > 0.5) & (rows < height - 0.5)
        kept = inside.nonzero()[:, 0]
        places = torch.stack([columns / width * 2 - 1, rows / height * 2 - 1], dim=-1)[kept]
        distance, weight = self._distances(plane_maps(camera, depth, seen), places, z[kept])
        shape = tuple(s.stop - s.start for s in part)
        for values, target in ((distance * weight, self.total), (weight, self.weight)):
            everywhere = torch.zeros(len(points))
            everywhere[kept] = values
            target[part] += everywhere.reshape(shape)

    def _distances(
        self, maps: Float[Tensor, "4 height width"], places: Float[Tensor, "points 2"], z: Float[Tensor, " points"]
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
        """Signed distances in truncations and their weights, the inverse of the area that a pixel covers there."""
        inverse, cosine, whole = F.grid_sample(maps[None, :3], places[None, None], align_corners=False)[0, :, 0]
        nearest = F.grid_sample(maps[None, 3:], places[None, None], mode="nearest", align_corners=False)[0, 0, 0]
        ahead = 1 / inverse - z
        distance = ahead * cosine / self.truncation
        on_surface = (whole > 0.99) & (distance > -1) & (ahead > -BEHIND * self.truncation)
        free = z < nearest - self.truncation
        distance = torch.where(on_surface, distance.clamp(max=1), torch.ones_like(distance))
        return distance, (on_surface | free) * cosine.clamp(min=LEAST_COSINE) / z.clamp(min=self.truncation).square()

    def _within_reach(self, camera: Cameras, depth: Float[Tensor, "height width"]) -> tuple[slice, slice, slice]:
        """The part of the lattice (z, y, x) that holds what a view sees, and what lies just behind."""
        origin, directions = camera_rays(camera.reshape((1,)), *depth.shape)
        ends = origin[0] + directions[0].reshape(-1, 3) * (depth.reshape(-1, 1) + BEHIND * self.truncation)
        corners = torch.cat([origin, ends])
        first = ((corners.amin(0) - self.low) / self.cell).floor().long().clamp(min=0)
        last = ((corners.amax(0) - self.low) / self.cell).ceil().long() + 1
        sizes = self.total.shape[::-1]
        x, y, z = (slice(int(a), min(int(b), size)) for a, b, size in zip(first, last, sizes, strict=True))
        return z, y, x

    def _points(self, part: tuple[slice, slice, slice]) -> Float[Tensor, "points 3"]:
        axes = [
            self.low[2 - i] + self.cell[2 - i] * torch.arange(s.start, s.stop, dtype=torch.float32)
            for i, s in enumerate(part)
        ]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([x, y, z], dim=-1).reshape(-1, 3)

    def surface(self) -> Triangles:
        """Triangles of the cells all of whose corners a view has said something about.

        Raises:
            UserInputError: if the surface passes through none.
        """
        known = self.weight > 0
        inside = torch.where(known, -self.total / self.weight.clamp(min=1e-12), torch.full_like(self.total, -1.0))
        corners = [
            known[tuple(slice(o, n - 1 + o) for o, n in zip(offset, known.shape, strict=True))]
            for offset in product(range(2), repeat=3)
        ]
        # scikit-image asks the mask at a cell's last corner.
        mask = F.pad(torch.stack(corners).all(0), (1, 0, 1, 0, 1, 0))
        try:
            vertices, faces, _, _ = marching_cubes(inside.numpy(), 0.0, mask=mask.numpy(), allow_degenerate=False)
        except (RuntimeError, ValueError):  # no cell has a surface, or no value is above the level
            raise UserInputError(
                "The views see no surfaces from before and behind: try --method density, or sample another."
            ) from None
        low, cell = self.low.double().numpy(), self.cell.double().numpy()
        return Triangles(low + vertices[:, ::-1].astype(np.float64) * cell, faces.astype(np.int64))


def plane_maps(
    camera: Cameras, depth: Float[Tensor, "height width"], seen: Bool[Tensor, "height width"]
) -> Float[Tensor, "4 height width"]:
    """What pixels say of planes.

    Returns:
        inverse depth in 1/m; the cosine between the ray and the plane's normal, times the length of the ray per metre
        of planar depth, so that planar depth times it is a distance to the plane; 1 where the pixel and its four
        neighbours are of one surface that is seen, else 0; and the least depth of the pixel and its eight neighbours.
    """
    height, width = depth.shape
    inverse = 1 / depth.clamp(min=1e-3)
    around = F.pad(inverse[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    left, right, up, down = around[1:-1, :-2], around[1:-1, 2:], around[:-2, 1:-1], around[2:, 1:-1]
    fx, fy, cx, cy = (float(getattr(camera, name)) for name in ("fx", "fy", "cx", "cy"))
    by_x, by_y = (right - left) / 2 * fx, (down - up) / 2 * fy
    x = ((torch.arange(width) + 0.5 - cx) / fx)[None, :]
    y = ((torch.arange(height) + 0.5 - cy) / fy)[:, None]
    # A plane n . p = 1 has the inverse depth n . (x, y, 1), whose slopes are the first two components of n.
    cosine = inverse / (by_x.square() + by_y.square() + (inverse - x * by_x - y * by_y).square()).sqrt()
    bend = torch.maximum((left + right - 2 * inverse).abs(), (up + down - 2 * inverse).abs())
    whole = seen & (bend < EDGE * inverse)
    nearest = 1 / F.max_pool2d(around[None], 3, 1)[0]
    return torch.stack([inverse, cosine, whole.float(), nearest])
