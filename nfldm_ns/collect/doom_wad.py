"""Doom's WAD files: reading maps, and writing variants of them that render as static scenes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nfldm_ns.errors import UserInputError

_MAP_LUMPS = (
    "THINGS",
    "LINEDEFS",
    "SIDEDEFS",
    "VERTEXES",
    "SEGS",
    "SSECTORS",
    "NODES",
    "SECTORS",
    "REJECT",
    "BLOCKMAP",
)
THING = np.dtype([("x", "<i2"), ("y", "<i2"), ("angle", "<i2"), ("type", "<i2"), ("flags", "<i2")])
LINE = np.dtype(
    [
        ("v1", "<u2"),
        ("v2", "<u2"),
        ("flags", "<u2"),
        ("special", "<u2"),
        ("tag", "<u2"),
        ("right", "<u2"),
        ("left", "<u2"),
    ]
)
SIDE = np.dtype([("xo", "<i2"), ("yo", "<i2"), ("upper", "S8"), ("lower", "S8"), ("middle", "S8"), ("sector", "<u2")])
VERTEX = np.dtype([("x", "<i2"), ("y", "<i2")])
SECTOR = np.dtype(
    [
        ("floor", "<i2"),
        ("ceiling", "<i2"),
        ("floor_flat", "S8"),
        ("ceiling_flat", "S8"),
        ("light", "<i2"),
        ("special", "<u2"),
        ("tag", "<i2"),
    ]
)
_STARTS = (1, 2, 3, 4, 11, 14)
_FLICKERING = (1, 2, 3, 8, 12, 13, 17)
_HURTING_AND_FLICKERING = 4
_HURTING = 16
NO_SIDE = 0xFFFF


@dataclass(frozen=True)
class DoomMap:
    """The lumps of one map as structured arrays; lengths in map units."""

    name: str
    things: np.ndarray
    lines: np.ndarray
    sides: np.ndarray
    vertices: np.ndarray
    sectors: np.ndarray

    def side_sectors(self, side: str) -> np.ndarray:
        """Sector index on the `right` (front) or `left` (back) of each line, -1 where there is none."""
        index = self.lines[side].astype(np.int64)
        has_side = index < min(NO_SIDE, len(self.sides))
        return np.where(has_side, self.sides["sector"][np.where(has_side, index, 0)].astype(np.int64), -1)


class Wad:
    """A WAD file opened for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data = path.read_bytes()
            magic, count, offset = struct.unpack_from("<4sii", self._data)
            entries = [struct.unpack_from("<ii8s", self._data, offset + 16 * i) for i in range(count)]
        except FileNotFoundError:
            raise UserInputError(f"There is no WAD file {path}: install vizdoom, which carries Freedoom's.") from None
        except struct.error:
            raise UserInputError(f"{path} is not a whole WAD file: reinstall vizdoom.") from None
        if magic not in (b"IWAD", b"PWAD"):
            raise UserInputError(f"{path} is not a WAD file: reinstall vizdoom.")
        self._lumps = [(name.rstrip(b"\0").decode("latin-1"), start, size) for start, size, name in entries]
        names = [lump[0] for lump in self._lumps]
        self._maps = {names[i - 1]: i for i, name in enumerate(names) if name == "THINGS" and i > 0}

    @property
    def map_names(self) -> list[str]:
        return list(self._maps)

    def map_lumps(self, name: str) -> dict[str, bytes]:
        """The raw lumps of one map by lump name, in their order."""
        first = self._maps[name]
        lumps = {}
        for lump, start, size in self._lumps[first : first + len(_MAP_LUMPS)]:
            if lump not in _MAP_LUMPS:
                break
            lumps[lump] = self._data[start : start + size]
        return lumps

    def read_map(self, name: str) -> DoomMap:
        lumps = self.map_lumps(name)

        def table(lump: str, dtype: np.dtype) -> np.ndarray:
            return np.frombuffer(lumps[lump], dtype)

        return DoomMap(
            name,
            table("THINGS", THING),
            table("LINEDEFS", LINE),
            table("SIDEDEFS", SIDE),
            table("VERTEXES", VERTEX),
            table("SECTORS", SECTOR),
        )


class MapLumps(Protocol):
    """Where the lumps of maps come from."""

    def map_lumps(self, name: str) -> dict[str, bytes]: ...


def write_static_maps(wad: MapLumps, names: Sequence[str], path: Path, *, keep_sprites: bool, min_light: int) -> None:
    """Writes a patch WAD in which the named maps stand still.

    Lights no longer flicker. Without `keep_sprites` only the players' starts remain of all things, because sprites turn
    with the camera and so are no part of a static 3D scene.

    Args:
        min_light: sectors darker than this level (0-255) are raised to it.
    """
    lumps: list[tuple[str, bytes]] = []
    for name in names:
        lumps.append((name, b""))
        for lump, data in wad.map_lumps(name).items():
            if lump == "SECTORS":
                data = _still_sectors(data, min_light)
            elif lump == "THINGS" and not keep_sprites:
                things = np.frombuffer(data, THING)
                data = things[np.isin(things["type"], _STARTS)].tobytes()
            lumps.append((lump, data))
    _write_wad(path, lumps)


def _still_sectors(data: bytes, min_light: int) -> bytes:
    sectors = np.frombuffer(data, SECTOR).copy()
    sectors["special"][np.isin(sectors["special"], _FLICKERING)] = 0
    sectors["special"][sectors["special"] == _HURTING_AND_FLICKERING] = _HURTING
    sectors["light"] = np.maximum(sectors["light"], min_light)
    return sectors.tobytes()


def _write_wad(path: Path, lumps: Sequence[tuple[str, bytes]]) -> None:
    offset, directory = 12, []
    for name, data in lumps:
        directory.append(struct.pack("<ii8s", offset, len(data), name.encode("latin-1")))
        offset += len(data)
    header = struct.pack("<4sii", b"PWAD", len(lumps), offset)
    path.write_bytes(b"".join([header, *(data for _, data in lumps), *directory]))
