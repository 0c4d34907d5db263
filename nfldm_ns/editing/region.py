"""Regions of the ground plane, in metres or as images, and how they fall on voxels and latents."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.image_files import open_image
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres

GREY_MODES = ("1", "L")
Box = tuple[float, float, float, float]
"""Minimum x and y, then maximum x and y, in metres."""
WHERE_HELP = (
    "give 'box X0 Y0 X1 Y1', 'mask FILE', 'x > X', 'x < X', 'y > Y', 'y < Y' or 'half-plane A B C' (A x + B y > C)"
)


@dataclass(frozen=True)
class Region:
    """A part of the ground plane: whole columns of voxels.

    Attributes:
        columns: `[Y, X]`, true inside; rows grow with y (south first) as those of voxels do.
        extent: sizes (x, y) of the plane in metres.
        description: what it was made from, for the record.
    """

    columns: Bool[Tensor, "y x"]
    extent: tuple[float, float]
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def covers_nothing(self) -> bool:
        return not bool(self.columns.any())

    @property
    def covers_all(self) -> bool:
        return bool(self.columns.all())

    @property
    def share(self) -> float:
        """Of the plane's area, from 0 to 1."""
        return float(self.columns.float().mean())

    def distance(self) -> Float[Tensor, "y x"]:
        """Metres from each column's centre to the nearest centre inside; 0 inside, infinite if nothing is."""
        if self.covers_nothing:
            return torch.full(self.columns.shape, math.inf)
        rows, columns = self.columns.shape
        sampling = (self.extent[1] / rows, self.extent[0] / columns)
        return torch.from_numpy(distance_transform_edt(~self.columns.numpy(), sampling=sampling)).float()

    def weights(self, seam_m: float) -> Float[Tensor, "y x"]:
        """1 inside, falling linearly to 0 at `seam_m` metres from the region, and exactly 0 beyond."""
        distance = self.distance()
        if seam_m <= 0:
            return (distance == 0).float()
        return (1 - distance / seam_m).clamp(min=0)

    def border(self, reach_m: float) -> Region:
        """What lies within `reach_m` metres of both the region and the rest."""
        outside = Region(~self.columns, self.extent)
        near = (self.distance() <= reach_m) & (outside.distance() <= reach_m)
        return Region(near, self.extent, {"border_of": self.description, "reach_m": reach_m})

    def cells(self, factor: int) -> Bool[Tensor, "yc xc"]:
        """Cells of `factor` x `factor` columns of which any is inside, as c has them."""
        blocks = self.columns.unflatten(1, (-1, factor)).unflatten(0, (-1, factor))
        return blocks.any(dim=3).any(dim=1)

    def picture(self) -> Image.Image:
        """A mask image of one pixel per column, north up, white inside; `mask_region` reads it back."""
        return Image.fromarray(np.where(self.columns.flip(0).numpy(), 255, 0).astype(np.uint8))


def everywhere(grid: VoxelGrid) -> Region:
    """The whole plane."""
    return _region(grid, torch.ones(grid.shape[1:], dtype=torch.bool), {"everywhere": True})


def union(regions: list[Region]) -> Region:
    """What lies in any of some regions of one plane."""
    columns = torch.stack([region.columns for region in regions]).any(dim=0)
    return Region(columns, regions[0].extent, {"union_of": [region.description for region in regions]})


def box_region(grid: VoxelGrid, box: Box) -> Region:
    """The columns whose centres lie in a box.

    Args:
        box: minimum x and y, then maximum x and y, in metres.

    Raises:
        UserInputError: if the box is empty, reaches outside the scene, or lies between two columns.
    """
    x0, y0, x1, y1 = box
    (low_x, low_y, _), (high_x, high_y, _) = grid.aabb.tolist()
    shown = " ".join(f"{value:g}" for value in box)
    if not all(math.isfinite(value) for value in box) or x0 >= x1 or y0 >= y1:
        raise UserInputError(f"The box {shown} is empty: give minimum x and y, then maximum x and y, in metres.")
    tolerance = 1e-4
    if min(x0 - low_x, y0 - low_y, high_x - x1, high_y - y1) < -tolerance:
        raise UserInputError(
            f"The box {shown} reaches outside the scene, which spans {low_x:g} to {high_x:g} m in x and {low_y:g} to "
            f"{high_y:g} m in y: give a box within it."
        )
    x, y = _centres(grid)
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    return _not_empty(_region(grid, inside, {"box": list(box)}), f"The box {shown}", grid)


def half_plane_region(grid: VoxelGrid, a: float, b: float, c: float) -> Region:
    """The columns whose centres satisfy `a x + b y > c`, x and y in metres.

    Raises:
        UserInputError: if there are none, or a and b are both zero.
    """
    if not all(math.isfinite(value) for value in (a, b, c)) or (a == 0 and b == 0):
        raise UserInputError(f"{a:g} x + {b:g} y > {c:g} is no half-plane: give finite numbers, A or B not zero.")
    x, y = _centres(grid)
    region = _region(grid, a * x + b * y > c, {"half_plane": [a, b, c]})
    return _not_empty(region, f"The half-plane {a:g} x + {b:g} y > {c:g}", grid)


def mask_region(grid: VoxelGrid, path: Path | str) -> Region:
    """The columns whose centres lie on white pixels (brighter than half) of an image of the box seen from above.

    As in the BEV maps of collections north (the largest y) is up and east (the largest x) right.

    Args:
        path: a greyscale or black-and-white image of any size that has the shape of the box.

    Raises:
        UserInputError: if it is no such image, or has no white on any column.
    """
    path = Path(path)
    image = _read_grey(path)
    width, height = image.size
    size_x, size_y = _extent(grid)
    if abs(width * size_y - height * size_x) > max(size_x, size_y):
        rows, columns = grid.shape[1:]
        raise UserInputError(
            f"{path} is {width} x {height} pixels, but the scene is {size_x:g} x {size_y:g} m from above: give a mask "
            f"of that shape, for example {columns} x {rows}."
        )
    white = np.asarray(image.convert("L")) > 127
    x, y = _centres(grid)
    column = ((x - grid.aabb[0, 0].cpu()) / size_x * width).long().clamp(0, width - 1)
    row = ((grid.aabb[1, 1].cpu() - y) / size_y * height).long().clamp(0, height - 1)
    inside = torch.from_numpy(white)[row, column]
    return _not_empty(_region(grid, inside, {"mask": str(path)}), f"The white part of {path}", grid)


def parse_region(grid: VoxelGrid, text: str) -> Region:
    """A region from words: `box X0 Y0 X1 Y1`, `mask FILE`, `x > X` (also `<` and y) or `half-plane A B C`.

    Raises:
        UserInputError: if the text is none of these, or the region cannot be made.
    """
    kind, _, rest = text.strip().partition(" ")
    if kind == "mask" and rest.strip():
        return mask_region(grid, rest.strip())
    spaced = text.replace(",", " ").replace(">", " > ").replace("<", " < ").split()
    try:
        match spaced:
            case ["box", *values] if len(values) == 4:
                x0, y0, x1, y1 = (float(value) for value in values)
                return box_region(grid, (x0, y0, x1, y1))
            case ["half-plane", *values] if len(values) == 3:
                return half_plane_region(grid, *(float(value) for value in values))
            case [("x" | "y") as axis, (">" | "<") as side, value]:
                sign = 1.0 if side == ">" else -1.0
                a, b = (sign, 0.0) if axis == "x" else (0.0, sign)
                return half_plane_region(grid, a, b, sign * float(value))
    except ValueError:
        pass
    raise UserInputError(f"'{text}' does not say where: {WHERE_HELP}.")


def _read_grey(path: Path) -> Image.Image:
    if not path.is_file():
        raise UserInputError(f"There is no mask {path}: fix the path.")
    image = open_image(path, "save the mask again as PNG")
    if image.mode not in GREY_MODES:
        raise UserInputError(
            f"{path} has mode {image.mode}, but a mask is greyscale (L) or black and white (1): convert it; white is "
            "the region."
        )
    return image


def _centres(grid: VoxelGrid) -> tuple[Float[Tensor, "y x"], Float[Tensor, "y x"]]:
    """x and y of the columns' centres in metres."""
    points = voxel_centres((1, *grid.shape[1:]), grid.aabb.cpu())[0]
    return points[..., 0], points[..., 1]


def _extent(grid: VoxelGrid) -> tuple[float, float]:
    x, y, _ = (grid.aabb[1] - grid.aabb[0]).tolist()
    return x, y


def _region(grid: VoxelGrid, columns: Bool[Tensor, "y x"], description: dict[str, Any]) -> Region:
    return Region(columns, _extent(grid), description)


def _not_empty(region: Region, what: str, grid: VoxelGrid) -> Region:
    if region.covers_nothing:
        x, y, _ = grid.voxel_size.tolist()
        raise UserInputError(
            f"{what} holds the centre of no column of voxels, which are {x:.2g} x {y:.2g} m: choose a larger region or "
            "another place."
        )
    return region
