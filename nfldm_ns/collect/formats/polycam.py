"""Raw data of Polycam (developer mode): `keyframes/` with a JSON file of camera, a picture and a depth for each frame.

Poses are ARKit's: camera-to-world of OpenGL, y up, in metres. Corrected pictures and cameras, which Polycam's own
bundle adjustment leaves, come first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nfldm_ns.collect.captures import Capture, CapturedFrame
from nfldm_ns.collect.formats.reading import checked_pose, pinhole, require_file
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import Checked, Finite, Pixels, Positive, validated

METRES_PER_STEP = 0.001
_FOLDERS = (("corrected_images", "corrected_cameras"), ("images", "cameras"))


class _Camera(Checked):
    fx: Positive
    fy: Positive
    cx: Finite
    cy: Finite
    width: Pixels
    height: Pixels
    t_00: float
    t_01: float
    t_02: float
    t_03: float
    t_10: float
    t_11: float
    t_12: float
    t_13: float
    t_20: float
    t_21: float
    t_22: float
    t_23: float
    blur_score: float | None = None


def read_polycam(folder: Path, min_blur_score: float = 0.0) -> Capture:
    """Reads one capture; frames without a camera, with a pose that is not finite, or blurred, are left out and counted.

    Args:
        min_blur_score: least `blur_score`, which is large for sharp pictures.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    root = folder / "keyframes" if (folder / "keyframes").is_dir() else folder
    names = next((n for n in _FOLDERS if all((root / name).is_dir() for name in n)), None)
    if names is None:
        raise UserInputError(
            f"There are neither images and cameras nor corrected_images and corrected_cameras in {root}: export raw "
            "data in Polycam's developer mode."
        )
    images, cameras = (root / name for name in names)
    pictures = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not pictures:
        raise UserInputError(f"There are no pictures in {images}: export raw data of a capture.")
    has_depth = (root / "depth").is_dir() and any((root / "depth").iterdir())
    frames = []
    for picture in pictures:
        path = cameras / f"{picture.stem}.json"
        if not path.is_file():
            continue  # bundle adjustment drops some
        camera = validated(_Camera, read_json(path), path)
        pose = np.array([[getattr(camera, f"t_{row}{column}") for column in range(4)] for row in range(3)])
        if not np.isfinite(pose).all() or (camera.blur_score is not None and camera.blur_score < min_blur_score):
            continue
        lens = pinhole((camera.fx, camera.fy, camera.cx, camera.cy), str(path), (camera.width, camera.height))
        depth = require_file(root / "depth" / f"{picture.stem}.png") if has_depth else None
        pose = checked_pose(pose, str(path))
        frames.append(CapturedFrame(picture.stem, picture, depth, None, pose, lens, METRES_PER_STEP))
    if not frames:
        raise UserInputError(f"No picture of {images} has a usable camera in {cameras}: restore them.")
    lost = len(pictures) - len(frames)
    notes = [f"{lost} of {len(pictures)} pictures of {folder} have no camera, or are too blurred"] if lost else []
    if not has_depth:
        notes.append(f"{folder} has no depth")
    return Capture(folder, frames, cameras, notes=tuple(notes))
