"""Which way is up in a capture, how high its cameras were held, and so how long its units are."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

from nfldm_ns.errors import UserInputError

Up = Literal["z", "y", "-y", "cameras", "path"]
_AXES = {"z": (0.0, 0.0, 1.0), "y": (0.0, 1.0, 0.0), "-y": (0.0, -1.0, 0.0)}
_TURNING = 0.02  # least share of the second direction of the cameras' x axes, of which a turn by 28 degrees has so much
_SPREAD = 1e-3  # the same of the path's second direction: narrower paths are lines
_MIN_POINTS = 50
_BINS = 100
_CLEARLY = 3.0  # how many times more surface than at other heights a floor has


def upright(poses: Float[np.ndarray, "frames 3 4"], up: Up, where: str) -> Float[np.ndarray, "3 3"]:
    """The rotation of a capture's world after which z points up.

    "cameras" takes for up what is at right angles to the cameras' x axes, as people hold cameras level, however far
    they look up or down; where the cameras do not turn, their mean y axis. "path" takes the direction in which the
    cameras' positions vary least (nerfstudio's orientation methods "vertical" and "pca" have the same ideas).

    Args:
        poses: camera-to-world of OpenGL.
        where: whose they are, for the sentence.

    Raises:
        UserInputError: if the cameras do not say it.
    """
    if up in _AXES:
        return _rotation_to_z(np.array(_AXES[up]))
    tops = poses[:, :, 1].mean(axis=0)
    found = _across_the_cameras(poses) if up == "cameras" else _across_the_path(poses[:, :, 3], where)
    if abs(found @ tops) < 1e-3:
        raise UserInputError(f"The cameras of {where} do not say what is up: give an axis by --up.")
    return _rotation_to_z(found * np.sign(found @ tops))


def _across_the_cameras(poses: Float[np.ndarray, "frames 3 4"]) -> Float[np.ndarray, " 3"]:
    sides = poses[:, :, 0]
    values, vectors = np.linalg.eigh(sides.T @ sides / len(sides))
    if values[1] >= _TURNING:
        return vectors[:, 0]
    side = vectors[:, 2]
    top = poses[:, :, 1].mean(axis=0)
    top = top - (top @ side) * side
    return top / max(float(np.linalg.norm(top)), 1e-12)


def _across_the_path(eyes: Float[np.ndarray, "frames 3"], where: str) -> Float[np.ndarray, " 3"]:
    offsets = eyes - eyes.mean(axis=0)
    values, vectors = np.linalg.eigh(offsets.T @ offsets)
    if values[1] <= _SPREAD * values[2]:
        raise UserInputError(
            f"The cameras of {where} stand in a line, so that their path does not say what is up: use --up cameras, or "
            "give an axis."
        )
    return vectors[:, 0]


def _rotation_to_z(direction: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    """The smallest rotation that takes a unit vector to z."""
    x, y, z = direction
    if z < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + z)


def floor_drop(drops: Float[np.ndarray, " points"]) -> float | None:
    """How far below the eye the floor is: the lowest height at which clearly more surface lies than at others.

    Args:
        drops: how far surfaces lie below the eye; what is above it (negative) does not count.

    Returns:
        The median drop of the floor's points; None if no height stands out, as where only walls are seen.
    """
    below = drops[drops > 0]
    if len(below) < _MIN_POINTS:
        return None
    width = float(np.quantile(below, 0.995)) / (_BINS - 2)
    if width <= 0:
        return None
    counts = np.bincount((below / width).astype(int).clip(max=_BINS), minlength=_BINS + 1)[:_BINS].astype(float)
    smooth = np.convolve(counts, np.ones(3), mode="same")
    if smooth.max() < _CLEARLY * smooth.mean():
        return None
    lowest = int(np.flatnonzero(smooth >= smooth.max() / 2)[-1])
    peak = max(range(max(0, lowest - 2), lowest + 1), key=smooth.__getitem__)
    near = below[np.abs(below - (peak + 0.5) * width) <= 1.5 * width]
    return float(np.median(near))
