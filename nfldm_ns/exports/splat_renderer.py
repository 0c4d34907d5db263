"""Images of Gaussian splats: a small differentiable renderer for the CPU, and gsplat where there is CUDA.

As in Kerbl et al. (2023): Gaussians are projected by the linearised camera (EWA), sorted by depth, and composed front
to back, tile by tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.exports.splats import Splats, rotation_matrices

NEAR = 0.05  # metres
BLUR = 0.3  # pixels squared that a Gaussian is wider in the image, as in the reference
REACH = 3.0  # standard deviations to which a Gaussian is drawn
WIDEST = 1.3  # half images from the centre at which the linearised camera is held
LARGEST_ALPHA = 0.99
TILE = 16


def render_splats(splats: Splats, camera: Cameras) -> Float[Tensor, "3 height width"]:
    """One image on the CPU, over black; gradients reach all parameters of the splats.

    Args:
        camera: perspective, batch shape `[]`.
    """
    height, width = int(camera.height), int(camera.width)
    means, inverse, radii, depth = _project(splats, camera)
    order = _drawn(means, radii, depth, height, width)
    order = order[depth[order].argsort()]
    means, inverse, radii = means[order], inverse[order], radii[order]
    opacity, colors = splats.opacity_logits[order].sigmoid(), splats.colors[order].clamp(min=0)
    rows = []
    for top in range(0, height, TILE):
        tiles = []
        for left in range(0, width, TILE):
            size = (min(TILE, height - top), min(TILE, width - left))
            low = means.new_tensor([left, top])
            high = low + means.new_tensor([size[1], size[0]])
            near = ((means + radii[:, None] > low) & (means - radii[:, None] < high)).all(-1).nonzero()[:, 0]
            tiles.append(_tile(means[near] - low, inverse[near], opacity[near], colors[near], size))
        rows.append(torch.cat(tiles, dim=-1))
    return torch.cat(rows, dim=-2)


def _tile(
    means: Float[Tensor, "splats 2"],
    inverse: Float[Tensor, "splats 3"],
    opacity: Float[Tensor, " splats"],
    colors: Float[Tensor, "splats 3"],
    size: tuple[int, int],
) -> Float[Tensor, "3 height width"]:
    """Splats in order of depth, composed over the pixels of a tile."""
    rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x = columns.reshape(-1, 1) - means[:, 0]
    y = rows.reshape(-1, 1) - means[:, 1]
    power = -0.5 * (inverse[:, 0] * x * x + inverse[:, 2] * y * y) - inverse[:, 1] * x * y
    alpha = (opacity * power.exp()).clamp(max=LARGEST_ALPHA)
    through = torch.cumprod(1 - alpha, dim=-1)
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    return ((alpha * before) @ colors).T.reshape(3, *size)


@torch.no_grad()
def splat_images(splats: Splats, cameras: Cameras) -> Float[Tensor, "views 3 height width"]:
    """Pictures in [0, 1] of cameras of batch shape `[N]`, on the CPU."""
    return torch.stack([render_splats(splats, cameras[i]) for i in range(cameras.shape[0])]).clamp(0, 1)


def _drawn(means: Tensor, radii: Tensor, depth: Tensor, height: int, width: int) -> Tensor:
    """Indices of splats before the camera that touch the image."""
    size = means.new_tensor([width, height])
    touches = ((means + radii[:, None] > 0) & (means - radii[:, None] < size)).all(-1)
    return (touches & (depth > NEAR)).nonzero()[:, 0]


def _project(splats: Splats, camera: Cameras) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means in pixels, inverse covariances (xx, xy, yy), radii in pixels, and depths in metres."""
    rotation, position = _world_to_camera(camera)
    local = (splats.positions - position) @ rotation.T
    depth = local[:, 2]
    z = depth.clamp(min=NEAR)
    fx, fy = float(camera.fx), float(camera.fy)
    means = torch.stack([fx * local[:, 0] / z + camera.cx, fy * local[:, 1] / z + camera.cy], dim=-1)
    reach_x, reach_y = (WIDEST * float(size) / 2 / f for size, f in ((camera.width, fx), (camera.height, fy)))
    x, y = (local[:, 0] / z).clamp(-reach_x, reach_x), (local[:, 1] / z).clamp(-reach_y, reach_y)
    zero = torch.zeros_like(z)
    across = torch.stack([fx / z, zero, -fx * x / z], dim=-1)
    down = torch.stack([zero, fy / z, -fy * y / z], dim=-1)
    axes = rotation @ (rotation_matrices(splats.rotations) * splats.log_scales.exp()[:, None])
    flat = torch.stack([across, down], dim=1) @ axes
    covariance = flat @ flat.transpose(1, 2)
    a, b, c = covariance[:, 0, 0] + BLUR, covariance[:, 0, 1], covariance[:, 1, 1] + BLUR
    determinant = a * c - b * b
    inverse = torch.stack([c, -b, a], dim=-1) / determinant[:, None]
    largest = (a + c) / 2 + ((a - c).square() / 4 + b * b + 1e-12).sqrt()
    return means, inverse, REACH * largest.detach().sqrt(), depth


def _world_to_camera(camera: Cameras) -> tuple[Float[Tensor, "3 3"], Float[Tensor, " 3"]]:
    """Rotation to the axes of the image (x right, y down, z forward), and the camera's position."""
    pose = camera.camera_to_worlds
    flip = pose.new_tensor([1.0, -1.0, -1.0])
    return (pose[:, :3] * flip).T, pose[:, 3]


def gsplat_works() -> bool:
    """Whether there is a CUDA device, and gsplat with its kernels, which it compiles when it is first asked."""
    if not torch.cuda.is_available():
        return False
    try:
        from gsplat.cuda._backend import _C
    except ImportError:
        return False
    return _C is not None  # as it is without nvcc


def render_with_gsplat(splats: Splats, camera: Cameras) -> Float[Tensor, "3 height width"]:
    """As `render_splats`, by gsplat; splats and camera on a CUDA device."""
    from gsplat import rasterization

    rotation, position = _world_to_camera(camera)
    view = torch.eye(4, device=position.device)
    view[:3, :3], view[:3, 3] = rotation, -rotation @ position
    intrinsics = torch.eye(3, device=position.device)
    intrinsics[0, 0], intrinsics[1, 1] = camera.fx[0], camera.fy[0]
    intrinsics[0, 2], intrinsics[1, 2] = camera.cx[0], camera.cy[0]
    image, _, _ = rasterization(
        splats.positions,
        splats.rotations,
        splats.log_scales.exp(),
        splats.opacity_logits.sigmoid(),
        splats.colors.clamp(min=0),
        view[None],
        intrinsics[None],
        int(camera.width),
        int(camera.height),
        near_plane=NEAR,
        eps2d=BLUR,
    )
    return image[0].movedim(-1, 0)
