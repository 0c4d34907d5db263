"""Houses of MiniWorld (Farama Foundation, Apache-2.0), made up by a seed, and pictures of them without a display.

Needs the package `miniworld`, and OpenGL through EGL. Positions are in metres with z up; MiniWorld's own have y up.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyglet

pyglet.options["headless"] = True  # before any of its windows is imported: no display is needed
pyglet.options["shadow_window"] = False

from jaxtyping import Bool, Float, UInt8  # noqa: E402
from miniworld.entity import Box, MeshEnt  # noqa: E402
from miniworld.miniworld import MiniWorldEnv  # noqa: E402
from miniworld.opengl import FrameBuffer  # noqa: E402
from PIL import Image  # noqa: E402
from pyglet import gl  # noqa: E402

from nfldm_ns.scenes.collection import BevClass  # noqa: E402

EYE_HEIGHT = 1.6
WALL_HEIGHT = 2.74
DOOR_HEIGHT = 2.2
WALL_THICKNESS = 0.25
BEV_CLASSES = (
    BevClass(0, "void", (0, 0, 0)),
    BevClass(1, "floor", (160, 160, 160)),
    BevClass(2, "doorway", (230, 200, 120)),
    BevClass(3, "object", (190, 60, 60)),
)
_WALLS = ("brick_wall", "concrete", "cinder_blocks", "drywall", "stucco", "wood_planks", "marble")
_FLOORS = ("floor_tiles_bw", "wood", "wood_planks", "marble", "concrete_tiles", "cardboard", "asphalt")
_CEILINGS = ("concrete_tiles", "ceiling_tiles", "ceiling_tile_noborder", "drywall")
_OBJECTS = (
    ("office_desk", 0.8),
    ("office_chair", 1.0),
    ("barrel", 0.9),
    ("cone", 0.6),
    ("medkit", 0.35),
    ("potion", 0.4),
    ("duckie", 0.4),
)  # meshes and their heights in metres
_COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
# The depth buffer has 16 bits: steps of z^2 / (near * 2^16), 8 mm at 10 m. Cameras keep farther from all things than
# the corner of this square.
_NEAR, _FAR = 0.2, 60.0
_OVERSAMPLING = 2  # colours, beside the renderer's own samples


@dataclass(frozen=True)
class HouseOptions:
    """What houses look like; lengths in metres.

    Attributes:
        rooms: least and greatest number of rows and of columns of rooms.
        room_size: least and greatest side of a room.
        door_width: least and greatest.
        objects_per_room: greatest number.
    """

    rooms: tuple[int, int] = (2, 3)
    room_size: tuple[float, float] = (3.5, 6.5)
    door_width: tuple[float, float] = (1.2, 2.2)
    objects_per_room: int = 4


class _World(MiniWorldEnv):
    """Rooms on a grid of uneven rows and columns, joined by a random tree of doorways and a few more."""

    def __init__(self) -> None:
        self.options = HouseOptions()
        super().__init__(obs_width=8, obs_height=8, window_width=8, window_height=8, domain_rand=True)

    def _gen_world(self) -> None:
        rng, options = self.np_random, self.options
        rows, columns = rng.integers(options.rooms[0], options.rooms[1] + 1, 2)
        starts, sizes = zip(*(_along(rng, count, options.room_size) for count in (columns, rows)), strict=True)
        walls, floor, ceiling = rng.choice(_WALLS, 2), rng.choice(_FLOORS), rng.choice(_CEILINGS)
        self.chambers = [
            self.add_rect_room(
                min_x=starts[0][i],
                max_x=starts[0][i] + sizes[0][i],
                min_z=starts[1][j],
                max_z=starts[1][j] + sizes[1][j],
                wall_height=WALL_HEIGHT,
                wall_tex=str(rng.choice(walls)),
                floor_tex=str(floor if rng.random() < 0.7 else rng.choice(_FLOORS)),
                ceil_tex=str(ceiling),
            )
            for j in range(rows)
            for i in range(columns)
        ]
        for first, second in _joined(rng, int(rows), int(columns)):
            self._join(self.chambers[first], self.chambers[second], rng)
        for room in self.chambers:
            for _ in range(int(rng.integers(options.objects_per_room + 1))):
                self._furnish(room, rng)
        self.place_agent(room=self.chambers[0])

    def _join(self, first, second, rng: np.random.Generator) -> None:
        side_by_side = first.max_x < second.min_x or second.max_x < first.min_x
        low, high = (first.min_z, first.max_z) if side_by_side else (first.min_x, first.max_x)
        width = min(float(rng.uniform(*self.options.door_width)), high - low - 0.6)
        start = float(rng.uniform(low + 0.3, high - 0.3 - width))
        axis = "z" if side_by_side else "x"
        self.connect_rooms(first, second, **{f"min_{axis}": start, f"max_{axis}": start + width}, max_y=DOOR_HEIGHT)

    def _furnish(self, room, rng: np.random.Generator) -> None:
        """Puts one more thing into a room, near a wall rather than in its middle; no thing where it does not fit."""
        kind = int(rng.integers(len(_OBJECTS) + 1))
        if kind < len(_OBJECTS):
            thing = MeshEnt(*_OBJECTS[kind])
        else:
            thing = Box(str(rng.choice(_COLOURS)), size=rng.uniform(0.4, 1.0, 3))
        if len(self.wall_segs) == 0:
            self._gen_static_data()
        reach = np.array([room.max_x - room.min_x, room.max_z - room.min_z]) / 2 - thing.radius - 0.05
        for _ in range(8):
            offset = rng.uniform(-1, 1, 2)
            offset = np.sign(offset) * np.abs(offset) ** 0.5 * reach
            position = np.array([room.mid_x + offset[0], 0.0, room.mid_z + offset[1]])
            turn = float(rng.uniform(-math.pi, math.pi))
            in_doorway = any(_distance(p.outline, position) < thing.radius + 0.8 for p in self._doorways())
            if reach.min() > 0 and not in_doorway and not self.intersect(thing, position, thing.radius + 0.1):
                self.place_entity(thing, pos=position, dir=turn)
                return

    def _doorways(self) -> list:
        chambers = {id(room) for room in self.chambers}
        return [room for room in self.rooms if id(room) not in chambers]


@cache
def _world() -> _World:
    """The one of this process: its meshes and textures belong to one context of OpenGL, and a second would crash."""
    return _World()


class HouseRenderer:
    """Draws houses, one at a time in each process, in square images of 90 degrees.

    Raises:
        Exception: of many kinds, if OpenGL cannot be had without a display.
    """

    def __init__(self, image_size: int, options: HouseOptions) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells how many samples a pixel gets
            self._world = _world()
            self._world.shadow_window.switch_to()
            self._colours = FrameBuffer(image_size * _OVERSAMPLING, image_size * _OVERSAMPLING, 4)
            self._depths = FrameBuffer(image_size, image_size, 1)
        self._size, self._options = image_size, options

    def open(self, seed: int) -> None:
        """Makes the house of a seed."""
        self._world.options = self._options
        self._world.reset(seed=seed)

    @property
    def rooms(self) -> Float[np.ndarray, "rooms 4"]:
        """Minimum x, y and maximum x, y of each room, doorways not among them."""
        return np.array([(r.min_x, -r.max_z, r.max_x, -r.min_z) for r in self._world.chambers])

    @property
    def doorways(self) -> Float[np.ndarray, "doorways 4"]:
        """As `rooms`."""
        found = [(r.min_x, -r.max_z, r.max_x, -r.min_z) for r in self._world._doorways()]
        return np.array(found, dtype=np.float64).reshape(-1, 4)

    @property
    def walls(self) -> Float[np.ndarray, "walls 2 2"]:
        """Ends of the walls that stand on the floor, in x and y."""
        segments = np.array(self._world.wall_segs)
        return np.stack([segments[..., 0], -segments[..., 2]], axis=-1)

    @property
    def objects(self) -> Float[np.ndarray, "objects 3"]:
        """x, y and radius."""
        things = [e for e in self._world.entities if e is not self._world.agent]
        return np.array([(e.pos[0], -e.pos[2], e.radius) for e in things], dtype=np.float64).reshape(-1, 3)

    def clearance(self, points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, " points"]:
        """Distance to the nearest wall or thing; negative within a thing."""
        ends = self.walls
        along = ends[:, 1] - ends[:, 0]
        t = ((points[:, None] - ends[:, 0]) * along).sum(-1) / (along**2).sum(-1)
        nearest = ends[:, 0] + t.clip(0, 1)[..., None] * along
        found = np.linalg.norm(points[:, None] - nearest, axis=-1).min(axis=1)
        things = self.objects
        if len(things):
            found = np.minimum(found, (np.linalg.norm(points[:, None] - things[:, :2], axis=-1) - things[:, 2]).min(1))
        return found

    def render(
        self, eye: Float[np.ndarray, " 3"], angle: float
    ) -> tuple[UInt8[np.ndarray, "size size 3"], Float[np.ndarray, "size size"]]:
        """Colours and planar depth, in metres, of a level camera looking along `angle` (degrees from x to y)."""
        self._colours.bind()
        self._draw(eye, angle)
        picture = self._colours.resolve()
        picture = np.asarray(Image.fromarray(picture).resize((self._size, self._size), Image.Resampling.BOX))
        # Straight into the buffer of single samples, which are at the centres of pixels, as those of several are not.
        gl.glBindFramebuffer(gl.GL_FRAMEBUFFER, self._depths.final_fbo)
        gl.glViewport(0, 0, self._size, self._size)
        self._draw(eye, angle)
        depth = self._depths.get_depth_map(_NEAR, _FAR)[..., 0].astype(np.float64)
        return picture, np.where(depth < _FAR * 0.99, depth, 0)

    def bev(
        self, centre: Float[np.ndarray, " 2"], corners: Float[np.ndarray, "2 2"], size: int
    ) -> UInt8[np.ndarray, "h w"]:
        """Classes of `BEV_CLASSES` of a square map around a place, north up; `corners` are relative to it."""
        steps = (np.arange(size) + 0.5) / size
        x = centre[0] + corners[0, 0] + steps * (corners[1, 0] - corners[0, 0])
        y = centre[1] + corners[1, 1] - steps * (corners[1, 1] - corners[0, 1])
        found = np.zeros((size, size), np.uint8)
        for value, rectangles in ((1, self.rooms), (2, self.doorways)):
            for x0, y0, x1, y1 in rectangles:
                found[np.ix_((y > y0) & (y < y1), (x > x0) & (x < x1))] = value
        for ox, oy, radius in self.objects:
            found[np.hypot(x[None] - ox, y[:, None] - oy) < radius] = 3
        return found

    def _draw(self, eye: Float[np.ndarray, " 3"], angle: float) -> None:
        world = self._world
        gl.glClearColor(0, 0, 0, 1)
        gl.glClearDepth(1.0)
        gl.glClear(gl.GL_COLOR_BUFFER_BIT | gl.GL_DEPTH_BUFFER_BIT)
        gl.glMatrixMode(gl.GL_PROJECTION)
        gl.glLoadIdentity()
        gl.gluPerspective(90.0, 1.0, _NEAR, _FAR)
        gl.glMatrixMode(gl.GL_MODELVIEW)
        gl.glLoadIdentity()
        at = np.array([eye[0], eye[2], -eye[1]])
        turn = math.radians(angle)
        gl.gluLookAt(*at, *(at + np.array([math.cos(turn), 0, -math.sin(turn)])), 0, 1, 0)
        gl.glCallList(1)  # what MiniWorld compiled of walls and standing things
        for thing in world.entities:
            if not thing.is_static and thing is not world.agent:
                thing.render()


def _along(
    rng: np.random.Generator, count: int, size: tuple[float, float]
) -> tuple[Float[np.ndarray, " count"], Float[np.ndarray, " count"]]:
    """Where rooms begin, and how long they are, along one axis."""
    sizes = rng.uniform(*size, int(count))
    return np.concatenate([[0.0], np.cumsum(sizes + WALL_THICKNESS)[:-1]]), sizes


def _joined(rng: np.random.Generator, rows: int, columns: int) -> list[tuple[int, int]]:
    """Pairs of neighbours on the grid: a random spanning tree, and a third of the rest."""
    pairs = [(j * columns + i, j * columns + i + 1) for j in range(rows) for i in range(columns - 1)]
    pairs += [(j * columns + i, (j + 1) * columns + i) for j in range(rows - 1) for i in range(columns)]
    group = list(range(rows * columns))
    chosen = []
    for at in rng.permutation(len(pairs)):
        first, second = pairs[at]
        if group[first] != group[second] or rng.random() < 1 / 3:
            chosen.append((first, second))
            old, new = group[second], group[first]
            group = [new if value == old else value for value in group]
    return chosen


def _distance(outline: Float[np.ndarray, "corners 3"], position: Float[np.ndarray, " 3"]) -> float:
    """From a rectangle on the floor to a point."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    return float(np.linalg.norm(np.maximum(np.maximum(low - position, position - high), 0)[[0, 2]]))


def inside(rectangle: Float[np.ndarray, " 4"], points: Float[np.ndarray, "points 2"]) -> Bool[np.ndarray, " points"]:
    """Whether points lie in a rectangle of minimum x, y and maximum x, y."""
    return ((points > rectangle[:2]) & (points < rectangle[2:])).all(axis=-1)
