"""A collection of scenes on disk: a folder of nerfstudio datasets (format: docs/data.md)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from torch import Tensor

from nfldm_ns.errors import UserInputError
from nfldm_ns.scenes.image_files import open_image, rgb_image
from nfldm_ns.scenes.schema import INTRINSICS, CollectionFile, SceneFile, validated
from nfldm_ns.scenes.views import SceneBatch, Views, make_cameras

FORMAT = "nfldm-scene-collection"
VERSION = 2  # version 1 has no masks
READABLE_VERSIONS = (1, 2)
DEPTH_UNIT_M = 0.001
BEV_FILE = "bev.png"
MASK_FOLDER = "masks"
SPLITS = ("train", "val", "test")
LARGEST = 1e12  # of the numbers of a camera, which are computed with in single precision


@dataclass(frozen=True)
class BevClass:
    """One class of the semantic bird's-eye-view maps."""

    id: int
    name: str
    color: tuple[int, int, int]


def bev_class(entry: Mapping[str, Any]) -> BevClass:
    """A class as JSON files have it."""
    return BevClass(entry["id"], entry["name"], tuple(entry["color"]))


@dataclass
class Scene:
    """One scene in memory.

    Attributes:
        scene_id: its folder's name.
        source: views for the encoder, batch shape `[N]`.
        target: held-back views of the same place, batch shape `[M]`.
        bev: `[h, w]` class ids, north up; None if the collection has no maps.
    """

    scene_id: str
    source: Views
    target: Views
    bev: UInt8[np.ndarray, "height width"] | None = None


@dataclass
class SceneCollection:
    """A folder with `collection.json` and `scenes/<id>/`.

    Attributes:
        root: the folder.
        aabb: `[2, 3]`, the box all scenes share, in metres.
        near, far: range of planar depth in metres.
        image_size: (width, height) of all images.
        splits: scene ids by split name.
        places: by scene id, the map and the origin in the map's world (metres), where known.
    """

    root: Path
    name: str
    licence: str
    aabb: Float[Tensor, "2 3"]
    near: float
    far: float
    image_size: tuple[int, int]
    splits: dict[str, list[str]]
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    bev_classes: list[BevClass] = field(default_factory=list)
    made_by: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path | str) -> SceneCollection:
        """Reads `collection.json`; images are read by `load_scene`.

        Raises:
            UserInputError: if the folder is missing, empty, or its description cannot be used.
        """
        root = Path(root)
        if not root.is_dir():
            raise UserInputError(f"There is no data folder {root}: make one with 'nfldm-collect vizdoom {root}'.")
        path = root / "collection.json"
        if not path.is_file():
            raise UserInputError(
                f"{root} has no collection.json, so it is not a scene collection: make one with "
                "'nfldm-collect vizdoom', or from your own captures with 'nfldm-collect import'."
            )
        description = read_json(path)
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise UserInputError(f'{path} does not say "format": "{FORMAT}": see docs/data.md for the format.')
        if description.get("version") not in READABLE_VERSIONS:
            raise UserInputError(
                f"{path} has version {description.get('version')}, but this release reads versions up to {VERSION}: "
                "collect or import the data again."
            )
        validated(CollectionFile, description, path)
        collection = cls._from_description(root, description)
        collection._check_description(path)
        return collection

    @classmethod
    def _from_description(cls, root: Path, description: dict[str, Any]) -> SceneCollection:
        width, height = description["image_size"]
        return cls(
            root=root,
            name=description["name"],
            licence=description["licence"],
            aabb=torch.tensor(description["aabb"], dtype=torch.float32),
            near=float(description["near"]),
            far=float(description["far"]),
            image_size=(width, height),
            splits={name: list(description["splits"].get(name) or []) for name in SPLITS},
            places=dict(description.get("scenes") or {}),
            bev_classes=[bev_class(entry) for entry in description.get("bev_classes") or []],
            made_by=dict(description.get("made_by") or {}),
        )

    def _check_description(self, path: Path) -> None:
        if not 0 < self.near < self.far:
            raise UserInputError(f"near and far in {path} must satisfy 0 < near < far, in metres.")
        if min(self.image_size) < 1:
            raise UserInputError(f"image_size in {path} must be [width, height] in pixels, both positive.")
        twice = [scene_id for scene_id, count in Counter(self.scene_ids).items() if count > 1]
        if twice:
            raise UserInputError(f"{path} lists the scene {twice[0]} more than once: splits must not share scenes.")
        if not self.splits["train"]:
            raise UserInputError(f"{path} has no training scenes: list at least one in splits.train.")

    @property
    def scene_ids(self) -> list[str]:
        """All scenes, in the order of the splits."""
        return [scene_id for split in SPLITS for scene_id in self.splits[split]]

    def split(self, name: str) -> list[str]:
        """Scene ids of one split.

        Raises:
            UserInputError: if there are none.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, not {name!r}")
        if not self.splits[name]:
            raise UserInputError(
                f"{self.root} has no {name} split: list at least one scene under splits.{name} in its collection.json."
            )
        return self.splits[name]

    def require_train_and_test(self) -> None:
        """Raises `UserInputError` unless there are scenes to learn from and others to judge by."""
        if len(self.scene_ids) < 2:
            raise UserInputError(
                f"{self.root} holds {len(self.scene_ids)} scene, but learning a distribution of scenes needs several: "
                "collect or import more."
            )
        self.split("train")
        self.split("test")

    def scene_dir(self, scene_id: str) -> Path:
        return self.root / "scenes" / scene_id

    def load_scene(self, scene_id: str) -> Scene:
        """Reads images, depths and poses of one scene and checks them.

        Raises:
            UserInputError: if a file is missing or broken, or a pose, an intrinsic or a depth cannot be right.
        """
        folder = self.scene_dir(scene_id)
        transforms = read_transforms(folder)
        source_names, target_names = transforms.source_names, transforms.target_names
        scene = Scene(
            scene_id,
            source=_load_views(folder, transforms, source_names, self.image_size),
            target=_load_views(folder, transforms, target_names, self.image_size),
            bev=_load_bev(folder / BEV_FILE),
        )
        for views in (scene.source, scene.target):
            self._check_depth_unit(folder, views)
        return scene

    def load_bev(self, scene_id: str, size: tuple[int, ...] | None = None) -> UInt8[np.ndarray, "height width"]:
        """The semantic map of one scene, north up, without reading its images.

        Args:
            size: (height, width) of the other scenes' maps.

        Raises:
            UserInputError: if it has none, one of another size, or one with a class that `bev_classes` does not name.
        """
        path = self.scene_dir(scene_id) / BEV_FILE
        bev = _load_bev(path)
        if bev is None or not self.bev_classes:
            lack = "collection.json names no bev_classes" if bev is not None else f"the scene {scene_id} has no bev.png"
            raise UserInputError(
                f"{self.root} has no BEV maps ({lack}): collect scenes with maps, or train without --condition bev."
            )
        unknown = sorted(set(np.unique(bev).tolist()) - {c.id for c in self.bev_classes})
        if unknown:
            raise UserInputError(
                f"{path} has the class {unknown[0]}, which collection.json does not name: add it to bev_classes, or "
                "repair the map."
            )
        if size is not None and bev.shape != size:
            raise UserInputError(
                f"The BEV map of {scene_id} in {self.root} is {bev.shape[1]} x {bev.shape[0]}, but others are "
                f"{size[1]} x {size[0]}: give all maps one size."
            )
        return bev

    def _check_depth_unit(self, folder: Path, views: Views) -> None:
        if views.depths is None or not bool((views.depths > 0).any()):
            return
        median = float(views.depths[views.depths > 0].median())
        diagonal = float((self.aabb[1] - self.aabb[0]).norm())
        if not 0.001 * diagonal < median < diagonal:
            raise UserInputError(
                f"The depths of {folder} have a median of {median:.4g} m, but the box is {diagonal:.4g} m across: "
                "store planar depth as 16-bit PNG in millimetres."
            )

    def batch(self, scenes: list[Scene]) -> SceneBatch:
        """Joins scenes of this collection.

        Raises:
            UserInputError: if their numbers of source or target views differ.
        """
        first = (scenes[0].source.shape[0], scenes[0].target.shape[0])
        for scene in scenes:
            number = (scene.source.shape[0], scene.target.shape[0])
            if number != first:
                raise UserInputError(
                    f"Scene {scenes[0].scene_id} of {self.root} has {first[0]} source and {first[1]} target views, "
                    f"but {scene.scene_id} has {number[0]} and {number[1]}: give all scenes the same numbers."
                )
        return SceneBatch(
            [scene.scene_id for scene in scenes],
            Views.stack([scene.source for scene in scenes]),
            Views.stack([scene.target for scene in scenes]),
            self.aabb,
        )


@dataclass
class Transforms:
    """A checked `transforms.json`: one entry per frame, and which frames are source and target."""

    path: Path
    frames: dict[str, dict[str, Any]]
    source_names: list[str]
    target_names: list[str]

    def cameras(self, names: Sequence[str], image_size: tuple[int, int]) -> Cameras:
        """Cameras of frames, batch shape `[N]`, without their images, which are of this (width, height)."""
        frames = [self.frames[name] for name in names]
        poses = np.stack([np.asarray(frame["transform_matrix"], dtype=np.float32)[:3, :4] for frame in frames])
        fx, fy, cx, cy = (torch.tensor([float(frame[k]) for frame in frames]) for k in ("fl_x", "fl_y", "cx", "cy"))
        width, height = image_size
        return make_cameras(torch.from_numpy(poses), fx, fy, cx, cy, height, width)


def read_json(path: Path) -> Any:
    """Parses a JSON file; `UserInputError` if it is missing, truncated or not text."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserInputError(f"{path} is missing: restore it or collect the data again.") from None
    except OSError as error:
        raise UserInputError(f"{path} cannot be read ({error.strerror}): check what is there.") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, numbers or depths that Python gives up on
        raise UserInputError(f"{path} is not valid JSON ({error}): restore it or collect the data again.") from None


def read_transforms(folder: Path) -> Transforms:
    """Reads and checks one scene's `transforms.json`.

    Raises:
        UserInputError: for a missing key, NaN, non-rigid or mirrored pose, or an impossible intrinsic.
    """
    path = folder / "transforms.json"
    content = read_json(path)
    if not isinstance(content, dict) or not content.get("frames"):
        raise UserInputError(f"{path} has no frames: see docs/data.md for the format.")
    if not isinstance(content["frames"], list) or not all(isinstance(frame, dict) for frame in content["frames"]):
        raise UserInputError(f"The frames of {path} are not a list of objects: see docs/data.md for the format.")
    validated(SceneFile, content, path)
    shared = _given({key: content.get(key) for key in (*INTRINSICS, "w", "h")})
    frames: dict[str, dict[str, Any]] = {}
    for frame in content["frames"]:
        merged = {**shared, **_given(frame)}
        name = merged["file_path"]
        missing = [key for key in INTRINSICS if key not in merged]
        if missing:
            raise UserInputError(
                f"The frame {name} of {path} lacks {', '.join(missing)}: see docs/data.md for the format."
            )
        _check_frame(path, merged)
        if name in frames:
            raise UserInputError(f"Two frames of {path} have the file_path {name}: keep the one with its pose.")
        frames[name] = merged
    sources = content.get("train_filenames") or list(frames)
    targets = content.get("test_filenames") or content.get("val_filenames") or list(frames)
    listed = [name for split in SPLITS for name in content.get(f"{split}_filenames") or ()]
    unknown = [name for name in listed if name not in frames]
    if unknown:
        raise UserInputError(f"{path} lists {unknown[0]} as a view, but has no frame of that name: add it or drop it.")
    return Transforms(path, frames, sources, targets)


def _given(content: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is `null`, which is as good as absent."""
    return {key: value for key, value in content.items() if value is not None}


def _check_frame(path: Path, frame: dict[str, Any]) -> None:
    name = frame["file_path"]
    try:
        pose = np.asarray(frame["transform_matrix"], dtype=np.float64)
        intrinsics = np.asarray([frame[key] for key in INTRINSICS], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserInputError(f"The pose or the intrinsics of {name} in {path} are not numbers: repair them.") from None
    if pose.shape not in ((3, 4), (4, 4)):
        raise UserInputError(f"The pose of {name} in {path} is {pose.shape}, not 4 x 4: give camera-to-world matrices.")
    if not (np.abs(pose) < LARGEST).all():
        what = f"a number beyond {LARGEST:g}" if np.isfinite(pose).all() else "NaN or infinity"
        raise UserInputError(f"The pose of {name} in {path} contains {what}: remove the frame or repair it.")
    if not (np.abs(intrinsics) < LARGEST).all() or (intrinsics[:2] <= 0).any():
        raise UserInputError(
            f"The focal length or the centre of {name} in {path} cannot be right "
            f"({', '.join(f'{value:g}' for value in intrinsics)}): give fl_x, fl_y > 0, cx and cy in pixels."
        )
    check_rotation(pose[:3, :3], f"{name} in {path}")


def check_rotation(rotation: Float[np.ndarray, "3 3"], where: str) -> None:
    """Raises `UserInputError` unless it turns, and does nothing else; `where` is what it belongs to."""
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3:
        raise UserInputError(f"The rotation of {where} is not orthonormal: remove scale and shear from the matrix.")
    if np.linalg.det(rotation) < 0:
        raise UserInputError(
            f"The pose of {where} is mirrored (determinant -1): give a right-handed OpenGL camera-to-world matrix."
        )


def _load_views(folder: Path, transforms: Transforms, names: list[str], image_size: tuple[int, int]) -> Views:
    frames = [transforms.frames[name] for name in names]
    for frame in frames:
        size = (frame.get("w", image_size[0]), frame.get("h", image_size[1]))
        if size != image_size:
            raise UserInputError(
                f"The intrinsics of {frame['file_path']} in {transforms.path} are for {size[0]} x {size[1]} pixels, "
                f"but collection.json says {image_size[0]} x {image_size[1]}: scale them to the images."
            )
    images = np.stack([read_image(folder / name, image_size) for name in names])
    depths = None
    if any("depth_file_path" in frame for frame in frames):
        width, height = image_size
        depths = np.stack(
            [
                read_depth(folder / frame["depth_file_path"], image_size)
                if "depth_file_path" in frame
                else np.zeros((height, width), np.float32)
                for frame in frames
            ]
        )
    masks = None
    if any("mask_path" in frame for frame in frames):
        masks = np.stack([_frame_mask(folder, frame, image_size) for frame in frames])
    return Views(
        transforms.cameras(names, image_size),
        torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255),
        None if depths is None else torch.from_numpy(depths)[:, None],
        None if masks is None else torch.from_numpy(masks)[:, None],
    )


def _frame_mask(
    folder: Path, frame: Mapping[str, Any], image_size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    if "mask_path" in frame:
        return read_mask(folder / str(frame["mask_path"]), image_size)
    return np.ones(image_size[::-1], bool)


def _open_image(path: Path) -> Image.Image:
    return open_image(path, "restore it or collect it again", "restore it or remove its frame from transforms.json")


def _check_size(path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if size != expected:
        raise UserInputError(
            f"{path} is {size[0]} x {size[1]}, but collection.json wants {expected[0]} x {expected[1]}: resize it."
        )


def read_image(path: Path, image_size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """An RGB image of the given (width, height)."""
    image = rgb_image(_open_image(path), path)
    _check_size(path, image.size, image_size)
    return np.asarray(image)


def read_depth(path: Path, image_size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """Planar depth in metres from a 16-bit PNG in millimetres; 0 is unknown."""
    image = _open_image(path)
    if image.mode not in ("I;16", "I;16B", "I"):
        raise UserInputError(
            f"{path} has mode {image.mode}, but depth must be a 16-bit PNG in millimetres: convert it."
        )
    _check_size(path, image.size, image_size)
    return np.asarray(image).astype(np.float32) * DEPTH_UNIT_M


def read_mask(path: Path, image_size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Which pixels are of the scene, from an 8-bit PNG of one channel: 0 is masked, all else valid."""
    image = open_image(path, "restore it or collect it again", "restore it or remove mask_path from its frame")
    if image.mode != "L":
        raise UserInputError(
            f"{path} has mode {image.mode}, but a mask must be an 8-bit PNG of one channel, 0 where masked: convert it."
        )
    _check_size(path, image.size, image_size)
    mask = np.asarray(image) > 0
    if not mask.any():
        raise UserInputError(f"{path} masks every pixel of its view: remove the frame from transforms.json.")
    return mask


def _load_bev(path: Path) -> UInt8[np.ndarray, "height width"] | None:
    if not path.exists():
        return None
    image = _open_image(path)
    if image.mode not in ("P", "L"):
        raise UserInputError(f"{path} has mode {image.mode}, but a BEV map is a palette PNG of class ids: convert it.")
    return np.asarray(image)
