"""Sequences of the RGB-D benchmark of TUM (Sturm et al., IROS 2012), as its page on file formats has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.reading import (
    NO_DISTORTION,
    PIXEL_CENTRE,
    as_numbers,
    opengl_pose,
    pinhole,
    read_lines,
    require_file,
    rotation_of,
)
from nfldm_ns.errors import UserInputError

METRES_PER_STEP = 1 / 5000
LARGEST_GAP = 0.02  # seconds between a picture and its depth or pose
SIZE = (640, 480)
Camera = Literal["auto", "freiburg1", "freiburg2", "freiburg3"]
PUBLISHED = {
    "freiburg1": (
        (517.306408, 516.469215, 318.643040, 255.313989),
        (0.262383, -0.953104, 1.163314, 0.0, -0.005358, 0.002628),
    ),
    "freiburg2": (
        (520.908620, 521.007327, 325.141442, 249.701764),
        (0.231222, -0.784899, 0.917205, 0.0, -0.003257, -0.000105),
    ),
    "freiburg3": ((535.4, 539.2, 320.1, 247.6), NO_DISTORTION),  # undistorted before it was published
}
"""The colour cameras' fx, fy, cx, cy from the middle of the first pixel, and k1, k2, k3, k4, p1, p2."""


@dataclass(frozen=True)
class _Stamped:
    """Lines of a file by their times, in order."""

    path: Path
    times: Float[np.ndarray, " lines"]
    lines: list[tuple[str, list[str]]]

    def nearest(self, time: float) -> tuple[str, list[str]] | None:
        """The line of the nearest time, if that is near enough."""
        at = int(np.searchsorted(self.times, time))
        index = min(range(max(0, at - 1), min(len(self.times), at + 1)), key=lambda i: abs(self.times[i] - time))
        return self.lines[index] if abs(self.times[index] - time) <= LARGEST_GAP else None


def read_tum(folder: Path, camera: Camera = "auto", intrinsics: tuple[float, ...] | None = None) -> Capture:
    """Reads `rgb.txt`, `depth.txt` and `groundtruth.txt`; pictures without depth or pose in time are left out.

    Args:
        camera: whose published intrinsics count; "auto" looks for its name in the folder's.
        intrinsics: fx, fy, cx, cy from the middle of the first pixel, without distortion, in place of the published.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    lens = _lens(folder, camera, intrinsics)
    pictures, depths, poses = (_stamped(folder / name) for name in ("rgb.txt", "depth.txt", "groundtruth.txt"))
    frames = []
    for time, (where, words) in zip(pictures.times, pictures.lines, strict=True):
        depth, pose = depths.nearest(time), poses.nearest(time)
        if depth is not None and pose is not None:
            image = require_file(folder / _file_name(words, where))
            depth_file = require_file(folder / _file_name(depth[1], depth[0]))
            frames.append(
                CapturedFrame(words[1], image, depth_file, None, _pose(*pose), lens, depth_unit=METRES_PER_STEP)
            )
    lost = len(pictures.times) - len(frames)
    note = f"{lost} of {len(pictures.times)} pictures of {folder} have no depth or pose within {LARGEST_GAP} s"
    return Capture(folder, frames, pictures.path, notes=(note,) if lost else ())


def _lens(folder: Path, camera: Camera, intrinsics: tuple[float, ...] | None) -> Lens:
    if intrinsics is not None:
        values, distortion, size = intrinsics, NO_DISTORTION, None
    else:
        name = camera if camera != "auto" else next((n for n in PUBLISHED if n in folder.resolve().name), None)
        if name is None:
            raise UserInputError(
                f"Nothing in the name of {folder} says which camera took it: give --camera freiburg1, freiburg2 or "
                "freiburg3, or --intrinsics."
            )
        values, distortion = PUBLISHED[name]
        size = SIZE
    fx, fy, cx, cy = values
    return pinhole((fx, fy, cx + PIXEL_CENTRE, cy + PIXEL_CENTRE), f"{folder} (--intrinsics)", size, distortion)


def _stamped(path: Path) -> _Stamped:
    lines = read_lines(path)
    if not lines:
        raise UserInputError(f"{path} has no lines but comments: restore it.")
    times = np.array([as_numbers(words[:1], 1, where)[0] for where, words in lines])
    if not np.isfinite(times).all():
        where = lines[int(np.argmin(np.isfinite(times)))][0]
        raise UserInputError(f"The time in {where} is not finite: restore it.")
    order = np.argsort(times, kind="stable")
    return _Stamped(path, times[order], [lines[i] for i in order])


def _file_name(words: list[str], where: str) -> str:
    if len(words) != 2 or "\0" in words[1]:
        raise UserInputError(f"There is not a time and the name of a file in {where}: restore it.")
    return words[1]


def _pose(where: str, words: list[str]) -> Float[np.ndarray, "3 4"]:
    _, x, y, z, qx, qy, qz, qw = as_numbers(words, 8, where)
    rotation = rotation_of(np.array([qw, qx, qy, qz]), where)
    return opengl_pose(np.concatenate([rotation, [[x], [y], [z]]], axis=1), where)
