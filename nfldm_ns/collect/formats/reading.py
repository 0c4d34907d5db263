"""What readers of published formats share: lines of numbers, poses of OpenCV, lenses of pinhole cameras."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nfldm_ns.collect.captures import Lens
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import LARGEST, check_rotation

PIXEL_CENTRE = 0.5  # added to principal points of formats that count from the middle of the first pixel
NO_DISTORTION = (0.0,) * 6
_AXES = np.diag([1.0, -1.0, -1.0])  # between a camera's axes of OpenCV and of OpenGL


def read_lines(path: Path) -> list[tuple[str, list[str]]]:
    """Words of the lines that are neither empty nor comments (`#`), and what to call each in a sentence.

    Raises:
        UserInputError: if it is missing, or no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserInputError(f"{path} is missing: give a folder of this format, or restore it.") from None
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}): check what is there.") from None
    except ValueError:
        raise UserInputError(f"{path} is no text: restore it.") from None
    lines = [line.split("#")[0] for line in lines]
    return [(f"line {i} of {path}", line.split()) for i, line in enumerate(lines, 1) if line.strip()]


def as_numbers(words: Sequence[str], count: int, where: str) -> Float[np.ndarray, " count"]:
    """So many numbers, which may be infinite.

    Raises:
        UserInputError: if there are more or fewer, or any is no number.
    """
    if len(words) != count:
        raise UserInputError(f"There are {len(words)} values in {where}, not {count}: restore it.")
    try:
        return np.array([float(word) for word in words])
    except ValueError as error:
        raise UserInputError(f"There is something else than numbers in {where} ({error}): restore it.") from None


def read_matrix(path: Path) -> Float[np.ndarray, "4 4"]:
    """A file of four lines of four numbers, which may be infinite."""
    lines = read_lines(path)
    if len(lines) != 4:
        raise UserInputError(f"{path} has {len(lines)} lines of numbers, not 4: restore it.")
    return np.stack([as_numbers(words, 4, where) for where, words in lines])


def numbered_files(folder: Path, pattern: str) -> dict[int, Path]:
    """Files by the number in their names, in its order.

    Args:
        pattern: as of `Path.glob`, with one star that stands for the number.

    Raises:
        UserInputError: if there are none.
    """
    before, after = pattern.split("*")
    found = {}
    for path in sorted(folder.glob(pattern)):
        number = path.name[len(before) : len(path.name) - len(after)]
        if number.isdecimal() and number.isascii():
            found[int(number)] = path
    if not found:
        raise UserInputError(f"There are no files {pattern} in {folder}: give a folder of this format.")
    return dict(sorted(found.items()))


def require_file(path: Path) -> Path:
    """The file itself; `UserInputError` if it is missing."""
    if not path.is_file():
        raise UserInputError(f"{path} is missing: restore it, or remove what belongs to it.")
    return path


def opengl_pose(camera_to_world: Float[np.ndarray, "rows 4"], where: str) -> Float[np.ndarray, "3 4"]:
    """The pose of OpenGL of a camera whose axes are those of OpenCV (x right, y down, z forward).

    Raises:
        UserInputError: unless it is finite, rigid and right-handed.
    """
    pose = checked_pose(camera_to_world, where)
    return np.concatenate([pose[:, :3] @ _AXES, pose[:, 3:]], axis=1)


def checked_pose(camera_to_world: Float[np.ndarray, "rows 4"], where: str) -> Float[np.ndarray, "3 4"]:
    """Without its last row; `UserInputError` unless it is finite, rigid and right-handed."""
    if not (np.abs(camera_to_world) < LARGEST).all():
        raise UserInputError(f"The pose of {where} has infinite or far too large numbers: restore it.")
    check_rotation(camera_to_world[:3, :3], where)
    return camera_to_world[:3].astype(np.float64)


def inverse_pose(world_to_camera: Float[np.ndarray, "rows 4"], where: str) -> Float[np.ndarray, "3 4"]:
    """Camera-to-world; `UserInputError` unless the given one is finite, rigid and right-handed."""
    pose = checked_pose(world_to_camera, where)
    return np.concatenate([pose[:, :3].T, -pose[:, :3].T @ pose[:, 3:]], axis=1)


def rotation_of(quaternion: Float[np.ndarray, " 4"], where: str) -> Float[np.ndarray, "3 3"]:
    """The rotation of a quaternion (w, x, y, z); `UserInputError` unless its length is about 1."""
    length = math.hypot(*quaternion)
    if not 0.99 < length < 1.01:
        raise UserInputError(f"The quaternion of {where} has length {length:.3g}, not 1: restore it.")
    w, x, y, z = quaternion / length
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def pinhole(
    intrinsics: Sequence[float] | Float[np.ndarray, " 4"],
    where: str,
    size: tuple[float, float] | None = None,
    distortion: tuple[float, ...] = NO_DISTORTION,
    fisheye: bool = False,
) -> Lens:
    """A lens of fx, fy, cx and cy in pixels, of which the first is centred at (0.5, 0.5).

    Args:
        size: (width, height) of the image that they are for; None: of any.
        distortion: k1, k2, k3, k4, p1, p2.

    Raises:
        UserInputError: if they are no numbers that a camera can have.
    """
    values = np.array([*intrinsics, *distortion], dtype=np.float64)
    if not (np.abs(values) < LARGEST).all() or (values[:2] <= 0).any():
        raise UserInputError(f"The focal length, centre or distortion of {where} cannot be right: restore it.")
    fx, fy, cx, cy = (float(value) for value in values[:4])
    return Lens(fisheye, tuple(distortion), size, (fx, fy), (cx, cy), (None, None))
