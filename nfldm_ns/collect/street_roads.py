"""Roads as lanes along polylines: their edges, their outlines as polygons, and semantic maps of what is on them.

Positions are in metres in the layout's world, x and y, right-handed; polygons are `[P, 2]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from nfldm_ns.scenes.collection import BevClass

GROUND, ROAD, LINE, VEHICLE, BUILDING, VEGETATION, PAVEMENT = range(7)
BEV_CLASSES = (
    BevClass(GROUND, "ground", (178, 190, 140)),
    BevClass(ROAD, "road", (90, 90, 96)),
    BevClass(LINE, "lane line", (245, 240, 210)),
    BevClass(VEHICLE, "vehicle", (220, 60, 50)),
    BevClass(BUILDING, "building", (120, 80, 140)),
    BevClass(VEGETATION, "vegetation", (50, 140, 60)),
    BevClass(PAVEMENT, "pavement", (190, 180, 170)),
)
NO_LINE, BROKEN, CONTINUOUS, KERB = range(4)
LINE_WIDTH = 0.15
_DASH, _GAP = 3.0, 4.0
_JOINED = 1.0  # metres between ends of lanes that are one


@dataclass(frozen=True)
class Lane:
    """One lane, in the direction of its traffic.

    Attributes:
        points: `[P, 2]` along its middle, at most a metre apart.
        lines: what is at its left and right: `NO_LINE`, `BROKEN`, `CONTINUOUS` or `KERB`, where the road ends.
        yellow: whether those lines are.
    """

    points: Float[np.ndarray, "points 2"]
    width: float
    lines: tuple[int, int]
    yellow: tuple[bool, bool]

    @property
    def length(self) -> float:
        return float(arc_lengths(self.points)[-1])

    def at(self, distance: float) -> tuple[Float[np.ndarray, " 2"], float]:
        """The point so many metres from the lane's beginning, and the direction there in radians from x to y."""
        along = arc_lengths(self.points)
        spot = np.array([np.interp(distance, along, self.points[:, axis]) for axis in (0, 1)])
        step = self.points[1:] - self.points[:-1]
        k = int(np.clip(np.searchsorted(along, distance) - 1, 0, len(step) - 1))
        return spot, float(np.arctan2(step[k, 1], step[k, 0]))


def read_lanes(path: Path) -> list[Lane]:
    """The lanes that `metadrive/server.py` wrote."""
    with np.load(path) as arrays:
        starts, points = arrays["starts"], arrays["points"].astype(np.float64)
        rest = zip(arrays["widths"], arrays["lines"], arrays["yellow"], strict=True)
        return [
            Lane(
                points[starts[i] : starts[i + 1]],
                float(width),
                (int(lines[0]), int(lines[1])),
                (bool(yellow[0]), bool(yellow[1])),
            )
            for i, (width, lines, yellow) in enumerate(rest)
        ]


def arc_lengths(points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, " points"]:
    """Distance of each point of a polyline from its beginning, along it."""
    return np.concatenate([[0.0], np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()])


def offset(points: Float[np.ndarray, "points 2"], distance: float) -> Float[np.ndarray, "points 2"]:
    """A polyline beside another one, so many metres to its left."""
    along = np.gradient(points, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    return points + distance * np.stack([-along[:, 1], along[:, 0]], axis=1)


def outline(points: Float[np.ndarray, "points 2"], left: float, right: float) -> Float[np.ndarray, "corners 2"]:
    """The band between two lines beside a polyline, so many metres to its left (negative: to its right)."""
    return np.concatenate([offset(points, left), offset(points, right)[::-1]])


def rectangle(centre: Float[np.ndarray, " 2"], heading: float, length: float, width: float) -> Float[np.ndarray, "4 2"]:
    """Corners of a rectangle that is `length` long in the direction of `heading`, counter-clockwise."""
    along = np.array([np.cos(heading), np.sin(heading)])
    left = np.array([-along[1], along[0]])
    half = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) / 2
    return centre + half[:, :1] * length * along + half[:, 1:] * width * left


def lane_outline(lane: Lane) -> Float[np.ndarray, "corners 2"]:
    """All of a lane."""
    return outline(lane.points, lane.width / 2, -lane.width / 2)


def painted_lines(lane: Lane) -> Iterator[tuple[Float[np.ndarray, "points 2"], bool]]:
    """The middles of a lane's lines, dash by dash, and whether they are yellow; kerbs have none."""
    for line, yellow, side in zip(lane.lines, lane.yellow, (1, -1), strict=True):
        if line in (BROKEN, CONTINUOUS):
            edge = offset(lane.points, side * (lane.width / 2 - (LINE_WIDTH if line == CONTINUOUS else 0)))
            yield from ((part, yellow) for part in (_dashes(edge) if line == BROKEN else [edge]))


def _dashes(points: Float[np.ndarray, "points 2"]) -> Iterator[Float[np.ndarray, "points 2"]]:
    along = arc_lengths(points)
    for begin in np.arange(_GAP / 2, along[-1] - _DASH / 2, _DASH + _GAP):
        s = np.linspace(begin, min(begin + _DASH, along[-1]), 4)
        yield np.stack([np.interp(s, along, points[:, axis]) for axis in (0, 1)], axis=1)


def kerbs(lanes: Sequence[Lane]) -> list[Float[np.ndarray, "points 2"]]:
    """The edges of the road, each in a direction that has the road to its left."""
    found = []
    for lane in lanes:
        if lane.lines[1] == KERB:
            found.append(offset(lane.points, -lane.width / 2))
        if lane.lines[0] == KERB:
            found.append(offset(lane.points, lane.width / 2)[::-1])
    return found


def dead_ends(lanes: Sequence[Lane]) -> Float[np.ndarray, "ends 2"]:
    """Where lanes begin or end and no other one does: where the world does."""
    ends = np.array([lane.points[k] for lane in lanes for k in (0, -1)])
    near = np.linalg.norm(ends[:, None] - ends, axis=-1) < _JOINED
    return ends[near.sum(axis=1) < 2]


class Footprints:
    """What of the ground is taken, on a grid of `cell` metres around all of the given points."""

    def __init__(self, points: Float[np.ndarray, "points 2"], margin: float, cell: float = 0.5) -> None:
        self._low, self._cell = points.min(axis=0) - margin, cell
        extent = points.max(axis=0) + margin - self._low
        self._image = Image.new("1", [int(v) for v in np.ceil(extent / cell)])
        self._draw = ImageDraw.Draw(self._image)

    def take(self, polygon: Float[np.ndarray, "corners 2"]) -> None:
        _fill(self._draw, (polygon - self._low) / self._cell, 1)

    def is_free(self, polygon: Float[np.ndarray, "corners 2"]) -> bool:
        """Whether nothing of a polygon is taken or beyond the grid."""
        cells = (polygon - self._low) / self._cell
        low, high = np.floor(cells.min(axis=0)).astype(int), np.ceil(cells.max(axis=0)).astype(int) + 1
        if (low < 0).any() or (high > self._image.size).any():
            return False
        stencil = Image.new("1", [int(v) for v in high - low])
        _fill(ImageDraw.Draw(stencil), cells - low, 1)
        here = self._image.crop((int(low[0]), int(low[1]), int(high[0]), int(high[1])))
        return not (np.asarray(here) & np.asarray(stencil)).any()

    def taken(self, points: Float[np.ndarray, "points 2"]) -> Bool[np.ndarray, " points"]:
        """Whether points lie on what is taken; those beyond the grid do not."""
        cells: Int[np.ndarray, "points 2"] = np.floor((points - self._low) / self._cell).astype(int)
        inside = ((cells >= 0) & (cells < self._image.size)).all(axis=1)
        cells = np.where(inside[:, None], cells, 0)
        return inside & np.asarray(self._image)[cells[:, 1], cells[:, 0]]


def street_map(
    centre: Float[np.ndarray, " 2"],
    corners: Float[np.ndarray, "2 2"],
    size: int,
    layers: Iterable[tuple[int, Iterable[Float[np.ndarray, "corners 2"]]]],
) -> UInt8[np.ndarray, "size size"]:
    """A map of classes around a place, its top row in the north; what no layer covers is `GROUND`.

    Args:
        corners: minimum and maximum x, y of the map, relative to `centre`.
        layers: a class and its polygons, each over those before it.
    """
    image = Image.new("L", (size, size), GROUND)
    draw = ImageDraw.Draw(image)
    low, high = corners
    for label, polygons in layers:
        for polygon in polygons:
            share = (polygon - centre - low) / (high - low)
            if (share.max(axis=0) > 0).all() and (share.min(axis=0) < 1).all():
                _fill(draw, np.stack([share[:, 0], 1 - share[:, 1]], axis=1) * size, label)
    return np.asarray(image).copy()


def _fill(draw: ImageDraw.ImageDraw, cells: Float[np.ndarray, "corners 2"], value: int) -> None:
    """Fills the cells whose centres a polygon holds, and those along its edge; cell 0 reaches from 0 to 1."""
    draw.polygon([(float(x), float(y)) for x, y in cells - 0.5], fill=value)
