"""Turns posed captures in nerfstudio's format into a scene collection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.collection import SPLITS, Transforms, read_json, read_transforms
from nfldm_ns.scenes.views import Views, make_cameras
from nfldm_ns.scenes.writing import atomic_path, write_collection, write_scene

_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_UP = {
    "z": np.eye(3),
    "y": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "-y": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
}


@dataclass(frozen=True)
class ImportOptions:
    """How captures become scenes.

    Attributes:
        image_size: width and height of the result; images are cropped to its aspect and averaged down.
        num_source_views, num_target_views: per scene, evenly spaced over the capture's frames.
        metres_per_unit: scale of the poses.
        depth_unit_scale: metres per unit of the depth files (0.001 for millimetres).
        up: the capture's axis that points up.
        fractions: share of the captures by held-out split, chosen by the seed.
        test_scenes: captures held out for testing, by folder name; takes the place of the fraction.
    """

    image_size: tuple[int, int] = (64, 64)
    num_source_views: int = 8
    num_target_views: int = 4
    metres_per_unit: float = 1.0
    depth_unit_scale: float = 0.001
    up: Literal["z", "y", "-y"] = "z"
    aabb: tuple[tuple[float, ...], tuple[float, ...]] = ((-10.0, -10.0, -2.5), (10.0, 10.0, 4.0))
    near: float = 0.1
    far: float = 30.0
    test_fraction: float = 0.1
    val_fraction: float = 0.0
    test_scenes: tuple[str, ...] = ()
    seed: int = 0
    name: str = "imported captures"
    licence: str = "unknown"


def import_captures(
    root: Path, captures: Sequence[Path], options: ImportOptions, on_scene: Callable[[str], None] = lambda scene: None
) -> dict[str, list[str]]:
    """Writes a collection of one scene per capture, whole or not at all.

    Args:
        root: the new collection; must not exist or be empty.
        captures: folders with a `transforms.json`; poses are OpenGL camera-to-world, depth is planar.

    Returns:
        Scene ids by split.

    Raises:
        UserInputError: if a capture cannot be used.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserInputError(f"{root} is not empty: choose a new folder for the collection.")
    ids = _scene_ids(captures)
    splits = _split(ids, options)
    places = {}
    with atomic_path(root) as temporary:
        for scene_id, capture in zip(ids, captures, strict=True):
            source, target, place = load_capture(capture, options)
            places[scene_id] = {"map": scene_id, **place}
            write_scene(temporary / "scenes" / scene_id, source, target, extra={"place": places[scene_id]})
            on_scene(scene_id)
        write_collection(
            temporary,
            name=options.name,
            licence=options.licence,
            aabb=options.aabb,
            near=options.near,
            far=options.far,
            image_size=options.image_size,
            splits=splits,
            places=places,
            bev_classes=(),
            made_by={"command": "nfldm-collect import", "scenes": [path.name for path in captures], **asdict(options)},
        )
    return splits


def _scene_ids(captures: Sequence[Path]) -> list[str]:
    ids = [path.resolve().name for path in captures]
    if len(set(ids)) < len(ids):
        ids = [f"{path.resolve().parent.name}-{path.resolve().name}" for path in captures]
    if not ids or len(set(ids)) < len(ids):
        raise UserInputError("Give captures with different folder names, at least one: they become the scenes' names.")
    return ids


def _split(ids: Sequence[str], options: ImportOptions) -> dict[str, list[str]]:
    unknown = [name for name in options.test_scenes if name not in ids]
    if unknown:
        raise UserInputError(f"The test scene {unknown[0]} is not among the captures: give the name of its folder.")
    rest = [
        ids[i] for i in np.random.default_rng(options.seed).permutation(len(ids)) if ids[i] not in options.test_scenes
    ]
    held_out: dict[str, list[str]] = {"test": list(options.test_scenes), "val": []}
    for name, fraction in (("test", options.test_fraction), ("val", options.val_fraction)):
        if fraction > 0 and not held_out[name]:
            for _ in range(max(1, round(fraction * len(ids)))):
                if len(rest) > 1:
                    held_out[name].append(rest.pop())
    train = [i for i in ids if i in rest]
    return {name: train if name == "train" else sorted(held_out[name]) for name in SPLITS}


def load_capture(folder: Path, options: ImportOptions) -> tuple[Views, Views, dict[str, Any]]:
    """Source views, target views and place of one capture, recentred on the mean of its source cameras.

    Raises:
        UserInputError: if files are missing or broken, the lens is distorted, or there are too few frames.
    """
    if not folder.is_dir():
        raise UserInputError(f"There is no capture folder {folder}: give folders that hold a transforms.json.")
    _check_lens(folder)
    transforms = read_transforms(folder)
    names = list(transforms.frames)
    sources, targets = choose_views(len(names), options.num_source_views, options.num_target_views, folder)
    poses = np.stack([_metric_pose(transforms.frames[name], options) for name in names])
    origin = poses[sources][:, :, 3].mean(axis=0)
    poses[:, :, 3] -= origin
    views = [
        _load_views(folder, transforms, [names[i] for i in chosen], poses[chosen], options)
        for chosen in (sources, targets)
    ]
    return views[0], views[1], {"origin": origin.tolist()}


def choose_views(num_frames: int, num_source: int, num_target: int, folder: Path) -> tuple[list[int], list[int]]:
    """Indices of source and target frames: both evenly spaced over the capture, none in common.

    Raises:
        UserInputError: if there are too few frames.
    """
    if num_frames < num_source + num_target or min(num_source, num_target) < 1:
        raise UserInputError(
            f"{folder} has {num_frames} frames, too few for {num_source} source and {num_target} target views: "
            "ask for fewer, at least one each."
        )
    sources = [int((i + 0.5) * num_frames / num_source) for i in range(num_source)]
    rest = [i for i in range(num_frames) if i not in set(sources)]
    targets = [rest[int((i + 0.5) * len(rest) / num_target)] for i in range(num_target)]
    return sources, targets


def _check_lens(folder: Path) -> None:
    content = read_json(folder / "transforms.json")
    frames = content.get("frames", []) if isinstance(content, dict) else []
    for values in (content, *frames):
        if not isinstance(values, dict):
            continue
        if any(abs(float(values.get(key, 0))) > 1e-8 for key in _DISTORTION):
            raise UserInputError(f"The images of {folder} have lens distortion: undistort them first.")
        if "camera_model" in values and values["camera_model"] not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
            raise UserInputError(
                f"{folder} has camera model {values['camera_model']}: only pinhole images can be used."
            )


def _metric_pose(frame: dict[str, Any], options: ImportOptions) -> Float[np.ndarray, "3 4"]:
    pose = np.asarray(frame["transform_matrix"], dtype=np.float64)[:3]
    pose = _UP[options.up] @ pose
    pose[:, 3] *= options.metres_per_unit
    return pose


def _load_views(
    folder: Path, transforms: Transforms, names: list[str], poses: np.ndarray, options: ImportOptions
) -> Views:
    images, depths, intrinsics = [], [], []
    for name in names:
        frame = transforms.frames[name]
        image = _read_image(folder / name)
        box = _crop_box(image.size, options.image_size)
        images.append(np.asarray(image.resize(options.image_size, Image.Resampling.BOX, box=box)))
        intrinsics.append(_fit_intrinsics(frame, image.size, box, options.image_size))
        if "depth_file_path" in frame:
            depth = _read_depth(folder / frame["depth_file_path"]) * options.depth_unit_scale
            depths.append(_resize_depth(depth, box, image.size, options.image_size))
    if depths and len(depths) < len(names):
        raise UserInputError(
            f"Some frames of {folder} have a depth file and others have none: give all of them one, or none."
        )
    width, height = options.image_size
    fx, fy, cx, cy = torch.tensor(intrinsics, dtype=torch.float32).unbind(-1)
    views = Views(
        make_cameras(torch.from_numpy(poses), fx, fy, cx, cy, height, width),
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(np.stack(depths)).float()[:, None] if depths else None,
    )
    _check_depth_unit(folder, views, options)
    return views


def _check_depth_unit(folder: Path, views: Views, options: ImportOptions) -> None:
    if views.depths is None or not bool((views.depths > 0).any()):
        return
    median = float(views.depths[views.depths > 0].median())
    if not options.near < median < options.far:
        raise UserInputError(
            f"The depths of {folder} have a median of {median:.4g} m, not between {options.near:g} and "
            f"{options.far:g} m: set --depth-unit-scale to metres per unit of its depth files."
        )


def _crop_box(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of the wanted aspect."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    width, height = wanted[0] * scale, wanted[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _fit_intrinsics(frame: dict[str, Any], size: tuple[int, int], box: tuple[float, ...], wanted: tuple[int, int]):
    """fx, fy, cx, cy in pixels of the cropped and resized image."""
    given = (float(frame.get("w", size[0])), float(frame.get("h", size[1])))
    scale = (size[0] / given[0], size[1] / given[1])
    resize = (wanted[0] / (box[2] - box[0]), wanted[1] / (box[3] - box[1]))
    return (
        float(frame["fl_x"]) * scale[0] * resize[0],
        float(frame["fl_y"]) * scale[1] * resize[1],
        (float(frame["cx"]) * scale[0] - box[0]) * resize[0],
        (float(frame["cy"]) * scale[1] - box[1]) * resize[1],
    )


def _resize_depth(depth: np.ndarray, box: tuple[float, ...], size: tuple[int, int], wanted: tuple[int, int]):
    """Depth at the centres of the new pixels; averages would invent surfaces between near and far."""
    x = (box[0] + (np.arange(wanted[0]) + 0.5) / wanted[0] * (box[2] - box[0])) / size[0] * depth.shape[1]
    y = (box[1] + (np.arange(wanted[1]) + 0.5) / wanted[1] * (box[3] - box[1])) / size[1] * depth.shape[0]
    return depth[np.ix_(y.astype(int).clip(0, depth.shape[0] - 1), x.astype(int).clip(0, depth.shape[1] - 1))]


def _read_image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise UserInputError(f"{path} is missing: restore it or remove its frame from transforms.json.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserInputError(f"{path} is not a readable image ({error}): restore it or remove its frame.") from None


def _read_depth(path: Path) -> Float[np.ndarray, "height width"]:
    try:
        depth = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.asarray(Image.open(path))
    except FileNotFoundError:
        raise UserInputError(f"{path} is missing: restore it or remove depth_file_path from all frames.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserInputError(f"{path} is not a readable depth image ({error}): restore it.") from None
    if depth.ndim != 2 or depth.dtype == np.uint8:
        raise UserInputError(f"{path} is not a single-channel 16-bit depth image: convert it.")
    depth = depth.astype(np.float64)
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0)
