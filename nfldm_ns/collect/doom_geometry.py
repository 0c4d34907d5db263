"""Geometry of a Doom map, in map units: sectors at points, lines of sight, ray casts, bird's-eye-view maps."""

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

    def sector_at(self, points: Float[np.ndarray, "points 2"]) -> Int[np.ndarray, " points"]:
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

    def clearance(self, points: Float[np.ndarray, "points 2"], reach: float = 64.0) -> Float[np.ndarray, " points"]:
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

    def sees(
        self, origin: Float[np.ndarray, " 3"], points: Float[np.ndarray, " points 3"]
    ) -> Bool[np.ndarray, " points"]:
        """Whether the straight line from `origin` to each point passes through openings only."""
        along, hits, _ = self._crossings(origin[:2], points[:, :2] - origin[:2])
        with np.errstate(invalid="ignore"):
            height = origin[2] + along * (points[:, 2:] - origin[2])
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
        self,
        eyes: Float[np.ndarray, "views 3"],
        angles: Float[np.ndarray, " views"],
        size: int,
        half_width: float,
        far: float,
    ) -> Float[np.ndarray, "views size size"]:
        """Planar depth seen by level pinhole cameras with square images.

        Args:
            angles: viewing directions in degrees, counter-clockwise from the x axis.
            half_width: tangent of half the field of view.
            far: depths beyond are not looked for.

        Returns:
            Depth along the viewing direction at each pixel's centre; infinite for sky, void and beyond `far`.
        """
        across = ((np.arange(size) + 0.5) / size * 2 - 1) * half_width
        hits = [self._sorted_hits(eye[:2], angle, across, far) for eye, angle in zip(eyes, angles, strict=True)]
        count = max(1, max(t.shape[1] for t, _, _ in hits))
        along = _stack_padded([t for t, _, _ in hits], count, np.inf)
        near, beyond = (_stack_padded([sectors[k] for sectors in hits], count, -1) for k in (1, 2))
        depth = self._first_surface(along, near, beyond, np.repeat(eyes[:, 2], size), -across)
        return depth.reshape(len(eyes), size, size).transpose(0, 2, 1)

    def _sorted_hits(self, origin: np.ndarray, angle: float, across: np.ndarray, far: float):
        """Crossings `[columns, K]` of one view's columns with lines, near to far: depth, sectors before and beyond."""
        turn = np.radians(angle)
        forward, right = np.array([np.cos(turn), np.sin(turn)]), np.array([np.sin(turn), -np.cos(turn)])
        lines = self._lines_in_view(origin, forward, right, across[-1], far)
        along, hits, det = self._crossings(origin, forward + across[:, None] * right, lines)
        along = np.where(hits & (along < far), along, np.inf)
        count = int(np.isfinite(along).sum(axis=1).max(initial=0))
        order = np.argsort(along, axis=1)[:, :count]
        from_front = np.take_along_axis(det, order, axis=1) < 0
        front, back = self.front[lines][order], self.back[lines][order]
        along = np.take_along_axis(along, order, axis=1)
        return along, np.where(from_front, front, back), np.where(from_front, back, front)

    def _lines_in_view(self, origin, forward, right, half_width, far) -> np.ndarray:
        """Lines that may be seen: not wholly behind, beyond, or beside the view."""
        z1, z2 = (self.start - origin) @ forward, (self.end - origin) @ forward
        x1, x2 = (self.start - origin) @ right, (self.end - origin) @ right
        kept = (np.maximum(z1, z2) > 0) & (np.minimum(z1, z2) < far)
        for side in (1, -1):
            kept &= ~((side * x1 > half_width * z1) & (side * x2 > half_width * z2))
        return np.flatnonzero(kept)

    def _first_surface(self, along, near, beyond, eye, slopes) -> Float[np.ndarray, "columns rows"]:
        """Depth of the first surface on rays of given slopes in each column.

        What a column shows narrows from line to line: floors and steps close it from below, ceilings and lintels from
        above. So a ray ends at the first line whose running bounds no longer contain its slope.
        """
        exists = np.isfinite(along)
        with np.errstate(divide="ignore", invalid="ignore"):
            floor, ceiling = ((h[near] - eye[:, None]) / along for h in (self.floor, self.ceiling))
            step, lintel = ((h[beyond] - eye[:, None]) / along for h in (self.floor, self.ceiling))
        wall = exists & ((beyond < 0) | (near < 0))
        lower = np.where(exists, np.maximum(floor, np.where(wall, np.inf, step)), -np.inf)
        upper = np.where(exists, np.minimum(ceiling, np.where(wall, -np.inf, lintel)), np.inf)
        lower, upper = np.maximum.accumulate(lower, axis=1), np.minimum.accumulate(upper, axis=1)
        passed = (lower[:, :, None] <= slopes) & (slopes <= upper[:, :, None])
        at = passed.sum(axis=1)
        missed = at == along.shape[1]
        at = np.minimum(at, along.shape[1] - 1)

        def pick(values: np.ndarray) -> np.ndarray:
            return np.take_along_axis(values, at, axis=1)

        sector, after = pick(near), pick(beyond)
        with np.errstate(divide="ignore", invalid="ignore"):
            on_floor, on_ceiling = ((h[sector] - eye[:, None]) / slopes for h in (self.floor, self.ceiling))
        through_sky = ~pick(wall) & (slopes > pick(lintel)) & self.sky[sector] & self.sky[after]
        depth = np.where(through_sky, np.inf, pick(along))
        depth = np.where(slopes > pick(ceiling), np.where(self.sky[sector], np.inf, on_ceiling), depth)
        depth = np.where(slopes < pick(floor), on_floor, depth)
        return np.where(missed | (sector < 0), np.inf, depth)

    def bev(
        self, centre: Float[np.ndarray, " 3"], corners: Float[np.ndarray, " 2 2"], size: int
    ) -> UInt8[np.ndarray, "h w"]:
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

    def _sectors_on_row(self, x: np.ndarray, y: float) -> Int[np.ndarray, " columns"]:
        y = y + _NUDGE
        lines = np.flatnonzero((self.start[:, 1] > y) != (self.end[:, 1] > y))
        if not len(lines):
            return np.full(len(x), -1)
        start, end = self.start[lines], self.end[lines]
        at = start[:, 0] + (y - start[:, 1]) / (end[:, 1] - start[:, 1]) * (end[:, 0] - start[:, 0])
        order = np.argsort(at)
        faces_west = np.where(end[:, 1] > start[:, 1], self.back[lines], self.front[lines])[order]
        return np.append(faces_west, -1)[np.searchsorted(at[order], x)]


def _stack_padded(tables: list[np.ndarray], width: int, filling: float) -> np.ndarray:
    """Tables of equal height below each other, filled up to one width."""
    return np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=filling) for t in tables])
