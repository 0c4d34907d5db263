"""Cameras that stand upright, as simulators have them, and what their depths say of a place."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def level_poses(
    eyes: Float[np.ndarray, "views 3"], angles: Float[np.ndarray, " views"]
) -> Float[np.ndarray, "views 3 4"]:
    """OpenGL camera-to-world of level cameras at `eyes` looking along `angles` (degrees from x, counter-clockwise)."""
    turn = np.radians(angles)
    zero, one = np.zeros_like(turn), np.ones_like(turn)
    right = np.stack([np.sin(turn), -np.cos(turn), zero], axis=-1)
    up = np.stack([zero, zero, one], axis=-1)
    back = -np.stack([np.cos(turn), np.sin(turn), zero], axis=-1)
    return np.stack([right, up, back, eyes], axis=-1)


def share_inside(
    depths: Float[np.ndarray, "views size size"],
    poses: Float[np.ndarray, "views 3 4"],
    aabb: Float[np.ndarray, "2 3"],
    half_fov_tangent: float = 1.0,
) -> float:
    """Share of pixels of square images whose surface lies inside the box; depths are planar."""
    size = depths.shape[-1]
    across = ((np.arange(size) + 0.5) / size * 2 - 1) * half_fov_tangent
    local = np.stack(np.broadcast_arrays(across, -across[:, None], -1.0), axis=-1)
    directions = local @ poses[:, None, :, :3].swapaxes(-1, -2)
    with np.errstate(invalid="ignore"):
        points = poses[:, None, None, :, 3] + depths[..., None] * directions
        return float(((points > aabb[0]) & (points < aabb[1])).all(axis=-1).mean())
