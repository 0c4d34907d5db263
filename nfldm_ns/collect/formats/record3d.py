"""Recordings of Record3D: an unpacked `.r3d` file, or its export "EXR + RGB", as `ns-process-data record3d` takes it.

Poses are ARKit's: camera-to-world of OpenGL, y up, in metres. Quaternions are x, y, z, w. K has its columns one after
the other, and is of the pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.collect.formats.reading import checked_pose, pinhole, rotation_of
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import read_json
from nfldm_ns.scenes.schema import Checked, Finite, Pixels, validated

EXPORT = "EXR_RGBD"
_PICTURES = (".jpg", ".jpeg", ".png")
_DEPTHS = (".exr", ".png", ".npy", ".tiff")

_Seven = Annotated[list[float], Field(min_length=7, max_length=7)]
_Four = Annotated[list[Finite], Field(min_length=4, max_length=4)]


class _Metadata(Checked):
    poses: Annotated[list[_Seven], Field(min_length=1)]
    K: Annotated[list[Finite], Field(min_length=9, max_length=9)]
    w: Pixels
    h: Pixels
    dw: Pixels | None = None
    dh: Pixels | None = None
    perFrameIntrinsicCoeffs: list[_Four] | None = None


def read_record3d(folder: Path) -> Capture:
    """Reads one recording; frames without a finite pose are left out and counted.

    Files are `rgbd/0.jpg`, `rgbd/0.depth` and `metadata` of an unpacked recording, or `rgb/0.jpg`, `depth/0.exr` and
    `metadata.json` of an export, whose folder is often within one named EXR_RGBD. Depths are in metres.

    Raises:
        UserInputError: for what is missing, of a wrong kind, or cannot be used.
    """
    root = folder / EXPORT if (folder / EXPORT).is_dir() else folder
    path = next((p for p in (root / "metadata", root / "metadata.json") if p.is_file()), None)
    if path is None:
        raise UserInputError(
            f"Neither metadata nor metadata.json is in {root}: give an unpacked .r3d file (a zip) or an "
            "export EXR + RGB."
        )
    metadata = validated(_Metadata, read_json(path), path)
    pictures = _numbered(root / "rgbd", _PICTURES) or _numbered(root / "rgb", _PICTURES)
    if not pictures:
        raise UserInputError(f"There are no pictures 0.jpg, 1.jpg, ... in {root / 'rgbd'} or {root / 'rgb'}.")
    depths = _numbered(root / "rgbd", (".depth",)) or _numbered(root / "depth", _DEPTHS)
    per_frame = metadata.perFrameIntrinsicCoeffs
    for name, values in (("poses", metadata.poses), ("perFrameIntrinsicCoeffs", per_frame)):
        if values is not None and max(pictures) >= len(values):
            raise UserInputError(
                f"{path} has {len(values)} {name}, too few for {pictures[max(pictures)].name}: restore it."
            )
    frames = [
        _frame(path, metadata, number, picture, depths.get(number))
        for number, picture in pictures.items()
        if np.isfinite(metadata.poses[number]).all()
    ]
    lost = len(pictures) - len(frames)
    if not frames:
        raise UserInputError(f"No pose of {path} is finite: restore it.")
    notes = [f"{lost} of {len(pictures)} pictures of {folder} have no finite pose"] if lost else []
    if not depths:
        notes.append(f"{folder} has no depth")
    return Capture(folder, frames, path, notes=tuple(notes))


def _frame(path: Path, metadata: _Metadata, number: int, picture: Path, depth: Path | None) -> CapturedFrame:
    where = f"frame {number} of {path}"
    *quaternion, x, y, z = metadata.poses[number]
    rotation = rotation_of(np.array(quaternion)[[3, 0, 1, 2]], where)
    pose = checked_pose(np.concatenate([rotation, [[x], [y], [z]]], axis=1), where)
    size = None if metadata.dw is None or metadata.dh is None else (int(metadata.dw), int(metadata.dh))
    unit = 1.0 if depth is None or depth.suffix != ".png" else 0.001
    return CapturedFrame(
        picture.stem, picture, depth, None, pose, _lens(metadata, number, where), unit, depth_size=size
    )


def _lens(metadata: _Metadata, number: int, where: str) -> Lens:
    if metadata.perFrameIntrinsicCoeffs is not None:
        values = metadata.perFrameIntrinsicCoeffs[number]
    else:
        matrix = np.array(metadata.K).reshape(3, 3).T
        values = matrix[[0, 1, 0, 1], [0, 1, 2, 2]].tolist()
    return pinhole(values, where, (metadata.w, metadata.h))


def _numbered(folder: Path, suffixes: tuple[str, ...]) -> dict[int, Path]:
    """Files whose whole name is a number, in its order; of one number the first by its suffix."""
    found: dict[int, Path] = {}
    for suffix in suffixes:
        for path in sorted(folder.glob(f"*{suffix}")):
            if path.stem.isdecimal() and path.stem.isascii():
                found.setdefault(int(path.stem), path)
    return dict(sorted(found.items()))
