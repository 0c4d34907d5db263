"""Replica's rooms as NICE-SLAM and its successors rendered them: `results/`, `traj.txt` and `cam_params.json`."""

from __future__ import annotations

from pathlib import Path

from nfldm_ns.collect.captures import Capture, CapturedFrame
from nfldm_ns.collect.formats.reading import (
    PIXEL_CENTRE,
    as_numbers,
    numbered_files,
    opengl_pose,
    pinhole,
    read_lines,
    require_file,
)
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import Checked, Finite, Pixels, Positive, validated

CAMERA_FILE = "cam_params.json"
TRAJECTORY = "traj.txt"


class _Camera(Checked):
    w: Pixels
    h: Pixels
    fx: Positive
    fy: Positive
    cx: Finite
    cy: Finite
    scale: Positive


class _CameraFile(Checked):
    camera: _Camera


def read_replica(folder: Path) -> Capture:
    """Reads one room: line i of `traj.txt` is the pose of `results/frame00000i.jpg` and `results/depth00000i.png`.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    path = next((p for p in (folder / CAMERA_FILE, folder.resolve().parent / CAMERA_FILE) if p.is_file()), None)
    if path is None:
        raise UserInputError(f"{CAMERA_FILE} is neither in {folder} nor beside it: put it there.")
    camera = validated(_CameraFile, read_json(path), path).camera
    centre = (camera.cx + PIXEL_CENTRE, camera.cy + PIXEL_CENTRE)
    lens = pinhole((camera.fx, camera.fy, *centre), str(path), (camera.w, camera.h))
    lines = read_lines(folder / TRAJECTORY)
    frames = []
    for number, image in numbered_files(folder / "results", "frame*.jpg").items():
        if number >= len(lines):
            raise UserInputError(
                f"{folder / TRAJECTORY} has {len(lines)} poses, too few for {image.name}: restore it, or remove frames."
            )
        where, words = lines[number]
        pose = opengl_pose(as_numbers(words, 16, where).reshape(4, 4), where)
        depth = require_file(image.with_name(f"{image.stem.replace('frame', 'depth')}.png"))
        frames.append(CapturedFrame(image.stem, image, depth, None, pose, lens, depth_unit=1 / camera.scale))
    return Capture(folder, frames, folder / TRAJECTORY)
