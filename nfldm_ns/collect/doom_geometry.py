"""Geometry of a Doom map: sectors at points, lines of sight, ray casts and bird's-eye-view maps. Map units throughout."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nfldm_ns.collect.doom_wad import DoomMap
from nfldm_ns.scenes.collection import BevClass

UNITS_PER_METRE = 25.6
EYE_HEIGHT = 41.0
PLAYER_HEIGHT = 56.0
MAX_STEP = 24.0
_IMPASSABLE = 1
_NUDGE = 1e-3  # map coordinates are integers, so nudged rays never pass exactly through a vertex

BEV_CLASSES = (
    BevClass(0, "void", (0, 0, 0)),
    BevClass(1, "floor", (170, 170, 170)),
    BevClass(2, "step up", (214, 148, 70)),
    BevClass(3, "step down", (94, 84, 150)),
    BevClass(4, "liquid", (66, 150, 80)),
    BevClass(5, "open air", (130, 190, 235)),
    BevClass(6, "closed", (150, 50, 50)),
)
_LIQUIDS = (b"NUKAGE", b"FWATER", b"SWATER", b"LAVA", b"BLOOD", b"WATER", b"SLIME0", b"SLIME10", b"SLIME11", b"SLIME12")


class DoomGeometry:
    """Lines and sectors of one map as float arrays.

    Attributes:
        start, end: `[L, 2]` end points of the lines.
        front, back: `[L]` sector on the right and the left of each line, -1 for none.
        floor, ceiling: `[S]` heights.
        sky: `[S]` whether the ceiling is the sky.
    """

    def __init__(self, doom_map: DoomMap) -> None:
        xy = np.stack([doom_map.vertices["x"], doom_map.vertices["y"]], axis=-1).astype(np.float64)
        self.start, self.end = xy[doom_map.lines["v1"]], xy[doom_map.lines["v2"]]
        self.front, self.back = doom_map.side_sectors("right"), doom_map.side_sectors("left")
        sectors = doom_map.sectors
        self.floor, self.ceiling = sectors["floor"].astype(np.float64), sectors["ceiling"].astype(np.float64)
        self.sky = sectors["ceiling_flat"] == b"F_SKY1"
        self.liquid = np.array([flat.startswith(_LIQUIDS) for flat in sectors["floor_flat"]], dtype=bool)
        self.light = sectors["light"].astype(np.float64)
        two_sided = (self.front >= 0) & (self.back >= 0)
        self._bottom = np.where(two_sided, np.maximum(self.floor[self.front], self.floor[self.back]), np.inf)
        self._top = np.where(two_sided, np.minimum(self.ceiling[self.front], self.ceiling[self.back]), -np.inf)
        step = np.abs(self.floor[self.front] - self.floor[self.back])
        impassable = (doom_map.lines["flags"] & _IMPASSABLE) > 0
        self._blocking = impassable | (self._top - self._bottom < PLAYER_HEIGHT) | (step > MAX_STEP)
        self.bounds = np.stack([xy.min(0), xy.max(0)]) if len(xy) else np.zeros((2, 2))

    def sector_at(self, points: Float[np.ndarray, "points 2"]) -> Int[np.ndarray, "points"]:
        """Sector of each point, -1 in the void."""
        x, y = points[:, :1], points[:, 1:] + _NUDGE
        low, high = np.minimum(self.start, self.end), np.maximum(self.start, self.end)
        lines = np.flatnonzero(
            (low[:, 1] <= y.max(initial=-np.inf))
            & (high[:, 1] >= y.min(initial=np.inf))
            & (high[:, 0] > x.min(initial=np.inf))
        )
        if not len(lines):
            return np.full(len(points), -1)
        (x1, y1), (x2, y2) = self.start[lines].T, self.end[lines].T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = x1 + (y - y1) * ((x2 - x1) / (y2 - y1))
        at = np.where(((y1 > y) != (y2 > y)) & (at > x), at, np.inf)
        nearest = at.argmin(axis=1)
        faces_west = np.where(y2 > y1, self.back[lines], self.front[lines])
        hit = np.isfinite(at[np.arange(len(at)), nearest])
        return np.where(hit, faces_west[nearest], -1)

    def clearance(self, points: Float[np.ndarray, "points 2"], reach: float = 64.0) -> Float[np.ndarray, "points"]:
        """Distance to the nearest line that a player cannot walk across, as far as `reach`."""
        low, high = np.minimum(self.start, self.end), np.maximum(self.start, self.end)
        if not len(points):
            return np.zeros(0)
        close = ((low <= points.max(0) + reach) & (high >= points.min(0) - reach)).all(axis=1) & self._blocking
        start, edge = self.start[close], (self.end - self.start)[close]
        offset = points[:, None] - start
        along = (offset * edge).sum(-1) / np.maximum((edge**2).sum(-1), 1e-9)
        nearest = offset - np.clip(along, 0, 1)[..., None] * edge
        return np.sqrt((nearest**2).sum(-1).min(axis=1, initial=reach**2))

    def sees(self, origin: Float[np.ndarray, "3"], points: Float[np.ndarray, "points 3"]) -> Bool[np.ndarray, "points"]:
        """Whether the straight line from `origin` to each point passes through openings only."""
        along, hits, _ = self._crossings(origin[:2], points[:, :2] - origin[:2])
        height = origin[2] + along * (points[:, 2:] - origin[2])
        with np.errstate(invalid="ignore"):
            blocked = hits & (along < 1) & ((height < self._bottom) | (height > self._top))
        return ~blocked.any(axis=1)

    def _crossings(self, origin: np.ndarray, directions: np.ndarray, lines: np.ndarray | slice = slice(None)):
        """For each ray and line: distance in multiples of the direction, whether they cross, and the determinant."""
        start, edge = self.start[lines] - origin, (self.end - self.start)[lines]
        det = directions[:, :1] * edge[:, 1] - directions[:, 1:] * edge[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            along = (start[:, 0] * edge[:, 1] - start[:, 1] * edge[:, 0]) / det
            across = (start[:, 0] * directions[:, 1:] - start[:, 1] * directions[:, :1]) / det
        return along, (along > 1e-6) & (across >= 0) & (across <= 1), det

    def cast(
        self, eye: Float[np.ndarray, "3"], angle: float, rows: int, columns: int, half_width: float, far: float
    ) -> Float[np.ndarray, "rows columns"]:
        """Planar depth of a level pinhole camera with square pixels.

        Args:
            angle: viewing direction in degrees, counter-clockwise from the x axis.
            half_width: tangent of half the horizontal field of view.
            far: depths beyond are not looked for.

        Returns:
            Depth along the viewing direction at each pixel's centre; infinite for sky, void and beyond `far`.
        """
        turn = np.radians(angle)
        forward, right = np.array([np.cos(turn), np.sin(turn)]), np.array([np.sin(turn), -np.cos(turn)])
        across = ((np.arange(columns) + 0.5) / columns * 2 - 1) * half_width
        slopes = -((np.arange(rows) + 0.5) / rows * 2 - 1) * half_width * rows / columns
        directions = forward + across[:, None] * right
        lines = self._lines_in_view(eye[:2], forward, right, half_width, far)
        along, hits, det = self._crossings(eye[:2], directions, lines)
        return self._march(np.where(hits & (along < far), along, np.inf), det, lines, eye[2], slopes).T

    def _lines_in_view(self, origin, forward, right, half_width, far) -> np.ndarray:
        """Lines that may be seen: not wholly behind, beyond, or beside the view."""
        kept = np.ones(len(self.start), dtype=bool)
        z1, z2 = (self.start - origin) @ forward, (self.end - origin) @ forward
        x1, x2 = (self.start - origin) @ right, (self.end - origin) @ right
        kept &= (np.maximum(z1, z2) > 0) & (np.minimum(z1, z2) < far)
        for side in (1, -1):
            kept &= ~((side * x1 > half_width * z1) & (side * x2 > half_width * z2))
        return np.flatnonzero(kept)

    def _march(self, along, det, lines, eye, slopes) -> Float[np.ndarray, "columns rows"]:
        """Follows each column's crossings from near to far until all its pixels have met a surface."""
        num_columns, num_rows = len(along), len(slopes)
        depth = np.full((num_columns, num_rows), np.inf)
        open_pixels = np.ones((num_columns, num_rows), dtype=bool)
        count = int(np.isfinite(along).sum(axis=1).max(initial=0))
        order = np.argsort(along, axis=1)[:, :count]
        columns = np.arange(num_columns)
        for k in range(count):
            columns = columns[open_pixels[columns].any(axis=1)]
            line = order[columns, k]
            t = along[columns, line]
            columns, line, t = columns[np.isfinite(t)], line[np.isfinite(t)], t[np.isfinite(t)]
            if not len(columns):
                break
            from_front = det[columns, line] < 0
            front, back = self.front[lines[line]], self.back[lines[line]]
            near, beyond = np.where(from_front, front, back), np.where(from_front, back, front)
            hit, done = self._meet(near, beyond, t, eye, slopes)
            open_here = open_pixels[columns]
            depth[columns] = np.where(open_here & done, hit, depth[columns])
            open_pixels[columns] = open_here & ~done
        return depth

    def _meet(self, near, beyond, t, eye, slopes):
        """What rays meet up to and at a line: depth, infinite for sky, and whether they end there."""
        height = eye + t[:, None] * slopes
        floor, ceiling = self.floor[near][:, None], self.ceiling[near][:, None]
        wall = np.broadcast_to(t[:, None], height.shape)
        solid = (beyond < 0)[:, None]
        under, over = height < floor, height > ceiling
        lower, upper = height < self.floor[beyond][:, None], height > self.ceiling[beyond][:, None]
        both_sky = (self.sky[near] & self.sky[beyond])[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            on_floor, on_ceiling = (floor - eye) / slopes, (ceiling - eye) / slopes
        depth = np.where(~solid & upper & both_sky, np.inf, wall)
        depth = np.where(over, np.where(self.sky[near][:, None], np.inf, on_ceiling), depth)
        depth = np.where(under, on_floor, depth)
        nowhere = (near < 0)[:, None]
        return np.where(nowhere, np.inf, depth), nowhere | under | over | solid | lower | upper

    def bev(self, centre: Float[np.ndarray, "3"], corners: Float[np.ndarray, "2 2"], size: int) -> UInt8[np.ndarray, "h w"]:
        """Semantic map from above, north up, with the classes of `BEV_CLASSES`.

        Args:
            centre: the place at eye height; floors count as steps relative to the floor below it.
            corners: minimum and maximum (x, y) relative to the centre.
        """
        cells = (np.arange(size) + 0.5) / size
        x = centre[0] + corners[0, 0] + cells * (corners[1, 0] - corners[0, 0])
        y = centre[1] + corners[1, 1] - cells * (corners[1, 1] - corners[0, 1])
        sectors = np.stack([self._sectors_on_row(x, row) for row in y])
        rise = self.floor[sectors] - (centre[2] - EYE_HEIGHT)
        closed = self.ceiling[sectors] - self.floor[sectors] < PLAYER_HEIGHT
        classes = np.where(self.sky[sectors], 5, 1)
        classes = np.where(rise > 8, 2, np.where(rise < -8, 3, classes))
        classes = np.where(closed, 6, np.where(self.liquid[sectors], 4, classes))
        return np.where(sectors < 0, 0, classes).astype(np.uint8)

    def _sectors_on_row(self, x: np.ndarray, y: float) -> Int[np.ndarray, "columns"]:
        y = y + _NUDGE
        lines = np.flatnonzero((self.start[:, 1] > y) != (self.end[:, 1] > y))
        if not len(lines):
            return np.full(len(x), -1)
        start, end = self.start[lines], self.end[lines]
        at = start[:, 0] + (y - start[:, 1]) / (end[:, 1] - start[:, 1]) * (end[:, 0] - start[:, 0])
        order = np.argsort(at)
        faces_west = np.where(end[:, 1] > start[:, 1], self.back[lines], self.front[lines])[order]
        return np.append(faces_west, -1)[np.searchsorted(at[order], x)]
