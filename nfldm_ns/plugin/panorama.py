"""Cameras that see more than one image plane holds: a panorama of one place, looked up along every pixel's ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.autoencoder.scene_autoencoder import SceneAutoencoder
from nfldm_ns.plugin.pictures import ray_lengths, render_steadily
from nfldm_ns.scenes.views import make_cameras
from nfldm_ns.scenes.voxel_grid import VoxelGrid

BLEND = 1.1  # half the side of a cube's face in distances to it; up to there neighbours are blended
RAYS_AT_ONCE = 2**18


@dataclass
class Panorama:
    """All that is seen from one place, on the faces of a cube along the world's axes.

    The faces look level, up and down as upright training cameras do, and do not turn with the camera.

    Attributes:
        rotations: `[6, 3, 3]`, camera to world of each face.
        faces: `[6, 5, S, S]`: colours, distance in metres along the ray, accumulation.
        focal: focal length of the faces in their pixels.
    """

    rotations: Float[Tensor, "6 3 3"]
    faces: Float[Tensor, "6 5 size size"]
    focal: float

    def look_up(self, directions: Float[Tensor, "n 3"]) -> Float[Tensor, "n 5"]:
        """What is seen along world-space directions of any length; near a cube's edge its faces are blended."""
        sums = directions.new_zeros(len(directions), 5)
        total = directions.new_zeros(len(directions), 1)
        for rotation, face in zip(self.rotations, self.faces, strict=True):
            x, y, z = (directions @ rotation).unbind(-1)
            before = z < -1e-6 * directions.norm(dim=-1)
            plane = torch.stack([x, -y], dim=-1) / torch.where(before, -z, torch.ones_like(z))[:, None]
            from_edge = (BLEND - plane.abs().amax(-1)) / (BLEND - 1 / BLEND)
            weights = torch.where(before, from_edge.clamp(0, 1), torch.zeros_like(z))
            seen = (weights > 0).nonzero()[:, 0]
            if len(seen):
                colours = _sample(face[:3], plane[seen] * self.focal, "bicubic")
                surfaces = _sample(face[3:], plane[seen] * self.focal, "bilinear")
                values = torch.cat([colours, surfaces], dim=-1)
                sums.index_add_(0, seen, values * weights[seen, None])
                total.index_add_(0, seen, weights[seen, None])
        return sums / total


def _sample(face: Float[Tensor, "c size size"], offsets: Float[Tensor, "n 2"], mode: str) -> Float[Tensor, "n c"]:
    """Interpolates a face at offsets (right, down) from its centre in its pixels."""
    where = offsets[None, :, None] * (2 / face.shape[-1])
    return F.grid_sample(face[None], where, mode=mode, padding_mode="border", align_corners=False)[0, :, :, 0].T


def render_panorama(
    autoencoder: SceneAutoencoder,
    grid: VoxelGrid,
    origin: Float[Tensor, " 3"],
    *,
    num_feature_samples: int | None = None,
    phases: int | None = None,
) -> Panorama:
    """Renders one scene all around a place, at the ray density of training.

    Args:
        grid: of one scene.
        num_feature_samples, phases: see `render_steadily`.
    """
    focal, stride = float(autoencoder.config.focal_length), autoencoder.config.feature_stride
    half = math.ceil(BLEND * focal / stride + 1) * stride
    rotations = face_rotations().to(grid.device)
    poses = torch.cat([rotations, origin.to(rotations).expand(6, 3)[..., None]], dim=-1)
    cameras = make_cameras(poses[None], focal, focal, half, half, 2 * half, 2 * half)
    faces = render_steadily(autoencoder, grid, cameras, num_feature_samples=num_feature_samples, phases=phases)
    faces[:, 3:4] *= ray_lengths(cameras)[0].movedim(-1, 1)
    return Panorama(rotations, faces, focal)


def face_rotations() -> Float[Tensor, "6 3 3"]:
    """Camera to world of the faces of a cube: four level ones (x, y, -x, -y), up and down."""
    forward = torch.tensor([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=torch.float32)
    up = torch.tensor([[0, 0, 1]] * 4 + [[-1, 0, 0], [1, 0, 0]], dtype=torch.float32)
    return torch.stack([torch.linalg.cross(forward, up), up, -forward], dim=-1)


def panoramic_pictures(panorama: Panorama, camera: Cameras) -> dict[str, Tensor]:
    """Pictures of a camera at the panorama's place.

    Args:
        camera: one camera of batch shape `[1]` of any kind whose rays start at one point. Where its pixels are larger
            than those of the panorama, several rays are averaged.

    Returns:
        rgb `[H, W, 3]` in [0, 1], depth `[H, W, 1]` in metres along the ray, accumulation `[H, W, 1]`.
    """
    rays = max(1, math.ceil(pixel_angle(camera) * panorama.focal - 0.1))
    finer = Cameras(
        camera.camera_to_worlds,
        *(getattr(camera, name) * rays for name in ("fx", "fy", "cx", "cy", "width", "height")),
        distortion_params=camera.distortion_params,
        camera_type=camera.camera_type,
    )
    coords = finer.get_image_coords().to(camera.device)
    rows = max(1, RAYS_AT_ONCE // (int(camera.width) * rays**2)) * rays
    parts = []
    for part in coords.split(rows):
        values = panorama.look_up(ray_directions(finer, part).reshape(-1, 3))
        parts.append(F.avg_pool2d(values.T.unflatten(1, part.shape[:2]), rays))
    image = torch.cat(parts, dim=1).movedim(0, -1)
    return {"rgb": image[..., :3].clamp(0, 1), "depth": image[..., 3:4], "accumulation": image[..., 4:]}


def ray_directions(camera: Cameras, coords: Float[Tensor, "height width 2"]) -> Float[Tensor, "height width 3"]:
    """World-space unit directions through points (row, column) of a camera of batch shape `[1]`."""
    directions = camera.generate_rays(camera_indices=0, coords=coords).directions
    forward = -camera.camera_to_worlds[0, :, 2]
    return torch.where(directions.isfinite(), directions, forward)  # nerfstudio's fisheye has no ray at its very centre


def pixel_angle(camera: Cameras) -> float:
    """Median angle between neighbouring pixels of a camera of batch shape `[1]`, in radians, from a sample of them."""
    height, width = (int(size) for size in (camera.height, camera.width))
    rows, columns = (torch.linspace(0, size - 1, min(size, 32)).round() + 0.5 for size in (height, width))
    coords = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).to(camera.device)
    return float(camera.generate_rays(camera_indices=0, coords=coords).pixel_area.sqrt().nanmedian())
