"""Scans of ScanNet as its own reader of `.sens` files exports them: `color/`, `depth/`, `pose/` and `intrinsic/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.reading import (
    PIXEL_CENTRE,
    numbered_files,
    opengl_pose,
    pinhole,
    read_matrix,
    require_file,
)

METRES_PER_STEP = 0.001


def read_scannet(folder: Path) -> Capture:
    """Reads one scan; frames whose pose is infinite, for tracking was lost, are left out and counted.

    Depth is taken where `intrinsic_depth.txt` says that the depth camera saw a pixel's ray; without that file it is
    taken for a smaller or larger picture of the same view.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    lens = _lens(folder / "intrinsic" / "intrinsic_color.txt")
    depth_file = folder / "intrinsic" / "intrinsic_depth.txt"
    depth_lens = _lens(depth_file) if depth_file.exists() else None
    pictures = numbered_files(folder / "color", "*.jpg")
    frames = []
    for number, image in pictures.items():
        pose_file = folder / "pose" / f"{number}.txt"
        pose = read_matrix(pose_file)
        if np.isfinite(pose).all():
            depth = require_file(folder / "depth" / f"{number}.png")
            pose = opengl_pose(pose, str(pose_file))
            frames.append(
                CapturedFrame(str(number), image, depth, None, pose, lens, METRES_PER_STEP, depth_lens=depth_lens)
            )
    lost = len(pictures) - len(frames)
    note = f"{lost} of {len(pictures)} pictures of {folder} have no pose, as tracking was lost"
    return Capture(folder, frames, folder / "pose", notes=(note,) if lost else ())


def _lens(path: Path) -> Lens:
    matrix = read_matrix(path)
    fx, fy, cx, cy = matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
    return pinhole((fx, fy, cx + PIXEL_CENTRE, cy + PIXEL_CENTRE), str(path))
