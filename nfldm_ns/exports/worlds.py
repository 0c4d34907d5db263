"""Meshes, points and splats of worlds: surfaces of the whole, seen from a place in every tile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.exports.mesh import ColoredMesh, Method, check_method, mesh_of_views
from nfldm_ns.exports.splat_fitting import fit_splats
from nfldm_ns.exports.splats import Splats, splats_from_points
from nfldm_ns.exports.surface_views import (
    RING_PITCHES,
    RING_YAWS,
    SurfacePoints,
    SurfaceViews,
    join_points,
    rings_of,
    surface_views,
    thin,
    unproject,
)
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.generated.world_files import World
from nfldm_ns.generated.world_paths import FreeSpace, free_space, level_cameras, places
from nfldm_ns.scenes.views import index_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid

CAMERAS_AT_ONCE = 4
BORDER_M = 1e-3
NOTHING_SEEN = "The world has no surfaces that its cameras see: make another."


def world_mesh(world: World, *, method: Method = "density", **settings: Any) -> ColoredMesh:
    """The surfaces of a whole world, in the colours of its renderings.

    Args:
        method: as `scene_mesh` takes it. Views stand at one place of each tile, which does not see all of it: an
            isosurface has the rest, too.
        settings: as `scene_mesh` takes them; there are no rings.

    Raises:
        UserInputError: if there are no surfaces, or a density is given for the method "depth".
    """
    check_method(method, settings.get("opacity"), settings.get("level"))
    views = [part for _, part in tile_views(world)]
    return mesh_of_views(world.whole(), views, method=method, **settings)


def world_points(world: World, spacing: float = 0.05) -> SurfacePoints:
    """Surface points of a world, tile by tile.

    Raises:
        UserInputError: if no view sees a surface.
    """
    parts = [thin(unproject(views, grid), spacing) for grid, views in tile_views(world)]
    points = thin(join_points(parts), spacing)
    if len(points.positions) == 0:
        raise UserInputError(NOTHING_SEEN)
    return points


def world_splats(
    world: World, *, spacing: float = 0.1, fit_steps: int = 0, ring_places: int = 2, **settings: Any
) -> Splats:
    """Splats on the surfaces of a whole world, and on its own border where the background shows there.

    Where a ray meets nothing within the reach of a view, a box, there is no splat.

    Args:
        spacing: edge in metres of cells that get one splat each; 0 makes one of every pixel.
        fit_steps: of `fit_splats`, on the views of all tiles.
        ring_places: further places around that of each tile (`further_cameras`).
        settings: further ones of `fit_splats`.

    Raises:
        UserInputError: if no view sees a surface.
    """
    points, views = [], []
    for grid, part in tile_views(world, ring_places):
        found = unproject(part, grid, beyond=True)
        points.append(thin(without_inner_borders(found, grid.aabb, world.aabb), spacing))
        views.append(part)
    if not any(bool(part.seen.any()) for part in views):
        raise UserInputError(NOTHING_SEEN)
    return fit_splats(splats_from_points(thin(join_points(points), spacing), spacing), views, fit_steps, **settings)


def without_inner_borders(
    points: SurfacePoints, near: Float[Tensor, "2 3"], whole: Float[Tensor, "2 3"]
) -> SurfacePoints:
    """The points but those on the border of what was near a view, unless the world ends there, too."""
    faces = points.positions[:, None] - near
    inner = ((faces.abs() < BORDER_M) & ((near - whole).abs() > BORDER_M)).flatten(1).any(-1)
    return SurfacePoints(*(getattr(points, field.name)[~inner] for field in fields(SurfacePoints)))


def tile_views(world: World, ring_places: int = 0) -> Iterator[tuple[VoxelGrid, SurfaceViews]]:
    """What is seen to all sides, up and down from where there is most room in each tile, with the voxels around.

    Args:
        ring_places: further places around it (`further_cameras`).
    """
    space = free_space(world)
    box = world.base_renderer.aabb
    reach = float((box[1] - box[0])[:2].max())
    for place in places(world, space):
        grid, scene = _scene_at(world, space, place, reach)
        for cameras in rings_of(scene, ring_places):
            for first in range(0, cameras.shape[0], CAMERAS_AT_ONCE):
                yield grid, surface_views(scene, index_cameras(cameras, slice(first, first + CAMERAS_AT_ONCE)))


def _scene_at(world: World, space: FreeSpace, place: tuple[int, int], reach: float) -> tuple[VoxelGrid, GeneratedScene]:
    """A scene of what is near a place, with its cameras."""
    point = space.points(np.array([place], dtype=np.float64))
    yaws = torch.arange(RING_YAWS).repeat_interleave(len(RING_PITCHES)) / RING_YAWS * 2 * math.pi
    cameras = level_cameras(world, point.repeat(len(yaws), axis=0), yaws.double().numpy())
    positions = cameras.camera_to_worlds[:, :, 3]
    cameras.camera_to_worlds = look_along(positions, yaws, torch.tensor(RING_PITCHES).repeat(RING_YAWS))
    grid = world.near(positions[0], reach)
    return grid, GeneratedScene(grid, world.renderer_for(grid), cameras)
