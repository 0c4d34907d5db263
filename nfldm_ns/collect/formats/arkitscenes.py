"""Videos of ARKitScenes (Baruch et al., 2021): `lowres_wide`, `lowres_depth`, their intrinsics and `lowres_wide.traj`.

A line of the trajectory is a time in seconds, a rotation as axis times angle in radians, and a translation in metres:
the world-to-camera transform of OpenCV, in a world whose z points up. A `.pincam` file holds width, height, fx, fy,
cx, cy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.reading import as_numbers, inverse_pose, opengl_pose, pinhole, read_lines, require_file
from nfldm_ns.errors import UserInputError

METRES_PER_STEP = 0.001
LARGEST_GAP = 0.005  # seconds between a picture and its pose
_PINCAM_GAP = 0.0015  # times in names of files are rounded to milliseconds, each in its own way


@dataclass(frozen=True)
class _Times:
    """Something by its time, in order."""

    times: Float[np.ndarray, " count"]

    def nearest(self, time: float, gap: float) -> int | None:
        """The index of what is nearest in time, if that is near enough."""
        if not len(self.times):
            return None
        at = int(np.searchsorted(self.times, time))
        index = min(range(max(0, at - 1), min(len(self.times), at + 1)), key=lambda i: abs(self.times[i] - time))
        return index if abs(self.times[index] - time) <= gap else None


def read_arkitscenes(folder: Path) -> Capture:
    """Reads one video, of the raw data or of the 3D object detection subset (within `<id>_frames`).

    Pictures without a pose in time are left out and counted.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    inner = folder / f"{folder.resolve().name}_frames"
    root = inner if inner.is_dir() else folder
    pictures = _timed(root / "lowres_wide", ".png")
    if not pictures:
        raise UserInputError(
            f"There are no pictures <video>_<time>.png in {root / 'lowres_wide'}: give a video's folder."
        )
    path = root / "lowres_wide.traj"
    poses = sorted(((as_numbers(words, 7, where), where) for where, words in read_lines(path)), key=lambda p: p[0][0])
    pose_times = _Times(np.array([values[0] for values, _ in poses]))
    cameras = _timed(root / "lowres_wide_intrinsics", ".pincam")
    camera_times = _Times(np.array([time for time, _ in cameras]))
    has_depth = (root / "lowres_depth").is_dir()
    frames = []
    for time, picture in pictures:
        at = pose_times.nearest(time, LARGEST_GAP)
        if at is None or not np.isfinite(poses[at][0]).all():
            continue
        camera = camera_times.nearest(time, _PINCAM_GAP)
        if camera is None:
            raise UserInputError(
                f"No .pincam file of {root / 'lowres_wide_intrinsics'} is of the time of {picture.name}: restore it."
            )
        depth = require_file(root / "lowres_depth" / picture.name) if has_depth else None
        lens = _lens(cameras[camera][1])
        frames.append(CapturedFrame(picture.stem, picture, depth, None, _pose(*poses[at]), lens, METRES_PER_STEP))
    if not frames:
        raise UserInputError(f"No picture of {root / 'lowres_wide'} has a pose within {LARGEST_GAP} s in {path}.")
    lost = len(pictures) - len(frames)
    notes = [f"{lost} of {len(pictures)} pictures of {folder} have no pose within {LARGEST_GAP} s"] if lost else []
    if not has_depth:
        notes.append(f"{folder} has no depth")
    return Capture(folder, frames, path, notes=tuple(notes))


def _timed(folder: Path, suffix: str) -> list[tuple[float, Path]]:
    """Files `<video>_<time><suffix>` by their times, in order."""
    found = []
    for path in folder.glob(f"*{suffix}"):
        word = path.name.removesuffix(suffix).rpartition("_")[2]
        if word.replace(".", "", 1).isdecimal():
            found.append((float(word), path))
    return sorted(found)


def _pose(values: Float[np.ndarray, " 7"], where: str) -> Float[np.ndarray, "3 4"]:
    rotation = Rotation.from_rotvec(values[1:4]).as_matrix()
    return opengl_pose(inverse_pose(np.concatenate([rotation, values[4:, None]], axis=1), where), where)


def _lens(path: Path) -> Lens:
    lines = read_lines(path)
    if len(lines) != 1:
        raise UserInputError(f"{path} has {len(lines)} lines of numbers, not 1: restore it.")
    width, height, *values = as_numbers(lines[0][1], 6, lines[0][0]).tolist()
    if not (1 <= width <= 1e6 and 1 <= height <= 1e6):
        raise UserInputError(f"The size of {path} is {width:g} x {height:g}, which no image has: restore it.")
    return pinhole(values, str(path), (width, height))
