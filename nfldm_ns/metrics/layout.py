"""What a scene is from above, free floor and walls, and whether it agrees with a semantic map.

The inside of a wall, and all that lies behind one, was never observed: V may hold anything there. So a scene and a map
are compared by what is seen from the scene's origin. Level rays go from there to the centre of every column of voxels:

- free floor is where rays still pass: a column whose centre is reached by half of the light or more, on average over
  the heights of a band around the eyes;
- wall is where they end: a column whose centre is not reached, but lies at most `wall_m` behind where its ray ends;
- all else, in the shadow of these and beyond the radius, is neither.

Both are found in the same way in the density of V and in a map whose solid classes stop all light. Rays of the map that
pass over a class that may or may not stop them, such as a step of unknown height, are not judged from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import BevClass
from nfldm_ns.scenes.voxel_grid import VoxelGrid, voxel_centres

REACHED = 0.5  # share of the light from which on a place counts as reached
STOPS_ALL = 1e4  # 1/m
STEPS_PER_VOXEL = 4


@dataclass(frozen=True)
class LayoutSettings:
    """How scenes and maps are looked at.

    Attributes:
        radius_m: columns farther from the origin do not count.
        wall_m: how far behind its surface a wall counts, in metres.
        floor_z: height of the floor in metres; eyes are at 0.
        band_m: lowest and highest ray, in metres above the floor.
        solid: names of the classes that stop rays.
        unknown: names of the classes of which this is not known.
    """

    radius_m: float = 6.0
    wall_m: float = 0.7
    floor_z: float = -1.6
    band_m: tuple[float, float] = (0.3, 2.0)
    solid: tuple[str, ...] = ("void", "closed")
    unknown: tuple[str, ...] = ("step up",)


@dataclass(frozen=True)
class Layout:
    """Scenes from above; rows grow with y (south first), as those of voxels do.

    Attributes:
        floor: free floor that is seen from the origin.
        wall: walls that are seen from there.
        judged: where this is known.
    """

    floor: Bool[Tensor, "batch y x"]
    wall: Bool[Tensor, "batch y x"]
    judged: Bool[Tensor, "batch y x"]

    def __len__(self) -> int:
        return len(self.floor)

    def __getitem__(self, index: int | slice) -> Layout:
        """Selects scenes; an integer keeps the batch axis."""
        index = slice(index, index + 1 or None) if isinstance(index, int) else index
        return Layout(self.floor[index], self.wall[index], self.judged[index])

    def rolled(self, shift: int) -> Layout:
        """The same with each scene's place taken by the one `shift` before it."""
        return Layout(self.floor.roll(shift, 0), self.wall.roll(shift, 0), self.judged.roll(shift, 0))

    @staticmethod
    def cat(layouts: Sequence[Layout]) -> Layout:
        """Joins layouts of one grid."""
        return Layout(*(torch.cat([getattr(one, name) for one in layouts]) for name in ("floor", "wall", "judged")))

    def picture(self, index: int) -> Float[Tensor, "3 y x"]:
        """One of them, north up: floor light, walls dark red, what is neither grey, what is not judged blue."""
        colors = torch.tensor([[0.45, 0.45, 0.45], [0.92, 0.92, 0.88], [0.55, 0.1, 0.1], [0.35, 0.45, 0.7]])
        kinds = self.floor[index].long() + 2 * self.wall[index].long()
        kinds = torch.where(self.judged[index], kinds, 3)
        return colors[kinds.cpu()].permute(2, 0, 1).flip(1)


def voxel_layout(grid: VoxelGrid, settings: LayoutSettings | None = None) -> Layout:
    """What level rays from the origin find in V; everything is judged.

    Raises:
        UserInputError: if no voxel's centre lies in the band of heights, or the origin lies outside the box.
    """
    settings = settings or LayoutSettings()
    heights = voxel_centres(grid.shape, grid.aabb)[:, 0, 0, 2] - settings.floor_z
    low, high = settings.band_m
    layers = ((heights >= low) & (heights <= high)).nonzero().flatten()
    if not len(layers):
        raise UserInputError(f"No voxel's centre lies {low:g} to {high:g} m above the floor: give a wider band.")
    rays = _Rays.of(grid.shape[1:], grid.aabb, settings)
    depth = rays.optical_depth(grid.density[:, 0, layers].float(), "bilinear")
    floor, wall = rays.ends(torch.exp(-depth).mean(dim=1))
    return Layout(floor, wall, rays.inside.expand_as(floor))


def map_layout(
    maps: UInt8[np.ndarray, "batch rows columns"] | Tensor,
    classes: Sequence[BevClass],
    shape: tuple[int, int],
    aabb: Float[Tensor, "2 3"],
    settings: LayoutSettings | None = None,
) -> Layout:
    """What level rays from the origin find in semantic maps, for the columns of a grid.

    Args:
        maps: class ids, north up as in files; any size.
        shape: columns of voxels (Y, X).
        aabb: the box that maps and voxels share.

    Raises:
        UserInputError: if none of the classes is solid, or the origin lies outside the box.
    """
    settings = settings or LayoutSettings()
    ids = {name: [c.id for c in classes if c.name in getattr(settings, name)] for name in ("solid", "unknown")}
    if not ids["solid"]:
        known = ", ".join(c.name for c in classes) or "none"
        raise UserInputError(f"No class of the maps is {' or '.join(settings.solid)} (they are {known}): name walls.")
    rows = torch.as_tensor(maps).to(aabb.device).flip(-2)
    solid, unknown = (torch.isin(rows, rows.new_tensor(ids[name])).float() for name in ("solid", "unknown"))
    rays = _Rays.of(shape, aabb, settings)
    depth = rays.optical_depth(STOPS_ALL * solid[:, None], "nearest")
    floor, wall = rays.ends(torch.exp(-depth).mean(dim=1))
    doubtful = rays.samples(unknown[:, None], "nearest")[:, 0] * (depth[:, 0, :, 1:] == 0)
    judged = rays.up_to(F.pad(doubtful.cumsum(dim=-1), (1, 0)), rays.distance) == 0
    return Layout(floor, wall, judged & rays.inside)


def agreement(found: Layout, given: Layout) -> dict[str, Float[Tensor, " batch"]]:
    """IoU of `floor` and of `wall` of each pair of scenes, where both are judged; NaN where there is none in both."""
    judged = found.judged & given.judged
    scores = {}
    for name in ("floor", "wall"):
        a, b = (getattr(layout, name) & judged for layout in (found, given))
        either = (a | b).sum(dim=(-2, -1))
        scores[name] = torch.where(either > 0, (a & b).sum(dim=(-2, -1)) / either, torch.nan)
    return scores


@dataclass(frozen=True)
class _Rays:
    """Level rays from the origin to the centres of columns.

    Attributes:
        distance: `[Y, X]`, lengths in metres.
        inside: `[Y, X]`, whether a column counts.
        points: `[Y * X, K, 2]`, places on each ray as `grid_sample` wants them.
        step: metres from one place to the next; the first is half as far from the origin.
        wall_m: as in the settings.
    """

    distance: Float[Tensor, "y x"]
    inside: Bool[Tensor, "y x"]
    points: Float[Tensor, "columns steps 2"]
    step: float
    wall_m: float

    @staticmethod
    def of(shape: tuple[int, int], aabb: Float[Tensor, "2 3"], settings: LayoutSettings) -> _Rays:
        low, high = aabb[:, :2]
        if not bool(((low < 0) & (high > 0)).all()):
            raise UserInputError(f"The origin lies outside the box {aabb.tolist()}, so nothing is seen from there.")
        centres = voxel_centres((1, *shape), aabb)[0, :, :, :2]
        distance = centres.norm(dim=-1)
        step = float(((high - low) / aabb.new_tensor([shape[1], shape[0]])).min()) / STEPS_PER_VOXEL
        count = int(settings.radius_m / step) + 1
        along = (torch.arange(count, device=aabb.device) + 0.5) * step
        directions = (centres / distance.clamp(min=1e-6)[..., None]).flatten(0, 1)
        points = directions[:, None] * along[:, None]
        points = (points - low) / (high - low) * 2 - 1
        return _Rays(distance, distance <= settings.radius_m, points, step, settings.wall_m)

    def samples(self, values: Float[Tensor, "batch layers rows columns"], mode: str) -> Tensor:
        """Values `[B, L, Y * X, K]` of pictures of the box (south first) along the rays."""
        points = self.points.expand(len(values), -1, -1, -1)
        return F.grid_sample(values, points, mode=mode, padding_mode="border", align_corners=False)

    def optical_depth(self, extinction: Float[Tensor, "batch layers rows columns"], mode: str) -> Tensor:
        """`[B, L, Y * X, K + 1]`, at 0, 1, ... K steps from the origin; extinction in 1/m."""
        return F.pad(self.samples(extinction, mode).cumsum(dim=-1) * self.step, (1, 0))

    def up_to(self, running: Float[Tensor, "batch columns steps"], distance: Float[Tensor, "y x"]) -> Tensor:
        """`[B, Y, X]`: a running total along each ray, at a distance of its own."""
        index = (distance.flatten() / self.step).round().long().clamp(0, running.shape[-1] - 1)
        found = running.gather(-1, index.expand(len(running), -1)[..., None])[..., 0]
        return found.unflatten(1, distance.shape)

    def ends(self, light: Float[Tensor, "batch columns steps"]) -> tuple[Tensor, Tensor]:
        """Free floor and walls, from the light that is left along the rays."""
        reached = self.up_to(light, self.distance) >= REACHED
        before = self.up_to(light, (self.distance - self.wall_m).clamp(min=0)) >= REACHED
        return reached & self.inside, ~reached & before & self.inside
