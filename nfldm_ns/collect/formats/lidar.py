"""Scans of Lidars as sparse depth of cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from nfldm_ns.errors import UserInputError

NEAREST = 0.5  # metres before a camera; nearer points are of the car itself


def points_before(
    path: Path, values: int, to_camera: Float[np.ndarray, "4 4"], focal: float, width: float
) -> Float[np.ndarray, "points 3"]:
    """A scan's points in a camera's axes of OpenCV, in metres, of those before it and not far beyond its sides.

    Args:
        path: little-endian single precision numbers; the first three of each point are x, y, z.
        values: how many numbers a point has.
        to_camera: from the Lidar to the camera.
        focal, width: of the camera, in pixels.

    Raises:
        UserInputError: if the scan is missing or of another size.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}): restore it, or remove its frame.") from None
    if len(content) % (4 * values):
        raise UserInputError(
            f"{path} has {len(content)} bytes, which no scan of {values} numbers a point has: restore it."
        )
    points = np.frombuffer(content, "<f4").reshape(-1, values)[:, :3].astype(np.float64)
    points = points[np.isfinite(points).all(axis=1)] @ to_camera[:3, :3].T + to_camera[:3, 3]
    return points[(points[:, 2] > NEAREST) & (np.abs(points[:, 0]) < width / focal * points[:, 2])]


def rigid(rows: Float[np.ndarray, "rows 4"]) -> Float[np.ndarray, "4 4"]:
    """A transform of 3 or 4 rows with its last row."""
    return np.concatenate([rows[:3], [[0.0, 0, 0, 1]]])
