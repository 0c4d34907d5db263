"""A world on disk: one file of voxels per tile, read as a camera comes near.

    world.json               layout, settings, provenance, and how far it has come
    renderer.safetensors     what turns voxels into images, and the background at each window
    tiles/<row>_<column>.safetensors   voxels of one box each, half precision, compressed without loss (plain in worlds
                             of version 1); less at the world's edge
    latents_<revision>.safetensors     c and f of the whole, and the scene code of each window, to go on from

Rows and columns are counted in cells of c, from the south-west corner of the world as it was first made; what is added
in the west or south later has negative ones.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nfldm_ns.autoencoder.model_configs import build_model
from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.diffusion.windows import Span, WindowGrid
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.scene_files import (
    GeneratedScene,
    half_precision,
    read_voxel_tensors,
    renderer_of,
    voxel_tensors,
    without_encoder,
)
from nfldm_ns.generated.tensor_coding import coded_description, exact_half, read_coded, write_coded
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import Checked, Finite, Positive, validated_json
from nfldm_ns.scenes.voxel_grid import VoxelGrid
from nfldm_ns.scenes.writing import write_json

FORMAT = "nfldm-world"
VERSION: Final = 2
UNCODED = 1  # whose tiles and renderer are in their files as they are
DESCRIPTION = "world.json"
RENDERER = "renderer.safetensors"
TILES = "tiles"
TILES_KEPT = 36  # in memory: what a camera sees of them, and as many on its way
REMEDY = "make the world again"
Count = Annotated[int, Field(ge=1, le=10**6)]
Pair = Annotated[list[Count], Field(min_length=2, max_length=2)]
Starts = Annotated[list[Annotated[int, Field(ge=-(10**6), le=10**6)]], Field(min_length=1)]


class WorldDescription(Checked):
    """`world.json`.

    Attributes:
        state: "unfinished" until all tiles are written.
        revision: how often the world was made larger.
        settings: what it was made with; the same again continues an unfinished one.
        corner: x and y in metres of the south-west corner of cell (0, 0).
        cell: edges (x, y) of a cell in metres.
        height: lowest and highest z in metres.
        voxels: per cell and horizontal axis.
        layers: voxels along z.
        window, y_starts, x_starts: as in `WindowGrid`.
        reach: how far a camera sees, in metres.
        camera_height: z of cameras, in metres.
        autoencoder: configuration of the renderer.
        provenance: what made it.
    """

    format: Literal["nfldm-world"] = "nfldm-world"
    version: Literal[1, 2] = 2
    state: Literal["unfinished", "finished"] = "unfinished"
    revision: Annotated[int, Field(ge=0)] = 0
    settings: dict[str, Any]
    corner: Annotated[list[Finite], Field(min_length=2, max_length=2)]
    cell: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    height: Annotated[list[Finite], Field(min_length=2, max_length=2)]
    voxels: Count
    layers: Count
    window: Pair
    y_starts: Starts
    x_starts: Starts
    reach: Positive
    camera_height: Finite = 0.0
    autoencoder: dict[str, Any]
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def windows(self) -> WindowGrid:
        return WindowGrid(self.y_starts, self.x_starts, (self.window[0], self.window[1]))

    def box(self, y: Span, x: Span) -> Float[Tensor, "2 3"]:
        """Corners in metres of a part of the world, in cells."""
        (left, bottom), (dx, dy), (low, high) = self.corner, self.cell, self.height
        corners = [[left + x[i] * dx, bottom + y[i] * dy, z] for i, z in enumerate((low, high))]
        return torch.tensor(corners, dtype=torch.float32)

    @property
    def tiles(self) -> dict[tuple[int, int], tuple[Span, Span]]:
        """The cells (rows, columns) of each tile, by its row and column among tiles."""
        spans = (self.windows.y, self.windows.x)
        rows, columns = (_cut(span, size) for span, size in zip(spans, self.window, strict=True))
        return {(i, j): (y, x) for i, y in rows.items() for j, x in columns.items()}


def _cut(span: Span, size: int) -> dict[int, Span]:
    first, last = span[0] // size, (span[1] - 1) // size
    return {i: (max(span[0], i * size), min(span[1], (i + 1) * size)) for i in range(first, last + 1)}


def read_description(folder: Path) -> WorldDescription | None:
    """What `world.json` says; None if there is none.

    Raises:
        UserInputError: if it is damaged.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    content = read_json(path)
    known = isinstance(content, dict) and content.get("version") in (UNCODED, VERSION)
    if not known or content.get("format") != FORMAT:
        raise UserInputError(f"{path} is not of format {FORMAT}, version {VERSION}: {REMEDY}.")
    described = validated_json(WorldDescription, content, path, REMEDY)
    for starts, size in ((described.y_starts, described.window[0]), (described.x_starts, described.window[1])):
        if any(not a < b <= a + size for a, b in pairwise(starts)):
            raise UserInputError(f"{path} has windows that leave gaps or run back ({starts}): {REMEDY}.")
    return described


def write_description(folder: Path, description: WorldDescription) -> None:
    """Writes `world.json` in one step."""
    write_json(folder / DESCRIPTION, description.model_dump())


def tile_path(folder: Path, tile: tuple[int, int]) -> Path:
    """The file of a tile, by its row and column."""
    return folder / TILES / f"{tile[0]:+04d}_{tile[1]:+04d}.safetensors"


def write_tile(folder: Path, tile: tuple[int, int], grid: VoxelGrid, revision: int) -> None:
    """Writes the voxels of one tile in one step, compressed without loss (`tensor_coding`)."""
    write_coded(tile_path(folder, tile), voxel_tensors(half_precision(grid)), {"revision": revision})


def tile_revision(folder: Path, tile: tuple[int, int]) -> int | None:
    """When a tile was written; None if it is missing or damaged."""
    try:
        described = coded_description(tile_path(folder, tile))
        if described is not None:
            return int(described["revision"])
        with safe_open(tile_path(folder, tile), framework="pt") as file:  # of version 1
            return int((file.metadata() or {})["revision"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def write_renderer(
    folder: Path, autoencoder: SceneAutoencoder, backgrounds: Float[Tensor, "rows columns codes 4"] | None
) -> SceneAutoencoder:
    """Writes what turns the world's voxels into images, in one step, and returns it.

    Args:
        backgrounds: of each window.
    """
    renderer = renderer_of(autoencoder)
    tensors = {f"renderer.{name}": exact_half(value) for name, value in renderer.state_dict().items()}
    if backgrounds is not None:
        tensors["backgrounds"] = backgrounds.detach().cpu().float()
    write_coded(folder / RENDERER, tensors)
    return renderer


@dataclass
class World:
    """A world whose tiles are read when they are needed.

    Attributes:
        folder: where it lies.
        description: its layout.
        base_renderer: a `SceneAutoencoder` without its image encoder, for grids of the size of one box.
        backgrounds: code of what lies beyond, at each window.
    """

    folder: Path
    description: WorldDescription
    base_renderer: SceneAutoencoder
    backgrounds: Float[Tensor, "rows columns codes 4"] | None

    def __post_init__(self) -> None:
        self._tiles: OrderedDict[tuple[int, int], VoxelGrid] = OrderedDict()
        self._last: tuple[tuple[Span, Span], VoxelGrid] | None = None
        self._renderers: dict[int, SceneAutoencoder] = {}

    @property
    def aabb(self) -> Float[Tensor, "2 3"]:
        """Corners of the whole in metres."""
        windows = self.description.windows
        return self.description.box(windows.y, windows.x)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (Z, Y, X) of the whole."""
        rows, columns = self.description.windows.shape
        return self.description.layers, rows * self.description.voxels, columns * self.description.voxels

    @property
    def tiles_in_memory(self) -> int:
        """How many tiles are kept now."""
        return len(self._tiles)

    def tile(self, tile: tuple[int, int]) -> VoxelGrid:
        """The voxels of one tile, read from disk unless they were used lately.

        Raises:
            UserInputError: if its file is missing, damaged, or of another size.
        """
        if tile in self._tiles:
            self._tiles.move_to_end(tile)
            return self._tiles[tile]
        y, x = self.description.tiles[tile]
        path = tile_path(self.folder, tile)
        try:
            grid = read_voxel_tensors(read_coded(path), self.description.box(y, x), self.base_renderer)
        except (KeyError, ValueError) as error:
            raise UserInputError(f"{path} is no tile of this world ({error}): {REMEDY}.") from None
        scale = self.description.voxels
        expected = (self.description.layers, (y[1] - y[0]) * scale, (x[1] - x[0]) * scale)
        if grid.shape != expected:
            raise UserInputError(f"{path} has {grid.shape} voxels (z, y, x), not {expected}: {REMEDY}.")
        self._tiles[tile] = grid.to(torch.float16)
        while len(self._tiles) > TILES_KEPT:
            self._tiles.popitem(last=False)
        return self._tiles[tile]

    def block(self, y: Span, x: Span) -> VoxelGrid:
        """The voxels of a part of the world in one dense grid, single precision, with the background at its middle.

        Args:
            y, x: first row and column and those after the last, in cells.
        """
        if self._last is not None and self._last[0] == (y, x):
            return self._last[1]
        scale = self.description.voxels
        shape = (self.description.layers, (y[1] - y[0]) * scale, (x[1] - x[0]) * scale)
        density = torch.empty(1, 1, *shape)
        features = torch.empty(1, self.base_renderer.feature_channels, *shape)
        for tile, (rows, columns) in self.description.tiles.items():
            low = max(rows[0], y[0]), max(columns[0], x[0])
            high = min(rows[1], y[1]), min(columns[1], x[1])
            if low[0] >= high[0] or low[1] >= high[1]:
                continue
            grid = self.tile(tile)
            to, source = (
                tuple(slice((a - o) * scale, (b - o) * scale) for a, b, o in zip(low, high, origin, strict=True))
                for origin in ((y[0], x[0]), (rows[0], columns[0]))
            )
            density[..., to[0], to[1]] = grid.density[..., source[0], source[1]].float()
            features[..., to[0], to[1]] = grid.features[..., source[0], source[1]].float()
        aabb = self.description.box(y, x)
        grid = VoxelGrid(density, features, aabb, self.background_at(aabb.mean(0)))
        self._last = ((y, x), grid)
        return grid

    def whole(self) -> VoxelGrid:
        """All voxels in one dense grid: as large as the world."""
        return self.block(self.description.windows.y, self.description.windows.x)

    def near(self, position: Float[Tensor, " 3"], reach: float | None = None) -> VoxelGrid:
        """What lies at most `reach` metres from a place along x and y (and less than a cell more), as a dense grid."""
        return self.block(*self._cells_near(position, self.description.reach if reach is None else reach))

    def _cells_near(self, position: Tensor, reach: float) -> tuple[Span, Span]:
        spans = []
        windows = self.description.windows
        for axis, (first, last) in ((1, windows.y), (0, windows.x)):
            edge = self.description.cell[axis]
            place = (float(position[axis]) - self.description.corner[axis]) / edge
            low = min(max(int((place - reach / edge) // 1), first), last - 1)
            high = max(min(-int((-place - reach / edge) // 1), last), low + 1)
            spans.append((low, high))
        return spans[0], spans[1]

    def background_at(self, position: Float[Tensor, " 3"]) -> Float[Tensor, "1 codes 4"] | None:
        """The code of what lies beyond the world, as the windows around a place have it."""
        if self.backgrounds is None:
            return None
        weights = []
        windows = self.description.windows
        for axis, (span, factors) in ((1, (windows.y, windows.axes(1)[0])), (0, (windows.x, windows.axes(1)[1]))):
            place = (
                (float(position[axis]) - self.description.corner[axis]) / self.description.cell[axis] - span[0] - 0.5
            )
            place = min(max(place, 0.0), factors.shape[1] - 1.0)
            low = min(int(place), factors.shape[1] - 2) if factors.shape[1] > 1 else 0
            high = min(low + 1, factors.shape[1] - 1)
            weights.append(torch.lerp(factors[:, low], factors[:, high], place - low))
        return torch.einsum("r,c,rcks->ks", *weights, self.backgrounds)[None]

    def renderer_for(self, grid: VoxelGrid) -> SceneAutoencoder:
        """The renderer with as many samples per ray as keep them as close as in one box; weights are shared."""
        config = self.base_renderer.config
        box = self.base_renderer.aabb
        share = ((grid.aabb[1] - grid.aabb[0])[:2].cpu() / (box[1] - box[0])[:2].cpu()).max().item()
        samples = max(config.num_samples, round(config.num_samples * share))
        if samples not in self._renderers:
            renderer = copy.copy(self.base_renderer)
            renderer.register_to_config(num_samples=samples)
            self._renderers[samples] = renderer
        return self._renderers[samples]

    def scene_near(self, position: Float[Tensor, " 3"], cameras: Cameras | None = None) -> GeneratedScene:
        """What a camera at a place sees, as a scene of its own."""
        grid = self.near(position)
        return GeneratedScene(grid, self.renderer_for(grid), cameras)

    def blocks(self) -> Iterator[tuple[tuple[int, int], VoxelGrid]]:
        """All tiles, one after the other, none kept."""
        for tile in self.description.tiles:
            grid = self.tile(tile)
            yield tile, grid.to(torch.float32)
            self._tiles.pop(tile, None)


def is_world(folder: Path | str) -> bool:
    """Whether a folder is that of a world."""
    return (Path(folder) / DESCRIPTION).is_file()


def load_world(folder: Path | str, unfinished: bool = False) -> World:
    """Opens a world without reading its tiles.

    Args:
        unfinished: whether one that is still being made will do.

    Raises:
        UserInputError: if there is none, it is damaged, or it is not finished.
    """
    folder = Path(folder)
    description = read_description(folder)
    if description is None:
        raise UserInputError(f"{folder} is no world (it has no {DESCRIPTION}): make one with 'nfldm-world'.")
    if description.state != "finished" and not unfinished:
        raise UserInputError(f"{folder} is not finished: run the nfldm-world command that began it again.")
    try:
        tensors = read_coded(folder / RENDERER)
    except ValueError as error:
        raise UserInputError(f"{folder / RENDERER} is damaged ({error}): {REMEDY}.") from None
    backgrounds = tensors.pop("backgrounds", None)
    state = {name.removeprefix("renderer."): value for name, value in tensors.items()}
    path = folder / DESCRIPTION
    renderer = build_model(SceneAutoencoder, description.autoencoder, path, state, folder / RENDERER, without_encoder)
    windows = description.windows
    expected = (len(windows.y_starts), len(windows.x_starts), *renderer.background_shape)
    if backgrounds is not None and tuple(backgrounds.shape) != expected:
        raise UserInputError(
            f"{folder / RENDERER} has backgrounds of {list(backgrounds.shape)}, not {list(expected)}: {REMEDY}."
        )
    return World(folder, description, renderer, backgrounds)
