"""A semantic map that is being drawn: cells of classes, seen from above."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.bev_maps import drawn_map
from nfldm_ns.scenes.collection import BevClass
from nfldm_ns.scenes.image_files import open_image
from nfldm_ns.scenes.writing import bev_png

FIRST_ROOM = 0.25  # share of the box, from its middle to each side, that is floor on a new map
GRID = 0.82  # how bright the lines between cells are
Rectangle = tuple[float, float, float, float]
"""Two corners on the ground plane, x, y, x, y in metres."""


class DrawnMap:
    """Class ids of a map, north up, and how to change them.

    A new map has a room around the cameras, of the second class; the first is what lies outside of rooms.

    Args:
        classes: what there is to draw.
        size: (height, width) in cells.
        aabb: of the scene, `[2, 3]` in metres.
    """

    def __init__(
        self, classes: Sequence[BevClass], size: tuple[int, int], aabb: Float[np.ndarray, "corner axis"]
    ) -> None:
        self.classes, self.size, self.aabb = tuple(classes), size, np.asarray(aabb, dtype=float)
        self._before: list[UInt8[np.ndarray, "height width"]] = []
        self.cells = self._new()

    def _new(self) -> UInt8[np.ndarray, "height width"]:
        height, width = self.size
        cells = np.full(self.size, self.classes[0].id, dtype=np.uint8)
        rows, columns = (slice(round(n * (0.5 - FIRST_ROOM)), round(n * (0.5 + FIRST_ROOM))) for n in (height, width))
        cells[rows, columns] = self.classes[min(1, len(self.classes) - 1)].id
        return cells

    def clear(self) -> None:
        """Begins anew."""
        self._change(self._new())

    def undo(self) -> None:
        """Takes the last change back, if there is one."""
        if self._before:
            self.cells = self._before.pop()

    def paint(self, rectangle: Rectangle, name: str) -> None:
        """Gives cells a class: all that a rectangle touches, cut to the map.

        Args:
            rectangle: any two opposite corners; one point twice is one cell.
            name: of the class.

        Raises:
            UserInputError: if it lies beside the map, or there is no such class.
        """
        found = [entry.id for entry in self.classes if entry.name == name]
        if not found:
            names = ", ".join(entry.name for entry in self.classes)
            raise UserInputError(f"There is no class {name} to draw: take one of {names}.")
        (x0, x1), (y0, y1) = sorted(rectangle[::2]), sorted(rectangle[1::2])
        height, width = self.size
        first_row, first_column = self._cell(x0, y1)
        last_row, last_column = self._cell(x1, y0)
        if last_row < 0 or first_row >= height or last_column < 0 or first_column >= width:
            raise UserInputError("That is beside the map: click on it.")
        cells = self.cells.copy()
        rows = slice(max(first_row, 0), last_row + 1)
        cells[rows, max(first_column, 0) : last_column + 1] = found[0]
        self._change(cells)

    def _cell(self, x: float, y: float) -> tuple[int, int]:
        """Row and column at a place, also beside the map."""
        height, width = self.size
        (x_min, y_min), (x_max, y_max) = self.aabb[:, :2]
        return (
            int(np.floor((y_max - y) / (y_max - y_min) * height)),
            int(np.floor((x - x_min) / (x_max - x_min) * width)),
        )

    def load(self, content: bytes, name: str) -> None:
        """Takes a map from an image file.

        Args:
            content: of the file.
            name: for messages.

        Raises:
            UserInputError: if it is no such map (`read_drawn_map`); then nothing changes.
        """
        image = open_image(Path(name), "save it again, as PNG", content=content)
        self._change(drawn_map(image, name, self.classes, self.size))

    def png(self) -> bytes:
        """As `bev.png` of scenes."""
        return bev_png(self.cells, self.classes)

    def picture(self, cell_pixels: int = 8) -> UInt8[np.ndarray, "rows columns 3"]:
        """In the colours of the classes, with lines between cells."""
        palette = np.zeros((256, 3), dtype=np.uint8)
        for entry in self.classes:
            palette[entry.id] = entry.color
        large = palette[self.cells].repeat(cell_pixels, axis=0).repeat(cell_pixels, axis=1)
        for lines in (large[::cell_pixels], large[:, ::cell_pixels]):
            lines[:] = np.maximum(lines * GRID, 24).astype(np.uint8)
        return large

    def _change(self, cells: UInt8[np.ndarray, "height width"]) -> None:
        self._before.append(self.cells)
        self.cells = cells
