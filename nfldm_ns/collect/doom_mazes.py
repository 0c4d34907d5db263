"""Mazes of rooms, planned at random and dressed in Freedoom's textures: as many Doom maps as a training wants.

Freedoom's own maps are few, and each looks different. Mazes share a handful of looks, so that a model of modest size
can learn them whole, and one that it has never seen is still a fair test. All stands on a lattice of 32 map units.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nfldm_ns.collect.doom_wad import LINE, NO_SIDE, SECTOR, SIDE, THING, VERTEX, DoomMap, Wad
from nfldm_ns.errors import UserInputError

MAZES = "mazes"
NUM_MAZES = 10_000
TILE = 32
"""Map units per tile of the lattice."""
_SIZE = 48
_VOID, _PILLAR = -1, -2
_BLOCKING, _TWO_SIDED, _UPPER_UNPEGGED = 1, 4, 8
_LIGHT = 240
_PLAYER_START, _HEALTH_BONUS = 1, 2014
_THING_SPACING = 4
_TEXTURE_WIDTH = 128

_Line = tuple[tuple[int, int], tuple[int, int], int, int]
"""Two ends in tiles, and the tiles' values on the right and on the left."""


@dataclass(frozen=True)
class Look:
    """Textures of a room: its walls, its pillars and steps, flats of floor and ceiling; and its height."""

    wall: str
    trim: str
    floor: str
    ceiling: str
    height: int = 128


@dataclass(frozen=True)
class Sector:
    """A part of a maze of one height and look; heights of floor and ceiling in map units, `flat` of the floor."""

    look: Look
    floor: int
    ceiling: int
    flat: str


LOOKS = (
    Look("BRICK7", "SUPPORT3", "FLOOR4_8", "CEIL3_5"),
    Look("STARTAN3", "SUPPORT2", "FLOOR0_1", "CEIL3_1"),
    Look("GSTONE1", "MARBLE1", "RROCK09", "FLAT5_7"),
    Look("BIGBRIK1", "WOOD5", "GRASS1", "FLAT1_1"),
    Look("WOOD1", "METAL", "FLOOR5_2", "FLAT5_5"),
    Look("TEKGREN2", "SHAWN2", "FLAT14", "TLITE6_1"),
    Look("SHAWN2", "COMPBLUE", "FLAT23", "TLITE6_5"),
    Look("GRAY1", "SUPPORT2", "FLOOR7_1", "FLAT19"),
)
_LIQUIDS = ("NUKAGE1", "FWATER1", "LAVA1")


def maze_names() -> list[str]:
    """All mazes there are: `MAZE0000` to `MAZE9999`."""
    return [f"MAZE{number:04d}" for number in range(NUM_MAZES)]


class MazeWad:
    """Mazes as if they were maps of a WAD; a maze is decided by its name alone.

    Args:
        game: the WAD of the game whose textures they wear.
    """

    def __init__(self, game: Path) -> None:
        self.path = Wad(game).path

    def map_lumps(self, name: str) -> dict[str, bytes]:
        """The raw lumps of one maze; those that the game builds itself are empty."""
        maze = self.read_map(name)
        return {
            "THINGS": maze.things.tobytes(),
            "LINEDEFS": maze.lines.tobytes(),
            "SIDEDEFS": maze.sides.tobytes(),
            "VERTEXES": maze.vertices.tobytes(),
            "SEGS": b"",
            "SSECTORS": b"",
            "NODES": b"",
            "SECTORS": maze.sectors.tobytes(),
            "REJECT": b"",
            "BLOCKMAP": b"",
        }

    def read_map(self, name: str) -> DoomMap:
        if name not in maze_names():
            raise UserInputError(f"There is no maze {name}: give MAZE0000 to MAZE{NUM_MAZES - 1:04d}.")
        return draw_map(name, *plan_maze(name))


def plan_maze(name: str) -> tuple[Int[np.ndarray, "y x"], list[Sector]]:
    """The sector of each tile of a maze (negative in walls and pillars; y north, x east), and the sectors."""
    return _Builder(np.random.default_rng(zlib.crc32(name.encode()))).build()


class _Builder:
    """Divides a square into rooms, joins neighbours by doorways, and furnishes the rooms."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._tiles = np.full((_SIZE, _SIZE), _VOID)  # [row y, column x]
        self._sectors: list[Sector] = []

    def build(self) -> tuple[Int[np.ndarray, "y x"], list[Sector]]:
        self._divide(0, 0, _SIZE, _SIZE)
        self._join()
        return np.pad(self._tiles, 1, constant_values=_VOID), self._sectors

    def _add(self, sector: Sector) -> int:
        self._sectors.append(sector)
        return len(self._sectors) - 1

    def _divide(self, x0: int, y0: int, x1: int, y1: int) -> None:
        """Splits a rectangle, at even tiles, until rooms are small; the last row and column of each are its walls."""
        width, depth = x1 - x0, y1 - y0
        longest = max(width, depth)
        if longest > 14 or (longest >= 12 and self._rng.random() < 0.6):
            cut = 2 * int(self._rng.integers(3, longest // 2 - 2))
            if width >= depth:
                self._divide(x0, y0, x0 + cut, y1)
                self._divide(x0 + cut, y0, x1, y1)
            else:
                self._divide(x0, y0, x1, y0 + cut)
                self._divide(x0, y0 + cut, x1, y1)
            return
        self._furnish(x0, y0, x1 - 1, y1 - 1)

    def _furnish(self, x0: int, y0: int, x1: int, y1: int) -> None:
        look = LOOKS[self._rng.integers(len(LOOKS))]
        room = self._tiles[y0:y1, x0:x1]
        room[:] = self._add(Sector(look, 0, look.height, look.floor))
        kind = self._rng.random()
        if min(room.shape) < 7:
            return
        if kind < 0.25:
            flat = _LIQUIDS[self._rng.integers(len(_LIQUIDS))]
            room[2:-2, 2:-2] = self._add(Sector(look, -8, look.height, flat))
        elif kind < 0.5:
            self._pillars(room)

    def _pillars(self, room: np.ndarray) -> None:
        """Square pillars away from the walls: one in the middle of a small room, four in a large one."""
        height, width = room.shape
        rows = (2, height - 3) if height >= 10 else ((height - 1) // 2,)
        columns = (2, width - 3) if width >= 10 else ((width - 1) // 2,)
        for row in rows:
            for column in columns:
                room[row, column] = _PILLAR

    def _join(self) -> None:
        for tiles in (self._tiles, self._tiles.T):
            self._join_across_columns(tiles)

    def _join_across_columns(self, tiles: np.ndarray) -> None:
        """Opens a doorway in most walls that stand between two rooms, one west and one east of them."""
        size = len(tiles)
        for column in range(1, size - 1):
            row = 0
            while row < size:
                pair = _beside(tiles, row, column)
                end = row
                while end < size and tiles[end, column] == _VOID and _beside(tiles, end, column) == pair:
                    end += 1
                if min(pair) >= 0 and pair[0] != pair[1]:
                    self._open(tiles, column, row, end)
                row = max(end, row + 1)

    def _open(self, tiles: np.ndarray, column: int, start: int, end: int) -> None:
        """A doorway of two to four tiles somewhere in a stretch of wall, under a lintel."""
        if end - start < 4 or self._rng.random() < 0.15:
            return
        width = 2 if end - start < 6 else int(self._rng.choice((2, 4)))
        at = start + 1 + int(self._rng.integers(0, end - start - width - 1))
        look = self._sectors[tiles[start, column - 1]].look
        tiles[at : at + width, column] = self._add(Sector(look, 0, 96, look.floor))


def _beside(tiles: np.ndarray, row: int, column: int) -> tuple[int, int]:
    return int(tiles[row, column - 1]), int(tiles[row, column + 1])


def draw_map(name: str, tiles: Int[np.ndarray, "y x"], sectors: list[Sector]) -> DoomMap:
    """A map with a line wherever two tiles differ, one for each straight stretch with the same two neighbours."""
    lines: list[_Line] = []
    for turned, grid in ((False, tiles), (True, tiles.T)):
        for edge in range(1, len(grid)):
            below, above = grid[edge - 1], grid[edge]
            changes = np.flatnonzero((np.diff(below) != 0) | (np.diff(above) != 0)) + 1
            bounds = [0, *changes.tolist(), len(below)]
            for start, end in itertools.pairwise(bounds):
                first, second = int(below[start]), int(above[start])
                if first == second or max(first, second) < 0:
                    continue
                a, b = ((edge, start), (edge, end)) if turned else ((start, edge), (end, edge))
                # right of a line drawn east is south (`below`); of one drawn north, east (`above`)
                right, left = (second, first) if turned else (first, second)
                lines.append((a, b, right, left) if right >= 0 else (b, a, left, right))
    return _assemble(name, lines, sectors, tiles)


def _assemble(name: str, lines: list[_Line], sectors: list[Sector], tiles: Int[np.ndarray, "y x"]) -> DoomMap:
    points = sorted({point for a, b, _, _ in lines for point in (a, b)})
    index = {point: i for i, point in enumerate(points)}
    side_rows: list[tuple] = []
    line_rows: list[tuple] = []
    for a, b, right, left in lines:
        two_sided = left >= 0
        sides = [len(side_rows)]
        side_rows.append(_side(a, b, sectors[right], right, left))
        if two_sided:
            sides.append(len(side_rows))
            side_rows.append(_side(b, a, sectors[left], left, right))
        flags = _TWO_SIDED | _UPPER_UNPEGGED if two_sided else _BLOCKING
        line_rows.append((index[a], index[b], flags, 0, 0, sides[0], sides[1] if two_sided else NO_SIDE))
    sector_rows = [(s.floor, s.ceiling, s.flat.encode(), s.look.ceiling.encode(), _LIGHT, 0, 0) for s in sectors]
    return DoomMap(
        name,
        _things(tiles),
        np.array(line_rows, LINE),
        np.array(side_rows, SIDE),
        np.array([(px * TILE, py * TILE) for px, py in points], VERTEX),
        np.array(sector_rows, SECTOR),
    )


def _things(tiles: Int[np.ndarray, "y x"]) -> np.ndarray:
    """A start, and items all over the floor, because scenes are looked for near things."""
    floor = np.argwhere(tiles >= 0)
    blocks = np.unique(floor // _THING_SPACING, axis=0, return_index=True)[1]
    centres = ((floor[np.sort(blocks)] + 0.5) * TILE).astype(int).tolist()
    rows = [(x, y, 0, _HEALTH_BONUS if i else _PLAYER_START, 7) for i, (y, x) in enumerate(centres)]
    return np.array(rows, THING)


def _side(a: tuple[int, int], b: tuple[int, int], sector: Sector, own: int, other: int) -> tuple:
    """A side whose texture is fixed to the lattice, so that walls of one look meet without a seam."""
    along = (a[0] if b[0] > a[0] else -a[0]) if a[1] == b[1] else (a[1] if b[1] > a[1] else -a[1])
    offset = along * TILE % _TEXTURE_WIDTH
    wall, trim = sector.look.wall.encode(), sector.look.trim.encode()
    if other >= 0:
        return (offset, 0, wall, trim, b"-", own)
    return (offset, 0, b"-", b"-", trim if other == _PILLAR else wall, own)
