"""Scenes of ScanNet++ (Yeshwanth et al., ICCV 2023): the iPhone's frames with depth, or the DSLR's fisheye pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from nfldm_ns.collect.captures import Capture, CapturedFrame
from nfldm_ns.collect.formats.nerfstudio import capture_of
from nfldm_ns.collect.formats.reading import PIXEL_CENTRE, opengl_pose, pinhole, require_file
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import Checked, Finite, validated

METRES_PER_STEP = 0.001
POSES = "pose_intrinsic_imu.json"
Camera = Literal["iphone", "dslr"]
# From the world of the DSLR's transforms.json to that of the meshes and the iPhone, whose z points up.
_TO_Z_UP = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])


def _has_shape(*shape: int) -> Any:
    def check(rows: list[list[float]]) -> list[list[float]]:
        if np.shape(rows) != shape:
            raise ValueError(f"give {shape[0]} x {shape[1]} numbers")
        return rows

    return AfterValidator(check)


class _Frame(Checked):
    aligned_pose: Annotated[list[list[float]], _has_shape(4, 4)]
    intrinsic: Annotated[list[list[Finite]], _has_shape(3, 3)]


class _Frames(Checked):
    frames: Annotated[dict[str, _Frame], Field(min_length=1)]


def read_scannetpp(folder: Path, camera: Camera = "iphone") -> Capture:
    """Reads one scene.

    Args:
        camera: `iphone`, of `iphone/rgb`, `iphone/depth` and `iphone/pose_intrinsic_imu.json`, as ScanNet++'s toolkit
            unpacks them, with `iphone/rgb_masks` if they are there; or `dslr`, of `dslr/resized_images` and
            `dslr/nerfstudio/transforms.json`, without depth.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    return _read_iphone(folder) if camera == "iphone" else _read_dslr(folder)


def _read_iphone(folder: Path) -> Capture:
    root = folder / "iphone"
    path = root / POSES
    entries = validated(_Frames, {"frames": read_json(path)}, path).frames
    pictures = sorted((root / "rgb").glob("*.jpg"))
    if not pictures:
        raise UserInputError(
            f"There are no pictures in {root / 'rgb'}: unpack rgb.mkv and depth.bin with ScanNet++'s toolkit."
        )
    has_masks = (root / "rgb_masks").is_dir()
    frames = []
    for picture in pictures:
        entry = entries.get(picture.stem)
        if entry is None or not np.isfinite(entry.aligned_pose).all():
            continue
        where = f"{picture.stem} of {path}"
        pose = opengl_pose(np.array(entry.aligned_pose), where)
        fx, fy, cx, cy = np.array(entry.intrinsic)[[0, 1, 0, 1], [0, 1, 2, 2]]
        depth = require_file(root / "depth" / f"{picture.stem}.png")
        mask = require_file(root / "rgb_masks" / f"{picture.stem}.png") if has_masks else None
        lens = pinhole((fx, fy, cx + PIXEL_CENTRE, cy + PIXEL_CENTRE), where)
        frames.append(CapturedFrame(picture.stem, picture, depth, mask, pose, lens, METRES_PER_STEP))
    if not frames:
        raise UserInputError(f"No picture of {root / 'rgb'} has a finite aligned_pose in {path}: restore it.")
    lost = len(pictures) - len(frames)
    notes = (f"{lost} of {len(pictures)} pictures of {folder} have no finite pose",) if lost else ()
    return Capture(folder, frames, path, notes=notes)


def _read_dslr(folder: Path) -> Capture:
    path = folder / "dslr" / "nerfstudio" / "transforms.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserInputError(f"{path} holds no object: restore it.")
    listed = {key: content.get(key) or [] for key in ("frames", "test_frames")}
    if not all(isinstance(v, list) and all(isinstance(f, dict) for f in v) for v in listed.values()):
        raise UserInputError(f"The frames or test_frames of {path} are no list of objects: restore it.")
    kept = {key: [frame for frame in value if not frame.get("is_bad")] for key, value in listed.items()}
    known = {key: value for key, value in content.items() if key not in ("frames", "test_frames", "has_mask")}
    frames = [_frame(frame, bool(content.get("has_mask", True))) for value in kept.values() for frame in value]
    capture = capture_of(folder, path, {**known, "frames": frames})
    turned = [CapturedFrame(f.name, f.image, None, f.mask, (_TO_Z_UP[:3, :3] @ f.pose), f.lens) for f in capture.frames]
    bad = sum(map(len, listed.values())) - len(frames)
    notes = [f"{bad} pictures of {folder} are marked as bad and were left out"] if bad else []
    count = len(kept["frames"])
    splits = {"train": list(range(count)) if kept["test_frames"] else [], "val": [], "test": []}
    splits["test"] = list(range(count, len(frames)))
    notes.append(f"{folder} has no depth, as its DSLR measures none")
    return Capture(folder, turned, path, splits, unread=capture.unread, notes=tuple(notes))


def _frame(frame: dict[str, Any], has_masks: bool) -> dict[str, Any]:
    """With its files relative to the scene's folder."""
    found = {key: value for key, value in frame.items() if key != "is_bad"}
    if isinstance(found.get("file_path"), str):
        found["file_path"] = f"dslr/resized_images/{found['file_path']}"
    if not has_masks:
        found.pop("mask_path", None)
    elif isinstance(found.get("mask_path"), str):
        found["mask_path"] = f"dslr/resized_anon_masks/{found['mask_path']}"
    return found
