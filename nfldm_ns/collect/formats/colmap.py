"""Reconstructions of COLMAP, `sparse/0` beside `images`, read by nerfstudio's own functions."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float
from nerfstudio.data.utils import colmap_parsing_utils as colmap

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.reading import inverse_pose, opengl_pose, pinhole, rotation_of
from nfldm_ns.errors import UserInputError

# Where each model keeps fx, fy, cx, cy and k1, k2, k3, k4, p1, p2; None is 0.
MODELS: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {
    "SIMPLE_PINHOLE": ((0, 0, 1, 2), (None,) * 6),
    "PINHOLE": ((0, 1, 2, 3), (None,) * 6),
    "SIMPLE_RADIAL": ((0, 0, 1, 2), (3, *(None,) * 5)),
    "RADIAL": ((0, 0, 1, 2), (3, 4, *(None,) * 4)),
    "OPENCV": ((0, 1, 2, 3), (4, 5, None, None, 6, 7)),
    "OPENCV_FISHEYE": ((0, 1, 2, 3), (4, 5, 6, 7, None, None)),
}


def read_colmap(folder: Path, model: str = "sparse/0", images: str = "images") -> Capture:
    """Reads cameras, poses, and as sparse depth the points that each image observes; frames are in order of name.

    Args:
        model, images: folders of the reconstruction and of its images, relative to the capture.

    Raises:
        UserInputError: for what is missing, damaged, or cannot be used.
    """
    path, cameras = _read(folder / model, "cameras")
    lenses = {key: _lens(camera, f"camera {key} of {path}") for key, camera in cameras.items()}
    path, registered = _read(folder / model, "images")
    points_path, points = _read(folder / model, "points3D")
    positions = {key: point.xyz for key, point in points.items()}
    frames = []
    for image in sorted(registered.values(), key=lambda image: image.name):
        where = f"the image {image.name} of {path}"
        if image.camera_id not in lenses:
            raise UserInputError(f"There is no camera {image.camera_id}, which {where} has: restore both files.")
        frames.append(_frame(folder / images, image, lenses[image.camera_id], positions, where))
    if not frames:
        raise UserInputError(f"{path} has no images: give a reconstruction.")
    notes = () if points else (f"{points_path} has no points: there is no depth",)
    return Capture(folder, frames, path, notes=notes)


def _frame(
    folder: Path, image: Any, lens: Lens, positions: dict[int, Float[np.ndarray, " 3"]], where: str
) -> CapturedFrame:
    if not image.name or "\0" in image.name:
        raise UserInputError(f"The name of {where} is none that a file can have: restore it.")
    world_to_camera = np.concatenate([rotation_of(image.qvec, where), np.reshape(image.tvec, (-1, 1))], axis=1)
    pose = opengl_pose(inverse_pose(world_to_camera, where), where)
    seen = [positions[key] for key in image.point3D_ids.tolist() if key in positions]
    points = np.array(seen, dtype=np.float64).reshape(-1, 3) @ world_to_camera[:, :3].T + world_to_camera[:, 3]
    finite = points[np.isfinite(points).all(axis=1)]
    return CapturedFrame(image.name, folder / image.name, None, None, pose, lens, points=finite if positions else None)


def _lens(camera: Any, where: str) -> Lens:
    if camera.model not in MODELS:
        raise UserInputError(
            f"The model of {where} is {camera.model}, which cannot be undone here: use one of {', '.join(MODELS)}."
        )
    pinhole_at, distortion_at = MODELS[camera.model]
    needed = max(*pinhole_at, *(at for at in distortion_at if at is not None)) + 1
    if len(camera.params) != needed:
        raise UserInputError(f"There are {len(camera.params)} parameters of {where}, not {needed}: restore it.")
    if not (1 <= camera.width <= 1e6 and 1 <= camera.height <= 1e6):
        raise UserInputError(
            f"The size of {where} is {camera.width} x {camera.height}, which no image has: restore it."
        )
    return pinhole(
        camera.params[list(pinhole_at)],
        where,
        (camera.width, camera.height),
        tuple(0.0 if at is None else float(camera.params[at]) for at in distortion_at),
        fisheye=camera.model == "OPENCV_FISHEYE",
    )


def _read(model: Path, name: str) -> tuple[Path, dict[int, Any]]:
    """What nerfstudio reads from the binary file, or from the text if there is none."""
    binary, text = model / f"{name}.bin", model / f"{name}.txt"
    path = binary if binary.exists() else text
    if not path.is_file():
        raise UserInputError(f"Neither {binary} nor {text.name} is there: give a capture with a reconstruction.")
    try:
        if path is binary:
            _check_counts(path, name)
        read: Callable[[Path], dict[int, Any]] = getattr(
            colmap, f"read_{name}_{'binary' if path is binary else 'text'}"
        )
        return path, read(path)
    except Exception as error:  # the functions trust their files
        raise UserInputError(f"{path} is damaged ({type(error).__name__}: {error}): restore it.") from None


def _check_counts(path: Path, name: str) -> None:
    """Raises ValueError where a count says more than the file holds: such memory must not be asked for."""
    with path.open("rb") as file:
        count = _count(file, path, 1)
        if name == "cameras":
            return
        for _ in range(count):
            file.seek(64 if name == "images" else 43, os.SEEK_CUR)
            if name == "images":
                while file.read(1) not in (b"\0", b""):
                    pass
            each = 24 if name == "images" else 8
            file.seek(_count(file, path, each) * each, os.SEEK_CUR)


def _count(file: BinaryIO, path: Path, each: int) -> int:
    (count,) = struct.unpack("<Q", file.read(8))
    if count * each > path.stat().st_size:
        raise ValueError(f"it cannot hold {count} entries")
    return count
