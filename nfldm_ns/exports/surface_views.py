"""What cameras inside a scene see of its surfaces: images, depth of the surfaces, and points unprojected from both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.lifting import box_exit_depth, occupancy_along_rays
from nfldm_ns.errors import UserInputError
from nfldm_ns.generated.cameras import look_along
from nfldm_ns.generated.scene_files import GeneratedScene
from nfldm_ns.scenes.views import camera_rays, index_cameras, make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid, sample_voxels

CAMERAS_AT_ONCE = 8
SAMPLES_PER_VOXEL = 4
LARGEST_STEP_ASIDE = 3.0  # metres from the scene's cameras to those of the ring
RING_PITCHES = (-0.6, 0.0, 0.6)  # radians: floors and ceilings, which level cameras see from afar only
RING_YAWS = 4


@dataclass
class SurfaceViews:
    """Renderings of N cameras, with the depth of surfaces.

    Attributes:
        cameras: batch shape `[N]`.
        images: `[N, 3, H, W]` in [0, 1].
        depth: `[N, 1, H, W]`, planar depth in metres at which half of a ray's light is stopped; where less is,
            that at which it leaves the box.
        expected: `[N, 1, H, W]`, the expected planar depth, as the renderer has it (`FeatureMaps`).
        seen: `[N, 1, H, W]`, true where there is such a surface: accumulation is at least 0.5.
    """

    cameras: Cameras
    images: Float[Tensor, "views 3 height width"]
    depth: Float[Tensor, "views 1 height width"]
    expected: Float[Tensor, "views 1 height width"]
    seen: Bool[Tensor, "views 1 height width"]


@dataclass
class SurfacePoints:
    """Points on surfaces.

    Attributes:
        positions: `[N, 3]`, metres.
        colors: `[N, 3]` in [0, 1].
        normals: `[N, 3]`, unit length, towards where they were seen from.
        footprints: `[N]`, metres that a pixel is wide there.
    """

    positions: Float[Tensor, "points 3"]
    colors: Float[Tensor, "points 3"]
    normals: Float[Tensor, "points 3"]
    footprints: Float[Tensor, " points"]


def scene_cameras(scene: GeneratedScene) -> Cameras:
    """The scene's own cameras, batch shape `[N]`.

    Raises:
        UserInputError: if it has none.
    """
    if scene.cameras is None:
        raise UserInputError("The scene has no transforms.json, and so no cameras that see it: sample it again.")
    return scene.cameras.to("cpu")


@torch.inference_mode()
def surface_views(scene: GeneratedScene, cameras: Cameras) -> SurfaceViews:
    """Renders cameras of batch shape `[N]`."""
    images, depths, expected, seen = [], [], [], []
    for first in range(0, cameras.shape[0], CAMERAS_AT_ONCE):
        chunk = index_cameras(cameras, (None, slice(first, first + CAMERAS_AT_ONCE)))
        images.append(scene.renderer.render(scene.grid, chunk).rgb[0].clamp(0, 1))
        median, mean, hit = surface_depth(scene.grid, chunk[0], scene.renderer.config.near)
        depths.append(median)
        expected.append(mean)
        seen.append(hit)
    return SurfaceViews(cameras, torch.cat(images), torch.cat(depths), torch.cat(expected), torch.cat(seen))


@torch.inference_mode()
def surface_depth(
    grid: VoxelGrid, cameras: Cameras, near: float
) -> tuple[
    Float[Tensor, "views 1 height width"], Float[Tensor, "views 1 height width"], Bool[Tensor, "views 1 height width"]
]:
    """Where half of each pixel's light is stopped, the expected depth, and whether half is stopped at all.

    Unlike the expected depth the median lies on a surface also at edges, between a near and a far one.
    """
    height, width = (int(size.reshape(-1)[0]) for size in (cameras.height, cameras.width))
    origins, directions = camera_rays(cameras, height, width)
    origins = origins[:, None, None].expand_as(directions)
    enter, leave = box_exit_depth(origins, directions, grid.aabb)
    start = torch.minimum(enter.clamp(min=near), leave)
    num_samples = _samples_across(grid)
    step = (leave - start) / num_samples
    depth = start[..., None] + step[..., None] * (torch.arange(num_samples) + 0.5)
    points = origins[..., None, :] + directions[..., None, :] * depth[..., None]
    density = sample_voxels(grid.density, grid.normalise(points)[None])[0, ..., 0]
    weights, _ = occupancy_along_rays(density, (step * directions.norm(dim=-1))[..., None])
    stopped = weights.cumsum(-1) >= 0.5
    index = stopped.to(torch.uint8).argmax(-1, keepdim=True)
    seen = stopped[..., -1]
    median = torch.where(seen, depth.gather(-1, index)[..., 0], leave)
    expected = (weights * depth).sum(-1) + (1 - weights.sum(-1)) * leave
    return median[:, None], expected[:, None], seen[:, None]


def _samples_across(grid: VoxelGrid) -> int:
    """Samples on the longest ray, `SAMPLES_PER_VOXEL` to the smallest edge of a voxel, within reason."""
    across = float((grid.aabb[1] - grid.aabb[0]).norm() / grid.voxel_size.min())
    return min(1024, math.ceil(across * SAMPLES_PER_VOXEL))


def further_cameras(scene: GeneratedScene, places: int) -> Cameras | None:
    """A ring of places around the centre of the scene's cameras, each with views to all sides, up and down.

    A place lies half-way to the surface in its direction, at most `LARGEST_STEP_ASIDE` away: in free space.

    Returns:
        cameras of batch shape `[places * 12]`; None without places.
    """
    if places == 0:
        return None
    own = scene_cameras(scene)
    centre = own.camera_to_worlds[:, :, 3].mean(0)
    yaws = torch.arange(places) / places * 2 * math.pi
    probe = make_cameras(look_along(centre.expand(places, 3), yaws, torch.zeros(places)), 1.0, 1.0, 0.5, 0.5, 1, 1)
    free, _, _ = surface_depth(scene.grid, probe, scene.renderer.config.near)
    aside = (free.reshape(-1) / 2).clamp(max=LARGEST_STEP_ASIDE)
    positions = centre + aside[:, None] * torch.stack([yaws.cos(), yaws.sin(), torch.zeros(places)], dim=-1)
    turns = torch.arange(RING_YAWS) / RING_YAWS * 2 * math.pi
    pitches = torch.tensor(RING_PITCHES)
    shape = (places, RING_YAWS, len(pitches))
    yaw = (yaws[:, None, None] + turns[None, :, None]).expand(shape).reshape(-1)
    pitch = pitches.expand(shape).reshape(-1)
    poses = look_along(positions[:, None, None].expand(*shape, 3).reshape(-1, 3), yaw, pitch)
    focal = float(scene.renderer.config.focal_length)
    height, width = scene.renderer.image_size
    return make_cameras(poses, focal, focal, width / 2, height / 2, height, width)


def rings_of(scene: GeneratedScene, ring_places: int = 0) -> list[Cameras]:
    """The scene's own cameras and, if any, a ring of further ones (`further_cameras`); each of batch shape `[N]`."""
    further = further_cameras(scene, ring_places)
    return [scene_cameras(scene)] + ([] if further is None else [further])


def views_of(scene: GeneratedScene, ring_places: int = 0) -> list[SurfaceViews]:
    """Renderings of the scene's cameras and, if any, of a ring of further ones (`further_cameras`).

    Raises:
        UserInputError: if the scene has no cameras, or if none of them sees a surface.
    """
    views = [surface_views(scene, cameras) for cameras in rings_of(scene, ring_places)]
    if not any(bool(view.seen.any()) for view in views):
        raise UserInputError(
            "The scene has no surfaces that its cameras see (accumulation stays below 0.5): sample another."
        )
    return views


def unproject(views: SurfaceViews, grid: VoxelGrid, *, beyond: bool = False) -> SurfacePoints:
    """One point per pixel that sees a surface.

    Args:
        beyond: also one for every other pixel, where its ray leaves the box, turned to the camera: what shows there is
            the background.
    """
    height, width = views.images.shape[-2:]
    origins, directions = camera_rays(views.cameras, height, width)
    kept = torch.ones_like(views.seen[:, 0]) if beyond else views.seen[:, 0]
    depth, toward = views.depth[:, 0][kept], -F.normalize(directions, dim=-1)[kept]
    positions = origins[:, None, None].expand_as(directions)[kept] + depth[:, None] * directions[kept]
    normals = torch.where(views.seen[:, 0][kept][:, None], surface_normals(grid, positions, toward), toward)
    focal = views.cameras.fx[..., 0][:, None, None].expand(kept.shape)[kept]
    return SurfacePoints(positions, views.images.movedim(1, -1)[kept], normals, depth / focal)


def surface_normals(
    grid: VoxelGrid, points: Float[Tensor, "points 3"], toward: Float[Tensor, "points 3"]
) -> Float[Tensor, "points 3"]:
    """Where density falls fastest (differences over a voxel), on the side of `toward`; that itself where it is flat."""
    offsets = torch.diag(grid.voxel_size / 2)
    differences = [
        (grid.sample((points - offset)[None])[0] - grid.sample((points + offset)[None])[0])[0] / (2 * offset.sum())
        for offset in offsets
    ]
    fall = torch.cat(differences, dim=-1)
    length = fall.norm(dim=-1, keepdim=True)
    normals = torch.where(length > 1e-6, fall / length.clamp(min=1e-6), toward)
    return normals * torch.where((normals * toward).sum(-1, keepdim=True) < 0, -1.0, 1.0)


def join_points(parts: list[SurfacePoints]) -> SurfacePoints:
    """All points of some sets."""
    fields = ("positions", "colors", "normals", "footprints")
    return SurfacePoints(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def thin(points: SurfacePoints, spacing: float) -> SurfacePoints:
    """One point, the mean, for every cell of `spacing` metres and side that its points face; 0 keeps all.

    The side is the axis, with its sign, that a normal is nearest to: the two sides of a wall are not mixed.
    """
    if spacing == 0 or len(points.positions) == 0:
        return points
    cells = (points.positions / spacing).floor().long()
    axis = points.normals.abs().argmax(-1, keepdim=True)
    side = 2 * axis + (points.normals.gather(-1, axis) > 0)
    keys = torch.cat([cells, side], dim=-1)
    _, index, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)

    def mean(values: Tensor) -> Tensor:
        total = values.new_zeros(len(counts), *values.shape[1:]).index_add_(0, index, values)
        return total / counts.reshape(-1, *[1] * (values.ndim - 1))

    normals = F.normalize(mean(points.normals), dim=-1)
    return SurfacePoints(mean(points.positions), mean(points.colors), normals, mean(points.footprints))
