"""Floors where no camera of a generator's collection saw any: below where its cameras stood."""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.ndimage import distance_transform_edt

from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres

BODY = (-0.8, 0.4)  # metres about the camera's height that must be free
FREE_DENSITY = 0.5  # 1/m: less is haze that one sees through
FLOOR_DEPTH = 1.0  # optical depth from which something is a floor
HOLE_DEPTH = 0.3  # and below which there is none
REACH = 4.0  # metres from a hole to the floor that it is filled with


def fill_floor(grid: VoxelGrid, camera_height: float) -> VoxelGrid:
    """Fills holes in the floor with the nearest floor: what lies below `BODY` in the nearest column that has one.

    A column is a hole if nothing stops somebody standing in it and hardly anything stops light below; it is a floor if
    nothing stops somebody and most light is stopped below. All other columns, and all above, stay as they are.

    Args:
        grid: of one scene.
        camera_height: z of the cameras in metres.
    """
    heights = voxel_centres(grid.shape, grid.aabb)[:, 0, 0, 2] - camera_height
    below, body = heights < BODY[0], (heights >= BODY[0]) & (heights <= BODY[1])
    free = grid.density[0, 0, body].mean(0) < FREE_DENSITY
    depth = grid.density[0, 0, below].sum(0) * grid.voxel_size[2]
    floor, holes = free & (depth >= FLOOR_DEPTH), free & (depth < HOLE_DEPTH)
    if not bool(floor.any()) or not bool(holes.any()):
        return grid
    edges = [float(grid.voxel_size[axis]) for axis in (1, 0)]
    far, nearest = distance_transform_edt(~floor.numpy(), sampling=edges, return_indices=True)
    holes &= torch.from_numpy(far <= REACH)
    rows, columns = (torch.from_numpy(index)[holes].long() for index in nearest)
    layers = below.nonzero()[:, 0]
    to = holes.nonzero().unbind(-1)
    density, features = grid.density.clone(), grid.features.clone()
    for values in (density, features):
        values[:, :, layers[:, None], to[0], to[1]] = values[:, :, layers[:, None], rows, columns]
    return replace(grid, density=density, features=features)
