"""Drives of KITTI-360 (Liao et al., TPAMI 2022): the rectified cameras, and the Velodyne as sparse depth."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.lidar import points_before, rigid
from nfldm_ns.collect.formats.reading import PIXEL_CENTRE, as_numbers, checked_pose, opengl_pose, pinhole, read_lines
from nfldm_ns.errors import UserInputError

Cameras = Literal["both", "left", "right"]
_NUMBERS = {"both": (0, 1), "left": (0,), "right": (1,)}


def read_kitti360(folder: Path, cameras: Cameras = "both") -> Capture:
    """Reads one drive: `data_2d_raw/<drive>` within the folder that also has `calibration` and `data_poses`.

    Pictures without a pose, or without a scan where the drive has scans, are left out and counted.

    Args:
        cameras: of the stereo pair.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    drive = folder.resolve()
    root = drive.parent.parent
    calibration = _keyed_lines(root / "calibration" / "perspective.txt")
    from_velodyne = _velodyne_to_rectified(root / "calibration" / "calib_cam_to_velo.txt", calibration)
    path = root / "data_poses" / drive.name / "cam0_to_world.txt"
    poses = _poses(path)
    scans = root / "data_3d_raw" / drive.name / "velodyne_points" / "data"
    has_scans = scans.is_dir()
    frames, lost = [], 0
    found = {number: _pictures(folder, number) for number in _NUMBERS[cameras]}
    for index in sorted({index for pictures in found.values() for index in pictures}):
        for number, pictures in found.items():
            if index not in pictures:
                continue
            scan = scans / f"{index:010d}.bin"
            if index not in poses or (has_scans and not scan.is_file()):
                lost += 1
                continue
            lens, offset = _camera(calibration, number)
            where = f"frame {index} of {path}"
            pose = opengl_pose((poses[index] @ offset)[:3], where)
            assert lens.focal is not None and lens.size is not None
            points = partial(points_before, scan, 4, np.linalg.inv(offset) @ from_velodyne, lens.focal[0], lens.size[0])
            name = f"image_0{number}/{index:010d}"
            seen = points if has_scans else None
            frames.append(
                CapturedFrame(name, pictures[index], None, None, pose, lens, points=seen, camera=f"image_0{number}")
            )
    if not frames:
        raise UserInputError(f"No picture of {folder} has a pose in {path} and a scan in {scans}: restore them.")
    notes = [f"{lost} pictures of {folder} have no pose or no scan and were left out"] if lost else []
    if not has_scans:
        notes.append(f"There are no scans in {scans}: {folder} has no depth")
    return Capture(folder, frames, path, notes=tuple(notes))


def _pictures(folder: Path, number: int) -> dict[int, Path]:
    images = folder / f"image_0{number}" / "data_rect"
    found = {int(p.stem): p for p in sorted(images.glob("*.png")) if p.stem.isdecimal() and p.stem.isascii()}
    if not found:
        raise UserInputError(
            f"There are no pictures in {images}: give folders <KITTI-360>/data_2d_raw/<drive>, or choose --cameras."
        )
    return found


def _keyed_lines(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Words after `key:`, and what to call the line."""
    return {words[0].removesuffix(":"): (where, words[1:]) for where, words in read_lines(path)}


def _numbers(lines: dict[str, tuple[str, list[str]]], key: str, count: int) -> Float[np.ndarray, " count"]:
    if key not in lines:
        raise UserInputError(f"The calibration perspective.txt lacks {key}: restore it.")
    where, words = lines[key]
    values = as_numbers(words, count, where)
    if not np.isfinite(values).all():
        raise UserInputError(f"There are infinite numbers in {where}: restore it.")
    return values


def _camera(calibration: dict[str, tuple[str, list[str]]], number: int) -> tuple[Lens, Float[np.ndarray, "4 4"]]:
    """A rectified camera's lens, and its pose in the rectified left one (camera 0)."""
    matrix = _numbers(calibration, f"P_rect_0{number}", 12).reshape(3, 4)
    width, height = _numbers(calibration, f"S_rect_0{number}", 2)
    fx, fy, cx, cy = matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
    lens = pinhole(
        (fx, fy, cx + PIXEL_CENTRE, cy + PIXEL_CENTRE), f"P_rect_0{number} of perspective.txt", (width, height)
    )
    offset = np.eye(4)
    offset[0, 3] = -matrix[0, 3] / fx  # P = K [I | -t]
    return lens, offset


def _velodyne_to_rectified(path: Path, calibration: dict[str, tuple[str, list[str]]]) -> Float[np.ndarray, "4 4"]:
    """From the Velodyne to the rectified left camera; the file has the way from the unrectified one to the Velodyne."""
    lines = read_lines(path)
    if len(lines) != 1:
        raise UserInputError(f"{path} has {len(lines)} lines of numbers, not 1: restore it.")
    to_velodyne = checked_pose(as_numbers(lines[0][1], 12, lines[0][0]).reshape(3, 4), str(path))
    rectify = np.eye(4)
    rectify[:3, :3] = _numbers(calibration, "R_rect_00", 9).reshape(3, 3)
    checked_pose(rectify, "R_rect_00 of perspective.txt")
    return rectify @ np.linalg.inv(rigid(to_velodyne))


def _poses(path: Path) -> dict[int, Float[np.ndarray, "4 4"]]:
    """Camera-to-world of the rectified left camera by frame; z is up."""
    found = {}
    for where, words in read_lines(path):
        values = as_numbers(words, 17, where)
        if not np.isfinite(values).all():
            continue
        found[int(values[0])] = rigid(checked_pose(values[1:].reshape(4, 4), where))
    return found
