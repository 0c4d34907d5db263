"""Trajectories as GSN (DeVries et al., ICCV 2021) released them of VizDoom and Replica: `cameras.json` and pictures.

What its numbers mean is not written down with the data; here they mean what GSN's own code takes them for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from pydantic import AfterValidator, Field

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.reading import inverse_pose, opengl_pose, pinhole
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import Checked, Finite, validated

FILE = "cameras.json"
Axes = Literal["opengl", "opencv"]
METRES_PER_GAME_UNIT = 1 / 25.6  # of Doom's maps, as in our own collections of them
GAME_UNITS_PER_STEP = 100 / 14  # of VizDoom's depth buffer
METRES_PER_TIFF_UNIT = 1000.0  # Replica's depths are in thousands of metres
NORMALISED = 8.0  # smaller focal lengths are of an image from -1 to 1
RELEASED_SIZE = 480  # pixels that VizDoom's focal lengths are for
_PICTURE = re.compile(r"(\d+)_rgb\.png")


def _is_square(rows: list[list[float]]) -> list[list[float]]:
    if np.shape(rows) not in ((3, 3), (4, 4)):
        raise ValueError("give 3 x 3 or 4 x 4 numbers")
    return rows


def _is_pose(rows: list[list[float]]) -> list[list[float]]:
    if np.shape(rows) not in ((3, 4), (4, 4)):
        raise ValueError("give 3 or 4 rows of 4 numbers")
    return rows


_Rows = list[Annotated[list[Finite], Field(min_length=3, max_length=4)]]


class _Camera(Checked):
    Rt: Annotated[_Rows, AfterValidator(_is_pose)]
    K: Annotated[_Rows, AfterValidator(_is_square)]


class _Cameras(Checked):
    cameras: list[_Camera]


def read_gsn(folder: Path, axes: Axes = "opengl") -> Capture:
    """Reads one trajectory: entry i of `cameras.json` is the camera of `00i_rgb.png` and `00i_depth.png` or `.tiff`.

    Args:
        axes: the cameras' axes; GSN's own cameras look along -z.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    path = folder / FILE
    cameras = validated(_Cameras, {"cameras": read_json(path)}, path).cameras
    pictures = {int(match[1]): file for file in sorted(folder.iterdir()) if (match := _PICTURE.fullmatch(file.name))}
    if not pictures:
        raise UserInputError(f"There are no pictures 000_rgb.png, 001_rgb.png, ... in {folder}: give a trajectory.")
    last = max(pictures)
    if last >= len(cameras):
        raise UserInputError(
            f"{path} has {len(cameras)} cameras, but {pictures[last].name} needs one more: restore it."
        )
    frames = [_frame(path, i, pictures[i], cameras[i], axes) for i in sorted(pictures)]
    of_a_game = any(frame.coarse_depth for frame in frames)
    notes = _notes(folder, len(cameras) - len(frames), frames)
    return Capture(folder, frames, path, units=METRES_PER_GAME_UNIT if of_a_game else 1.0, notes=notes)


def _frame(path: Path, index: int, image: Path, camera: _Camera, axes: Axes) -> CapturedFrame:
    where = f"camera {index} of {path}"
    pose = inverse_pose(np.array(camera.Rt), where)
    stem = image.name.removesuffix("_rgb.png")
    depth = next((file for end in ("png", "tiff") if (file := image.with_name(f"{stem}_depth.{end}")).is_file()), None)
    of_a_game = depth is not None and depth.suffix == ".png"
    return CapturedFrame(
        name=stem,
        image=image,
        depth=depth,
        mask=None,
        pose=opengl_pose(pose, where) if axes == "opencv" else pose,
        lens=_lens(np.array(camera.K), where),
        depth_unit=GAME_UNITS_PER_STEP * METRES_PER_GAME_UNIT if of_a_game else METRES_PER_TIFF_UNIT,
        coarse_depth=of_a_game,
    )


def _lens(matrix: Float[np.ndarray, "rows rows"], where: str) -> Lens:
    """Focal lengths of either sign, normalised or in pixels; a centre of (0, 0) is the middle of the image."""
    fx, fy = np.abs(matrix[[0, 1], [0, 1]])
    centre = matrix[:2, 2]
    lens = pinhole((fx, fy, *centre), where)
    if fx < NORMALISED:
        angles = 2 * np.arctan(1 / np.array([fx, fy]))
        return Lens(False, lens.distortion, None, None, None, (float(angles[0]), float(angles[1])))
    if not centre.any():
        return Lens(False, lens.distortion, (RELEASED_SIZE, RELEASED_SIZE), lens.focal, None, (None, None))
    return lens


def _notes(folder: Path, unused: int, frames: list[CapturedFrame]) -> tuple[str, ...]:
    notes = []
    if unused:
        notes.append(f"{unused} cameras of {folder / FILE} have no picture and were left out")
    if not any(frame.depth for frame in frames):
        notes.append(f"{folder} has no depth")
    return tuple(notes)
