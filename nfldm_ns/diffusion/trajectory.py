"""Where the cameras of a scene go, as a vector that can be modelled together with g."""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.rotations import quarter_turn
from nfldm_ns.scenes.views import make_cameras

CAMERA_DIM = 5  # x, y, z in metres, cos and sin of yaw
BORDER = 0.05  # share of the box, at each side, that sampled cameras keep clear of

Intrinsics = tuple[float, float, float, float]


def cameras_to_trajectory(cameras: Cameras) -> Float[Tensor, "*batch views_times_5"]:
    """(x, y, z, cos yaw, sin yaw) of each camera, for cameras of batch shape `[*B, N]`; pitch and roll are dropped.

    Yaw is the direction of view in the plane, counter-clockwise from the x axis.
    """
    poses = cameras.camera_to_worlds
    forward = -poses[..., :2, 2]
    heading = forward / forward.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.cat([poses[..., :3, 3], heading], dim=-1).flatten(-2)


def turn_trajectory(
    trajectory: Float[Tensor, "*batch views_times_5"], quarter_turns: int
) -> Float[Tensor, "*batch views_times_5"]:
    """The trajectory turned with the scene, counter-clockwise (see `VoxelGrid.rotate90`)."""
    turn = quarter_turn(quarter_turns)[:2, :2].to(trajectory)
    x = trajectory.unflatten(-1, (-1, CAMERA_DIM))
    return torch.cat([x[..., :2] @ turn.T, x[..., 2:3], x[..., 3:] @ turn.T], dim=-1).flatten(-2)


def trajectory_to_cameras(
    trajectory: Float[Tensor, "*batch views_times_5"],
    aabb: Float[Tensor, "2 3"],
    intrinsics: Intrinsics,
    image_size: tuple[int, int],
) -> Cameras:
    """Level cameras of batch shape `[*B, N]`, moved into the box where a sampled one lies outside.

    Args:
        intrinsics: fx, fy, cx, cy in pixels.
        image_size: (height, width).
    """
    x = trajectory.float().unflatten(-1, (-1, CAMERA_DIM))
    margin = BORDER * (aabb[1] - aabb[0])
    position = torch.minimum(torch.maximum(x[..., :3], aabb[0] + margin), aabb[1] - margin)
    yaw = torch.atan2(x[..., 4], x[..., 3])
    cos, sin, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    right, up = torch.stack([sin, -cos, zero], -1), torch.stack([zero, zero, one], -1)
    back = torch.stack([-cos, -sin, zero], -1)
    poses = torch.stack([right, up, back, position], dim=-1)
    return make_cameras(poses, *intrinsics, *image_size)
