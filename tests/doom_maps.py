"""Small Doom maps with known geometry."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from nfldm_ns.collect.doom_geometry import DoomGeometry
from nfldm_ns.collect.doom_wad import DoomMap, Wad

NO_SIDE = 0xFFFF


@dataclass
class MapBuilder:
    """Collects sectors and lines; a line's front sector lies on the right when walking from its start to its end."""

    sectors: list[tuple] = field(default_factory=list)
    lines: list[tuple] = field(default_factory=list)
    things: list[tuple] = field(default_factory=list)

    def sector(self, floor: int, ceiling: int, floor_flat: bytes = b"FLAT1", ceiling_flat: bytes = b"CEIL1") -> int:
        self.sectors.append((floor, ceiling, floor_flat, ceiling_flat, 160, 0, 0))
        return len(self.sectors) - 1

    def line(self, start: tuple[int, int], end: tuple[int, int], front: int, back: int | None = None) -> None:
        self.lines.append((start, end, front, back))

    def walls(self, corners: list[tuple[int, int]], sector: int) -> None:
        """Solid walls along corners given clockwise, so that the sector is on their right."""
        for start, end in pairwise(corners):
            self.line(start, end, sector)

    def build(self) -> DoomMap:
        layout = _dtypes()
        vertices = [point for start, end, *_ in self.lines for point in (start, end)]
        sides = [s for _, _, front, back in self.lines for s in (front, back) if s is not None]
        lines, next_side = [], 0
        for i, (_, _, _, back) in enumerate(self.lines):
            left = NO_SIDE if back is None else next_side + 1
            lines.append((2 * i, 2 * i + 1, 0, 0, 0, next_side, left))
            next_side += 1 if back is None else 2
        return DoomMap(
            "MAP01",
            np.array([(x, y, 0, kind, 7) for x, y, kind in self.things], layout["THINGS"]),
            np.array(lines, layout["LINEDEFS"]),
            np.array([(0, 0, b"-", b"-", b"-", sector) for sector in sides], layout["SIDEDEFS"]),
            np.array(vertices, layout["VERTEXES"]),
            np.array(self.sectors, layout["SECTORS"]),
        )


def _dtypes() -> dict[str, np.dtype]:
    from nfldm_ns.collect import doom_wad

    return {
        "THINGS": doom_wad.THING,
        "LINEDEFS": doom_wad.LINE,
        "SIDEDEFS": doom_wad.SIDE,
        "VERTEXES": doom_wad.VERTEX,
        "SECTORS": doom_wad.SECTOR,
    }


def box_room(half: int = 256, floor: int = 0, ceiling: int = 128) -> DoomMap:
    """One square room about the origin."""
    builder = MapBuilder(things=[(0, 0, 1)])
    room = builder.sector(floor, ceiling)
    builder.walls([(-half, -half), (-half, half), (half, half), (half, -half), (-half, -half)], room)
    return builder.build()


def two_rooms(
    step: int = 16, lintel: int = 96, near_flat: bytes = b"CEIL1", far_flat: bytes = b"CEIL1", liquid: bool = False
) -> DoomMap:
    """A room from x = -256 to 0 (floor 0, ceiling 128) that opens on all its east side to one up to x = 256."""
    builder = MapBuilder(things=[(-128, 0, 1)])
    west = builder.sector(0, 128, ceiling_flat=near_flat)
    east = builder.sector(step, lintel, b"NUKAGE1" if liquid else b"FLAT1", far_flat)
    builder.walls([(0, -256), (-256, -256), (-256, 256), (0, 256)], west)
    builder.walls([(0, 256), (256, 256), (256, -256), (0, -256)], east)
    builder.line((0, 256), (0, -256), west, east)
    return builder.build()


def geometry(doom_map: DoomMap) -> DoomGeometry:
    return DoomGeometry(doom_map)


def freedoom(name: str = "freedoom2") -> Wad:
    from nfldm_ns.collect.doom_collection import wad_path

    return Wad(wad_path(name))
