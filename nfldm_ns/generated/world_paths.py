"""Where a camera can go in a world: free space at its height, and a smooth way through it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from scipy.ndimage import distance_transform_edt, gaussian_filter1d
from skimage.graph import MCP_Geometric

from nfldm_ns.generated.cameras import look_along
from nfldm_ns.generated.floors import BODY, FREE_DENSITY
from nfldm_ns.generated.world_files import World
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import voxel_centres

CLEARANCE = 1.0  # metres from what is solid, beyond which more room is no better
SPEED = 1.4  # m/s, of somebody who walks
SMOOTHING = 0.6  # metres along the way
LOOK_AHEAD = 1.5  # metres


@dataclass
class FreeSpace:
    """The ground plane at the camera's height.

    Attributes:
        density: `[Y, X]`, largest mean density (1/m) of the layers that a camera needs; rows grow with y.
        clearance: `[Y, X]`, metres to what is solid; 0 in it.
        corner: x and y of the plane's south-west corner in metres.
        edge: sizes (x, y) of a column in metres.
        height: z of the camera in metres.
    """

    density: Float[np.ndarray, "y x"]
    clearance: Float[np.ndarray, "y x"]
    corner: tuple[float, float]
    edge: tuple[float, float]
    height: float

    def column(self, x: float, y: float) -> tuple[int, int]:
        """Row and column of a point in metres, the nearest one if it is outside."""
        row, column = ((p - o) / e for p, o, e in zip((y, x), self.corner[::-1], self.edge[::-1], strict=True))
        rows, columns = self.density.shape
        return min(max(int(row), 0), rows - 1), min(max(int(column), 0), columns - 1)

    def points(self, cells: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Points (x, y) in metres of rows and columns."""
        return (cells[:, ::-1] + 0.5) * self.edge + self.corner


def free_space(world: World) -> FreeSpace:
    """Reads all tiles, one after the other."""
    described = world.description
    _, rows, columns = world.shape
    density = np.zeros((rows, columns), dtype=np.float32)
    scale, windows = described.voxels, described.windows
    for tile, grid in world.blocks():
        heights = voxel_centres(grid.shape, grid.aabb)[:, 0, 0, 2] - described.camera_height
        layers = (heights >= BODY[0]) & (heights <= BODY[1])
        y, x = described.tiles[tile]
        part = slice((y[0] - windows.y[0]) * scale, (y[1] - windows.y[0]) * scale)
        across = slice((x[0] - windows.x[0]) * scale, (x[1] - windows.x[0]) * scale)
        density[part, across] = grid.density[0, 0, layers].mean(0).numpy()
    edge = (described.cell[0] / scale, described.cell[1] / scale)
    free = np.pad(density < FREE_DENSITY, 1)  # beyond the world there is no room
    clearance = distance_transform_edt(free, sampling=edge[::-1])[1:-1, 1:-1]
    low = world.aabb[0]
    return FreeSpace(
        density, clearance.astype(np.float32), (float(low[0]), float(low[1])), edge, described.camera_height
    )


def way_costs(space: FreeSpace) -> Float[np.ndarray, "y x"]:
    """What a step costs: little in the open, more near what is solid, very much through it, yet never infinitely."""
    near = np.clip(1 - space.clearance / CLEARANCE, 0, 1)
    return 1 + 8 * near**2 + 40 * np.clip(space.density / FREE_DENSITY - 0.5, 0, 3)


def places(world: World, space: FreeSpace) -> list[tuple[int, int]]:
    """The columns with the most room near the middle of each tile, row by row, there and back."""
    found = []
    rows = sorted({tile[0] for tile in world.description.tiles})
    for i, row in enumerate(rows):
        tiles = sorted(tile for tile in world.description.tiles if tile[0] == row)
        for tile in tiles if i % 2 == 0 else reversed(tiles):
            box = world.description.box(*world.description.tiles[tile])
            low, high = (space.column(*((1 - s) * box[0, :2] + s * box[1, :2]).tolist()) for s in (0.25, 0.75))
            room = space.clearance[low[0] : high[0] + 1, low[1] : high[1] + 1]
            down, across = np.unravel_index(int(room.argmax()), room.shape)
            found.append((low[0] + int(down), low[1] + int(across)))
    return found


def way_through(space: FreeSpace, stops: list[tuple[int, int]], length: float) -> Float[np.ndarray, "n 2"]:
    """Points (x, y) in metres from the first stop through the others in order, until the way is long enough."""
    costs = way_costs(space)
    way = [np.array(stops[0])]
    for start, end in pairwise(stops):
        search = MCP_Geometric(costs, sampling=space.edge[::-1])
        search.find_costs([start], [end])
        way.extend(np.array(step) for step in search.traceback(end)[1:])
        points = space.points(np.array(way, dtype=np.float64))
        if np.linalg.norm(np.diff(points, axis=0), axis=1).sum() >= length:
            break
    return space.points(np.array(way, dtype=np.float64))


def walk(world: World, seconds: float = 30.0, fps: float = 24.0, image_size: tuple[int, int] | None = None) -> Cameras:
    """Cameras of somebody who walks through the world, from tile to tile, by the openings where there are any.

    Ways are cheapest in free space, but never impossible: where no opening joins two places, the camera goes through
    what is thinnest. A world that is smaller than the way is long is walked there and back.

    Args:
        image_size: (height, width); by default that of training. The field of view across the shorter side is that
            of training.

    Returns:
        cameras of batch shape `[seconds * fps]`.
    """
    space = free_space(world)
    length = SPEED * seconds
    line = _smooth(way_through(space, places(world, space), length))
    count = max(2, round(seconds * fps))
    along = np.concatenate([[0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()])
    where = _there_and_back(np.linspace(0, length, count), along[-1])
    positions = np.stack([np.interp(where, along, line[:, i]) for i in range(2)], axis=-1)
    yaw = _headings(positions, fps)
    return level_cameras(world, positions, yaw, image_size)


def level_cameras(
    world: World,
    positions: Float[np.ndarray, "n 2"],
    yaw: Float[np.ndarray, " n"],
    image_size: tuple[int, int] | None = None,
) -> Cameras:
    """Level cameras at points (x, y) of the world, batch shape `[n]`."""
    trained, focal = world.base_renderer.image_size, float(world.base_renderer.config.focal_length)
    height, width = image_size or trained
    focal *= min(height / trained[0], width / trained[1])
    xyz = np.column_stack([positions, np.full(len(positions), world.description.camera_height)])
    poses = look_along(torch.from_numpy(xyz).float(), torch.from_numpy(yaw).float(), torch.zeros(len(yaw)))
    return make_cameras(poses, focal, focal, width / 2, height / 2, height, width)


def _smooth(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    """Without the corners of a lattice; its ends stay where they are."""
    along = np.concatenate([[0], np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()])
    if along[-1] == 0:
        return np.repeat(points[:1], 2, axis=0)
    step = SMOOTHING / 8
    even = np.linspace(0, along[-1], max(2, math.ceil(along[-1] / step)))
    line = np.stack([np.interp(even, along, points[:, i]) for i in range(2)], axis=-1)
    return gaussian_filter1d(line, 8, axis=0, mode="nearest")


def _there_and_back(where: Float[np.ndarray, " n"], length: float) -> Float[np.ndarray, " n"]:
    if length <= 0:
        return np.zeros_like(where)
    turn = np.mod(where, 2 * length)
    return np.where(turn > length, 2 * length - turn, turn)


def _headings(positions: Float[np.ndarray, "n 2"], fps: float) -> Float[np.ndarray, " n"]:
    """Directions of view: ahead along the way, turning smoothly; once around where nobody moves."""
    ahead = max(1, round(LOOK_AHEAD / SPEED * fps))
    later = positions[np.minimum(np.arange(len(positions)) + ahead, len(positions) - 1)]
    forward = later - positions
    if not np.linalg.norm(forward, axis=1).any():
        return np.arange(len(positions)) / len(positions) * 2 * np.pi
    moving = np.linalg.norm(forward, axis=1) > 1e-3
    last = np.maximum.accumulate(np.where(moving, np.arange(len(moving)), int(moving.argmax())))
    yaw = np.unwrap(np.arctan2(forward[last, 1], forward[last, 0]))
    return gaussian_filter1d(yaw, fps / 2, mode="nearest")
