"""Camera rigs and paths for generated scenes."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_utils import get_interpolated_poses
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nfldm_ns.scenes.views import make_cameras


def look_along(
    positions: Float[Tensor, "n 3"], yaw: Float[Tensor, " n"], pitch: Float[Tensor, " n"]
) -> Float[Tensor, "n 3 4"]:
    """OpenGL camera-to-world matrices without roll.

    Args:
        positions: in metres.
        yaw: radians, counter-clockwise from x.
        pitch: radians, positive looks up.
    """
    zero, level = torch.zeros_like(yaw), pitch.cos()
    back = -torch.stack([yaw.cos() * level, yaw.sin() * level, pitch.sin()], dim=-1)
    right = torch.stack([yaw.sin(), -yaw.cos(), zero], dim=-1)
    return torch.stack([right, torch.linalg.cross(back, right), back, positions], dim=-1)


def surround_cameras(
    num_views: int, image_size: tuple[int, int], focal_length: float, first_yaw: float = 0.0
) -> Cameras:
    """Level cameras at the origin that look outward at equally spaced yaws, batch shape `[num_views]`.

    Args:
        image_size: (height, width).
        focal_length: in pixels.
    """
    height, width = image_size
    yaw = first_yaw + torch.arange(num_views) / num_views * 2 * math.pi
    poses = look_along(torch.zeros(num_views, 3), yaw, torch.zeros(num_views))
    return make_cameras(poses, focal_length, focal_length, width / 2, height / 2, height, width)


def fly_through(cameras: Cameras, num_frames: int, radius: float | None = None) -> Cameras:
    """A closed path for videos: one turn around the centre of some cameras while moving on a small circle.

    Args:
        cameras: batch shape `[N]`; they give the centre, the height, the mean pitch, the first yaw and the intrinsics.
        num_frames: of the path; the frame after the last would be the first.
        radius: of the circle in metres; by default half the largest distance of a camera from the centre, at most 0.5.

    Returns:
        cameras of batch shape `[num_frames]`.
    """
    poses = cameras.camera_to_worlds.float()
    centre = poses[:, :, 3].mean(0)
    if radius is None:
        radius = min(0.5, 0.5 * float((poses[:, :2, 3] - centre[:2]).norm(dim=-1).max()))
    forward = -poses[:, :, 2]
    first_yaw = torch.atan2(forward[0, 1], forward[0, 0])
    pitch = torch.asin(forward[:, 2].clamp(-1, 1)).mean()
    yaw = first_yaw + torch.arange(num_frames, device=poses.device) / num_frames * 2 * math.pi
    offset = radius * torch.stack([yaw.cos(), yaw.sin(), torch.zeros_like(yaw)], dim=-1)
    return _with_intrinsics_of(cameras, look_along(centre + offset, yaw, pitch.expand_as(yaw)))


def path_through(cameras: Cameras, frames_between: int) -> Cameras:
    """An open path from the first to the last of some cameras, through all of them in their order.

    Between two cameras positions move on a straight line and rotations along the shortest way (slerp), at equal steps.

    Args:
        cameras: batch shape `[N]`, N at least 2; the first gives the intrinsics.
        frames_between: steps from one camera to the next.

    Returns:
        cameras of batch shape `[(N - 1) * frames_between + 1]`.

    Raises:
        ValueError: if there are fewer than 2 cameras, or no steps.
    """
    if cameras.shape[0] < 2 or frames_between < 1:
        raise ValueError(f"a path needs 2 cameras and 1 step, not {cameras.shape[0]} and {frames_between}")
    given = cameras.camera_to_worlds.double().cpu().numpy()
    poses = [pose for a, b in pairwise(given) for pose in get_interpolated_poses(a, b, frames_between + 1)[:-1]]
    matrices = torch.from_numpy(np.stack([*poses, given[-1]])).float().to(cameras.device)
    return _with_intrinsics_of(cameras, matrices)


def _with_intrinsics_of(cameras: Cameras, poses: Float[Tensor, "n 3 4"]) -> Cameras:
    """Cameras with other poses and the intrinsics and image size of the first of `cameras`."""
    fx, fy, cx, cy = (float(getattr(cameras, name).reshape(-1)[0]) for name in ("fx", "fy", "cx", "cy"))
    height, width = (int(size.reshape(-1)[0]) for size in (cameras.height, cameras.width))
    return make_cameras(poses, fx, fy, cx, cy, height, width)
