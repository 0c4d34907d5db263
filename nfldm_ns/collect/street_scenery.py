"""What stands along made-up streets: pavements, buildings with facades, trees, lamps and parked cars, by a seed.

Nothing here needs a simulator. Lengths are in metres, z up, the road at z = 0; colours are sRGB from 0 to 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from nfldm_ns.collect.street_roads import (
    BUILDING,
    GROUND,
    LINE,
    LINE_WIDTH,
    PAVEMENT,
    ROAD,
    VEGETATION,
    Footprints,
    Lane,
    arc_lengths,
    kerbs,
    lane_outline,
    offset,
    outline,
    painted_lines,
    rectangle,
)

PARKING, WALK = 2.2, 2.8
"""Widths of the strip for parked cars beside the road, and of the pavement beyond it."""
_KERB_HEIGHT = 0.14
_BAY, _FLOOR = 3.0, 3.2  # one window of a facade
_MARGIN = 70.0  # of scenery around the roads
_GROUND_REACH = 1500.0
_TILE = 60.0
_FACADES = 10
PARKED_KINDS = ("s", "m", "l", "default")
PAINTS = (
    (0.85, 0.85, 0.87),
    (0.12, 0.12, 0.14),
    (0.5, 0.52, 0.55),
    (0.7, 0.1, 0.1),
    (0.1, 0.2, 0.5),
    (0.1, 0.35, 0.25),
    (0.85, 0.65, 0.15),
    (0.45, 0.3, 0.2),
)
_LEAVES = ((0.26, 0.42, 0.16), (0.36, 0.5, 0.2), (0.2, 0.36, 0.2), (0.55, 0.5, 0.18), (0.6, 0.36, 0.16))


@dataclass(frozen=True)
class Style:
    """What a layout's streets look like; shares are of what would fit."""

    ground: tuple[float, float, float]
    buildings: float
    floors: tuple[int, int]
    gabled: float
    trees: float
    parked: float
    forest: float


STYLES = {
    "town": Style((0.5, 0.5, 0.46), 0.95, (2, 5), 0.0, 0.5, 0.45, 0.15),
    "centre": Style((0.52, 0.51, 0.5), 1.0, (3, 8), 0.0, 0.3, 0.5, 0.05),
    "suburb": Style((0.36, 0.48, 0.22), 0.9, (1, 2), 1.0, 0.7, 0.35, 0.8),
    "village": Style((0.45, 0.5, 0.25), 0.7, (1, 3), 0.8, 0.7, 0.25, 1.4),
}


@dataclass
class Scenery:
    """All that stands still in a layout.

    Attributes:
        meshes: as `StreetDrawer.set_scenery` takes them.
        textures: by name, `[H, W, 4]` of 8 bits.
        parked: vehicles with `kind`, `x`, `y`, `heading` (radians), `paint`, `length` and `width`.
        layers: polygons by class, for maps.
    """

    style: str
    meshes: list[dict[str, Any]] = field(default_factory=list)
    textures: dict[str, UInt8[np.ndarray, "height width 4"]] = field(default_factory=dict)
    parked: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[int, list[Float[np.ndarray, "corners 2"]]] = field(default_factory=lambda: defaultdict(list))


def make_scenery(lanes: Sequence[Lane], seed: Sequence[int]) -> Scenery:
    """Builds along all kerbs of a road network; the same lanes and seed give the same."""
    rng = np.random.default_rng(list(seed))
    style = list(STYLES)[int(rng.integers(len(STYLES)))]
    return _Builder(lanes, rng, style).build()


class _Meshes:
    """Triangles by what they look like and in which square of `_TILE` m they are, so that far ones are not drawn."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int, float, int, int], list[tuple[np.ndarray, ...]]] = defaultdict(list)

    def add(
        self,
        vertices: Float[np.ndarray, "v 3"],
        triangles: Int[np.ndarray, "t 3"],
        normals: Float[np.ndarray, "v 3"],
        uv: Float[np.ndarray, "v 2"],
        colour: Sequence[float] | Float[np.ndarray, "v 3"],
        texture: str = "",
        label: int = GROUND,
        glow: float = 0.0,
    ) -> None:
        colours = np.broadcast_to(np.asarray(colour, dtype=np.float64), (len(vertices), 3))
        x, y = np.floor(vertices[:, :2].mean(axis=0) / _TILE).astype(int)
        self._parts[texture, label, glow, int(x), int(y)].append((vertices, triangles, normals, uv, colours))

    def quad(self, corners: Float[np.ndarray, "4 3"], uv: Float[np.ndarray, "4 2"], colour, **look: Any) -> None:
        """A flat quadrilateral, counter-clockwise as seen from its front."""
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        normal = normal / max(np.linalg.norm(normal), 1e-9)
        self.add(corners, np.array([(0, 1, 2), (0, 2, 3)]), np.tile(normal, (4, 1)), uv, colour, **look)

    def band(
        self, left: Float[np.ndarray, "p 3"], right: Float[np.ndarray, "p 3"], keep, colour, scale: float, **look: Any
    ) -> None:
        """Quadrilaterals between two lines, of those that are kept; textures lie on the ground, `scale` m a tile."""
        at = np.flatnonzero(keep)
        if not len(at):
            return
        corners = np.stack([left[at], right[at], right[at + 1], left[at + 1]], axis=1)
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
        normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
        first = 4 * np.arange(len(at))[:, None]
        triangles = np.concatenate([first + np.array(triangle) for triangle in ((0, 1, 2), (0, 2, 3))])
        flat = corners.reshape(-1, 3)
        self.add(flat, triangles, np.repeat(normals, 4, axis=0), flat[:, :2] / scale, colour, **look)

    def gathered(self) -> list[dict[str, Any]]:
        found = []
        for (texture, label, glow, _, _), parts in self._parts.items():
            counts = np.cumsum([0, *(len(part[0]) for part in parts)])
            columns = list(zip(*parts, strict=True))
            names = ("vertices", "normals", "uv", "colours")
            arrays = {
                name: np.concatenate(columns[k]).astype(np.float32) for name, k in zip(names, (0, 2, 3, 4), strict=True)
            }
            triangles = np.concatenate([part[1] + start for part, start in zip(parts, counts[:-1], strict=True)])
            arrays["triangles"] = triangles.astype(np.uint32)
            found.append({"texture": texture, "label": label, "glow": glow, **arrays})
        return found


class _Builder:
    def __init__(self, lanes: Sequence[Lane], rng: np.random.Generator, style: str) -> None:
        self.lanes, self.rng, self.style = lanes, rng, STYLES[style]
        self.scenery, self.meshes = Scenery(style), _Meshes()
        points = np.concatenate([lane.points for lane in lanes])
        self.low, self.high = points.min(axis=0) - _MARGIN, points.max(axis=0) + _MARGIN
        self.roads, self.taken = Footprints(points, _MARGIN), Footprints(points, _MARGIN)

    def build(self) -> Scenery:
        self._textures()
        self._ground_and_roads()
        edges = [edge for edge in kerbs(self.lanes) if arc_lengths(edge)[-1] > 2]
        for edge in edges:
            self._beside(edge)
        for edge in edges:
            self._furnish(edge)
        for edge in edges:
            self._build_along(edge)
        self._beyond()
        self.scenery.meshes = self.meshes.gathered()
        return self.scenery

    def _textures(self) -> None:
        textures = self.scenery.textures
        textures["grass"] = _noise(self.rng, 128, 0.22, 3)
        textures["asphalt"] = _noise(self.rng, 128, 0.16, 1)
        textures["paving"] = _paving(self.rng)
        textures["leaves"] = _noise(self.rng, 64, 0.5, 2)
        textures["roof"] = _courses(self.rng)
        for i in range(_FACADES):
            textures[f"facade{i}"] = _facade(self.rng)
        textures["shop"] = _shop(self.rng)

    def _ground_and_roads(self) -> None:
        reach, z = _GROUND_REACH, -0.04
        corners = np.array([(-reach, -reach, z), (reach, -reach, z), (reach, reach, z), (-reach, reach, z)])
        corners[:, :2] += (self.low + self.high) / 2
        tint = np.array(self.style.ground) * self.rng.uniform(0.9, 1.1, 3)
        self.meshes.quad(corners, corners[:, :2] / 5, tint.clip(0, 1), texture="grass", label=GROUND)
        dark = self.rng.uniform(0.26, 0.4)
        for lane in self.lanes:
            self._flat(lane.points, lane.width / 2 + 0.02, -lane.width / 2 - 0.02, 0.0, (dark,) * 3, "asphalt", ROAD)
            polygon = lane_outline(lane)
            self.scenery.layers[ROAD].append(polygon)
            self.roads.take(polygon)
            self.taken.take(polygon)
            for points, yellow in painted_lines(lane):
                colour = (0.85, 0.66, 0.15) if yellow else (0.88, 0.88, 0.86)
                self._flat(points, LINE_WIDTH / 2, -LINE_WIDTH / 2, 0.012, colour, "asphalt", LINE)
                self.scenery.layers[LINE].append(outline(points, LINE_WIDTH / 2, -LINE_WIDTH / 2))

    def _flat(self, points, left: float, right: float, z: float, colour, texture: str, label: int, keep=None) -> None:
        sides = [np.concatenate([offset(points, d), np.full((len(points), 1), z)], axis=1) for d in (left, right)]
        keep = np.ones(len(points) - 1, bool) if keep is None else keep
        self.meshes.band(sides[0], sides[1], keep, colour, 3.0, texture=texture, label=label)

    def _beside(self, edge: Float[np.ndarray, "points 2"]) -> None:
        """The strip for parked cars and the pavement, to the right of a kerb, wherever there is no road."""
        for near, far, z, colour, texture, label in (
            (0.0, PARKING, -0.005, (0.42, 0.42, 0.43), "asphalt", ROAD),
            (PARKING, PARKING + WALK, _KERB_HEIGHT, (0.62, 0.6, 0.57), "paving", PAVEMENT),
        ):
            middle = offset(edge, -(near + far) / 2)
            free = ~(self.roads.taken(middle) | self.roads.taken(offset(edge, -far)))
            keep = free[1:] & free[:-1]
            self._flat(edge, -near, -far, z, colour, texture, label, keep)
            if label == PAVEMENT:
                self._kerb_faces(edge, keep)
            for k in np.flatnonzero(keep):
                polygon = outline(edge[k : k + 2], -near, -far)
                self.scenery.layers[label].append(polygon)
                self.taken.take(polygon)

    def _kerb_faces(self, edge: Float[np.ndarray, "points 2"], keep) -> None:
        for distance in (PARKING, PARKING + WALK):
            line = offset(edge, -distance)
            low, top = (np.concatenate([line, np.full((len(line), 1), z)], axis=1) for z in (-0.05, _KERB_HEIGHT))
            colour = (0.7, 0.69, 0.67)
            self.meshes.band(top, low, keep, colour, 3.0, texture="paving", label=PAVEMENT)

    def _furnish(self, edge: Float[np.ndarray, "points 2"]) -> None:
        """Parked cars, lamps and trees along a kerb."""
        rng, along = self.rng, arc_lengths(edge)
        lamp_at = rng.uniform(4, 12)
        for s in np.arange(4.0, along[-1] - 4.0, 6.5):
            if rng.random() < self.style.parked:
                self._park(edge, along, s + rng.uniform(-0.5, 0.5))
        for s in np.arange(2.0, along[-1] - 2.0, 1.0):
            if s >= lamp_at:
                lamp_at = s + rng.uniform(18, 26)
                self._on_walk(edge, along, s, self._lamp)
            elif rng.random() < self.style.trees / 9:
                self._on_walk(edge, along, s, self._tree)

    def _spot(self, edge, along, s: float, distance: float) -> tuple[np.ndarray, float]:
        point = np.array([np.interp(s, along, edge[:, axis]) for axis in (0, 1)])
        k = int(np.clip(np.searchsorted(along, s) - 1, 0, len(edge) - 2))
        step = edge[k + 1] - edge[k]
        heading = float(np.arctan2(step[1], step[0]))
        return point + distance * np.array([np.sin(heading), -np.cos(heading)]), heading

    def _park(self, edge, along, s: float) -> None:
        spot, heading = self._spot(edge, along, s, PARKING / 2)
        length, width = 4.6, 1.9
        footprint = rectangle(spot, heading, length, width)
        if self.roads.taken(footprint).any() or any(
            np.hypot(*(spot - (v["x"], v["y"]))) < 5.5 for v in self.scenery.parked
        ):
            return
        kind = PARKED_KINDS[int(self.rng.integers(len(PARKED_KINDS)))]
        paint = PAINTS[int(self.rng.integers(len(PAINTS)))]
        heading += float(self.rng.normal(0, 0.02))
        place = {"x": float(spot[0]), "y": float(spot[1]), "heading": heading, "length": length, "width": width}
        self.scenery.parked.append({"kind": kind, "paint": list(paint), **place})

    def _on_walk(self, edge, along, s: float, build) -> None:
        spot, heading = self._spot(edge, along, s, PARKING + 0.6)
        if not self.roads.taken(rectangle(spot, heading, 2.0, 2.0)).any():
            build(spot, heading)

    def _lamp(self, spot: np.ndarray, heading: float) -> None:
        height = 5.5
        toward = np.array([-np.sin(heading), np.cos(heading)])
        grey = (0.25, 0.27, 0.28)
        self._prism(spot, 0.07, 0.05, 0.0, height, 6, grey, GROUND)
        beam = rectangle(spot + 0.7 * toward, heading + np.pi / 2, 1.4, 0.08)
        self._box(beam, height - 0.08, height, grey, GROUND)
        self._box(
            rectangle(spot + 1.3 * toward, heading, 0.3, 0.6),
            height - 0.18,
            height - 0.02,
            (1.0, 0.93, 0.75),
            GROUND,
            glow=0.9,
        )

    def _tree(self, spot: np.ndarray, heading: float) -> None:
        rng = self.rng
        leaves = np.array(_LEAVES[int(rng.choice(len(_LEAVES), p=(0.35, 0.3, 0.2, 0.1, 0.05)))]) * rng.uniform(
            0.85, 1.15
        )
        height = rng.uniform(4.5, 8.5)
        radius = height * rng.uniform(0.2, 0.28)
        self._prism(spot, 0.16, 0.09, 0.0, height * 0.6, 6, (0.32, 0.24, 0.17), VEGETATION)
        if rng.random() < 0.2:
            for low, wide in ((0.22, 0.9), (0.45, 0.7), (0.66, 0.5)):
                self._prism(
                    spot,
                    radius * wide,
                    0.02,
                    height * low,
                    height * min(1.0, low + 0.38),
                    9,
                    leaves * 0.8,
                    VEGETATION,
                    "leaves",
                )
        else:
            for _ in range(3):
                middle = np.array([*(spot + rng.normal(0, radius * 0.3, 2)), height * rng.uniform(0.62, 0.78)])
                self._blob(middle, radius * rng.uniform(0.75, 1.05), leaves * rng.uniform(0.85, 1.15))
        turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        self.scenery.layers[VEGETATION].append(spot + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1))

    def _build_along(self, edge: Float[np.ndarray, "points 2"]) -> None:
        rng, along, style = self.rng, arc_lengths(edge), self.style
        s = rng.uniform(0, 4)
        while s < along[-1]:
            front, deep = (
                (rng.uniform(7, 11), rng.uniform(7, 10))
                if style.gabled > 0.5
                else (rng.uniform(9, 18), rng.uniform(9, 14))
            )
            gap = rng.uniform(2, 7) if style.gabled > 0.5 else rng.uniform(0.2, 2.0)
            back = PARKING + WALK + (rng.uniform(2, 5) if style.gabled > 0.5 else rng.uniform(0.2, 1.2))
            spot, heading = self._spot(edge, along, min(s + front / 2, along[-1]), back + deep / 2)
            if rng.random() < style.buildings and self._raise_house(spot, heading, front, deep):
                s += front + gap
            else:
                s += 3.0

    def _raise_house(self, spot: np.ndarray, heading: float, front: float, deep: float) -> bool:
        footprint = rectangle(spot, heading, front, deep)
        if not self.taken.is_free(rectangle(spot, heading, front + 0.4, deep + 0.4)):
            return False
        self.taken.take(footprint)
        self.scenery.layers[BUILDING].append(footprint)
        rng, style = self.rng, self.style
        height = _FLOOR * float(rng.integers(style.floors[0], style.floors[1] + 1)) + 0.3
        texture = f"facade{int(rng.integers(_FACADES))}"
        tint = np.clip(rng.uniform(0.8, 1.0) * (1 + rng.normal(0, 0.05, 3)), 0, 1)
        shop = style.gabled < 0.5 and rng.random() < 0.6
        base = _FLOOR if shop else 0.0
        if shop:
            self._walls(footprint, 0.0, base, np.clip(tint * rng.uniform(0.7, 1.1, 3), 0, 1), "shop")
        self._walls(footprint, base, height, tint, texture)
        if rng.random() < style.gabled:
            self._gable(footprint, height, rng.uniform(2.0, 3.5), tint, texture)
        else:
            self._flat_roof(footprint, height)
        return True

    def _walls(self, footprint: np.ndarray, low: float, top: float, colour, texture: str) -> None:
        for a, b in zip(footprint, np.roll(footprint, -1, axis=0), strict=True):
            bays = max(1, round(float(np.linalg.norm(b - a)) / _BAY))
            floors = (top - low) / _FLOOR
            corners = np.array([(*a, low), (*b, low), (*b, top), (*a, top)])
            uv = np.array([(0, 0), (bays, 0), (bays, floors), (0, floors)]) / 4
            self.meshes.quad(corners, uv, colour, texture=texture, label=BUILDING)

    def _flat_roof(self, footprint: np.ndarray, height: float) -> None:
        grey = (self.rng.uniform(0.35, 0.6),) * 3
        self._box(footprint, height, height + 0.5, grey, BUILDING)

    def _gable(self, footprint: np.ndarray, height: float, rise: float, tint, texture: str) -> None:
        """A saddle roof with its ridge along the street, over the edge by a little."""
        colour = np.array(((0.55, 0.27, 0.2), (0.35, 0.3, 0.3), (0.45, 0.36, 0.28))[int(self.rng.integers(3))])
        middle = footprint.mean(axis=0)
        a, b, c, d = middle + 1.06 * (footprint - middle)  # a to b and c to d along the street
        ridge = [np.array([*((a + d) / 2), height + rise]), np.array([*((b + c) / 2), height + rise])]
        low = [np.array([*p, height - 0.1]) for p in (a, b, c, d)]
        slope = float(np.hypot(rise, np.linalg.norm(a - d) / 2))
        length = float(np.linalg.norm(a - b))
        uv = np.array([(0, 0), (length, 0), (length, slope), (0, slope)]) / 2
        self.meshes.quad(np.array([low[0], low[1], ridge[1], ridge[0]]), uv, colour, texture="roof", label=BUILDING)
        self.meshes.quad(np.array([low[2], low[3], ridge[0], ridge[1]]), uv, colour, texture="roof", label=BUILDING)
        for first, second, top in ((low[3], low[0], ridge[0]), (low[1], low[2], ridge[1])):
            flat = np.array([first, second, top, top])
            self.meshes.quad(flat, np.zeros((4, 2)) + 0.01, tint, texture=texture, label=BUILDING)

    def _beyond(self) -> None:
        """Further houses and woods in what is left."""
        rng, extent = self.rng, self.high - self.low
        for _ in range(int(extent.prod() / 900)):
            spot, heading = rng.uniform(self.low, self.high), rng.uniform(0, np.pi)
            if rng.random() < 0.5 * self.style.buildings:
                self._raise_house(spot, heading, rng.uniform(8, 14), rng.uniform(8, 12))
        for _ in range(int(self.style.forest * extent.prod() / 250)):
            spot = rng.uniform(self.low, self.high)
            if self.taken.is_free(rectangle(spot, 0.0, 3.0, 3.0)):
                self._tree(spot, 0.0)

    def _prism(
        self,
        spot,
        low_radius: float,
        top_radius: float,
        low: float,
        top: float,
        sides: int,
        colour,
        label: int,
        texture: str = "",
    ) -> None:
        turn = np.linspace(0, 2 * np.pi, sides + 1)
        round_ = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        below = np.concatenate([spot + low_radius * round_, np.full((sides + 1, 1), low)], axis=1)
        above = np.concatenate([spot + top_radius * round_, np.full((sides + 1, 1), top)], axis=1)
        slope = np.full((sides + 1, 1), (low_radius - top_radius) / max(top - low, 1e-6))
        normals = np.concatenate([round_, slope], axis=1)
        normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
        k = np.arange(sides)[:, None]
        triangles = np.concatenate(
            [np.concatenate([k, k + 1, k + sides + 2], 1), np.concatenate([k, k + sides + 2, k + sides + 1], 1)]
        )
        uv = np.stack([np.tile(turn, 2), np.repeat([low, top], sides + 1)], axis=1) / 2
        self.meshes.add(
            np.concatenate([below, above]),
            triangles,
            np.tile(normals, (2, 1)),
            uv,
            colour,
            texture=texture,
            label=label,
        )

    def _blob(self, middle: Float[np.ndarray, " 3"], radius: float, colour) -> None:
        """A round crown with bumps."""
        across, up = np.meshgrid(np.linspace(0, 2 * np.pi, 8), np.linspace(-np.pi / 2, np.pi / 2, 6))
        ball = np.stack([np.cos(up) * np.cos(across), np.cos(up) * np.sin(across), np.sin(up)], axis=-1)
        bumps = self.rng.uniform(0.8, 1.15, ball.shape[:2])
        bumps[:, -1] = bumps[:, 0]
        bumps[0], bumps[-1] = bumps[0, 0], bumps[-1, 0]
        vertices = middle + radius * (ball * bumps[..., None] * (1, 1, 0.85)).reshape(-1, 3)
        corner = (np.arange(5)[:, None] * 8 + np.arange(7)).reshape(-1, 1)
        triangles = np.concatenate([corner + np.array(triangle) for triangle in ((0, 1, 9), (0, 9, 8))])
        uv = np.stack([across / np.pi, up / np.pi * 2], axis=-1).reshape(-1, 2)
        shade = (0.72 + 0.28 * (ball[..., 2:].reshape(-1, 1) * 0.5 + 0.5)) * np.asarray(colour)
        self.meshes.add(
            vertices, triangles, ball.reshape(-1, 3), uv, shade.clip(0, 1), texture="leaves", label=VEGETATION
        )

    def _box(self, footprint: np.ndarray, low: float, top: float, colour, label: int, glow: float = 0.0) -> None:
        for a, b in zip(footprint, np.roll(footprint, -1, axis=0), strict=True):
            corners = np.array([(*a, low), (*b, low), (*b, top), (*a, top)])
            self.meshes.quad(corners, np.zeros((4, 2)), colour, label=label, glow=glow)
        for z, order in ((top, (0, 1, 2, 3)), (low, (3, 2, 1, 0))):
            lid = np.array([(*footprint[i], z) for i in order])
            self.meshes.quad(lid, np.zeros((4, 2)), colour, label=label, glow=glow)


def _opaque(grey_or_rgb: np.ndarray) -> UInt8[np.ndarray, "height width 4"]:
    values = np.asarray(grey_or_rgb, dtype=np.float64)
    rgb = np.repeat(values[..., None], 3, axis=-1) if values.ndim == 2 else values
    pixels = np.round(rgb.clip(0, 1) * 255).astype(np.uint8)
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)


def _waves(rng: np.random.Generator, size: int, slope: float) -> Float[np.ndarray, "size size"]:
    """Noise that repeats, of mean 0 and deviation 1; larger slopes are smoother."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) * size
    spectrum = np.fft.fft2(rng.standard_normal((size, size))) / np.maximum(frequency, 1) ** slope
    spectrum[0, 0] = 0
    noise = np.fft.ifft2(spectrum).real
    return noise / noise.std()


def _noise(rng: np.random.Generator, size: int, strength: float, slope: int) -> UInt8[np.ndarray, "size size 4"]:
    return _opaque(0.85 + strength * 0.3 * (_waves(rng, size, slope / 2) + _waves(rng, size, 0.2)) / 1.4)


def _paving(rng: np.random.Generator) -> UInt8[np.ndarray, "64 64 4"]:
    slabs = np.kron(0.86 + 0.06 * rng.standard_normal((4, 4)), np.ones((16, 16)))
    slabs[::16], slabs[:, ::16] = 0.62, 0.62
    return _opaque(slabs + 0.02 * rng.standard_normal((64, 64)))


def _courses(rng: np.random.Generator) -> UInt8[np.ndarray, "64 64 4"]:
    rows = np.kron(0.85 + 0.08 * rng.standard_normal((8, 8)), np.ones((8, 8)))
    rows[::8] *= 0.7
    return _opaque(rows)


def _facade(rng: np.random.Generator) -> UInt8[np.ndarray, "128 128 4"]:
    """Four by four windows in a wall of plaster, brick or concrete."""
    size, bay = 128, 32
    walls = (
        (0.8, 0.74, 0.62),
        (0.62, 0.36, 0.28),
        (0.72, 0.72, 0.7),
        (0.85, 0.82, 0.76),
        (0.6, 0.66, 0.7),
        (0.82, 0.68, 0.5),
    )
    wall = np.array(walls[int(rng.integers(len(walls)))]) * rng.uniform(0.85, 1.05)
    image = wall * (1 + 0.03 * _waves(rng, size, 0.5))[..., None]
    if rng.random() < 0.5:  # bricks, or panels
        image[::4] *= 0.86
    image[::bay] *= 0.75
    left, right = int(rng.integers(5, 10)), int(rng.integers(22, 28))
    top, bottom = int(rng.integers(5, 9)), int(rng.integers(22, 27))
    frame = np.array((0.92, 0.92, 0.9) if rng.random() < 0.7 else (0.25, 0.2, 0.18))
    for row in range(4):
        for column in range(4):
            cell = image[row * bay : (row + 1) * bay, column * bay : (column + 1) * bay]
            cell[top - 2 : bottom + 2, left - 2 : right + 2] = frame
            glass = np.array((0.2, 0.27, 0.34)) * rng.uniform(0.6, 1.5)
            cell[top:bottom, left:right] = glass
            if rng.random() < 0.35:  # a curtain
                cell[top : top + int(rng.integers(4, 14)), left:right] = np.array((0.8, 0.76, 0.68)) * rng.uniform(
                    0.7, 1.1
                )
            cell[top:bottom, (left + right) // 2] = frame
            cell[bottom + 2 : bottom + 4, left - 3 : right + 3] = wall * 0.7
    return _opaque(image)


def _shop(rng: np.random.Generator) -> UInt8[np.ndarray, "128 128 4"]:
    """Four bays of shop windows; one of four is a door. The texture is as high as four of them."""
    image = np.full((128, 128, 3), 0.75)
    for row in range(4):
        for column in range(4):
            cell = image[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32]
            cell[1:8] = rng.uniform(0.25, 0.9, 3)  # the sign
            cell[10:29, 2:30] = np.array((0.2, 0.24, 0.28)) * rng.uniform(0.8, 1.6)
            if rng.random() < 0.3:
                cell[10:32, 10:22] = rng.uniform(0.15, 0.5, 3)
            cell[29:] = 0.5
    return _opaque(image)
