"""What a capture's `transforms.json` may say: read once, checked, and told in a sentence where it is wrong."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import AfterValidator, Field

from nfldm_ns.collect.captures import Capture, CapturedFrame, Lens
from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import check_rotation, read_json
from nfldm_ns.scenes.schema import Checked, FileName, Finite, Pixels, Positive, validated

FILE = "transforms.json"
Angle = Annotated[float, Field(gt=0, lt=math.pi)]
Perspective = Literal["OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE"]
Fisheye = Literal["OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE"]
RADIAL = ("k1", "k2", "k3", "k4", "p1", "p2")  # in nerfstudio's order of `distortion_params`
LENSES = ("omega", "rolling_shutter", "equirectangular", "latlong", "orthographic", "ftheta_p1")
"""Keys of lenses and shutters that cannot be undone here; 0 and false say that there is no such thing."""
IGNORED = frozenset(
    (
        *("orientation_override", "ply_file_path", "colmap_im_id"),  # of nerfstudio
        *("aabb_scale", "scale", "offset", "aabb", "render_aabb", "up", "n_frames", "sharpness"),  # of instant-ngp
        *("sharpness_discard_threshold", "enable_depth_loading", "enable_ray_loading", "fix_premult", "sharpen"),
        *("white_transparent", "black_transparent", "importance_sampling", "n_extra_learnable_dims"),
        *("rotation", "timestamp", "time", "place"),  # of Blender's scenes, of videos, of our own collections
    )
)
"""Keys that say nothing about where pixels look or how far: not read, on purpose."""
EXTENSIONS = ("", ".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")


def _is_matrix(rows: list[list[float]]) -> list[list[float]]:
    if np.shape(rows) not in ((3, 4), (4, 4)):
        raise ValueError("give 3 or 4 rows of 4 numbers")
    return rows


Matrix = Annotated[list[Annotated[list[Finite], Field(min_length=4, max_length=4)]], AfterValidator(_is_matrix)]


class _Lens(Checked):
    """What stands at the top of the file for all frames, or in a frame for it alone; `null` is as good as absent."""

    fl_x: Positive | None = None
    fl_y: Positive | None = None
    cx: Finite | None = None
    cy: Finite | None = None
    w: Pixels | None = None
    h: Pixels | None = None
    camera_angle_x: Angle | None = None
    camera_angle_y: Angle | None = None
    camera_model: str | None = None
    k1: Finite | None = None
    k2: Finite | None = None
    k3: Finite | None = None
    k4: Finite | None = None
    k5: Finite | None = None
    k6: Finite | None = None
    p1: Finite | None = None
    p2: Finite | None = None
    distortion_params: Annotated[list[Finite], Field(max_length=6)] | None = None
    is_fisheye: bool | None = None
    fisheye_crop_radius: Positive | None = None
    depth_unit_scale_factor: Positive | None = None
    omega: Finite | None = None
    rolling_shutter: list[Finite] | None = None
    equirectangular: bool | None = None
    latlong: bool | None = None
    orthographic: bool | None = None
    ftheta_p1: Finite | None = None


class _Frame(_Lens):
    file_path: FileName
    transform_matrix: Matrix
    depth_file_path: str | None = None
    mask_path: str | None = None


class _Capture(_Lens):
    frames: Annotated[list[_Frame], Field(min_length=1)]
    train_filenames: list[str] | None = None
    val_filenames: list[str] | None = None
    test_filenames: list[str] | None = None
    applied_transform: Matrix | None = None
    applied_scale: Positive | None = None


def read_capture(folder: Path) -> Capture:
    """Reads a capture's description; which keys count for what is in docs/data.md.

    Raises:
        UserInputError: for what is missing, of a wrong kind, contradictory, or cannot be used.
    """
    path = folder / FILE
    return capture_of(folder, path, read_json(path))


def capture_of(folder: Path, path: Path, content: Any) -> Capture:
    """As `read_capture`, of what `path` holds; its files' names are relative to the folder."""
    capture = validated(_Capture, content, path)
    _check_lenses(path, capture)
    frames = [_frame(folder, path, capture, frame) for frame in capture.frames]
    files = [(frame.image.parent.resolve() / frame.image.name, frame.name) for frame in frames]
    counts = Counter(file for file, _ in files)
    shared = [name for file, name in files if counts[file] > 1]
    if shared:
        raise UserInputError(f"Two frames of {path} have the file_path {shared[0]}: keep the one with its pose.")
    splits = _splits(path, capture, files, folder)
    return Capture(folder, frames, path, splits, 1 / (capture.applied_scale or 1.0), _unread(content))


def _unread(content: dict[str, Any]) -> tuple[str, ...]:
    """Keys that are neither read nor ignored on purpose, the file's and then the frames', each once."""
    places: list[tuple[dict[str, Any], type[Checked]]] = [(content, _Capture)]
    places += [(frame, _Frame) for frame in content["frames"]]
    return tuple(
        dict.fromkeys(
            key
            for place, schema in places
            for key, value in place.items()
            if value is not None and key not in schema.model_fields and key not in IGNORED
        )
    )


def _check_lenses(path: Path, capture: _Capture) -> None:
    for holder in (capture, *capture.frames):
        lens = next((key for key in LENSES if np.any(getattr(holder, key) or 0)), None)
        if lens is not None:
            raise UserInputError(
                f"{path} has {lens}, of a lens or shutter that cannot be undone: undistort its images and remove it."
            )


def _frame(folder: Path, path: Path, capture: _Capture, frame: _Frame) -> CapturedFrame:
    where = f"the frame {frame.file_path} of {path}"
    pose = np.asarray(frame.transform_matrix)[:3]
    check_rotation(pose[:, :3], where)
    image = _file(folder, frame.file_path)
    depth, mask = (_file(folder, name) if name else None for name in (frame.depth_file_path, frame.mask_path))
    unit = frame.depth_unit_scale_factor or capture.depth_unit_scale_factor
    return CapturedFrame(frame.file_path, image, depth, mask, pose, _lens(where, capture, frame), unit)


def _file(folder: Path, name: str) -> Path:
    """The file of a name, which may use backslashes and lack its extension."""
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        for extension in EXTENSIONS:
            file = folder / f"{written}{extension}"
            if file.is_file():
                return file
    return folder / name


def _lens(where: str, capture: _Capture, frame: _Frame) -> Lens:
    def value(key: str) -> Any:
        own = getattr(frame, key)
        return getattr(capture, key) if own is None else own

    model = value("camera_model") or "OPENCV"
    if model not in (*get_args(Perspective), *get_args(Fisheye)):
        raise UserInputError(
            f"The camera_model of {where} is {model}: only OpenCV's perspective and fisheye models can be used."
        )
    focal = value("fl_x"), value("fl_y")
    angles = value("camera_angle_x"), value("camera_angle_y")
    if focal[0] is None and focal[1] is None and angles == (None, None):
        raise UserInputError(f"The intrinsics of {where} are missing: give fl_x and fl_y, or camera_angle_x.")
    size, centre = (value("w"), value("h")), (value("cx"), value("cy"))
    for names, pair in ((("w", "h"), size), (("cx", "cy"), centre)):
        if (pair[0] is None) != (pair[1] is None):
            raise UserInputError(f"Of {where} {names[0]} or {names[1]} is missing: give both or none.")
    lens = Lens(
        fisheye=model in get_args(Fisheye) or bool(value("is_fisheye")),
        distortion=_distortion(capture, frame),
        size=None if size[0] is None else size,
        focal=None if focal == (None, None) else (focal[0] or focal[1], focal[1] or focal[0]),
        centre=None if centre[0] is None else centre,
        angles=angles,
        radius=capture.fisheye_crop_radius,
    )
    unknown = value("k5"), value("k6"), *(() if lens.fisheye else lens.distortion[3:4])
    if any(unknown):
        raise UserInputError(
            f"The lens of {where} has k4, k5 or k6, which cannot be undone here: undistort its images."
        )
    return lens


def _distortion(capture: _Capture, frame: _Frame) -> tuple[float, ...]:
    """k1, k2, k3, k4, p1, p2: of the frame, else of the file; a list counts before single keys, as in nerfstudio."""
    for holder in (frame, capture):
        if holder.distortion_params is not None:
            return (*holder.distortion_params, *[0.0] * (6 - len(holder.distortion_params)))
        single = [getattr(holder, key) for key in RADIAL]
        if any(value is not None for value in single):
            return tuple(value or 0.0 for value in single)
    return (0.0,) * 6


def _splits(path: Path, capture: _Capture, files: list[tuple[Path, str]], folder: Path) -> dict[str, list[int]]:
    index = {file: i for i, (file, _) in enumerate(files)}
    splits: dict[str, list[int]] = {}
    for split in ("train", "val", "test"):
        names = getattr(capture, f"{split}_filenames") or []
        found = [_file(folder, name) for name in names]
        keys = [file.parent.resolve() / file.name for file in found]
        for name, key in zip(names, keys, strict=True):
            if key not in index:
                raise UserInputError(
                    f"{path} lists {name} in {split}_filenames, but has no frame of that name: add it or drop it."
                )
        splits[split] = [index[key] for key in keys]
    return splits
